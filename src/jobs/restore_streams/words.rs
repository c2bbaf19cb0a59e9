//! The words of a plan and of its end, as `--json` shows them.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::restore::{PhaseTime, Refusal, RegionState};
use crate::model::{BackupId, Error, Result, TargetName};
use crate::repository::backup::stream::StreamLine;
use crate::repository::regions::Incident;

/// Everything that a restore will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Identifies the plan; its first six digits are enough.
    pub digest: String,
    /// The backup.
    pub backup: Backup,
    /// Where it goes.
    pub destination: Destination,
    /// The regions in the order in which they are read, and what they lack.
    pub regions: Vec<RegionState>,
    /// Bytes to fetch, at most.
    pub fetch_bytes: u64,
    /// Bytes to write, at most: holes take none.
    pub write_bytes: u64,
    /// Free space where a directory is to stand.
    pub free_bytes: Option<u64>,
    /// What opened the keyset just now.
    pub opens_with: Option<String>,
    /// What stands in the way.
    pub refused: Vec<Refusal>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// The command that runs this plan; absent when something stands in the way.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub command: String,
}

/// What is restored.
#[derive(Debug, Clone, Serialize)]
pub struct Backup {
    /// The backup.
    pub id: BackupId,
    /// What was backed up.
    pub target: TargetName,
    /// `dump` or `files`.
    pub kind: &'static str,
    /// When it was complete.
    pub finished_at: DateTime<Utc>,
    /// What was there at this moment comes back.
    pub recovery_point: DateTime<Utc>,
    /// The streams that are read.
    pub streams: Vec<StreamLine>,
}

/// Where it goes.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "to", rename_all = "snake_case")]
pub enum Destination {
    /// The tree of an archive, below a directory.
    Tree {
        /// The directory.
        directory: PathBuf,
    },
    /// The streams as files in a directory.
    StreamFiles {
        /// The directory.
        directory: PathBuf,
    },
    /// A database.
    Database {
        /// Its name.
        name: String,
        /// The server, without secrets.
        server: String,
        /// The database that was dumped.
        from: String,
        /// Whether it is made.
        create: bool,
        /// Whether all of it happens in one transaction.
        one_transaction: bool,
    },
}

impl Plan {
    /// As people type it.
    pub fn short_digest(&self) -> &str {
        self.digest.get(..6).unwrap_or(&self.digest)
    }

    /// An error if something stands in the way.
    ///
    /// # Errors
    /// The refusals.
    pub fn refuse(&self) -> Result<()> {
        let Some(first) = self.refused.first() else { return Ok(()) };
        let error = Error::refused(format!("{} is not restored: {}", self.backup.id, first.what));
        let rest = self.refused.iter().map(|refusal| format!("{}: {}", refusal.what, refusal.why));
        Err(rest.fold(error, |error, refusal| error.because(refusal)).hint(first.next.clone()))
    }

    pub(super) fn refuse_because(&mut self, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.refused.push(Refusal { what: what.into(), why: why.into(), next: next.into(), judges: false });
    }
}

/// What a restore came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The plan that was run.
    pub plan: String,
    /// The backup.
    pub backup: Backup,
    /// Where it went.
    pub destination: Destination,
    /// How long everything took.
    pub phases: Vec<PhaseTime>,
    /// Seconds in all.
    pub seconds: f64,
    /// Objects that were taken from another region.
    pub incidents: Vec<Incident>,
    /// What is not as it was, and what the backup says of itself.
    pub warnings: Vec<String>,
    /// What to do next.
    pub next: Vec<String>,
}
