//! WAL that leads to no backup that stays.
//!
//! WAL goes by whole epochs, which last a day: a hole inside of one would look like damage to every reader. An epoch that
//! its writer never closed keeps its last frame and its keyset, because whoever wakes up may still append to it. One that
//! another owner sealed keeps the SEAL and what is behind it, for the SEAL is all that stops a writer that wakes up.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};

use crate::model::commit::{Commit, WalNeed};
use crate::model::retention::Rules;
use crate::model::{EpochId, Error, KeysetId, Kind, Lsn, Result, SystemId, TargetName};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::facts::Facts;
use crate::repository::records::tombs;
use crate::repository::wal::closing::Closing;
use crate::repository::wal::frame::{FrameHeader, FrameKind};
use crate::repository::wal::index::{BranchId, WalIndex, branches};
use crate::repository::wal::seal::Ending;

/// An epoch of which nobody needs anything any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadEpoch {
    /// Where it is.
    pub branch: BranchId,
    /// Which.
    pub epoch: EpochId,
    /// Whose keys sealed it.
    pub target: TargetName,
    /// What the names of its frames begin with.
    pub prefix: String,
    /// Frames before this one may go.
    pub before: u64,
    /// Its keyset, if all of it may go.
    pub keyset: Option<KeysetId>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct DeadWal {
    /// Epochs.
    pub epochs: Vec<DeadEpoch>,
    /// Keysets of epochs of which something stays.
    pub alive: BTreeSet<(TargetName, KeysetId)>,
    /// Whether there are epochs that stay and did not say which keyset is theirs.
    pub is_blind: bool,
    /// What was left alone, and why.
    pub notes: Vec<String>,
}

/// A backup that is under way reads WAL from its own start, which comes after its intent; clocks may differ a little.
const BEFORE_INTENT: TimeDelta = TimeDelta::hours(1);

/// Finds epochs that no survivor leads into.
///
/// # Errors
/// A region does not answer.
pub async fn dead(
    repository: &Repository,
    facts: &Facts,
    (survivors, rules): (&[&Commit], &BTreeMap<TargetName, Rules>),
    grace: TimeDelta,
) -> Result<DeadWal> {
    let mut found = DeadWal::default();
    let begun = facts.intents.iter().map(|intent| intent.created_at - BEFORE_INTENT);
    let written_before = begun.chain([facts.now - grace]).min().unwrap_or(facts.now);
    let parts = repository.regions.prefixes_union(layout::WAL).await?;
    let systems = parts.iter().filter_map(|part| part.strip_prefix(layout::WAL)?.trim_end_matches('/').parse().ok());
    for system in systems.collect::<BTreeSet<SystemId>>() {
        let needs = survivors.iter().filter_map(|commit| Some((*commit, commit.wal.as_ref()?)));
        let needs: Vec<_> = needs.filter(|(_, need)| need.system_id == system).collect();
        let look = Look { facts, rules, needs, written_before, system };
        look.system(repository, &mut found).await?;
    }
    Ok(found)
}

struct Look<'a> {
    facts: &'a Facts,
    rules: &'a BTreeMap<TargetName, Rules>,
    /// The backups of this cluster that stay.
    needs: Vec<(&'a Commit, &'a WalNeed)>,
    written_before: DateTime<Utc>,
    system: SystemId,
}

impl Look<'_> {
    async fn system(&self, repository: &Repository, found: &mut DeadWal) -> Result<()> {
        if self.is_held() || !self.had_backups() {
            found.is_blind = true;
            return Ok(());
        }
        for branch in branches(&repository.regions, self.system).await? {
            let index = WalIndex::load(&repository.regions, branch.clone()).await;
            if let Some((region, why)) = index.unreadable().first() {
                let error = Error::new(Kind::Unavailable, format!("the WAL of region {region} is not readable"));
                return Err(error.because(why));
            }
            let cuts = tombs::cuts(repository, (branch.system_id, branch.timeline, &branch.branch)).await?;
            for (epoch, seqs) in index.epochs() {
                // Half of an epoch that a sweep left behind looks like one with a hole.
                let cut = cuts.get(epoch).copied().unwrap_or_default();
                let (Some((first, _)), Some((last, _))) = (seqs.first_key_value(), seqs.last_key_value()) else {
                    continue;
                };
                match self.epoch(repository, &index, (epoch, (*first, *last), cut)).await {
                    Ok((dead, keyset)) => {
                        if dead.as_ref().is_none_or(|dead| dead.keyset.is_none()) {
                            found.alive.insert(keyset);
                        }
                        found.epochs.extend(dead);
                    }
                    Err(error) => {
                        found.is_blind = true;
                        found.notes.push(format!("WAL epoch {epoch} stays: {error}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// A hold on any target that ever had a backup of this cluster.
    fn is_held(&self) -> bool {
        let alive = self.facts.backups.iter().map(|backup| (&backup.commit.target, backup.commit.wal.as_ref()));
        let gone = self.facts.tombs.values().map(|tomb| (&tomb.target, tomb.wal.as_ref()));
        alive
            .chain(gone)
            .any(|(target, need)| need.is_some_and(|need| need.system_id == self.system) && self.facts.is_held(target))
    }

    /// WAL of a cluster that has no backup yet waits for its first one. Without a backup that stays, only a tomb tells that
    /// there was one.
    fn had_backups(&self) -> bool {
        let gone = |need: &Option<WalNeed>| need.as_ref().is_some_and(|need| need.system_id == self.system);
        !self.needs.is_empty() || self.facts.tombs.values().any(|tomb| gone(&tomb.wal))
    }

    /// What of an epoch is dead, and its keyset.
    async fn epoch(
        &self,
        repository: &Repository,
        index: &WalIndex,
        seqs: (&EpochId, (u64, u64), u64),
    ) -> Result<(Option<DeadEpoch>, (TargetName, KeysetId))> {
        let head = index.header(repository, seqs.0, seqs.1.0).await?;
        let keyset = (head.target.clone(), head.keyset.clone());
        Ok((self.judge(repository, index, (head, seqs)).await?, keyset))
    }

    async fn judge(
        &self,
        repository: &Repository,
        index: &WalIndex,
        (head, (epoch, (first, last), cut)): (FrameHeader, (&EpochId, (u64, u64), u64)),
    ) -> Result<Option<DeadEpoch>> {
        let mut tail = index.header(repository, epoch, last).await?;
        if tail.written_at > self.written_before {
            return Ok(None);
        }
        let earlier = index.epochs().get(epoch).and_then(|seqs| seqs.range(..last).next_back());
        if let (FrameKind::Seal, Some((seq, _))) = (tail.kind, earlier) {
            // A SEAL was written by another owner and says nothing of the WAL before it.
            tail = index.header(repository, epoch, *seq).await?;
        }
        // Where an epoch ends and what it holds is told by its frames: whoever may sign in one region could end any of them.
        for frame in [&head, &tail] {
            if !self.facts.proofs.relies_on(&frame.signer) {
                let error = Error::refused(format!("{} was signed by {}", frame.place.key(), frame.signer));
                return Err(
                    error.because("prune relies on the signers in `signers`, or without a list on this host alone")
                );
            }
        }
        let ruled = self.rules.get(&head.target).filter(|rules| !rules.keep_everything());
        if ruled.is_none() || self.facts.is_held(&head.target) {
            return Ok(None);
        }
        if tail.written_at > self.written_before || !self.is_behind((&head, &tail)) {
            return Ok(None);
        }
        let ending = Ending::look(repository, (index, epoch), repository.regions.read_quorum()).await?;
        let before = match ending.closing {
            Closing::Ended => last + 1,
            Closing::Sealed(at) => at,
            // A SEAL that too few regions hold closes nothing, and the frame before it is the last of the log.
            Closing::Open(at) => at.saturating_sub(1).min(last),
        };
        let before = before.max(cut);
        let branch = index.branch().clone();
        let prefix = layout::wal_epoch(branch.system_id, branch.timeline, &branch.branch, epoch);
        let dead = DeadEpoch {
            branch,
            epoch: epoch.clone(),
            target: head.target,
            prefix,
            before,
            keyset: (before > last).then_some(head.keyset),
        };
        Ok((before > first).then_some(dead))
    }

    /// Whether no recovery from a survivor reads this epoch: positions only grow, also from one timeline to the next, and
    /// no recovery begins before its backup.
    fn is_behind(&self, (head, tail): (&FrameHeader, &FrameHeader)) -> bool {
        let Some(floor) = self.floor() else { return self.needs.is_empty() };
        let needs_it = |need: &WalNeed| {
            let branch = (need.timeline, &need.branch) == (head.place.timeline, &head.place.branch);
            branch && head.span.start < end(need) && begin(need) < tail.span.end
        };
        tail.span.end <= floor && !self.needs.iter().any(|(_, need)| needs_it(need))
    }

    /// Where recovery must be able to begin. Several targets may be of one cluster, and each was promised its own.
    fn floor(&self) -> Option<Lsn> {
        let targets: BTreeSet<_> = self.needs.iter().map(|(commit, _)| &commit.target).collect();
        targets.into_iter().filter_map(|target| self.floor_of(target)).min()
    }

    /// At a target's oldest survivor; or, where its WAL has an age of its own, at the newest proven one that is at least as
    /// old.
    fn floor_of(&self, target: &TargetName) -> Option<Lsn> {
        let own: Vec<_> = self.needs.iter().filter(|(commit, _)| commit.target == *target).collect();
        let oldest = own.iter().map(|(_, need)| begin(need)).min();
        let Some(age) = self.rules.get(target).and_then(|rules| rules.wal) else { return oldest };
        let old = own.iter().filter(|(commit, _)| commit.finished_at <= self.facts.now - age);
        let proven = old.filter(|(commit, _)| self.facts.proven.contains(&commit.id));
        let newest = proven.max_by_key(|(commit, _)| commit.finished_at);
        let Some((newest, _)) = newest else { return oldest };
        // Survivors that are younger may begin at a lower position: another timeline.
        let from = own.iter().filter(|(commit, _)| commit.finished_at >= newest.finished_at);
        from.map(|(_, need)| begin(need)).min()
    }
}

/// PostgreSQL reads the whole segment in which a recovery begins, and looks back at the one before.
fn begin(need: &WalNeed) -> Lsn {
    let segment = need.wal_segment_size.bytes();
    Lsn((need.start_lsn.0 / segment).saturating_sub(1) * segment)
}

/// And the whole one in which it ends.
fn end(need: &WalNeed) -> Lsn {
    let segment = need.wal_segment_size.bytes();
    Lsn((need.stop_lsn.0 / segment).saturating_add(2).saturating_mul(segment))
}
