//! What regions hold of the last frames of an epoch, and what that says of it. Needs no key.
//!
//! While an epoch is closed from outside, its writer may win a name in some regions that the SEAL took in others. If enough
//! regions are left for the frame it counts as one, and its name in the others is taken for good. Such a region gets it under
//! the name of a bundle with this frame alone; whoever meets a SEAL looks there. A frame that is found so is as good as one
//! under its own name for everybody but its writer, who acknowledges by the names that it won itself.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::model::{Error, Result};
use crate::repository::bundle::form::Contents;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::Region;
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FramePlace, HEADER_LIMIT};

/// What a region holds under one number of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// A frame with WAL, or the one with which the writer began.
    Wal,
    /// The writer closed its epoch.
    End,
    /// Another owner closed it.
    Seal,
    /// Bytes that are no frame. Nobody can take the name any more.
    Damaged,
}

/// What is held near the end of an epoch: number, region, what.
pub type Holdings<R> = BTreeMap<u64, BTreeMap<R, Holding>>;

/// Whether an epoch is closed, and where its WAL ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// By its writer, which had everything before acknowledged.
    Ended,
    /// By another owner: no number from here on was or will be acknowledged.
    Sealed(u64),
    /// Not yet. This is where the SEAL has to stand.
    Open(u64),
}

/// How many regions there are, and how many of them are enough.
///
/// The last two differ where somebody gave regions up: what these may hold is lost, but a frame that a region is seen to
/// have may have been acknowledged with them.
#[derive(Debug, Clone, Copy)]
pub struct Enough {
    /// All of them.
    pub regions: usize,
    /// So many were read at least, and hold a SEAL in the end.
    pub needed: usize,
    /// N−W+1: as many SEALs leave no W regions for a frame, whoever else has it.
    pub barrier: usize,
}

/// Judges an epoch by what the regions hold of its last frames.
///
/// Bytes that are no frame keep a name from the frame and from the SEAL alike. Where nobody has the frame they are no reason
/// to pass its number over, because its writer may still win the name in the other regions, unless these are too few. The
/// SEAL stands there as in any hole; it is done, too, when every region holds either.
pub fn closing<R: Ord>(holdings: &Holdings<R>, Enough { regions, needed, barrier }: Enough) -> Closing {
    if holdings.values().flat_map(BTreeMap::values).any(|holding| *holding == Holding::End) {
        return Closing::Ended;
    }
    let count = |at: u64, what: Holding| {
        let held = holdings.get(&at).into_iter().flat_map(BTreeMap::values);
        held.filter(|holding| **holding == what).count()
    };
    let is_taken = |at: u64| {
        let is_blocked = count(at, Holding::Damaged) >= barrier;
        (is_blocked || count(at, Holding::Wal) > 0) && count(at, Holding::Seal) < barrier
    };
    let mut at = holdings.keys().next().copied().unwrap_or_default();
    while is_taken(at) {
        at += 1;
    }
    let (seals, damaged) = (count(at, Holding::Seal), count(at, Holding::Damaged));
    let is_closed = seals >= needed || seals > 0 && seals + damaged >= regions;
    if is_closed { Closing::Sealed(at) } else { Closing::Open(at) }
}

/// What one region holds under a name, and the bytes that said so; a range of them if they are many.
pub(in crate::repository) async fn holding(
    repository: &Repository,
    region: &Region,
    place: &FramePlace,
    size: u64,
) -> Result<Option<(Holding, Bytes)>> {
    let key = place.key();
    let head = region.store.get(&key, Some(0..size.min(HEADER_LIMIT))).await;
    // Sizes differ where a frame and a SEAL have one name, and a damaged copy may have any.
    let judged = head.as_ref().ok().and_then(|bytes| judge(repository, place, bytes));
    let (holding, bytes) = match (judged, head) {
        (Some(holding), Ok(bytes)) => (holding, bytes),
        (_, Err(error)) if error.is_not_found() => return Ok(None),
        _ => match region.store.get(&key, None).await {
            Ok(bytes) => (judge(repository, place, &bytes).unwrap_or(Holding::Damaged), bytes),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(Error::from(error).during(format!("read {key} in {}", region.name))),
        },
    };
    Ok(Some((holding, bytes)))
}

fn judge(repository: &Repository, place: &FramePlace, bytes: &[u8]) -> Option<Holding> {
    let header = Frame::header(bytes, &repository.id, place, &repository.trust).ok()?;
    Some(match header.kind {
        FrameKind::Begin | FrameKind::Data => Holding::Wal,
        FrameKind::End => Holding::End,
        FrameKind::Seal => Holding::Seal,
    })
}

/// The name under which a region holds a frame whose own name a SEAL has.
pub fn key_beside(place: &FramePlace) -> String {
    layout::wal_bundle(&place.epoch_prefix(), place.seq, place.seq)
}

/// The frame that a region holds beside a SEAL. Whoever asks checks it as any other.
///
/// # Errors
/// There is none, or it is not readable.
pub async fn frame_beside(region: &Region, place: &FramePlace) -> Result<Bytes> {
    let bytes = region.store.get(&key_beside(place), None).await?;
    let range = Contents::parse(&bytes, (place.seq, place.seq))?.range(place.seq).unwrap_or_default();
    let usize = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    Ok(bytes.slice(usize(range.start)..usize(range.end)))
}

/// The head of the frame that a region holds beside a SEAL, if it is one with WAL.
pub(in crate::repository) async fn header_beside(
    repository: &Repository,
    region: &Region,
    place: &FramePlace,
) -> Option<FrameHeader> {
    let bytes = frame_beside(region, place).await.ok()?;
    let frame = Frame::decode(&bytes, &repository.id, place, &repository.trust).ok()?;
    (frame.header.kind == FrameKind::Data).then_some(frame.header)
}
