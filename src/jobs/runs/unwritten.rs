//! What is to be written into the state directory and is not there yet: nothing for long, unless the disk is full or gone.
//! It is bounded by the schedules, but for records that no region takes either.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use chrono::{DateTime, Utc};

use super::{CURSORS, DONE, OPEN, PAUSED, read_cursor, remove, slot_path, to_json, write};
use crate::disk::{DiskError, place};
use crate::model::run::{Open, Pause, Run, slot_text};
use crate::model::{Result, ScheduleName};

type Slot = (ScheduleName, DateTime<Utc>);

#[derive(Debug, Default)]
pub(super) struct Unwritten {
    done: BTreeMap<Slot, Run>,
    open: BTreeMap<Slot, Open>,
    /// Slots that are not open any more.
    closed: BTreeSet<Slot>,
    cursors: BTreeMap<ScheduleName, Cursor>,
    pauses: BTreeMap<ScheduleName, Option<Pause>>,
}

#[derive(Debug, Clone, Copy)]
struct Cursor {
    at: DateTime<Utc>,
    /// Whatever the file says; else it only moves forwards.
    forced: bool,
}

impl Unwritten {
    pub(super) fn note(&mut self, open: &Open) {
        let slot = (open.schedule.clone(), open.slot);
        self.closed.remove(&slot);
        self.open.insert(slot, open.clone());
        self.settle(&open.schedule, open.slot);
    }

    pub(super) fn record(&mut self, run: &Run) {
        let slot = (run.schedule.clone(), run.slot);
        self.open.remove(&slot);
        self.closed.insert(slot.clone());
        self.done.entry(slot).or_insert_with(|| run.clone());
        self.settle(&run.schedule, run.slot);
    }

    pub(super) fn settle(&mut self, schedule: &ScheduleName, at: DateTime<Utc>) {
        let cursor = self.cursors.entry(schedule.clone()).or_insert(Cursor { at, forced: false });
        cursor.at = cursor.at.max(at);
    }

    pub(super) fn rewind(&mut self, schedule: &ScheduleName, at: DateTime<Utc>) {
        self.cursors.insert(schedule.clone(), Cursor { at, forced: true });
    }

    pub(super) fn pause(&mut self, schedule: &ScheduleName, pause: Option<&Pause>) {
        self.pauses.insert(schedule.clone(), pause.cloned());
    }

    /// Records that are in memory alone.
    pub(super) fn records(&self) -> impl Iterator<Item = &Run> {
        self.done.values()
    }

    /// Every region holds this record.
    pub(super) fn spread(&mut self, run: &Run) {
        self.done.remove(&(run.schedule.clone(), run.slot));
    }

    /// Writes it, in an order in which a process that dies between any two writes leaves each slot open or recorded:
    /// outcomes before their slots are closed, and cursors last.
    pub(super) fn flush(&mut self, dir: &Path) -> Result<()> {
        while let Some(entry) = self.done.first_entry() {
            let (schedule, slot) = entry.key();
            record(&slot_path(dir, DONE, schedule, *slot), entry.get())?;
            entry.remove();
        }
        while let Some(entry) = self.open.first_entry() {
            let (schedule, slot) = entry.key();
            write(&slot_path(dir, OPEN, schedule, *slot), entry.get())?;
            entry.remove();
        }
        while let Some(entry) = self.cursors.first_entry() {
            settle(&dir.join(CURSORS).join(entry.key().as_str()), *entry.get())?;
            entry.remove();
        }
        while let Some((schedule, slot)) = self.closed.first() {
            remove(&slot_path(dir, OPEN, schedule, *slot))?;
            self.closed.pop_first();
        }
        while let Some(entry) = self.pauses.first_entry() {
            let path = dir.join(PAUSED).join(entry.key().as_str());
            entry.get().as_ref().map_or_else(|| remove(&path), |pause| write(&path, pause))?;
            entry.remove();
        }
        Ok(())
    }
}

fn record(path: &Path, run: &Run) -> Result<()> {
    let bytes = to_json(run)?;
    match place::place_new(path, &bytes, 0o600) {
        Ok(()) => Ok(()),
        // The same record, when an earlier call got no farther than this.
        Err(DiskError::Exists { .. }) if std::fs::read(path).is_ok_and(|known| known == bytes) => Ok(()),
        Err(DiskError::Exists { .. }) => {
            tracing::error!(path = %path.display(), "this slot has a record already");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn settle(path: &Path, cursor: Cursor) -> Result<()> {
    let known = read_cursor(path).ok().filter(|_| !cursor.forced);
    if known.is_none_or(|known| slot_text(known) < slot_text(cursor.at)) {
        place::place(path, slot_text(cursor.at).as_bytes(), 0o600)?;
    }
    Ok(())
}
