//! The same of WAL, frame by frame: is it there without a hole, and is it what was written?

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use futures::{StreamExt, stream};

use super::{Problem, READS, Trouble, check_wraps, get};
use crate::model::commit::WalNeed;
use crate::model::{EpochId, Error, Kind, Lsn, RegionName, Result};
use crate::repository::catalog::Backup;
use crate::repository::handle::Repository;
use crate::repository::keysets::{self, KeyRing};
use crate::repository::layout;
use crate::repository::records::tombs;
use crate::repository::regions::Region;
use crate::repository::survey::lost::has_holes;
use crate::repository::wal::bundling::check_bundle;
use crate::repository::wal::closing::frame_beside;
use crate::repository::wal::frame::{Frame, FrameKind, FramePlace};
use crate::repository::wal::frames::{Means, keyset_of};
use crate::repository::wal::index::{self, BranchId, WalIndex, cover, windows};

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
    if !index.epochs().values().any(|seqs| has_holes(seqs) || seqs.values().any(lacks)) {
        return problems;
    }
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
        problems.extend(lacking(repository, (index, region), (epoch, seqs), (cut, now)).await);
    }
    problems
}

/// The frames of an epoch from `cut` on that a region lacks, told as one.
async fn lacking(
    repository: &Repository,
    (index, region): (&WalIndex, &Region),
    (epoch, seqs): (&EpochId, &BTreeMap<u64, BTreeSet<RegionName>>),
    (cut, now): (u64, DateTime<Utc>),
) -> Option<Problem> {
    let lacks = |held: &BTreeSet<RegionName>| !held.contains(&region.name);
    // What prune took here first, and not yet elsewhere, is not lacking; what as many regions hold as acknowledged it may be.
    let enough = repository.regions.lowest_quorum();
    let is_wanted = |seq: u64, held: &BTreeSet<RegionName>| seq >= cut || held.len() >= enough;
    let wanted = seqs.iter().filter(|(seq, held)| is_wanted(**seq, held) && lacks(held));
    let mut missing: Vec<_> = wanted.map(|(seq, _)| *seq).collect();
    let (first, (last, _)) = (missing.first().copied()?, seqs.last_key_value()?);
    let written = index.header(repository, epoch, *last).await.map(|header| header.written_at);
    let is_young = written.is_ok_and(|at| (now - at).num_seconds() < 60);
    if is_young && last - first < 60 {
        missing = not_there(index, region, epoch, missing).await;
    }
    let first = missing.first()?;
    let tail = last + 1 - first == missing.len() as u64;
    if tail && is_young && missing.len() < 60 {
        return None;
    }
    let key = index.place(epoch, *first).key();
    let what = format!("{} WAL frames from here on are not there", missing.len());
    Some(Problem::new(region, key, Trouble::Missing, what))
}

/// Those of the frames that the region does not have now either: they may have come since it was listed.
async fn not_there(index: &WalIndex, region: &Region, epoch: &EpochId, mut seqs: Vec<u64>) -> Vec<u64> {
    let looks = seqs.iter().map(|seq| index.place(epoch, *seq).key());
    let looks: Vec<_> = looks.map(|key| async move { region.store.head(&key).await.is_ok() }).collect();
    let mut came = join_all(looks).await.into_iter();
    seqs.retain(|_| !came.next().unwrap_or_default());
    seqs
}

/// WAL frames whose name a SEAL has in this region, and which it holds nowhere else.
pub async fn displaced_frames(repository: &Repository, index: &WalIndex, region: &Region) -> Vec<Problem> {
    let displaced = index.displaced(repository).await.into_iter();
    let of_region = displaced.filter(|displaced| displaced.lacking.contains(&region.name));
    let what =
        "a SEAL has the name of this WAL frame here, and the frame, which counts, is not beside it; drctl repair";
    of_region.map(|displaced| Problem::new(region, displaced.place.key(), Trouble::Missing, what)).collect()
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
        branches.extend(index::branches(&repository.regions, system).await?);
    }
    Ok(branches)
}
