//! What prune took away: one record per backup and per WAL epoch, in every region before the first byte goes.
//!
//! A sweep that is killed leaves a COMMIT in one region and none in another, and to a repair that looks like a region that
//! lacks something. The record says otherwise: a backup that has one, and whose COMMIT is gone in a region *that holds the
//! record*, does not exist, wherever objects of it are left. A region without the record is one that no sweep ever worked in: it is
//! new, or was emptied, and what it lacks tells nothing.
//!
//! Nor does what one region says of itself: a tomb is in every region before the first COMMIT goes. One that is not in every region which
//! still has the COMMIT was written by no sweep, or its sweep died before it took anything.
//!
//! Nor does a region that may owe the COMMIT: as long as so many regions hold it as have to hold what is acknowledged, the backup
//! exists. Whoever may write can write a record, and then wait for an outage. A sweep that was killed so early has taken nothing
//! but copies of the COMMIT, because those go everywhere before anything else does.
//!
//! A sweep may end before it took what it had announced. Then a second record says that the backup was spared, and the
//! first one counts for nothing from then on. It is of one sweep alone: another one that comes later has a tomb of its own, so
//! a region that missed the second record can neither hide what was spared for good nor bring back what a later sweep took.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::codec::sign::split_text;
use crate::model::commit::WalNeed;
use crate::model::{
    BackupId, Branch, EpochId, Error, KeysetId, PruneId, RegionName, Result, SignerId, SystemId, TargetName, Timeline,
};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::records;

/// What a tomb's signature is bound to, beside its name.
pub const TOMB: &str = "tomb";
/// The same of the end of a tomb.
pub const SPARED: &str = "spared";
/// The same of a cut.
pub const CUT: &str = "wal cut";

/// A backup that was pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tomb {
    /// Version of the repository format.
    pub format: u32,
    /// The backup.
    pub backup: BackupId,
    /// What it was of.
    pub target: TargetName,
    /// The sweep that took it.
    pub prune: PruneId,
    /// When.
    pub at: DateTime<Utc>,
    /// Why, in words.
    pub why: String,
    /// The keysets of its closure: whoever finds one that nothing else needs may remove it.
    pub keysets: Vec<KeysetId>,
    /// The WAL that it needed.
    pub wal: Option<WalNeed>,
    /// Who did it.
    pub host: String,
}

/// WAL of one epoch that was pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalCut {
    /// Version of the repository format.
    pub format: u32,
    /// Whose keys sealed it.
    pub target: TargetName,
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// The epoch.
    pub epoch: EpochId,
    /// Frames before this one are gone.
    pub before: u64,
    /// The epoch's keyset, if all of the epoch is gone.
    pub keyset: Option<KeysetId>,
    /// The sweep that took it.
    pub prune: PruneId,
    /// When.
    pub at: DateTime<Utc>,
}

impl WalCut {
    /// The object's name.
    pub fn key(&self) -> String {
        let prefix = layout::wal_cuts(self.system_id, self.timeline, &self.branch);
        layout::wal_cut(&prefix, &self.epoch, self.before)
    }
}

/// The end of a tomb: its sweep took nothing of this backup but copies of its COMMIT, if that, and never will.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spared {
    /// Version of the repository format.
    pub format: u32,
    /// The backup.
    pub backup: BackupId,
    /// What it is of.
    pub target: TargetName,
    /// The sweep that left it alone.
    pub prune: PruneId,
    /// When this became known.
    pub at: DateTime<Utc>,
    /// Why, in words.
    pub why: String,
    /// Who says so.
    pub host: String,
}

impl Spared {
    /// The object's name.
    pub fn key(&self) -> String {
        layout::spared(&self.target, &self.backup, &self.prune)
    }
}

impl Tomb {
    /// The object's name.
    pub fn key(&self) -> String {
        layout::tomb(&self.target, &self.backup, &self.prune)
    }

    /// Whether it stands where it belongs.
    pub fn belongs_to(&self, key: &str) -> bool {
        key == self.key() || key == layout::nameless_tomb(&self.target, &self.backup)
    }
}

/// A tomb that did not end.
#[derive(Debug)]
pub struct Stone {
    /// What it says.
    pub tomb: Tomb,
    /// The regions that hold it.
    pub held: BTreeSet<RegionName>,
    /// Who signed it.
    pub signer: SignerId,
}

/// The tombs that count.
#[derive(Debug, Default)]
pub struct Standing {
    /// Those that are intact and did not end, a backup's by the age of their sweeps.
    pub tombs: Vec<Stone>,
    /// The names of those that ended.
    pub ended: BTreeSet<String>,
    /// Records that no region has intact. They count for nothing where backups are looked for: whoever may write into a
    /// region could hide a backup with one.
    pub unreadable: Vec<Error>,
}

/// The tombs of `wanted` backups of one target or of all.
///
/// # Errors
/// No region answers.
pub async fn standing(
    repository: &Repository,
    target: Option<&TargetName>,
    wanted: impl Fn(&BackupId) -> bool,
) -> Result<Standing> {
    let mut standing = Standing::default();
    let (held, _) = holders(repository, &layout::tombs(target)).await?;
    let names = held.into_iter().filter(|(key, _)| layout::parse_tomb(key).is_some_and(|(id, _)| wanted(&id)));
    let names: Vec<_> = names.collect();
    if names.is_empty() {
        return Ok(standing);
    }
    let ends = repository.regions.list_union(&layout::all_spared(target)).await?;
    for (key, held) in names {
        let read = |bytes: Bytes| {
            let tomb: Tomb = records::decode(repository, (TOMB, &key), &bytes)?;
            Ok((tomb, split_text(&bytes)?.signer))
        };
        let (tomb, signer) = match repository.regions.read(&key, None, read).await {
            Ok((read, _)) if read.0.belongs_to(&key) => read,
            Ok(_) => {
                standing.unreadable.push(Error::damaged(format!("{key} names another backup")));
                continue;
            }
            Err(error) => {
                standing.unreadable.push(error);
                continue;
            }
        };
        let end = layout::spared(&tomb.target, &tomb.backup, &tomb.prune);
        let ended = match ends.contains(&end) {
            true => records::read::<Spared>(repository, (SPARED, &end)).await.map(|spared| spared.key() == end),
            false => Ok(false),
        };
        match ended {
            Ok(true) => drop(standing.ended.insert(key)),
            Ok(false) => standing.tombs.push(Stone { tomb, held, signer }),
            Err(error) => {
                standing.unreadable.push(error);
                standing.tombs.push(Stone { tomb, held, signer });
            }
        }
    }
    Ok(standing)
}

/// The names below `prefix` with the regions that hold them, and the regions that answered.
///
/// # Errors
/// No region answers.
pub async fn holders(
    repository: &Repository,
    prefix: &str,
) -> Result<(BTreeMap<String, BTreeSet<RegionName>>, BTreeSet<RegionName>)> {
    let mut names: BTreeMap<String, BTreeSet<RegionName>> = BTreeMap::new();
    let mut answered = BTreeSet::new();
    for (region, objects) in repository.regions.list_answered(prefix).await? {
        for object in objects {
            names.entry(object.key).or_default().insert(region.clone());
        }
        answered.insert(region);
    }
    Ok((names, answered))
}

/// Which of the regions that answer have a COMMIT, and which do not.
#[derive(Debug, Default)]
pub struct Torn {
    having: BTreeSet<RegionName>,
    lacking: BTreeSet<RegionName>,
}

impl Torn {
    /// Of those that answered, these have it.
    pub fn new(having: BTreeSet<RegionName>, answered: &BTreeSet<RegionName>) -> Self {
        Self { lacking: answered.difference(&having).cloned().collect(), having }
    }

    /// Whether a tomb in the regions `held` ends the backup.
    fn is_ended(&self, repository: &Repository, held: &BTreeSet<RegionName>) -> bool {
        let may_be_owed = self.lacking.len() < repository.regions.read_quorum();
        !may_be_owed && !self.lacking.is_disjoint(held) && self.having.is_subset(held)
    }
}

/// Which backups were pruned, of those whose COMMIT some region does not have.
///
/// # Errors
/// No region answers.
pub async fn gone(
    repository: &Repository,
    target: Option<&TargetName>,
    torn: &BTreeMap<BackupId, Torn>,
) -> Result<BTreeSet<BackupId>> {
    if torn.is_empty() {
        return Ok(BTreeSet::new());
    }
    let standing = standing(repository, target, |id| torn.contains_key(id)).await?;
    for error in &standing.unreadable {
        tracing::warn!(%error, "the record of a pruned backup is not readable");
    }
    let is_gone =
        |stone: &&Stone| torn.get(&stone.tomb.backup).is_some_and(|torn| torn.is_ended(repository, &stone.held));
    Ok(standing.tombs.iter().filter(is_gone).map(|stone| stone.tomb.backup.clone()).collect())
}

/// Up to where each epoch of a branch was pruned.
///
/// # Errors
/// No region answers.
pub async fn cuts(
    repository: &Repository,
    (system, timeline, branch): (SystemId, Timeline, &Branch),
) -> Result<BTreeMap<EpochId, u64>> {
    let mut cuts: BTreeMap<EpochId, u64> = BTreeMap::new();
    for key in repository.regions.list_union(&layout::wal_cuts(system, timeline, branch)).await? {
        match records::read::<WalCut>(repository, (CUT, &key)).await {
            Ok(cut) if cut.key() == key => {
                let before = cuts.entry(cut.epoch).or_default();
                *before = cut.before.max(*before);
            }
            Ok(_) => tracing::warn!(key, "the record of pruned WAL belongs elsewhere"),
            Err(error) => tracing::warn!(%error, "the record of pruned WAL is not readable"),
        }
    }
    Ok(cuts)
}

/// Everything that was pruned, for whoever compares regions.
#[derive(Debug, Default)]
pub struct Pruned {
    backups: BTreeSet<BackupId>,
    keysets: BTreeSet<KeysetId>,
    /// By the name that all frames of an epoch begin with.
    epochs: BTreeMap<String, u64>,
    /// Tombs of backups that exist all the same.
    idle: BTreeSet<String>,
}

impl Pruned {
    /// Reads all records.
    ///
    /// # Errors
    /// No region answers.
    pub async fn load(repository: &Repository) -> Result<Self> {
        let mut pruned = Self::default();
        let standing = standing(repository, None, |_| true).await?;
        for error in &standing.unreadable {
            tracing::warn!(%error, "the record of a pruned backup is not readable");
        }
        // After the tombs: what exists now was not taken by a sweep that had announced it before.
        let (commits, answered) = holders(repository, layout::COMMITS).await?;
        for Stone { tomb, held, .. } in standing.tombs {
            let having = commits.get(&layout::commit(&tomb.target, &tomb.backup)).cloned().unwrap_or_default();
            let torn = Torn::new(having, &answered);
            if !torn.having.is_empty() && !torn.is_ended(repository, &held) {
                pruned.idle.extend([tomb.key(), layout::nameless_tomb(&tomb.target, &tomb.backup)]);
            } else {
                pruned.keysets.extend(tomb.keysets);
                pruned.backups.insert(tomb.backup);
            }
        }
        pruned.idle.extend(standing.ended);
        for key in repository.regions.list_union(&format!("{}wal/", layout::PRUNED)).await? {
            match records::read::<WalCut>(repository, (CUT, &key)).await {
                Ok(cut) if cut.key() == key => {
                    let prefix = layout::wal_epoch(cut.system_id, cut.timeline, &cut.branch, &cut.epoch);
                    let before = pruned.epochs.entry(prefix).or_default();
                    *before = cut.before.max(*before);
                    pruned.keysets.extend(cut.keyset);
                }
                _ => tracing::warn!(key, "the record of pruned WAL is not readable"),
            }
        }
        Ok(pruned)
    }

    /// Whether this is the tomb of a backup that exists. It must not reach a region that lacks that backup's COMMIT for
    /// another reason, where it would make it a pruned one.
    pub fn is_idle(&self, key: &str) -> bool {
        self.idle.contains(key)
    }

    /// Whether this name belongs to what was pruned, so that no region lacks it. `needed` are the keysets of what exists: a
    /// pruned backup may have shared one.
    pub fn covers(&self, key: &str, needed: impl Fn(&KeysetId) -> bool) -> bool {
        let mut parts = key.split('/');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("commits" | "inventories"), Some(_), Some(id)) => {
                id.parse().is_ok_and(|id: BackupId| self.backups.contains(&id))
            }
            (Some("keysets"), Some(_), Some(id)) => {
                id.parse().is_ok_and(|id: KeysetId| self.keysets.contains(&id) && !needed(&id))
            }
            (Some("wal"), ..) => {
                let Some((prefix, seq)) = key.rsplit_once('/') else { return false };
                let before = self.epochs.get(&format!("{prefix}/"));
                let last = layout::parse_seq(seq).or_else(|| layout::parse_bundle(seq).map(|(_, last)| last));
                before.zip(last).is_some_and(|(before, last)| last < *before)
            }
            _ => false,
        }
    }
}
