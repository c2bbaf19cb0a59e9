//! WAL that was acknowledged and is in no region any more. No receiver met that as a gap, and recovery ends there all the same.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;

use crate::model::{EpochId, RegionName};
use crate::repository::handle::Repository;
use crate::repository::records::tombs;
use crate::repository::wal::gaps::Gap;
use crate::repository::wal::index::{BranchId, WalIndex};

/// The first hole in each epoch of a branch. While a region cannot be listed it may hold what the others lack, and there is
/// none.
pub(super) async fn holes(repository: &Repository, index: &WalIndex) -> Vec<Gap> {
    let mut holes = Vec::new();
    if !index.unreadable().is_empty() || !index.epochs().values().any(has_holes) {
        return holes;
    }
    // What prune took is not lost.
    let BranchId { system_id, timeline, branch } = index.branch();
    let Ok(cuts) = tombs::cuts(repository, (*system_id, *timeline, branch)).await else { return holes };
    for (epoch, seqs) in index.epochs().iter().filter(|(_, seqs)| has_holes(seqs)) {
        let cut = cuts.get(epoch).copied().unwrap_or_default();
        let Some(first) = index.lost(repository, (epoch, seqs), cut).await.first().copied() else { continue };
        if is_gone(repository, index, (epoch, first)).await {
            holes.extend(around(repository, index, (epoch, seqs), first).await);
        }
    }
    holes
}

/// Whether numbers are missing between the first and the last.
pub(super) fn has_holes(seqs: &BTreeMap<u64, BTreeSet<RegionName>>) -> bool {
    let ends = seqs.first_key_value().zip(seqs.last_key_value());
    ends.is_some_and(|((first, _), (last, _))| last - first >= seqs.len() as u64)
}

/// Regions are not listed in one moment: a frame that came to one of them after its list was there all the time.
async fn is_gone(repository: &Repository, index: &WalIndex, (epoch, seq): (&EpochId, u64)) -> bool {
    let key = index.place(epoch, seq).key();
    let looks = repository.regions.all().iter().map(|region| region.store.head(&key));
    join_all(looks).await.into_iter().all(|look| look.is_err_and(|error| error.is_not_found()))
}

async fn around(
    repository: &Repository,
    index: &WalIndex,
    (epoch, seqs): (&EpochId, &BTreeMap<u64, BTreeSet<RegionName>>),
    lost: u64,
) -> Option<Gap> {
    let (before, _) = seqs.range(..lost).next_back()?;
    let (behind, _) = seqs.range(lost..).next()?;
    let before = index.header(repository, epoch, *before).await.ok()?;
    let behind = index.header(repository, epoch, *behind).await.ok()?;
    let range = (before.span.end, behind.span.start);
    let reason = format!("frames of epoch {epoch} are in no region any more");
    Some(Gap::new(&behind.target, index.branch(), range, &reason, behind.written_at))
}
