//! Schedules: what is to be done when, as the files in `schedules/` say it. Pure: it knows no clock and draws no chance.

pub mod cron;
pub mod slots;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::{RegionName, ScheduleName, TargetName};

pub use cron::Cron;
pub use slots::Slots;

/// What a schedule can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Job {
    /// A base backup.
    Backup,
    /// A logical dump.
    Dump,
    /// A snapshot of files.
    Files,
    /// Streaming of WAL.
    Wal,
    /// A look at what is stored.
    Verify,
    /// A restore into a scratch cluster.
    Drill,
    /// Regions brought back to equal.
    Repair,
    /// Removal of what retention no longer wants.
    Prune,
    /// Frames of old WAL put together.
    Bundle,
    /// Repacking.
    Compact,
}

impl Job {
    /// Every job, also the one that has no schedule.
    pub const ALL: [Self; 10] = [
        Self::Backup,
        Self::Dump,
        Self::Files,
        Self::Wal,
        Self::Verify,
        Self::Drill,
        Self::Repair,
        Self::Prune,
        Self::Bundle,
        Self::Compact,
    ];

    /// The jobs that this version runs by schedule.
    pub const RUNNABLE: [Self; 9] = [
        Self::Backup,
        Self::Dump,
        Self::Files,
        Self::Verify,
        Self::Drill,
        Self::Repair,
        Self::Prune,
        Self::Compact,
        Self::Bundle,
    ];

    /// As people and files write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Dump => "dump",
            Self::Files => "files",
            Self::Wal => "wal",
            Self::Verify => "verify",
            Self::Drill => "drill",
            Self::Repair => "repair",
            Self::Prune => "prune",
            Self::Bundle => "bundle",
            Self::Compact => "compact",
        }
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How deep `verify` looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// Catalog and signatures.
    L0,
    /// Every object is there.
    L1,
    /// Every frame is opened.
    L2,
}

/// Which recovery point a drill takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pick {
    /// The newest.
    #[default]
    Latest,
    /// Any time between the oldest backup and the newest commit.
    Random,
    /// The oldest backup.
    Oldest,
}

/// A job with its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "job", rename_all = "lowercase")]
pub enum Work {
    /// A base backup.
    Backup {
        /// What is backed up.
        target: TargetName,
        /// Whether the server is asked for an immediate checkpoint.
        fast: bool,
        /// Whether every page is read to prove that change detection misses none.
        verify_detection: bool,
    },
    /// A logical dump.
    Dump {
        /// What is dumped.
        target: TargetName,
    },
    /// A snapshot of files.
    Files {
        /// What is read.
        target: TargetName,
    },
    /// A look at what is stored.
    Verify {
        /// One target; without it everything.
        target: Option<TargetName>,
        /// How deep.
        level: Depth,
        /// Whether every byte is compared with its digest.
        scrub: bool,
        /// One region; without it every one.
        region: Option<RegionName>,
    },
    /// A restore into a scratch cluster.
    Drill {
        /// What is rehearsed.
        target: TargetName,
        /// The region that is read; without it the last one of the configuration.
        region: Option<RegionName>,
        /// Which recovery point.
        select: Pick,
    },
    /// Regions brought back to equal.
    Repair {
        /// One target; without it everything.
        target: Option<TargetName>,
        /// One region; without it every one.
        region: Option<RegionName>,
        /// Whether names and sizes alone are compared.
        quick: bool,
    },
    /// Removal of what retention no longer wants, of every target.
    Prune,
    /// Copies of backups that need little of packs that are mostly dead.
    Compact {
        /// Of what.
        target: TargetName,
    },
    /// Frames of old WAL put together.
    Bundle {
        /// One target; without it everything.
        target: Option<TargetName>,
        /// Epochs that ended so long ago; without it the job's own measure.
        older_than: Option<Duration>,
    },
}

impl Work {
    /// Its kind.
    pub const fn job(&self) -> Job {
        match self {
            Self::Backup { .. } => Job::Backup,
            Self::Dump { .. } => Job::Dump,
            Self::Files { .. } => Job::Files,
            Self::Verify { .. } => Job::Verify,
            Self::Drill { .. } => Job::Drill,
            Self::Repair { .. } => Job::Repair,
            Self::Prune => Job::Prune,
            Self::Compact { .. } => Job::Compact,
            Self::Bundle { .. } => Job::Bundle,
        }
    }

    /// The target that it is about, if it is about one.
    pub const fn target(&self) -> Option<&TargetName> {
        match self {
            Self::Backup { target, .. }
            | Self::Dump { target }
            | Self::Files { target }
            | Self::Compact { target }
            | Self::Drill { target, .. } => Some(target),
            Self::Verify { target, .. } | Self::Repair { target, .. } | Self::Bundle { target, .. } => target.as_ref(),
            Self::Prune => None,
        }
    }
}

/// What becomes of slots that came while nobody could run them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CatchUp {
    /// They are missed.
    None,
    /// The newest one runs late, the others are missed.
    #[default]
    One,
}

/// What becomes of a slot that comes while the one before still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overlap {
    /// It is skipped.
    #[default]
    Skip,
    /// It waits; one at most.
    QueueOne,
}

/// What is done after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Retry {
    /// Attempts beside the first.
    pub max: u32,
    /// The time before the second attempt; it doubles with each further one.
    #[serde(skip)]
    pub pause: Duration,
}

/// One schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Its name.
    pub name: ScheduleName,
    /// For people.
    pub description: Option<String>,
    /// Whether it has slots at all.
    pub enabled: bool,
    /// What is to be done.
    pub work: Work,
    /// When.
    pub cron: Cron,
    /// In which zone.
    pub timezone: Tz,
    /// The longest that a start is put off, so that not everything starts in the same second.
    pub jitter: Duration,
    /// What becomes of late slots.
    pub catch_up: CatchUp,
    /// What becomes of slots that come too early.
    pub overlap: Overlap,
    /// The longest that one slot may run, all attempts together.
    pub timeout: Duration,
    /// What is done after a failure.
    pub retry: Retry,
    /// Another schedule, whose due slots end before one of this begins.
    pub after: Option<ScheduleName>,
    /// How old the newest success may become before somebody must look.
    pub max_age: Option<Duration>,
}

impl Schedule {
    /// The slots after an instant, strictly ascending; none when it is not enabled.
    pub fn slots_after(&self, after: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> + '_ {
        self.cron.slots_after(self.timezone, after).take_while(|_| self.enabled)
    }

    /// The slots in `(after, until]`.
    pub fn slots_between(
        &self,
        after: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> impl Iterator<Item = DateTime<Utc>> + '_ {
        self.slots_after(after).take_while(move |slot| *slot <= until)
    }

    /// When a slot is to start: its instant and its share of the jitter.
    pub fn start_of(&self, slot: DateTime<Utc>) -> DateTime<Utc> {
        slot + TimeDelta::from_std(jitter(&self.name, slot, self.jitter)).unwrap_or_default()
    }
}

/// A slot's share of a jitter: always the same for the same schedule and slot, on every host and after every restart, so
/// that a slot neither starts twice nor wanders.
pub fn jitter(name: &ScheduleName, slot: DateTime<Utc>, longest: Duration) -> Duration {
    let digest = Sha256::digest(format!("{name}\n{}", slot.timestamp()));
    let drawn = digest.iter().take(8).fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    let longest = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(drawn % longest.saturating_add(1).max(1))
}
