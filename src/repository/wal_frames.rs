//! The frames of one epoch, in order and several ahead, each authenticated before a byte of it is used.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use crate::keys::keyset::Keyset;
use crate::model::{EpochId, Error, Kind, Lsn, Result};
use crate::observe::task;
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::wal_frame::{Frame, FrameHeader, FrameKind, FramePlace, WalSpan};
use crate::repository::wal_index::WalIndex;

/// Frames in flight or waiting for their turn.
const LOOK_AHEAD: usize = 8;
/// The most WAL that look-ahead holds in memory, by the largest frame seen: frames grow to 15 MiB under load.
const LOOK_AHEAD_BYTES: usize = 32 * 1024 * 1024;

type Fetching = AbortOnDropHandle<Result<(FrameHeader, Vec<u8>)>>;

/// What WAL is read with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<'a> {
    pub(super) index: &'a WalIndex,
    pub(super) repository: &'a Repository,
    pub(super) ring: &'a KeyRing,
}

/// Frames of one epoch that follow each other.
#[derive(Debug)]
pub(super) struct Frames<'a> {
    means: Means<'a>,
    epoch: EpochId,
    keyset: Arc<Keyset>,
    seqs: RangeInclusive<u64>,
    ahead: VecDeque<Fetching>,
    largest: usize,
    expected: Option<Lsn>,
}

impl<'a> Frames<'a> {
    /// Opens the keyset of an epoch. An epoch has one; a frame that claims another does not open with it.
    pub(super) async fn open(means: Means<'a>, epoch: &EpochId, seqs: RangeInclusive<u64>) -> Result<Self> {
        let first = means.index.header(means.repository, epoch, *seqs.start()).await?;
        let keyset = means.ring.open(&first.target, &first.keyset).await?;
        Ok(Self { means, epoch: epoch.clone(), keyset, seqs, ahead: VecDeque::new(), largest: 1, expected: None })
    }

    /// The next frame that holds WAL; `None` behind the last.
    ///
    /// # Errors
    /// It is in no region intact, does not open, or does not follow the one before it.
    pub(super) async fn next(&mut self) -> Result<Option<(WalSpan, Vec<u8>)>> {
        loop {
            let room = (LOOK_AHEAD_BYTES / self.largest).clamp(2, LOOK_AHEAD);
            while self.ahead.len() < room {
                let Some(seq) = self.seqs.next() else { break };
                self.ahead.push_back(self.fetch(seq));
            }
            let Some(next) = self.ahead.pop_front() else { return Ok(None) };
            let (header, wal) = next.await.map_err(|error| Error::failed("a WAL reader died").because(error))??;
            if header.kind == FrameKind::Seal {
                continue;
            }
            if self.expected.is_some_and(|expected| header.span.start != expected) {
                return Err(Error::damaged(format!(
                    "WAL frame {} does not follow the one before it",
                    header.place.key()
                )));
            }
            self.expected = Some(header.span.end);
            self.largest = self.largest.max(wal.len());
            return Ok(Some((header.span, wal)));
        }
    }

    fn fetch(&self, seq: u64) -> Fetching {
        let (place, repository) = (self.means.index.place(&self.epoch, seq), self.means.repository.clone());
        let keyset = Arc::clone(&self.keyset);
        let fetched = task::spawn("wal-frame", async move {
            let key =
                keyset.data().ok_or_else(|| Error::failed("the WAL keyset was opened without its data secret"))?;
            fetch_frame(&repository, &place, |frame| frame.open(key)).await
        });
        AbortOnDropHandle::new(fetched)
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

/// A SEAL in one region does not hide the frame that another region took before under the same name: all of them are asked, and one
/// that does not answer may be the one that has it.
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
    let mut silent = None;
    for region in repository.regions.all() {
        match region.store.get(&place.key(), None).await.map_err(Error::from).and_then(&check) {
            Ok(other) if kind(&other) != FrameKind::Seal => return Ok(other),
            Ok(_) => {}
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => silent = Some(error.during(format!("ask region {} for {}", region.name, place.key()))),
        }
    }
    silent.map_or(Ok(frame), |error| Err(error.hint("another region holds a SEAL there, which must not hide WAL")))
}

/// The bytes of a frame that begins at `start` which lie in `[from, to)`.
pub(super) fn trim((start, wal): (Lsn, &[u8]), (from, to): (Lsn, Lsn)) -> &[u8] {
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
