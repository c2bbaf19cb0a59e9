//! The memory of whoever runs schedules: which slots were begun, what became of them, and which regions know it.
//!
//! It lives in the state directory, so that an outage of every region can be recorded while it lasts, and moves into the
//! regions when they answer. Losing it costs the records that had not moved yet and, for slots that were running, the
//! word `interrupted`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::disk::lock::Lock;
use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::model::run::{Open, Pause, Run, parse_slot, slot_text};
use crate::model::{Error, Result, ResultExt, ScheduleName};
use crate::repository::runs::{self, Spread};

#[cfg(test)]
mod tests;

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
        let log = Self { dir, _lock: lock };
        let memory = log.memory().during(|| "read the state directory")?;
        Ok((log, memory))
    }

    fn memory(&self) -> Result<Memory> {
        let mut memory = Memory::default();
        for path in files(&self.dir.join(CURSORS))? {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path).because(error))?;
            if let Some(name) = name {
                memory.cursors.insert(name, parse_slot(text.trim()).ok_or_else(|| unreadable(&path))?);
            }
        }
        for path in files(&self.dir.join(PAUSED))? {
            if let Some(name) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) {
                memory.pauses.insert(name, read(&path)?);
            }
        }
        for path in files(&self.dir.join(OPEN))? {
            let open: Open = read(&path)?;
            // Its outcome was recorded, and the process died before it could say so here.
            if self.path(DONE, &open.schedule, open.slot).exists() {
                remove(&path)?;
            } else {
                memory.open.push(open);
            }
        }
        memory.open.sort_by(|a, b| (a.slot, &a.schedule).cmp(&(b.slot, &b.schedule)));
        Ok(memory)
    }

    /// Notes that a slot waits or runs. When this returns, the slot will have an outcome whatever happens.
    ///
    /// # Errors
    /// It could not be written.
    pub fn note(&self, open: &Open) -> Result<()> {
        write(&self.path(OPEN, &open.schedule, open.slot), open)?;
        self.settle(&open.schedule, open.slot)
    }

    /// Records what became of a slot. Only the first record of a slot counts.
    ///
    /// # Errors
    /// It could not be written.
    pub fn record(&self, run: &Run) -> Result<()> {
        let path = self.path(DONE, &run.schedule, run.slot);
        let bytes = to_json(run)?;
        match place::place_new(&path, &bytes, 0o600) {
            Ok(()) => {}
            // The same record, when an earlier call got no farther than this.
            Err(DiskError::Exists { .. }) if std::fs::read(&path).is_ok_and(|known| known == bytes) => {}
            Err(DiskError::Exists { .. }) => tracing::error!(path = %path.display(), "this slot has a record already"),
            Err(error) => return Err(error.into()),
        }
        self.settle(&run.schedule, run.slot)?;
        remove(&self.path(OPEN, &run.schedule, run.slot))
    }

    /// Notes that nothing is owed for any slot up to here but what is open. It moves forwards only: a slot that was skipped
    /// is recorded while an earlier one still runs.
    ///
    /// # Errors
    /// It could not be written.
    pub fn settle(&self, schedule: &ScheduleName, slot: DateTime<Utc>) -> Result<()> {
        let path = self.dir.join(CURSORS).join(schedule.as_str());
        let known = std::fs::read_to_string(&path).ok().and_then(|text| parse_slot(text.trim()));
        if known.is_none_or(|known| slot_text(known) < slot_text(slot)) {
            place::place(&path, slot_text(slot).as_bytes(), 0o600)?;
        }
        Ok(())
    }

    /// Takes back what [`Self::settle`] noted while the clock was wrong.
    ///
    /// # Errors
    /// It could not be written.
    pub fn rewind(&self, schedule: &ScheduleName, slot: DateTime<Utc>) -> Result<()> {
        Ok(place::place(&self.dir.join(CURSORS).join(schedule.as_str()), slot_text(slot).as_bytes(), 0o600)?)
    }

    /// Notes that a schedule is paused, or no longer.
    ///
    /// # Errors
    /// It could not be written.
    pub fn pause(&self, schedule: &ScheduleName, pause: Option<&Pause>) -> Result<()> {
        let path = self.dir.join(PAUSED).join(schedule.as_str());
        pause.map_or_else(|| remove(&path), |pause| write(&path, pause))
    }

    /// Records that some region lacks.
    ///
    /// # Errors
    /// The state directory cannot be read.
    pub fn owed(&self) -> Result<Vec<Run>> {
        files(&self.dir.join(DONE))?.iter().map(|path| read(path)).collect()
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
                remove(&self.path(DONE, &run.schedule, run.slot))?;
            }
        }
        Ok(owed)
    }

    fn path(&self, part: &str, schedule: &ScheduleName, slot: DateTime<Utc>) -> PathBuf {
        // Names of schedules have no dot.
        self.dir.join(part).join(format!("{schedule}.{}", slot_text(slot)))
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
