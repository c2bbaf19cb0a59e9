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
use crate::repository::wal::closing::frame_beside;
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FramePlace, WalSpan};
use crate::repository::wal::index::WalIndex;

/// Frames on their way or waiting for their turn: a server under load ships one for each MiB, and replay takes hundreds of
/// them in a second, each of which waits for the way to the region.
const LOOK_AHEAD: usize = 64;
/// The most that those hold in memory, as they are stored.
const LOOK_AHEAD_BYTES: u64 = 24 * 1024 * 1024;
/// Frames opened before their turn, of up to 15 MiB each: one is unpacked while another is used.
const OPENED_AHEAD: usize = 2;

type Fetching = AbortOnDropHandle<Result<Frame>>;
type Opening = AbortOnDropHandle<Result<(FrameHeader, Vec<u8>)>>;

/// What WAL is read with.
#[derive(Debug, Clone, Copy)]
pub(in crate::repository) struct Means<'a> {
    pub(in crate::repository) index: &'a WalIndex,
    pub(in crate::repository) repository: &'a Repository,
    pub(in crate::repository) ring: &'a KeyRing,
}

/// Frames of one epoch that follow each other.
#[derive(Debug)]
pub(in crate::repository) struct Frames<'a> {
    means: Means<'a>,
    epoch: EpochId,
    keyset: Arc<Keyset>,
    seqs: RangeInclusive<u64>,
    /// Each with its size.
    ahead: VecDeque<(u64, Fetching)>,
    opened: VecDeque<Opening>,
    /// The largest size that is known: of frames in bundles none is listed.
    largest: u64,
    expected: Option<Lsn>,
}

impl<'a> Frames<'a> {
    /// Opens the keyset of an epoch, and asks for the first frames. A frame that claims another keyset does not open with it.
    pub(in crate::repository) async fn open(
        means: Means<'a>,
        epoch: &EpochId,
        seqs: RangeInclusive<u64>,
    ) -> Result<Self> {
        let first = means.index.header(means.repository, epoch, *seqs.start()).await?;
        let keyset = keyset_of(means, &first).await?;
        let (ahead, opened) = (VecDeque::new(), VecDeque::new());
        let (epoch, largest) = (epoch.clone(), first.body_bytes);
        let mut frames = Self { means, epoch, keyset, seqs, ahead, opened, largest, expected: None };
        frames.look_ahead();
        Ok(frames)
    }

    /// The next frame that holds WAL; `None` behind the last.
    ///
    /// # Errors
    /// It is in no region intact, does not open, or does not follow the one before it.
    pub(in crate::repository) async fn next(&mut self) -> Result<Option<(WalSpan, Vec<u8>)>> {
        loop {
            self.look_ahead();
            let Some(next) = self.opened.pop_front() else { return Ok(None) };
            let (header, wal) = next.await.map_err(|error| Error::failed("a WAL reader died").because(error))??;
            self.largest = self.largest.max(header.body_bytes);
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
            return Ok(Some((header.span, wal)));
        }
    }

    fn look_ahead(&mut self) {
        self.fetch_ahead();
        while self.opened.len() < OPENED_AHEAD {
            let Some((_, fetching)) = self.ahead.pop_front() else { break };
            self.opened.push_back(self.unpack(fetching));
        }
        self.fetch_ahead();
    }

    fn fetch_ahead(&mut self) {
        let mut held: u64 = self.ahead.iter().map(|(size, _)| size).sum();
        while self.ahead.len() < LOOK_AHEAD && !self.seqs.is_empty() {
            let seq = *self.seqs.start();
            let listed = self.means.index.size(&self.epoch, seq);
            let size = if listed > 0 { listed } else { self.largest };
            if held > 0 && held + size > LOOK_AHEAD_BYTES {
                break;
            }
            held += size;
            self.ahead.push_back((size, self.fetch(seq)));
            self.seqs.next();
        }
    }

    fn fetch(&self, seq: u64) -> Fetching {
        let (place, repository) = (self.means.index.place(&self.epoch, seq), self.means.repository.clone());
        let fetched = task::spawn("wal-frame", async move { fetch_frame(&repository, &place).await });
        AbortOnDropHandle::new(fetched)
    }

    /// What opens in one region opens in all: the body is the one that was signed.
    fn unpack(&self, fetching: Fetching) -> Opening {
        let keyset = Arc::clone(&self.keyset);
        let opened = task::spawn("wal-open", async move {
            let frame = fetching.await.map_err(|error| Error::failed("a WAL reader died").because(error))??;
            // Unpacking 15 MiB takes tens of milliseconds: not on a thread that requests wait for.
            let opened = tokio::task::spawn_blocking(move || {
                let key =
                    keyset.data().ok_or_else(|| Error::failed("the WAL keyset was opened without its data secret"))?;
                frame.open(key).map(|wal| (frame.header, wal))
            });
            opened.await.map_err(|error| Error::failed("a WAL reader died").because(error))?
        });
        AbortOnDropHandle::new(opened)
    }
}

/// The keyset of the epoch that a frame is of, opened. An epoch has one, and its first frame, which lies in no bundle, names it. The
/// names of frames that do are free again after prune: whoever may write and sign could put WAL there under keys of his own,
/// but hardly under those of an epoch that is over.
///
/// # Errors
/// The frame names another keyset, or no key opens it.
pub(in crate::repository) async fn keyset_of(means: Means<'_>, frame: &FrameHeader) -> Result<Arc<Keyset>> {
    let FramePlace { epoch, .. } = &frame.place;
    let first = means.index.epochs().get(epoch).and_then(|seqs| seqs.keys().next());
    // One that is nowhere readable says nothing against the others.
    if let Some(first) = first
        && let Ok(born) = means.index.header(means.repository, epoch, *first).await
        && (&born.target, &born.keyset) != (&frame.target, &frame.keyset)
    {
        let error = Error::damaged(format!("{} names another keyset than its epoch has", frame.place.key()));
        return Err(error.hint("somebody wrote WAL that was not received: which signers are known? drctl status"));
    }
    means.ring.open(&frame.target, &frame.keyset).await
}

/// A whole frame from the first region that has it intact: signed, and in its place.
pub(in crate::repository) async fn fetch_frame(repository: &Repository, place: &FramePlace) -> Result<Frame> {
    let check = |bytes: Bytes| Frame::decode(&bytes, &repository.id, place, &repository.trust);
    fetch(repository, place, check, |frame: &Frame| frame.header.kind).await
}

/// The same as it is stored, for which no key is needed.
pub(in crate::repository) async fn fetch_object(repository: &Repository, place: &FramePlace) -> Result<Bytes> {
    let check = |bytes: Bytes| {
        let frame = Frame::decode(&bytes, &repository.id, place, &repository.trust)?;
        Ok((frame.header.kind, bytes))
    };
    fetch(repository, place, check, |frame| frame.0).await.map(|(_, bytes)| bytes)
}

/// A SEAL in one region does not hide the frame that another region took before under the same name, nor one beside it: all
/// of them are asked, and one that does not answer may be the one that has it.
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
    for region in repository.regions.all() {
        let Ok(bytes) = frame_beside(region, place).await else { continue };
        match check(bytes) {
            Ok(other) if kind(&other) != FrameKind::Seal => return Ok(other),
            _ => {}
        }
    }
    silent.map_or(Ok(frame), |error| Err(error.hint("another region holds a SEAL there, which must not hide WAL")))
}

/// The bytes of a frame that begins at `start` which lie in `[from, to)`.
pub(in crate::repository) fn trim((start, wal): (Lsn, &[u8]), (from, to): (Lsn, Lsn)) -> &[u8] {
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
