//! A segment file: whether it is one, and cut into frames.

use std::io::{Read, Seek, SeekFrom};

use tempfile::SpooledTempFile;

use crate::jobs::wal::buffer::{Buffer, Chunk};
use crate::model::{Error, Lsn, Result};
use crate::pg::history::History;
use crate::pg::wal::{Expect, RecordWalker, SegmentHeader, WalkState};

/// As much as is read at once.
const PIECE: usize = 1024 * 1024;
/// A frame of pushed WAL is not in a hurry: four of them hold a segment of the usual size.
const FRAME: usize = 4 * 1024 * 1024;

/// A segment whose header was looked at.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) file: SpooledTempFile,
    pub(super) header: SegmentHeader,
    /// The history of the timeline in its name.
    pub(super) history: History,
}

/// A stretch that is being cut.
#[derive(Debug)]
pub(super) struct Cut {
    buffer: Buffer,
    to: Lsn,
}

/// A stretch of a segment on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) from: Lsn,
    pub(super) to: Lsn,
    /// Whether `from` lies between two records, because a timeline begins there.
    pub(super) at_record: bool,
}

impl Segment {
    /// The position of its first byte.
    pub(super) fn start(&self) -> Lsn {
        self.header.name.start(self.header.segment_size)
    }

    /// The position behind its last byte.
    pub(super) fn end(&self) -> Lsn {
        Lsn(self.start().0 + self.header.segment_size.bytes())
    }

    fn expect(&self) -> Expect {
        let SegmentHeader { magic, system_id, .. } = self.header;
        Expect { magic: Some(magic), system_id: Some(system_id), history: Some(self.history.clone()) }
    }

    /// Walks every record.
    ///
    /// # Errors
    /// A record or page is wrong, or the file ends before the segment does.
    pub(super) fn check(&mut self) -> Result<()> {
        let walker = RecordWalker::new(self.start(), self.header.segment_size)?;
        let mut walker = walker.of_file().expecting(self.expect());
        self.pieces((self.start(), self.end()), |at, piece| {
            walker.push(at, piece, |_| ()).map(drop).map_err(Error::from)
        })?;
        match walker.state() {
            // What PostgreSQL archives is full, or was ended by a switch, behind which nothing is looked at.
            WalkState::AtZeros(at) => {
                Err(Error::damaged(format!("the WAL in it ends at {at}, before the segment does")))
            }
            _ => Ok(()),
        }
    }

    /// Where the last complete record ends. What stands behind the end of WAL in a partial segment is whatever the file
    /// was made from; PostgreSQL, too, takes the first thing that is no record for the end.
    pub(super) fn valid_end(&mut self) -> Result<Option<Lsn>> {
        let walker = RecordWalker::new(self.start(), self.header.segment_size)?;
        let mut walker = walker.of_file().expecting(self.expect());
        let mut over = false;
        self.pieces((self.start(), self.end()), |at, piece| {
            over = over || walker.push(at, piece, |_| ()).is_err();
            Ok(())
        })?;
        Ok(walker.last_complete().map(|(_, end)| end))
    }

    /// The parts of `[start, to)` by timeline, oldest first.
    pub(super) fn stretches(&self, to: Lsn) -> Vec<(crate::model::Timeline, Stretch)> {
        let start = self.start();
        let stretch = |reign: crate::pg::history::Reign| {
            let (from, end) = (reign.begin.max(start), reign.end.map_or(to, |end| end.min(to)));
            let stretch = Stretch { from, to: end, at_record: from > start };
            (from < end).then_some((reign.timeline, stretch))
        };
        self.history.ancestry().filter_map(stretch).collect()
    }

    /// Begins to cut a stretch into frames.
    pub(super) fn cut(&self, stretch: Stretch) -> Result<Cut> {
        let size = self.header.segment_size;
        let walker = match stretch.at_record {
            true => RecordWalker::at_record(stretch.from, size),
            false => RecordWalker::new(stretch.from, size),
        };
        Ok(Cut { buffer: Buffer::new(walker?.of_file().expecting(self.expect())), to: stretch.to })
    }

    /// The next frame of a cut; `None` = it is over.
    pub(super) fn next(&mut self, cut: &mut Cut) -> Result<Option<Chunk>> {
        loop {
            let from = cut.buffer.end();
            if from >= cut.to {
                return Ok(cut.buffer.take_all());
            }
            let to = Lsn(from.0 + PIECE as u64).min(cut.to);
            self.pieces((from, to), |at, piece| cut.buffer.push(at, piece))?;
            if cut.buffer.is_full() || cut.buffer.complete() >= FRAME {
                return Ok(cut.buffer.take());
            }
        }
    }

    fn pieces(&mut self, (from, to): (Lsn, Lsn), mut take: impl FnMut(Lsn, &[u8]) -> Result<()>) -> Result<()> {
        let unreadable = |error| Error::failed("what was received cannot be read back").because(error);
        self.file.seek(SeekFrom::Start(from.bytes_since(self.start()))).map_err(unreadable)?;
        let (mut at, mut piece) = (from, vec![0; PIECE]);
        while at < to {
            let length = usize::try_from(to.bytes_since(at)).unwrap_or(usize::MAX).min(PIECE);
            let piece = piece.get_mut(..length).unwrap_or_default();
            self.file.read_exact(piece).map_err(unreadable)?;
            take(at, piece)?;
            at.0 += length as u64;
        }
        Ok(())
    }
}
