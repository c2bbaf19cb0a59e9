//! Opening an epoch so that nobody else has one: each writer shows itself first and looks round then.
//!
//! A takeover seals the epochs that it sees. A writer that was asleep between its takeover and its first frame would not
//! have been seen, and would acknowledge beside its successor. So an epoch begins with a frame without WAL, at the write
//! quorum, and only then its writer looks for epochs that it does not know to be closed. Of two writers that do so at
//! least one sees the other: the quorum of the frame and the regions that are read have one region in common.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use futures::future::join_all;

use crate::model::{EpochId, Error, Kind, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::list_prefixes;
use crate::repository::wal_closing::Closing;
use crate::repository::wal_frame::{EpochKind, FrameHeader};
use crate::repository::wal_index::{BranchId, WalIndex};
use crate::repository::wal_seal::Ending;

/// What a writer knows of the others.
#[derive(Debug, Default)]
pub struct Known {
    /// Epochs that need no second look: closed ones, those of other kinds, and this writer's own.
    epochs: Mutex<BTreeSet<EpochId>>,
    /// Regions that somebody gave up, with whatever they alone hold.
    lost: Mutex<BTreeSet<RegionName>>,
}

impl Known {
    /// Adds one.
    pub fn add(&self, epoch: EpochId) {
        self.lock().insert(epoch);
    }

    /// Forgets all: what was this writer's own is another's now.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Whether an epoch is among them.
    pub fn contains(&self, epoch: &EpochId) -> bool {
        self.lock().contains(epoch)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<EpochId>> {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these regions may be away.
    pub fn give_up(&self, regions: BTreeSet<RegionName>) {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = regions;
    }

    /// How many regions must answer, and hold a SEAL: as many as share one with every write quorum, less those that do
    /// not answer and were given up.
    pub(super) fn read_quorum(&self, repository: &Repository, unreadable: &[(RegionName, String)]) -> usize {
        repository.regions.read_quorum().saturating_sub(self.given_up(unreadable)).max(1)
    }

    /// How many of the regions that do not answer were given up.
    pub(super) fn given_up(&self, unreadable: &[(RegionName, String)]) -> usize {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        unreadable.iter().filter(|(region, _)| lost.contains(region)).count()
    }
}

/// Whether an epoch is of the kind that has one owner at a time; `None` if no frame of it is readable.
pub(super) async fn is_stream(repository: &Repository, index: &WalIndex, epoch: &EpochId) -> Option<bool> {
    let seqs = index.epochs().get(epoch)?;
    let ends = [seqs.first_key_value(), seqs.last_key_value()];
    for (seq, _) in ends.into_iter().flatten() {
        if let Ok(FrameHeader { epoch_kind, .. }) = index.header(repository, epoch, *seq).await {
            return Some(epoch_kind == EpochKind::Stream);
        }
    }
    None
}

/// Looks for other open epochs of the branch, once this writer's own is to be seen at the write quorum.
///
/// # Errors
/// `Failed`: there is one, which a takeover must seal first. `Unavailable` and transient: too few regions answer.
pub async fn must_be_alone(repository: &Repository, branch: &BranchId, known: &Known) -> Result<()> {
    let epochs = epochs(repository, branch, known).await?;
    if epochs.iter().all(|epoch| known.contains(epoch)) {
        return Ok(());
    }
    repository.trust.refresh(&repository.regions).await?;
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    let needed = known.read_quorum(repository, index.unreadable());
    must_be_readable(repository, index.unreadable(), needed)?;
    for epoch in index.epochs().keys().filter(|epoch| !known.contains(epoch)) {
        if is_stream(repository, &index, epoch).await == Some(true) {
            let ending = Ending::look(repository, (&index, epoch), needed).await?;
            if let Closing::Open(_) = ending.closing {
                return Err(Error::failed(format!("another writer has an open WAL epoch beside this one: {epoch}")));
            }
        }
        known.add(epoch.clone());
    }
    Ok(())
}

/// The names of the epochs alone: far fewer than frames.
async fn epochs(repository: &Repository, branch: &BranchId, known: &Known) -> Result<BTreeSet<EpochId>> {
    let prefix = layout::wal_branch(branch.system_id, branch.timeline, &branch.branch);
    let lists = repository.regions.all().iter().map(|region| list_prefixes(region.store.as_ref(), &prefix));
    let (mut epochs, mut unreadable) = (BTreeSet::new(), Vec::new());
    for (region, list) in repository.regions.all().iter().zip(join_all(lists).await) {
        match list {
            Ok(names) => {
                let parse = |name: &String| name.strip_prefix(&prefix)?.trim_end_matches('/').parse().ok();
                epochs.extend(names.iter().filter_map(parse));
            }
            Err(error) => unreadable.push((region.name.clone(), error.to_string())),
        }
    }
    must_be_readable(repository, &unreadable, known.read_quorum(repository, &unreadable))?;
    Ok(epochs)
}

/// With every write acknowledged by at least W of N regions, N−W+1 of them hold at least one copy of each.
pub(super) fn must_be_readable(
    repository: &Repository,
    unreadable: &[(RegionName, String)],
    needed: usize,
) -> Result<()> {
    let count = repository.regions.all().len();
    if count - unreadable.len() >= needed {
        return Ok(());
    }
    let text = format!("the end of stored WAL needs {needed} of {count} regions to be read");
    let error = Error::new(Kind::Unavailable, text).transient(true);
    let because = |error: Error, (region, reason): &(RegionName, String)| error.because(format!("{region}: {reason}"));
    Err(unreadable.iter().fold(error, because))
}
