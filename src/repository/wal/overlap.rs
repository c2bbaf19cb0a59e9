//! Where two epochs hold the same part of the log, their bytes are compared: the WAL at one position of one branch is
//! what one server wrote there. Two versions mean that two servers wrote it, or that somebody forged one; which of them a
//! reader would meet is chance, so none is given out.
//!
//! Behind the last complete record of a run nothing is compared: there stands the torso of a record that a server which
//! crashed may have written differently afterwards.

use crate::model::{Error, Lsn, Timeline};
use crate::repository::wal::frame::{EpochKind, FrameHeader};
use crate::repository::wal::frames::{Frames, Means, trim};
use crate::repository::wal::index::Run;

/// The part of a run that every other epoch must agree with.
pub(in crate::repository) fn comparable(run: &Run) -> (Lsn, Lsn) {
    (run.start(), run.last.span.last_record_end.unwrap_or(run.start()).min(run.end()))
}

/// Two runs, by their place in the list, and a part of the log that both hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::repository) struct Overlap {
    pub(in crate::repository) ours: usize,
    pub(in crate::repository) theirs: usize,
    pub(in crate::repository) from: Lsn,
    pub(in crate::repository) to: Lsn,
}

/// Everything that must be compared so that every two of `ranges` are known to agree: each byte of each range once at most
/// as `theirs`, however many ranges hold it.
pub(in crate::repository) fn overlaps(ranges: &[(Lsn, Lsn)]) -> Vec<Overlap> {
    let mut overlaps = Vec::new();
    for (theirs, range) in ranges.iter().enumerate() {
        let mut open = vec![*range];
        for (ours, (start, end)) in ranges.iter().enumerate().take(theirs) {
            let mut left = Vec::new();
            for (from, to) in open {
                let both = (from.max(*start), to.min(*end));
                if both.0 >= both.1 {
                    left.push((from, to));
                    continue;
                }
                overlaps.push(Overlap { ours, theirs, from: both.0, to: both.1 });
                left.extend([(from, both.0), (both.1, to)].into_iter().filter(|(from, to)| from < to));
            }
            open = left;
        }
    }
    overlaps
}

/// Two versions of one position.
#[derive(Debug, Clone)]
pub struct Contradiction {
    /// The first byte that differs.
    pub at: Lsn,
    timeline: Timeline,
    /// A frame of each epoch.
    epochs: [FrameHeader; 2],
}

impl Contradiction {
    fn words(header: &FrameHeader) -> String {
        let kind = match header.epoch_kind {
            EpochKind::Stream => "streamed",
            EpochKind::Backup => "streamed by a backup",
            EpochKind::Push => "brought by archive_command",
        };
        format!("epoch {}: {kind}, signed by {}, begun {}", header.place.epoch, header.signer, header.written_at)
    }
}

impl From<&Contradiction> for Error {
    fn from(Contradiction { at, timeline, epochs }: &Contradiction) -> Self {
        let text = format!("the WAL of timeline {timeline} is stored in two versions from {at} on");
        let error = epochs.iter().fold(Self::damaged(text), |error, epoch| error.because(Contradiction::words(epoch)));
        error.hint(format!(
            "nothing behind {at} is given out: restore to a point before it (--to-lsn {at}), or from a backup behind it"
        ))
    }
}

/// What comparing came to.
#[derive(Debug)]
pub(in crate::repository) enum Look {
    /// Both say the same.
    Same,
    /// They do not.
    Differs(Box<Contradiction>),
    /// The other epoch cannot be read there.
    Unread(Error),
}

/// Another epoch that holds a part of what is being read, and is read beside it.
#[derive(Debug)]
pub(in crate::repository) struct Witness<'a> {
    means: Means<'a>,
    ours: &'a Run,
    run: &'a Run,
    from: Lsn,
    to: Lsn,
    frames: Option<Frames<'a>>,
    held: (Lsn, Vec<u8>),
}

impl<'a> Witness<'a> {
    /// `run` beside `ours` in `[from, to)`.
    pub(in crate::repository) const fn new(
        means: Means<'a>,
        ours: &'a Run,
        run: &'a Run,
        (from, to): (Lsn, Lsn),
    ) -> Self {
        Self { means, ours, run, from, to, frames: None, held: (Lsn::INVALID, Vec::new()) }
    }

    /// Compares bytes that were read at `at`; they come in order.
    pub(in crate::repository) async fn look(&mut self, at: Lsn, wal: &[u8]) -> Look {
        let end = Lsn(at.0 + wal.len() as u64).min(self.to);
        let mut from = at.max(self.from);
        while from < end {
            let held_to = Lsn(self.held.0.0 + self.held.1.len() as u64);
            if held_to <= from || self.held.0 > from {
                match self.turn(from).await {
                    Ok(()) => continue,
                    Err(error) => return Look::Unread(error),
                }
            }
            let part = (from, end.min(held_to));
            let (ours, theirs) = (trim((at, wal), part), trim((self.held.0, &self.held.1), part));
            if let Some(offset) = differs(ours, theirs) {
                let at = Lsn(from.0 + offset as u64);
                let epochs = [self.ours.first.clone(), self.run.first.clone()];
                let timeline = self.run.first.place.timeline;
                return Look::Differs(Box::new(Contradiction { at, timeline, epochs }));
            }
            from = part.1;
        }
        Look::Same
    }

    /// The next frame, or the first one, which holds `at`.
    async fn turn(&mut self, at: Lsn) -> Result<(), Error> {
        let frames = match &mut self.frames {
            Some(frames) => frames,
            None => {
                let first = self.means.index.locate(self.means.repository, self.run, at).await?;
                let seqs = first..=self.run.last.place.seq;
                self.frames.insert(Frames::open(self.means, &self.run.first.place.epoch, seqs).await?)
            }
        };
        let ends = || Error::damaged(format!("epoch {} ends before {at}", self.run.first.place.epoch));
        let (span, wal) = frames.next().await?.ok_or_else(ends)?;
        if span.start > at {
            return Err(Error::damaged(format!("epoch {} does not hold {at}", self.run.first.place.epoch)));
        }
        self.held = (span.start, wal);
        Ok(())
    }
}

fn differs(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    if ours == theirs {
        return None;
    }
    let first = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
    Some(first.unwrap_or(ours.len().min(theirs.len())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a range holds is linked to every other range that holds it, by comparisons that are made.
        #[test]
        fn what_two_ranges_hold_is_compared(ranges in prop::collection::vec((0u64..40, 0u64..20), 1..7)) {
            let ranges: Vec<_> = ranges.into_iter().map(|(from, length)| (Lsn(from), Lsn(from + length))).collect();
            let found = overlaps(&ranges);
            for at in (0..60).map(Lsn) {
                let holders: Vec<_> = (0..ranges.len()).filter(|n| ranges[*n].0 <= at && at < ranges[*n].1).collect();
                let links: Vec<_> = found.iter().filter(|overlap| overlap.from <= at && at < overlap.to).collect();
                prop_assert_eq!(links.len(), holders.len().saturating_sub(1));
                for (nth, holder) in holders.iter().enumerate().skip(1) {
                    let linked = |link: &&&Overlap| link.theirs == *holder && holders[..nth].contains(&link.ours);
                    prop_assert_eq!(links.iter().filter(linked).count(), 1);
                }
            }
        }
    }
}
