//! The memory of whoever runs schedules: which slots were begun, what became of them, and which regions know it.
//!
//! It lives in the state directory, so that an outage of every region can be recorded while it lasts, and moves into the
//! regions when they answer. Losing it costs the records that had not moved yet and, for slots that were running, the
//! word `interrupted`. What cannot be written is kept in memory and goes to the regions all the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::disk::lock::Lock;
use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::model::run::{Open, Pause, Run, parse_slot, slot_text};
use crate::model::{Error, Result, ResultExt, ScheduleName};
use crate::repository::records::runs::{self, Spread};

#[cfg(test)]
mod tests;
mod unwritten;

use unwritten::Unwritten;

/// What was known when the log was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// Slots without an outcome, ascending.
    pub open: Vec<Open>,
    /// Up to where every slot is accounted for.
    pub cursors: BTreeMap<ScheduleName, DateTime<Utc>>,
    /// Schedules that are paused, or were.
    pub pauses: BTreeMap<ScheduleName, Pause>,
}

/// The records in the state directory. One process has them at a time.
#[derive(Debug)]
pub struct RunLog {
    dir: PathBuf,
    unwritten: Mutex<Unwritten>,
    _lock: Lock,
}

const OPEN: &str = "open";
const DONE: &str = "done";
const CURSORS: &str = "cursors";
const PAUSED: &str = "paused";

impl RunLog {
    /// Opens the log and says what an earlier process left.
    ///
    /// # Errors
    /// Another daemon has this state directory, or it cannot be read.
    pub fn open(state_dir: &Path) -> Result<(Self, Memory)> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = state_dir.join("runs");
        for part in [OPEN, DONE, CURSORS, PAUSED] {
            let path = dir.join(part);
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|error| {
                let error = Error::failed(format!("create {}", path.display())).because(error);
                error.hint("set [repository] state_dir to a directory that drctl may write")
            })?;
        }
        let lock = Lock::acquire(&state_dir.join("daemon.lock")).map_err(|error| match error {
            DiskError::Locked { .. } => {
                Error::refused("another drctl daemon runs with this state directory").because(error)
            }
            error => error.into(),
        })?;
        let log = Self { dir, unwritten: Mutex::default(), _lock: lock };
        let memory = log.memory().during(|| "read the state directory")?;
        Ok((log, memory))
    }

    fn memory(&self) -> Result<Memory> {
        let mut memory = Memory::default();
        let named = |path: &Path| path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        for path in files(&self.dir.join(CURSORS))? {
            if let (Some(name), Some(slot)) = (named(&path), readable(&path, read_cursor(&path))) {
                memory.cursors.insert(name, slot);
            }
        }
        for path in files(&self.dir.join(PAUSED))? {
            if let (Some(name), Some(pause)) = (named(&path), readable(&path, read(&path))) {
                memory.pauses.insert(name, pause);
            }
        }
        for path in files(&self.dir.join(OPEN))? {
            let Some(open) = readable::<Open>(&path, read(&path)) else { continue };
            // Its outcome was recorded, and the process died before it could say so here.
            if self.path(DONE, &open.schedule, open.slot).exists() {
                remove(&path)?;
            } else {
                memory.open.push(open);
            }
        }
        // What has a record is accounted for, also if the cursor could not be written any more.
        for run in self.recorded()? {
            let cursor = memory.cursors.entry(run.schedule).or_insert(run.slot);
            *cursor = run.slot.max(*cursor);
        }
        memory.open.sort_by(|a, b| (a.slot, &a.schedule).cmp(&(b.slot, &b.schedule)));
        Ok(memory)
    }

    /// Notes that a slot waits or runs. When this returns, the slot will have an outcome whatever happens.
    ///
    /// # Errors
    /// It could not be written; it counts for as long as this process lives, and is written with whatever comes next.
    pub fn note(&self, open: &Open) -> Result<()> {
        self.write(|unwritten| unwritten.note(open))
    }

    /// Records what became of a slot. Only the first record of a slot counts.
    ///
    /// # Errors
    /// As [`Self::note`].
    pub fn record(&self, run: &Run) -> Result<()> {
        self.write(|unwritten| unwritten.record(run))
    }

    /// Notes that nothing is owed for any slot up to here but what is open. It moves forwards only: a slot that was skipped
    /// is recorded while an earlier one still runs.
    ///
    /// # Errors
    /// As [`Self::note`].
    pub fn settle(&self, schedule: &ScheduleName, slot: DateTime<Utc>) -> Result<()> {
        self.write(|unwritten| unwritten.settle(schedule, slot))
    }

    /// Takes back what [`Self::settle`] noted while the clock was wrong.
    ///
    /// # Errors
    /// As [`Self::note`].
    pub fn rewind(&self, schedule: &ScheduleName, slot: DateTime<Utc>) -> Result<()> {
        self.write(|unwritten| unwritten.rewind(schedule, slot))
    }

    /// Notes that a schedule is paused, or no longer.
    ///
    /// # Errors
    /// As [`Self::note`].
    pub fn pause(&self, schedule: &ScheduleName, pause: Option<&Pause>) -> Result<()> {
        self.write(|unwritten| unwritten.pause(schedule, pause))
    }

    /// Writes what could not be written before, and finds out whether anything can be.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn flush(&self) -> Result<()> {
        self.write(|_| {})?;
        Ok(place::place(&self.dir.join(".writable"), b"1", 0o600)?)
    }

    fn write(&self, change: impl FnOnce(&mut Unwritten)) -> Result<()> {
        let mut unwritten = self.unwritten();
        change(&mut unwritten);
        unwritten.flush(&self.dir)
    }

    fn unwritten(&self) -> MutexGuard<'_, Unwritten> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The records that are on disk.
    fn recorded(&self) -> Result<Vec<Run>> {
        let paths = files(&self.dir.join(DONE))?;
        Ok(paths.iter().filter_map(|path| readable(path, read(path))).collect())
    }

    /// Records that some region lacks.
    ///
    /// # Errors
    /// The state directory cannot be read.
    pub fn owed(&self) -> Result<Vec<Run>> {
        let unwritten = self.unwritten();
        let mut owed: Vec<_> = unwritten.records().cloned().collect();
        match self.recorded() {
            Ok(recorded) => owed.extend(recorded),
            // A directory that is gone keeps nothing from the regions that is still known.
            Err(error) if !owed.is_empty() => tracing::warn!(%error, "records of earlier slots are not brought"),
            Err(error) => return Err(error),
        }
        Ok(owed)
    }

    /// Brings records into every region and forgets those that all of them hold. Answers how many are still owed.
    ///
    /// # Errors
    /// This machine cannot sign, or the state directory failed.
    pub async fn spread(&self, context: &Context) -> Result<usize> {
        let mut owed = 0;
        for run in self.owed()? {
            let answers = runs::spread(&context.repository, context.writer()?, &run).await?;
            for (region, answer) in &answers {
                match answer {
                    Spread::Held => {}
                    Spread::Other => {
                        let (schedule, slot) = (&run.schedule, slot_text(run.slot));
                        tracing::error!(%region, %schedule, slot, "another daemon recorded this slot as well");
                    }
                    Spread::Owed(why) => tracing::info!(%region, schedule = %run.schedule, why, "a record is owed"),
                }
            }
            if answers.iter().any(|(_, answer)| matches!(answer, Spread::Owed(_))) {
                owed += 1;
            } else {
                let mut unwritten = self.unwritten();
                unwritten.spread(&run);
                remove(&self.path(DONE, &run.schedule, run.slot))?;
            }
        }
        Ok(owed)
    }

    fn path(&self, part: &str, schedule: &ScheduleName, slot: DateTime<Utc>) -> PathBuf {
        slot_path(&self.dir, part, schedule, slot)
    }
}

/// The newest slot of each schedule that any region knows.
///
/// # Errors
/// No region answers.
pub async fn newest_slots(context: &Context) -> Result<BTreeMap<ScheduleName, DateTime<Utc>>> {
    runs::newest_slots(&context.repository).await
}

/// What became of slots, as the regions tell it.
#[derive(Debug, Clone, Serialize)]
pub struct History {
    /// The newest first.
    pub runs: Vec<Run>,
    /// Records that no region holds intact.
    pub unreadable: Vec<String>,
}

/// The newest `count` records of one schedule, or of all.
///
/// # Errors
/// No region answers.
pub async fn history(context: &Context, only: Option<&ScheduleName>, count: usize) -> Result<History> {
    let (runs, errors) = runs::newest(&context.repository, only, count).await?;
    Ok(History { runs, unreadable: errors.iter().map(Error::to_string).collect() })
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>());
    let mut paths = entries.map_err(|error| unreadable(dir).because(error))?;
    // Half a file that a killed process left has a name of its own, which begins with a dot.
    paths.retain(|path| path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b".")));
    paths.sort();
    Ok(paths)
}

fn slot_path(dir: &Path, part: &str, schedule: &ScheduleName, slot: DateTime<Utc>) -> PathBuf {
    // Names of schedules have no dot.
    dir.join(part).join(format!("{schedule}.{}", slot_text(slot)))
}

/// What one file says. One that says nothing is set aside under a hidden name: the state directory is a cache, and the
/// regions tell the rest.
fn readable<T>(path: &Path, read: Result<T>) -> Option<T> {
    let error = match read {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".unreadable.{name}"));
    match place::rename(path, &aside) {
        Ok(()) => tracing::warn!(%error, aside = %aside.display(), "it is set aside, and what it said is not known"),
        Err(why) => tracing::warn!(%error, %why, "it cannot be set aside; what it says is not known"),
    }
    None
}

fn read_cursor(path: &Path) -> Result<DateTime<Utc>> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path).because(error))?;
    parse_slot(text.trim()).ok_or_else(|| unreadable(path).because("it holds no time"))
}

fn unreadable(path: &Path) -> Error {
    Error::failed(format!("{} cannot be read", path.display()))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|error| unreadable(path).because(error))?;
    serde_json::from_slice(&bytes).map_err(|error| unreadable(path).because(error))
}

fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::failed("a record is not JSON").because(error))
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    Ok(place::place(path, &to_json(value)?, 0o600)?)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::failed(format!("remove {}", path.display())).because(error))
        }
        _ => Ok(()),
    }
}
