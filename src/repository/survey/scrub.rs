//! Looking at one backup in one region: is everything there, and is it what was written? No keys are needed here, except
//! for [`open_everything`].
//!
//! The truth about a backup is its COMMIT and its inventory, taken from whichever region has them intact; each region is
//! then measured against it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::model::commit::{BackupKind, Commit, WalNeed};
use crate::model::{BackupId, EpochId, Error, KeysetId, Kind, Lsn, RegionName, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::backup::writer::Intent;
use crate::repository::catalog::{self, Backup, Held};
use crate::repository::handle::Repository;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::keysets::{self, KeyRing};
use crate::repository::layout;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::records::tombs;
use crate::repository::regions::Region;
use crate::repository::restore::check_files;
use crate::repository::restore::streams::StoredStreams;
use crate::repository::trust::Trust;
use crate::repository::wal::bundling::check_bundle;
use crate::repository::wal::closing::frame_beside;
use crate::repository::wal::frame::{Frame, FrameKind, FramePlace};
use crate::repository::wal::frames::{Means, keyset_of};
use crate::repository::wal::index::{BranchId, WalIndex, cover, windows};
use crate::store::Digest;

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
    /// The region, or a key holder, did not answer.
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
            Kind::Unavailable | Kind::NoKey => Trouble::Unreachable,
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

/// Level 2: the wraps of every keyset that seals WAL of a branch, in this region. No inventory lists them, and without one
/// the WAL stays closed.
pub async fn check_wal_wraps(
    repository: &Repository,
    ring: &KeyRing,
    index: &WalIndex,
    region: &Region,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (epoch, seqs) in index.epochs() {
        let Some((first, _)) = seqs.iter().find(|(_, held)| held.contains(&region.name)) else { continue };
        // A head that is not readable is told as a frame.
        let Ok(header) = index.header(repository, epoch, *first).await else { continue };
        let keyset = (&header.target, &header.keyset);
        match keysets::wraps(ring.regions(), &repository.id, keyset.0, keyset.1).await {
            Ok((_, wraps)) if wraps.is_empty() => {
                let what = format!("no wrap of the keyset of WAL epoch {epoch} is there");
                problems.push(Problem::new(region, layout::keyset(keyset.0, keyset.1), Trouble::Missing, what));
            }
            _ => problems.extend(check_wraps(ring, region, keyset).await),
        }
    }
    problems
}

/// Level 1: every object of the closure, by name and size.
pub fn check_presence(region: &Region, held: &Held, commit: &Commit, lines: &[InventoryLine]) -> Vec<Problem> {
    let debt = held.debt(commit, lines);
    let missing = debt.missing.iter().map(|key| Problem::new(region, key, Trouble::Missing, "not there"));
    let damaged = debt.damaged.iter().map(|key| Problem::new(region, key, Trouble::Damaged, "its size is wrong"));
    let unread = debt.unreadable.iter().map(|why| Problem::new(region, "", Trouble::Unreachable, why));
    missing.chain(damaged).chain(unread).collect()
}

/// Level 1: the WAL without which the backup is not consistent.
pub async fn check_wal(repository: &Repository, index: &WalIndex, region: &Region, need: &WalNeed) -> Vec<Problem> {
    let key = layout::wal_branch(need.system_id, need.timeline, &need.branch);
    if let Some((_, why)) = index.unreadable().iter().find(|(name, _)| *name == region.name) {
        return vec![Problem::new(region, key, Trouble::Unreachable, why)];
    }
    let (runs, _) = index.runs(repository, Some(&region.name)).await;
    let covered = windows(&runs).iter().any(|window| window.covers(need.start_lsn, need.stop_lsn));
    if covered {
        return Vec::new();
    }
    let what = format!("WAL {} to {} is not there without a hole", need.start_lsn, need.stop_lsn);
    vec![Problem::new(region, key, Trouble::Missing, what)]
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

/// Compares every WAL frame that a region lists with its signed header and the digest in it, in bundles and outside of them.
pub async fn scrub_wal(repository: &Repository, index: &WalIndex, region: &Region) -> (u64, Vec<Problem>) {
    let places: Vec<_> =
        index.frames().filter(|(_, held)| held.contains(&region.name)).map(|(place, _)| place).collect();
    let frames = places.len() as u64;
    let reads = stream::iter(places).map(|place| async move {
        let error = read_frame(repository, region, &place).await.err()?;
        Some(Problem::of(region, place.key(), &error))
    });
    let mut problems: Vec<_> = reads.buffer_unordered(READS).filter_map(|found| async { found }).collect().await;
    let held = index.bundles().iter().filter(|(_, held)| held.contains_key(&region.name));
    for ((epoch, numbers), _) in held {
        let place = index.place(epoch, numbers.0);
        let key = layout::wal_bundle(&place.epoch_prefix(), numbers.0, numbers.1);
        let good = get(region, &key).await.and_then(|bytes| check_bundle(&bytes, *numbers, repository, &place));
        problems.extend(good.err().map(|error| Problem::of(region, key, &error)));
    }
    (frames, problems)
}

/// One frame from one region, rather than a SEAL that has its name.
///
/// # Errors
/// It is not there, or not the one that was signed.
pub async fn read_frame(repository: &Repository, region: &Region, place: &FramePlace) -> Result<Frame> {
    let decode = |bytes: Bytes| Frame::decode(&bytes, &repository.id, place, &repository.trust);
    let own = decode(get(region, &place.key()).await?)?;
    if own.header.kind == FrameKind::Seal
        && let Ok(beside) = frame_beside(region, place).await
    {
        return decode(beside);
    }
    Ok(own)
}

/// WAL frames that other regions list and this one does not, as runs of each epoch, and those that none lists. The end of an
/// epoch that is still growing is left out: a region may be a moment behind, and of frames that are on their way together
/// any may come first.
pub async fn missing_frames(
    repository: &Repository,
    index: &WalIndex,
    region: &Region,
    now: DateTime<Utc>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if index.unreadable().iter().any(|(name, _)| *name == region.name) {
        return problems;
    }
    let lacks = |held: &BTreeSet<RegionName>| !held.contains(&region.name);
    let has_holes = |seqs: &BTreeMap<u64, BTreeSet<RegionName>>| {
        let ends = seqs.first_key_value().zip(seqs.last_key_value());
        ends.is_some_and(|((first, _), (last, _))| last - first >= seqs.len() as u64)
    };
    if !index.epochs().values().any(|seqs| has_holes(seqs) || seqs.values().any(lacks)) {
        return problems;
    }
    // What prune took here first, and not yet elsewhere, is not lacking; what as many regions hold as acknowledged it may be.
    let enough = repository.regions.lowest_quorum();
    let BranchId { system_id, timeline, branch } = index.branch();
    let cuts = tombs::cuts(repository, (*system_id, *timeline, branch)).await.unwrap_or_default();
    for (epoch, seqs) in index.epochs() {
        let cut = cuts.get(epoch).copied().unwrap_or_default();
        let lost = index.lost(repository, (epoch, seqs), cut).await;
        if let Some(first) = lost.first() {
            // No other region can pay this debt.
            let what = format!("{} WAL frames are in no region", lost.len());
            problems.push(Problem::new(region, index.place(epoch, *first).key(), Trouble::Damaged, what));
        }
        let mut missing: Vec<_> = seqs
            .iter()
            .filter(|(seq, held)| (**seq >= cut || held.len() >= enough) && lacks(held))
            .map(|(seq, _)| *seq)
            .collect();
        let (Some(first), Some((last, _))) = (missing.first().copied(), seqs.last_key_value()) else { continue };
        let written = index.header(repository, epoch, *last).await.map(|header| header.written_at);
        let is_young = written.is_ok_and(|at| (now - at).num_seconds() < 60);
        if is_young && last - first < 60 {
            missing = not_there(index, region, epoch, missing).await;
        }
        let Some(first) = missing.first() else { continue };
        let tail = last + 1 - first == missing.len() as u64;
        if !(tail && is_young && missing.len() < 60) {
            let key = index.place(epoch, *first).key();
            let what = format!("{} WAL frames from here on are not there", missing.len());
            problems.push(Problem::new(region, key, Trouble::Missing, what));
        }
    }
    problems
}

/// WAL frames whose name a SEAL has in this region, and which it holds nowhere else.
pub async fn displaced_frames(repository: &Repository, index: &WalIndex, region: &Region) -> Vec<Problem> {
    let displaced = index.displaced(repository).await.into_iter();
    let of_region = displaced.filter(|displaced| displaced.lacking.contains(&region.name));
    let what =
        "a SEAL has the name of this WAL frame here, and the frame, which counts, is not beside it; drctl repair";
    of_region.map(|displaced| Problem::new(region, displaced.place.key(), Trouble::Missing, what)).collect()
}

/// Those of the frames that the region does not have now either: they may have come since it was listed.
async fn not_there(index: &WalIndex, region: &Region, epoch: &EpochId, mut seqs: Vec<u64>) -> Vec<u64> {
    let looks = seqs.iter().map(|seq| index.place(epoch, *seq).key());
    let looks: Vec<_> = looks.map(|key| async move { region.store.head(&key).await.is_ok() }).collect();
    let mut came = join_all(looks).await.into_iter();
    seqs.retain(|_| !came.next().unwrap_or_default());
    seqs
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

/// The WAL bytes of a need, from one region, opened and handed to `take` in order.
///
/// # Errors
/// A hole, a frame that is not good, or what `take` says.
pub async fn read_need(
    repository: &Repository,
    (index, ring): (&WalIndex, &KeyRing),
    need: &WalNeed,
    mut take: impl FnMut(Lsn, &[u8]) -> Result<()>,
) -> Result<()> {
    let region = repository.regions.all().first().ok_or_else(|| Error::failed("no region"))?;
    let (runs, _) = index.runs(repository, Some(&region.name)).await;
    let stretches = cover(index, repository, &runs, (need.start_lsn, need.stop_lsn)).await?;
    let hole = |at| Error::not_found(format!("WAL is missing from {at} on"));
    for stretch in stretches.map_err(hole)? {
        let (mut at, mut opened) = (stretch.from, None);
        for seq in stretch.first_seq..=stretch.last_seq {
            let frame = read_frame(repository, region, &index.place(&stretch.epoch, seq)).await?;
            let span = frame.header.span;
            if frame.header.kind == FrameKind::Seal {
                return Err(Error::not_found(format!("{}: a SEAL has its name", frame.header.place.key())));
            }
            let keyset = match opened.take() {
                Some(keyset) => keyset,
                None => keyset_of(Means { index, repository, ring }, &frame.header).await?,
            };
            let key =
                opened.insert(keyset).data().ok_or_else(|| Error::new(Kind::NoKey, "the keyset has no data secret"))?;
            let wal = frame.open(key)?;
            let end = span.end.min(stretch.to);
            if span.start > at {
                return Err(Error::damaged(format!("{} does not go on at {at}", frame.header.place.key())));
            }
            let offset = |lsn: Lsn| usize::try_from(lsn.bytes_since(span.start)).unwrap_or(usize::MAX);
            if end > at {
                let bytes = wal.get(offset(at)..offset(end));
                take(at, bytes.ok_or_else(|| Error::damaged("a WAL frame is shorter than its header says"))?)?;
                at = end;
            }
            if at >= stretch.to {
                break;
            }
        }
    }
    Ok(())
}

/// Objects of a backup that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Orphan {
    /// The backup that was never committed.
    pub id: BackupId,
    /// Its target.
    pub target: TargetName,
    /// When its intent says that it began; `None` without one.
    pub started_at: Option<DateTime<Utc>>,
    /// Regions that hold objects of it.
    pub regions: Vec<RegionName>,
    /// Objects, in the region that holds most.
    pub objects: u64,
}

/// What was found beside the backups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Beside {
    /// Left over from runs that ended before COMMIT.
    pub orphans: Vec<Orphan>,
    /// Perhaps still being written.
    pub in_progress: Vec<Orphan>,
}

/// Objects of one target that belong to no backup. Those of one whose COMMIT is gone are needed all the same where a
/// later one shares its pages. A backup may be in progress as long as its intent has not expired and
/// no newer backup of the target has begun.
///
/// # Errors
/// No region answers.
pub async fn beside(
    repository: &Repository,
    target: &TargetName,
    held: &BTreeMap<RegionName, Held>,
    (backups, now): (&[Backup], DateTime<Utc>),
) -> Result<Beside> {
    let commits: BTreeSet<_> = backups.iter().map(|backup| backup.commit.id.clone()).collect();
    let mut needed: BTreeSet<String> = BTreeSet::new();
    for Backup { commit } in backups.iter().filter(|backup| backup.commit.parent.is_some()) {
        match catalog::inventory(repository, commit).await {
            Ok(lines) => needed.extend(lines.into_iter().map(|line| line.key)),
            Err(error) => tracing::warn!(%error, backup = %commit.id, "what it needs may be shown as orphaned"),
        }
    }
    let mut found: BTreeMap<BackupId, BTreeMap<RegionName, u64>> = BTreeMap::new();
    for (region, held) in held {
        for kind in ["packs", "manifests", "inventories"] {
            let prefix = format!("{kind}/{target}/");
            let keys = held.below(&prefix).filter(|key| !needed.contains(*key));
            let ids = keys.filter_map(|key| key.strip_prefix(&prefix)?.split('/').next()?.parse().ok());
            for id in ids.filter(|id| !commits.contains(id)) {
                *found.entry(id).or_default().entry(region.clone()).or_default() += 1;
            }
        }
    }
    let announced = announced(repository).await?;
    let own = announced.iter().filter(|id| id.target().ok().as_ref() == Some(target));
    let newest = found.keys().chain(&commits).chain(own).max();
    let newest = newest.cloned();
    let mut beside = Beside::default();
    for (id, regions) in found {
        let intent = if announced.contains(&id) { read_intent(repository, &id).await } else { None };
        let alive = intent.as_ref().is_some_and(|intent| intent.expires_at > now) && newest.as_ref() == Some(&id);
        let objects = regions.values().copied().max().unwrap_or(0);
        let started_at = intent.map(|intent| intent.created_at);
        let regions = regions.into_keys().collect();
        let orphan = Orphan { id, target: target.clone(), started_at, regions, objects };
        if alive { beside.in_progress.push(orphan) } else { beside.orphans.push(orphan) }
    }
    Ok(beside)
}

/// The backups that some region holds an intent of.
async fn announced(repository: &Repository) -> Result<BTreeSet<BackupId>> {
    let keys = repository.regions.list_union(layout::INTENTS).await?;
    Ok(keys.iter().filter_map(|key| key.strip_prefix(layout::INTENTS)?.parse().ok()).collect())
}

/// The intent of a backup that may be in progress. An intent ends with its COMMIT and is not repaired, so nobody asks for
/// those of backups that exist.
pub(in crate::repository) async fn read_intent(repository: &Repository, id: &BackupId) -> Option<Intent> {
    let parse = |bytes: Bytes| parse_intent(repository, &repository.trust, id, &bytes);
    match repository.regions.read(&layout::intent(id), None, parse).await {
        Ok((intent, _)) => Some(intent),
        Err(error) => {
            tracing::warn!(%error, "intent is not readable");
            None
        }
    }
}

fn parse_intent(repository: &Repository, trust: &Trust, id: &BackupId, bytes: &[u8]) -> Result<Intent> {
    let body = trust.verify_text(&crate::repository::backup::writer::intent_context(&repository.id, id), bytes)?;
    serde_json::from_slice(body).map_err(|error| Error::damaged(layout::intent(id)).because(error))
}

/// The branches whose WAL these backups need, and every other branch of the same clusters.
///
/// # Errors
/// No region answers.
pub async fn branches_of(repository: &Repository, backups: &[Backup]) -> Result<BTreeSet<BranchId>> {
    let needs = backups.iter().filter_map(|backup| backup.commit.wal.as_ref());
    let mut branches: BTreeSet<_> = needs
        .clone()
        .map(|need| BranchId { system_id: need.system_id, timeline: need.timeline, branch: need.branch.clone() })
        .collect();
    for system in needs.map(|need| need.system_id).collect::<BTreeSet<_>>() {
        branches.extend(crate::repository::wal::index::branches(&repository.regions, system).await?);
    }
    Ok(branches)
}
