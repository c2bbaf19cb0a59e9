//! Looking at one backup in one region: is everything there, and is it what was written? No keys are needed here, except
//! for [`open_everything`].
//!
//! The truth about a backup is its COMMIT and its inventory, taken from whichever region has them intact; each region is
//! then measured against it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::model::commit::{BackupKind, Commit};
use crate::model::{Error, KeysetId, Kind, RegionName, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::catalog::{self, Held};
use crate::repository::handle::Repository;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::regions::Region;
use crate::repository::restore::check_files;
use crate::repository::restore::streams::StoredStreams;
use crate::store::Digest;

mod wal;

pub use wal::{
    branches_of, check_wal, check_wal_wraps, displaced_frames, missing_frames, read_frame, read_need, scrub_wal,
};

/// Requests in flight.
const READS: usize = 8;

/// What is wrong with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The region does not hold it: a debt.
    Missing,
    /// The region holds other bytes.
    Damaged,
    /// The region, or a key holder, did not answer; or a newer drctl wrote it, which knows what it says.
    Unreachable,
}

/// Something wrong in one region.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// The region.
    pub region: RegionName,
    /// The object.
    pub key: String,
    /// What kind of trouble.
    pub trouble: Trouble,
    /// What was found.
    pub what: String,
}

impl Problem {
    fn new(region: &Region, key: impl Into<String>, trouble: Trouble, what: impl Into<String>) -> Self {
        Self { region: region.name.clone(), key: key.into(), trouble, what: what.into() }
    }

    /// An error met while an object was read.
    pub fn of(region: &Region, key: impl Into<String>, error: &Error) -> Self {
        let trouble = match error.kind() {
            Kind::NotFound => Trouble::Missing,
            Kind::Unavailable | Kind::NoKey | Kind::Newer => Trouble::Unreachable,
            _ => Trouble::Damaged,
        };
        Self::new(region, key, trouble, error.to_string())
    }
}

/// The repository as one region alone shows it.
///
/// # Errors
/// There is no region of that name.
pub fn alone(repository: &Repository, region: &RegionName) -> Result<Repository> {
    Ok(Repository { regions: repository.regions.only(region)?, ..repository.clone() })
}

/// Level 0: COMMIT and inventory of a backup, signatures and digests, from this region.
pub async fn check_records(repository: &Repository, region: &Region, commit: &Commit) -> Vec<Problem> {
    let mut problems = Vec::new();
    let key = layout::commit(&commit.target, &commit.id);
    let read = get(region, &key).await;
    match read.and_then(|bytes| catalog::parse_commit(repository, &key, &bytes)) {
        Ok(found) if found == *commit => {}
        Ok(_) => problems.push(Problem::new(region, &key, Trouble::Damaged, "another region signed something else")),
        Err(error) => problems.push(Problem::of(region, &key, &error)),
    }
    let mut summary = PartsSummary::default();
    for part in 0..commit.inventory.count {
        let key = layout::inventory(&commit.target, &commit.id, part);
        let read = get(region, &key).await.and_then(|bytes| {
            inventory::decode_part(&bytes, &repository.id, (&commit.id, part), &repository.trust)?;
            Ok((bytes.len() as u64, Digest::of(&bytes)))
        });
        match read {
            Ok((size, digest)) => summary.add(size, digest),
            Err(error) => problems.push(Problem::of(region, &key, &error)),
        }
    }
    if problems.is_empty() && summary.finish() != commit.inventory {
        let key = layout::inventory(&commit.target, &commit.id, 0);
        problems.push(Problem::new(region, key, Trouble::Damaged, "not the inventory that COMMIT signed"));
    }
    problems
}

async fn get(region: &Region, key: &str) -> Result<Bytes> {
    Ok(region.store.get(key, None).await?)
}

/// Level 0: the wraps of a keyset in this region. Those that a holder at hand can judge are opened.
pub async fn check_wraps(ring: &KeyRing, region: &Region, (target, id): (&TargetName, &KeysetId)) -> Vec<Problem> {
    let problem = |key, error: &Error| vec![Problem::of(region, key, error)];
    match ring.wrong_wraps(target, id).await {
        Ok(wrong) => {
            let wrong = wrong.into_iter();
            let damaged =
                |(holder, why)| Problem::new(region, layout::wrap(target, id, &holder), Trouble::Damaged, why);
            wrong.map(damaged).collect()
        }
        Err(error) => problem(layout::keyset(target, id), &error),
    }
}

/// Level 1: every object of the closure, by name and size.
pub fn check_presence(region: &Region, held: &Held, commit: &Commit, lines: &[InventoryLine]) -> Vec<Problem> {
    let debt = held.debt(commit, lines);
    let missing = debt.missing.iter().map(|key| Problem::new(region, key, Trouble::Missing, "not there"));
    let damaged = debt.damaged.iter().map(|key| Problem::new(region, key, Trouble::Damaged, "its size is wrong"));
    let unread = debt.unreadable.iter().map(|why| Problem::new(region, "", Trouble::Unreachable, why));
    missing.chain(damaged).chain(unread).collect()
}

/// Compares every object of an inventory with its digest. `seen` spares those that another backup shares.
pub async fn scrub_objects(
    region: &Region,
    lines: &[InventoryLine],
    seen: &mut BTreeMap<String, Option<Problem>>,
    progress: &Phase,
) -> Vec<Problem> {
    let new: Vec<_> = lines.iter().filter(|line| !seen.contains_key(&line.key)).collect();
    let reads = stream::iter(new).map(|line| async move {
        let found = match get(region, &line.key).await {
            Ok(bytes) if bytes.len() as u64 == line.size && Digest::of(&bytes) == line.digest() => None,
            Ok(_) => {
                let what = "its digest is not the one in the inventory";
                Some(Problem::new(region, &line.key, Trouble::Damaged, what))
            }
            Err(error) => Some(Problem::of(region, &line.key, &error)),
        };
        progress.advance(line.size);
        (line.key.clone(), found)
    });
    seen.extend(reads.buffer_unordered(READS).collect::<Vec<_>>().await);
    lines.iter().filter_map(|line| seen.get(&line.key).cloned().flatten()).collect()
}

/// Level 2: every map and every frame of a backup fetched from this region alone, opened, unpacked and compared with its
/// map. Returns the bytes of the files that are proven.
///
/// # Errors
/// The first object that is not good.
pub async fn open_everything(
    repository: &Repository,
    (region, ring): (&Region, &KeyRing),
    commit: &Commit,
    progress: &Arc<Phase>,
) -> Result<u64> {
    let alone = alone(repository, &region.name)?;
    let lines = catalog::inventory(&alone, commit).await?;
    let ring = ring.within(alone.regions.clone());
    let bytes = check_files(&alone, &ring, (commit, &lines), progress).await?;
    if matches!(commit.kind, BackupKind::Dump | BackupKind::Files) {
        // Pages that no list makes a stream of would come back as nothing.
        StoredStreams::open(&alone, &ring, (commit, &lines)).await?;
    }
    Ok(bytes)
}
