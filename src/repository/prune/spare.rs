//! Backups that a sweep announced to take, and left alone: their tombs end.
//!
//! A tomb that nobody ends stays loaded: whichever region loses a COMMIT later, by a rotten disk or by hand, would make a pruned
//! backup of one that everybody relies on. So it ends where the sweep stops early, where a lock keeps the backup, and, if the sweep
//! was killed, when the next prune begins.
//!
//! Only a sweep that cannot take anything any more may be spoken for: itself, or one that is over. And only of a backup that is
//! whole in every region: what a sweep took the COMMIT of stays gone, unless a lock keeps it ([`kept`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{BackupId, PruneId, Result, TargetName};
use crate::repository::catalog::{self, Held};
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::prune::kept;
use crate::repository::prune::plan::enroll;
use crate::repository::records::tombs::{self, Tomb};
use crate::repository::sweeps;

/// Ends the tombs that dead sweeps left on whole backups; tells which. `lock` is the one that this process holds.
///
/// # Errors
/// A region does not take the record.
pub async fn after_dead_sweeps(
    repository: &Repository,
    writer: &Writer,
    lock: Option<&str>,
) -> Result<BTreeSet<BackupId>> {
    let commits = repository.regions.list_union(layout::COMMITS).await?;
    let ids: BTreeSet<BackupId> = commits.iter().filter_map(|key| key.rsplit('/').next()?.parse().ok()).collect();
    let standing = tombs::standing(repository, None, |id| ids.contains(id)).await?;
    if standing.tombs.is_empty() {
        return Ok(BTreeSet::new());
    }
    let running = sweeps::running(repository, writer.clock.now()).await?.into_iter();
    let alive: BTreeSet<PruneId> = running.filter(|of| !of.held(lock)).map(|of| of.id).collect();
    let dead = standing.tombs.into_iter().map(|stone| stone.tomb).filter(|tomb| !alive.contains(&tomb.prune));
    of_whole(repository, writer, (dead.collect(), "its sweep died before it took anything")).await
}

/// Ends these tombs as far as their backups are whole in every region, or a lock keeps a COMMIT of them and no more is gone.
///
/// # Errors
/// As [`after_dead_sweeps`].
pub async fn of_whole(
    repository: &Repository,
    writer: &Writer,
    (tombs, why): (Vec<Tomb>, &str),
) -> Result<BTreeSet<BackupId>> {
    let mut by_target: BTreeMap<TargetName, Vec<Tomb>> = BTreeMap::new();
    for tomb in tombs {
        by_target.entry(tomb.target.clone()).or_default().push(tomb);
    }
    let mut spared = BTreeSet::new();
    let mut torn = Vec::new();
    for (target, tombs) in by_target {
        let whole = whole(repository, &target, |id| tombs.iter().any(|tomb| tomb.backup == *id)).await?;
        if spared.is_empty() && !whole.is_empty() {
            enroll(repository, writer).await?;
        }
        for tomb in tombs {
            if !whole.contains(&tomb.backup) {
                torn.push(tomb);
                continue;
            }
            kept::record(repository, writer, (&target, &tomb.backup, &tomb.prune), why).await?;
            spared.insert(tomb.backup);
        }
    }
    spared.extend(kept::bring_back(repository, writer, &torn).await?);
    Ok(spared)
}

/// The backups that every region holds all of, by names and sizes.
async fn whole(
    repository: &Repository,
    target: &TargetName,
    wanted: impl Fn(&BackupId) -> bool,
) -> Result<BTreeSet<BackupId>> {
    let (backups, _) = catalog::backups(repository, Some(target)).await?;
    let held = catalog::held_everywhere(repository, target).await;
    let mut whole = BTreeSet::new();
    for commit in backups.into_iter().map(|backup| backup.commit).filter(|commit| wanted(&commit.id)) {
        let Ok(lines) = catalog::inventory(repository, &commit).await else { continue };
        let is_whole = |held: &Held| held.debt(&commit, &lines).is_none();
        if held.iter().all(|(_, held)| is_whole(held)) {
            whole.insert(commit.id);
        }
    }
    Ok(whole)
}
