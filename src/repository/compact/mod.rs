//! Compaction: what lives in packs that are mostly dead moves on, without the source and without its writer.
//!
//! Backups that incrementals do not touch any more keep whole packs for a few frames each, once their neighbours are pruned.
//! COMMIT, inventory and manifest never change, so such a backup is written anew beside itself: a *copy*, a backup of the same
//! moment whose map names the new places. Frames are copied as they are, under the birth for which they were sealed; the map
//! chunks that name them and the manifest are sealed anew, for which `meta` of their keysets must be at hand. Nothing is
//! deleted here: the original goes when a drill has proved the copy and prune finds that one of the two is enough.
//!
//! Before a copy has its COMMIT it is read back and compared with its original, page by page (`compare`). An intent keeps the
//! original, and the copies of this run whose packs it uses, while it is being written.

mod alike;
mod chunks;
mod compare;
mod copy;
mod live;
mod manifest;
mod numbers;
mod plan;
mod run;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::model::commit::{BackupKind, Commit};
use crate::model::{BackupId, Error, Result, ResultExt, TargetName};
use crate::observe::progress::Progress;
use crate::repository::catalog;
use crate::repository::handle::{Repository, Writer};
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::regions::fan_out::LaneOutcome;

pub use alike::alike;
use live::Live;
pub use plan::{Plan, ThinPack};

/// What a compaction works with.
#[derive(Debug, Clone, Copy)]
pub struct Hands<'a> {
    /// The repository.
    pub repository: &'a Repository,
    /// Signs and wraps.
    pub writer: &'a Writer,
    /// Opens the keysets of what is there.
    pub ring: &'a KeyRing,
    /// Bytes that a pack stays within.
    pub pack_size: usize,
    /// Whom to tell how far it is.
    pub progress: &'a Progress,
}

/// A copy that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// The backup that stays as it is until prune takes it.
    pub original: BackupId,
    /// The backup of the same moment.
    pub copy: BackupId,
    /// Bytes that the copy added to each region.
    pub stored_bytes: u64,
}

/// What was found, and what it takes to do it.
#[derive(Debug)]
pub struct Survey {
    /// For people.
    pub plan: Plan,
    target: TargetName,
    live: Live,
    originals: Vec<Original>,
}

/// A backup and what it needs.
#[derive(Debug, Clone)]
struct Original {
    commit: Commit,
    inventory: Vec<InventoryLine>,
}

/// Looks at every backup of `target` that may be written anew. Those of `expiring` go anyway, and nothing moves for them.
///
/// # Errors
/// A COMMIT, an inventory or a map is in no region intact, or no key at hand opens it.
pub async fn survey(hands: Hands<'_>, target: &TargetName, expiring: &BTreeSet<BackupId>) -> Result<Survey> {
    let (backups, unreadable) = catalog::backups(hands.repository, Some(target)).await?;
    if let Some(error) = unreadable.into_iter().next() {
        return Err(error.during("list the backups").hint(format!("drctl repair {target}")));
    }
    let commits: Vec<_> = backups.into_iter().map(|backup| backup.commit).filter(is_of_cluster).collect();
    let staying: Vec<_> = commits.iter().filter(|commit| !expiring.contains(&commit.id)).collect();
    let mut fixed = BTreeSet::new();
    let mut originals = Vec::new();
    for commit in &staying {
        let inventory = catalog::inventory(hands.repository, commit).await?;
        match is_movable(commit, &staying) {
            true => originals.push(Original { commit: (*commit).clone(), inventory }),
            false => fixed.extend(inventory.into_iter().map(|line| line.key)),
        }
    }
    let looking = hands.progress.begin("read the maps", Some(originals.iter().map(|one| one.commit.size_bytes).sum()));
    let mut live = Live::default();
    for original in &originals {
        live.add(hands, original).await.during(|| format!("read the map of {}", original.commit.id))?;
        looking.advance(original.commit.size_bytes);
    }
    let plan = Plan::make((target, &live), &originals, &fixed);
    Ok(Survey { plan, target: target.clone(), live, originals })
}

fn is_of_cluster(commit: &Commit) -> bool {
    matches!(commit.kind, BackupKind::Full | BackupKind::Incremental) && commit.wal.is_some()
}

/// What the next backup shares pages with is the newest, and its writer knows its map: that one the incrementals repack. One
/// that has a copy goes when that is proven.
fn is_movable(commit: &Commit, staying: &[&Commit]) -> bool {
    let newest = staying.last().is_some_and(|newest| newest.id == commit.id);
    let of_moment = staying.iter().filter(|other| other.origin() == commit.origin()).count();
    !newest && of_moment == 1
}

/// Makes the copies of a plan, the oldest first. What is done is done, also where a later one fails.
///
/// # Errors
/// A pack or a map is in no region intact, not every key holder wraps, something did not reach the quorum, or what was read
/// back is not what the original says. A copy that has no COMMIT does not exist; prune removes what is left of it.
pub async fn run(hands: Hands<'_>, survey: &Survey, done: &mut Vec<Copied>) -> Result<Vec<LaneOutcome>> {
    let mut run = run::Run::new(hands, survey);
    for original in survey.chosen() {
        let copied = run.copy(original).await.during(|| format!("copy {}", original.commit.id))?;
        done.push(copied);
    }
    Ok(run.end().await)
}

impl Survey {
    fn chosen(&self) -> impl Iterator<Item = &Original> {
        self.originals.iter().filter(|original| self.plan.backups.contains(&original.commit.id))
    }
}

/// Lines of inventories by name.
type Lines = BTreeMap<String, InventoryLine>;

fn not_listed(what: &str, of: &BackupId) -> Error {
    Error::damaged(format!("the inventory of {of} does not list {what}"))
}
