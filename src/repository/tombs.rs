//! What prune took away: one record per backup and per WAL epoch, in every region before the first byte goes.
//!
//! A sweep that is killed leaves a COMMIT in one region and none in another, and to a repair that looks like a region that
//! lacks something. The record says otherwise: a backup that has one, and whose COMMIT is gone in some region, does not
//! exist, wherever objects of it are left.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::commit::WalNeed;
use crate::model::{BackupId, Branch, EpochId, KeysetId, PruneId, Result, SystemId, TargetName, Timeline};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::records;

/// What a tomb's signature is bound to, beside its name.
pub const TOMB: &str = "tomb";
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

/// The names of pruned backups, of one target or of all, whether their records are intact or not.
///
/// # Errors
/// No region answers.
pub async fn named(repository: &Repository, target: Option<&TargetName>) -> Result<BTreeMap<BackupId, String>> {
    let keys = repository.regions.list_union(&layout::tombs(target)).await?;
    let id = |key: &String| key.rsplit('/').next()?.parse::<BackupId>().ok();
    Ok(keys.iter().filter_map(|key| Some((id(key)?, key.clone()))).collect())
}

/// Reads one record.
///
/// # Errors
/// No region has it intact.
pub async fn read(repository: &Repository, key: &str) -> Result<Tomb> {
    records::read(repository, (TOMB, key)).await
}

/// Which of the backups `ids` were pruned. A record that is not intact counts for nothing: whoever may write into a region
/// could hide a backup with it.
///
/// # Errors
/// No region answers.
pub async fn among(
    repository: &Repository,
    target: Option<&TargetName>,
    ids: &BTreeSet<BackupId>,
) -> Result<BTreeSet<BackupId>> {
    let mut buried = BTreeSet::new();
    if ids.is_empty() {
        return Ok(buried);
    }
    for (id, key) in named(repository, target).await?.into_iter().filter(|(id, _)| ids.contains(id)) {
        match read(repository, &key).await {
            Ok(tomb) if tomb.backup == id => {
                buried.insert(id);
            }
            Ok(_) => tracing::warn!(key, "the record of a pruned backup names another one"),
            Err(error) => tracing::warn!(%error, "the record of a pruned backup is not readable"),
        }
    }
    Ok(buried)
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
}

impl Pruned {
    /// Reads all records.
    ///
    /// # Errors
    /// No region answers.
    pub async fn load(repository: &Repository) -> Result<Self> {
        let mut pruned = Self::default();
        for (id, key) in named(repository, None).await? {
            match read(repository, &key).await {
                Ok(tomb) if tomb.backup == id => {
                    pruned.keysets.extend(tomb.keysets);
                    pruned.backups.insert(id);
                }
                _ => tracing::warn!(key, "the record of a pruned backup is not readable"),
            }
        }
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
