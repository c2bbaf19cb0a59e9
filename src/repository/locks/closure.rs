//! The names that a backup needs, its inventory's and those beyond it.

use std::collections::BTreeSet;

use crate::model::commit::WalNeed;
use crate::model::{Error, Result, SystemId, TargetName};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::{Region, list_all};
use crate::repository::wal::index::{BranchId, WalIndex, cover};

/// What every backup of a target needs, wherever its pages are: the region's identity, the escape hatch, the addresses, the
/// signers' keys, the histories of its timelines; and the pins, which keep prune away.
pub(super) async fn roots(region: &Region, (target, system): (&TargetName, Option<SystemId>)) -> Result<Vec<String>> {
    let of_cluster = system.map(layout::histories);
    let prefixes =
        [layout::ESCAPE.to_owned(), layout::REGIONS.to_owned(), layout::SIGNERS.to_owned(), layout::pins(target)];
    let mut keys = vec![layout::REPOSITORY.to_owned()];
    for prefix in prefixes.into_iter().chain(of_cluster) {
        keys.extend(list_all(region.store.as_ref(), &prefix).await?.into_iter().map(|object| object.key));
    }
    Ok(keys)
}

/// The objects with the frames that a restore of a backup reads at least: a bundle where the region lists one, since the frames in it
/// go when prune comes by.
pub(super) async fn frames(
    repository: &Repository,
    (region, index): (&Region, &WalIndex),
    need: &WalNeed,
) -> Result<BTreeSet<String>> {
    let (runs, _) = index.runs(repository, Some(&region.name)).await;
    let hole = |at| Error::not_found(format!("WAL is missing from {at} on"));
    let stretches = cover(index, repository, &runs, (need.start_lsn, need.stop_lsn)).await?.map_err(hole)?;
    let mut keys = BTreeSet::new();
    for stretch in stretches {
        let bundles = index
            .bundles()
            .iter()
            .filter(|((epoch, _), held)| *epoch == stretch.epoch && held.contains_key(&region.name));
        let bundles: Vec<_> = bundles.map(|((_, numbers), _)| *numbers).collect();
        for seq in stretch.first_seq..=stretch.last_seq {
            if index.header(repository, &stretch.epoch, seq).await?.span.start >= stretch.to {
                break;
            }
            let place = index.place(&stretch.epoch, seq);
            let bundle = bundles.iter().find(|(first, last)| (*first..=*last).contains(&seq));
            keys.insert(match bundle {
                Some((first, last)) => layout::wal_bundle(&place.epoch_prefix(), *first, *last),
                None => place.key(),
            });
        }
    }
    Ok(keys)
}

/// The branch of a backup's WAL, listed once for all backups that need it.
pub(super) fn branch(need: &WalNeed) -> BranchId {
    BranchId { system_id: need.system_id, timeline: need.timeline, branch: need.branch.clone() }
}
