//! The writing side of the journal: sees every record that passes.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Chain, MAGIC, Stretch, print, scan};
use crate::disk::place;
use crate::model::{Clock, Error, Lsn, Result};
use crate::pg::wal::{ChangedBlocks, Record};
use crate::repository::backup::state::StateHead;
use crate::repository::wal::log::Log;

/// A backup that waits for its first position waits for this long at most, while WAL flows.
const PACE: Duration = Duration::from_millis(100);
/// As much as is held of pages that are not in the journal yet.
const HELD: usize = 4 << 20;
/// From here on a journal is made shorter.
const LONG: u64 = 16 << 20;

/// Notes what passes.
#[derive(Debug)]
pub(in crate::jobs::wal) struct Tracker {
    path: PathBuf,
    /// The page map of the newest backup: what it holds the next one compares with.
    pages: PathBuf,
    clock: Arc<dyn Clock>,
    /// The journal, once it could be opened.
    file: Option<File>,
    chain: Chain,
    bytes: u64,
    shorten_at: u64,
    long: u64,
    /// The unbroken stretch up to the last record seen.
    run: Option<Stretch>,
    /// The first position that the journal does not have.
    unsaved: Lsn,
    changed: ChangedBlocks,
    saved_at: Duration,
    /// The history that this session is of, and where it began, until its first record.
    opening: Option<Lsn>,
    log: Option<Log>,
}

impl Tracker {
    /// Goes on with the journal of earlier runs, if there is one.
    pub(in crate::jobs::wal) fn open(path: PathBuf, pages: PathBuf, clock: Arc<dyn Clock>) -> Self {
        let saved_at = clock.monotonic();
        let mut tracker = Self {
            path,
            pages,
            clock,
            file: None,
            chain: [0; 32],
            bytes: 0,
            shorten_at: LONG,
            long: LONG,
            run: None,
            unsaved: Lsn::INVALID,
            changed: ChangedBlocks::default(),
            saved_at,
            opening: None,
            log: None,
        };
        if let Err(error) = tracker.attach() {
            tracker.give_up(&error.to_string());
        }
        tracker
    }

    /// Opens the file behind its last good entry.
    fn attach(&mut self) -> Result<()> {
        let trouble = |error| Error::failed(format!("open {}", self.path.display())).because(error);
        let found = scan(&self.path, |_, _, _, _| Some(())).ok().filter(|found| found.bytes > 0);
        let mut options = OpenOptions::new();
        let mut file = options.append(true).create(true).mode(0o600).open(&self.path).map_err(trouble)?;
        let bytes = found.as_ref().map_or(0, |found| found.bytes);
        file.set_len(bytes).map_err(trouble)?;
        if bytes == 0 {
            file.write_all(MAGIC).map_err(trouble)?;
        }
        self.bytes = bytes.max(MAGIC.len() as u64);
        self.chain = found.as_ref().map_or([0; 32], |found| found.chain);
        self.run = found.and_then(|found| found.run).map(|run| Stretch { anew: false, ..run });
        self.unsaved = self.run.as_ref().map_or(Lsn::INVALID, |run| run.to);
        self.changed = ChangedBlocks::default();
        self.file = Some(file);
        Ok(())
    }

    /// A session begins at `start` of `log`.
    pub(in crate::jobs::wal) fn begin(&mut self, log: &Log, start: Lsn) {
        self.save();
        if self.file.is_none()
            && let Err(error) = self.attach()
        {
            tracing::debug!(%error, "changed pages are not noted");
        }
        (self.log, self.opening) = (Some(log.clone()), Some(start));
    }

    /// The next record of the session.
    pub(in crate::jobs::wal) fn see(&mut self, record: &Record) {
        let Some(log) = self.log.take() else { return };
        self.see_in(record, &log);
        self.log = Some(log);
    }

    fn see_in(&mut self, record: &Record, log: &Log) {
        let opening = self.opening.take();
        if !self.run.as_ref().is_some_and(|run| continues(run, log, record, opening)) {
            self.break_off();
            // Nothing is known of what was before this record.
            self.run = Some(Stretch {
                system_id: log.system_id,
                timeline: log.timeline,
                branch: log.branch.clone(),
                from: record.start,
                to: record.start,
                last: Lsn::INVALID,
                anew: true,
            });
            self.unsaved = record.start;
        }
        self.unsaved = self.unsaved.min(record.start);
        for touch in &record.touched {
            if let Err(why) = self.changed.add(touch) {
                tracing::info!(lsn = %record.start, why, "what changed here is unknown: the next backup reads every page");
                self.break_off();
                return;
            }
        }
        if let Some(run) = &mut self.run {
            (run.to, run.last) = (record.end, record.start);
        }
    }

    /// What comes next does not join what was seen.
    fn break_off(&mut self) {
        self.save();
        self.run = None;
        self.changed = ChangedBlocks::default();
    }

    /// Saves if it is time to.
    pub(in crate::jobs::wal) fn save_in_time(&mut self) {
        let late = self.clock.monotonic().saturating_sub(self.saved_at) >= PACE;
        if late || self.changed.weight() >= HELD {
            self.save();
        }
    }

    /// Appends what was seen since the last time. Called before WAL is shipped: whoever resumes behind it must find it here.
    pub(in crate::jobs::wal) fn save(&mut self) {
        let Some(run) = self.run.as_ref().filter(|run| run.to != self.unsaved && run.last > Lsn::INVALID) else {
            return;
        };
        self.saved_at = self.clock.monotonic();
        let entry = Stretch { from: self.unsaved, ..run.clone() };
        if let Some(run) = &mut self.run {
            run.anew = false;
        }
        let changed = std::mem::take(&mut self.changed);
        self.unsaved = entry.to;
        if let Err(error) = self.append(&entry, &changed).and_then(|()| self.shorten()) {
            self.give_up(&error.to_string());
        }
    }

    fn append(&mut self, entry: &Stretch, changed: &ChangedBlocks) -> Result<()> {
        // Without a journal nothing is kept; the next session tries again.
        let Some(file) = &mut self.file else { return Ok(()) };
        let (bytes, chain) = print(entry, changed, &self.chain).ok_or_else(|| Error::failed("an entry is too long"))?;
        file.write_all(&bytes).map_err(|error| Error::failed("write the journal").because(error))?;
        (self.chain, self.bytes) = (chain, self.bytes + bytes.len() as u64);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn shorten_beyond(&mut self, bytes: u64) {
        self.shorten_at = bytes;
        self.long = bytes;
    }

    /// Puts all entries of the unbroken stretch into one, without those that no backup will ask for any more.
    fn shorten(&mut self) -> Result<()> {
        if self.bytes < self.shorten_at {
            return Ok(());
        }
        let compared = StateHead::read(&self.pages).and_then(|head| head.start_lsn).unwrap_or(Lsn::INVALID);
        let (mut kept, mut changed): (Option<Stretch>, _) = (None, ChangedBlocks::default());
        let collect = |run: &Stretch, entry: &Stretch, joins: bool, blocks: &[u8]| {
            if !joins || entry.to <= compared {
                (kept, changed) = (Some(Stretch { from: entry.to, ..run.clone() }), ChangedBlocks::default());
            }
            if entry.to > compared {
                let from = kept.as_ref().filter(|_| joins).map_or(entry.from, |kept| kept.from.min(entry.from));
                kept = Some(Stretch { from, ..entry.clone() });
                changed.merge(&ChangedBlocks::decode(blocks)?);
            }
            Some(())
        };
        let unreadable = |error| Error::failed("read the journal").because(error);
        scan(&self.path, collect).map_err(unreadable)?;
        let mut bytes = MAGIC.to_vec();
        if let Some(stretch) = kept {
            let (entry, _) =
                print(&stretch, &changed, &[0; 32]).ok_or_else(|| Error::failed("an entry is too long"))?;
            bytes.extend_from_slice(&entry);
        }
        place::place(&self.path, &bytes, 0o600)?;
        let run = self.run.take();
        self.attach()?;
        let whole = self.run.as_ref().zip(run.as_ref()).is_some_and(|(found, run)| found.to == run.to);
        if !whole {
            return Err(Error::damaged("the journal is not what was written"));
        }
        // Where it begins now; what was seen in memory alone is nothing, because it was saved just before.
        self.shorten_at = self.long.max(2 * self.bytes);
        Ok(())
    }

    /// Costs the next backup its map, and nothing else.
    fn give_up(&mut self, why: &str) {
        tracing::warn!(path = %self.path.display(), why, "changed pages are not noted: the next backup reads every page");
        (self.file, self.run) = (None, None);
        self.changed = ChangedBlocks::default();
    }
}

/// Whether a record goes on with what was seen. Its own word for the record before is what proves it: a position alone
/// would also fit a server that was set back and wrote something else.
fn continues(run: &Stretch, log: &Log, record: &Record, opening: Option<Lsn>) -> bool {
    let same = (run.system_id, run.timeline, &run.branch) == (log.system_id, log.timeline, &log.branch);
    // A new session may begin before the end of what was seen, and repeats it.
    let repeats = opening.is_some() && (run.from..=run.last).contains(&record.start);
    same && (record.previous == run.last || repeats)
}
