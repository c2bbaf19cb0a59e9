//! Received WAL that waits for its frame.
//!
//! A frame ends with a complete record wherever one ends in it. What stands behind the last complete record stays in the
//! buffer: a server that crashes may write that part differently afterwards, and so the log never holds a torso that
//! somebody has to tell from the real thing. Only a record larger than a frame is cut.

use crate::model::{Lsn, Result};
use crate::pg::wal::{Pushed, Record, RecordWalker, WalError};
use crate::repository::wal::log::{FRAME_LIMIT, Marks};

/// As much as one message of the server may add to a buffer that is not full yet.
const MESSAGE_ROOM: usize = 1024 * 1024;
/// From here on nothing more is read.
const FULL: usize = FRAME_LIMIT - MESSAGE_ROOM;

/// The bytes of a frame.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Position of the first byte.
    pub(super) start: Lsn,
    /// The bytes.
    pub(super) wal: Vec<u8>,
    /// What the walker found in them.
    pub(super) marks: Marks,
    /// Whether `start` lies between two records.
    pub(super) at_boundary: bool,
}

/// WAL from the end of the last frame to the last byte received.
#[derive(Debug)]
pub(super) struct Buffer {
    start: Lsn,
    wal: Vec<u8>,
    walker: RecordWalker,
    found: Pushed,
    at_boundary: bool,
}

impl Buffer {
    /// An empty buffer where `walker` begins.
    pub(super) fn new(walker: RecordWalker) -> Self {
        Self { start: walker.position(), wal: Vec::new(), walker, found: Pushed::default(), at_boundary: true }
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// They do not follow those before, or they are not WAL of this history. Nothing of them is kept.
    pub(super) fn push(&mut self, at: Lsn, data: &[u8]) -> Result<()> {
        Ok(self.push_seen(at, data, |_| ())?)
    }

    /// The same; `see` is shown every record that became complete.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub(super) fn push_seen(&mut self, at: Lsn, data: &[u8], see: impl FnMut(&Record)) -> Result<(), WalError> {
        let found = self.walker.push(at, data, see)?;
        self.found.merge(&found);
        self.wal.extend_from_slice(data);
        Ok(())
    }

    /// The end of what was received.
    pub(super) fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.wal.len() as u64)
    }

    /// Bytes held.
    pub(super) fn len(&self) -> usize {
        self.wal.len()
    }

    /// Whether reading must stop until a frame was taken.
    pub(super) fn is_full(&self) -> bool {
        self.wal.len() >= FULL
    }

    /// Whether [`take`](Self::take) has something to give.
    pub(super) fn has_frame(&self) -> bool {
        self.found.last.is_some() || self.is_full()
    }

    /// Bytes of complete records.
    pub(super) fn complete(&self) -> usize {
        let end = self.found.last.map_or(self.start, |(_, end)| end);
        usize::try_from(end.bytes_since(self.start)).unwrap_or(usize::MAX).min(self.wal.len())
    }

    /// How many bytes [`take`](Self::take) would give.
    pub(super) fn frame_size(&self) -> usize {
        if self.found.last.is_some() { self.complete() } else { self.wal.len() }
    }

    /// Start and end of the last complete record, behind which to stream again after the connection was lost.
    pub(super) fn resume_at(&self) -> Option<(Lsn, Lsn)> {
        self.walker.last_complete()
    }

    /// Everything, also the torso of a record: its timeline ends here.
    pub(super) fn take_all(&mut self) -> Option<Chunk> {
        let (start, at_boundary) = (self.start, self.at_boundary);
        let mut chunk = self.take().unwrap_or(Chunk { start, at_boundary, ..Chunk::default() });
        self.start = self.end();
        chunk.wal.append(&mut self.wal);
        (!chunk.wal.is_empty()).then_some(chunk)
    }

    /// The next frame's bytes: all complete records, or a part of one that fills the buffer alone.
    pub(super) fn take(&mut self) -> Option<Chunk> {
        let found = std::mem::take(&mut self.found);
        let length = match found.last {
            Some((_, end)) => usize::try_from(end.bytes_since(self.start)).unwrap_or(usize::MAX).min(self.wal.len()),
            None if self.is_full() => self.wal.len(),
            None => return None,
        };
        let mut rest = self.wal.split_off(length);
        // The next frame is likely as long as this one: growing step by step copies it several times.
        rest.reserve(length);
        let marks = Marks { first_record: found.first, last_record: found.last, commits: found.commits };
        let wal = std::mem::replace(&mut self.wal, rest);
        let chunk = Chunk { start: self.start, wal, marks, at_boundary: self.at_boundary };
        self.start = Lsn(self.start.0 + length as u64);
        self.at_boundary = found.last.is_some();
        Some(chunk)
    }
}
