//! Reading WAL back: bytes in order, each frame authenticated before a byte of it is used, several frames ahead.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use crate::model::{EpochId, Error, Lsn, Result};
use crate::observe::task;
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::wal_frame::{Frame, FrameHeader, FrameKind, FramePlace};
use crate::repository::wal_index::{BranchId, Run, Stretch, WalIndex, Window, cover, windows};

/// Frames in flight or waiting for their turn.
const LOOK_AHEAD: usize = 8;
/// The most WAL that look-ahead holds in memory, by the largest frame seen: frames grow to 15 MiB under load.
const LOOK_AHEAD_BYTES: usize = 32 * 1024 * 1024;

/// Takes WAL in order; [`ControlFlow::Break`] ends the reading.
pub type Sink<'a> = dyn FnMut(Lsn, &[u8]) -> Result<ControlFlow<()>> + Send + 'a;

/// The WAL of one branch, as all regions hold it together.
#[derive(Debug)]
pub struct BranchLog {
    /// Its frames by region.
    pub index: WalIndex,
    /// Its unbroken runs, ascending.
    pub runs: Vec<Run>,
    /// Frames that broke a run because their header is nowhere intact.
    pub damaged: Vec<Error>,
}

impl BranchLog {
    /// Lists a branch and reads the headers at the ends of its runs.
    pub async fn load(repository: &Repository, branch: BranchId) -> Self {
        let index = WalIndex::load(&repository.regions, branch).await;
        let (runs, damaged) = index.runs(repository, None).await;
        Self { index, runs, damaged }
    }

    /// The gap-free window that holds the byte at `at`.
    pub fn window(&self, at: Lsn) -> Option<Window> {
        windows(&self.runs).into_iter().find(|window| window.start <= at && at < window.end)
    }

    /// The frames that give `[from, to)`; contiguous, so that reading them one after the other never leaves a hole and
    /// never steps back.
    ///
    /// # Errors
    /// There is a hole, or a header is nowhere intact.
    pub async fn stretches(&self, repository: &Repository, (from, to): (Lsn, Lsn)) -> Result<Vec<Stretch>> {
        if to <= from {
            return Ok(Vec::new());
        }
        let BranchId { timeline, .. } = self.index.branch();
        let hole = |at: Lsn| Error::damaged(format!("the WAL of timeline {timeline} has a hole at {at}"));
        cover(&self.index, repository, &self.runs, (from, to)).await?.map_err(hole)
    }

    /// The header of a frame.
    ///
    /// # Errors
    /// It is nowhere intact.
    pub async fn header(&self, repository: &Repository, epoch: &EpochId, seq: u64) -> Result<FrameHeader> {
        self.index.header(repository, epoch, seq).await
    }

    /// The number of the frame of a stretch that holds the byte at `at`.
    ///
    /// # Errors
    /// A header on the way is nowhere intact, or the stretch does not hold that byte.
    pub async fn locate(&self, repository: &Repository, stretch: &Stretch, at: Lsn) -> Result<u64> {
        let run = self.run_of(stretch).ok_or_else(|| Error::failed(format!("no run of WAL holds {at}")))?;
        self.index.locate(repository, run, at).await
    }

    /// The run that a stretch was cut from.
    pub fn run_of(&self, stretch: &Stretch) -> Option<&Run> {
        self.runs.iter().find(|run| {
            let seqs = run.first.place.seq..=run.last.place.seq;
            run.first.place.epoch == stretch.epoch && seqs.contains(&stretch.first_seq)
        })
    }

    /// Hands the bytes of `[from, to)` to `sink`, in order. Returns how many.
    ///
    /// # Errors
    /// A hole; a frame that is in no region intact; no key that opens an epoch; or what `sink` said.
    pub async fn read(
        &self,
        repository: &Repository,
        ring: &KeyRing,
        range: (Lsn, Lsn),
        sink: &mut Sink<'_>,
    ) -> Result<u64> {
        let mut bytes = 0;
        for stretch in self.stretches(repository, range).await? {
            let (read, flow) = self.read_stretch(repository, ring, &stretch, sink).await?;
            bytes += read;
            if flow.is_break() {
                break;
            }
        }
        Ok(bytes)
    }

    async fn read_stretch(
        &self,
        repository: &Repository,
        ring: &KeyRing,
        stretch: &Stretch,
        sink: &mut Sink<'_>,
    ) -> Result<(u64, ControlFlow<()>)> {
        let first = self.header(repository, &stretch.epoch, stretch.first_seq).await?;
        // An epoch has one keyset; a frame that claims another does not open with it.
        let keyset = ring.open(&first.target, &first.keyset).await?;
        let fetch = |seq: u64| {
            let (place, repository) = (self.index.place(&stretch.epoch, seq), repository.clone());
            let keyset = std::sync::Arc::clone(&keyset);
            let fetched = task::spawn("wal-frame", async move {
                let key =
                    keyset.data().ok_or_else(|| Error::failed("the WAL keyset was opened without its data secret"))?;
                fetch_frame(&repository, &place, |frame| frame.open(key)).await
            });
            AbortOnDropHandle::new(fetched)
        };
        let mut seqs = stretch.first_seq..=stretch.last_seq;
        let (mut ahead, mut largest, mut at) = (VecDeque::new(), 1, stretch.from);
        let mut expected = None;
        while at < stretch.to {
            let room = (LOOK_AHEAD_BYTES / largest).clamp(2, LOOK_AHEAD);
            ahead.extend(seqs.by_ref().take(room.saturating_sub(ahead.len())).map(&fetch));
            let Some(next) = ahead.pop_front() else {
                return Err(Error::damaged(format!(
                    "the WAL of epoch {} ends at {at}, before {}",
                    stretch.epoch, stretch.to
                )));
            };
            let frame = next.await.map_err(|error| Error::failed("a WAL reader died").because(error))??;
            let (header, wal) = frame;
            if header.kind == FrameKind::Seal {
                continue;
            }
            let follows = expected.map_or(header.span.start <= at, |expected| header.span.start == expected);
            if !follows {
                return Err(Error::damaged(format!(
                    "WAL frame {} does not follow the one before it",
                    header.place.key()
                )));
            }
            expected = Some(header.span.end);
            largest = largest.max(wal.len());
            let wanted = trim((header.span.start, &wal), (at, stretch.to));
            if !wanted.is_empty() {
                let flow = sink(at, wanted)?;
                at.0 += wanted.len() as u64;
                if flow.is_break() {
                    return Ok((at.bytes_since(stretch.from), flow));
                }
            }
        }
        Ok((at.bytes_since(stretch.from), ControlFlow::Continue(())))
    }
}

/// A whole frame from the first region that has it intact: signed, in its place, and opening with its key.
pub(super) async fn fetch_frame(
    repository: &Repository,
    place: &FramePlace,
    open: impl Fn(&Frame) -> Result<Vec<u8>>,
) -> Result<(FrameHeader, Vec<u8>)> {
    let check = |bytes: Bytes| {
        let frame = Frame::decode(&bytes, &repository.id, place, &repository.trust)?;
        let wal = open(&frame)?;
        Ok((frame.header, wal))
    };
    fetch(repository, place, check, |frame: &(FrameHeader, Vec<u8>)| frame.0.kind).await
}

/// The same as it is stored, for which no key is needed.
pub(super) async fn fetch_object(repository: &Repository, place: &FramePlace) -> Result<Bytes> {
    let check = |bytes: Bytes| {
        let frame = Frame::decode(&bytes, &repository.id, place, &repository.trust)?;
        Ok((frame.header.kind, bytes))
    };
    fetch(repository, place, check, |frame| frame.0).await.map(|(_, bytes)| bytes)
}

/// A SEAL in one region does not hide the frame that another region took before under the same name.
async fn fetch<T>(
    repository: &Repository,
    place: &FramePlace,
    check: impl Fn(Bytes) -> Result<T>,
    kind: impl Fn(&T) -> FrameKind,
) -> Result<T> {
    let (frame, _) = repository.regions.read(&place.key(), None, &check).await?;
    if kind(&frame) != FrameKind::Seal {
        return Ok(frame);
    }
    for region in repository.regions.all() {
        let Ok(bytes) = region.store.get(&place.key(), None).await else { continue };
        match check(bytes) {
            Ok(other) if kind(&other) != FrameKind::Seal => return Ok(other),
            _ => {}
        }
    }
    Ok(frame)
}

/// The bytes of a frame that begins at `start` which lie in `[from, to)`.
fn trim((start, wal): (Lsn, &[u8]), (from, to): (Lsn, Lsn)) -> &[u8] {
    let offset = |at: Lsn| usize::try_from(at.bytes_since(start)).unwrap_or(usize::MAX).min(wal.len());
    wal.get(offset(from)..offset(to)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_wanted_bytes_of_a_frame_are_used() {
        let wal = [1, 2, 3, 4];
        let part = |from, to| trim((Lsn(100), &wal), (Lsn(from), Lsn(to)));
        assert_eq!(part(100, 104), [1, 2, 3, 4]);
        assert_eq!(part(102, 103), [3]);
        assert_eq!(part(90, 102), [1, 2]);
        assert_eq!(part(103, 200), [4]);
        assert_eq!(part(104, 200), [0; 0]);
        assert_eq!(part(10, 20), [0; 0]);
    }
}
