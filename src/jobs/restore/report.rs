//! What came of a restore, as `--json` shows it.

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::{BackupId, Lsn, ReportId, TargetName, Timeline};
use crate::repository::regions::Incident;

/// What a restore came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The plan that was run.
    pub plan: String,
    /// The backup.
    pub backup: BackupId,
    /// What was backed up.
    pub target: TargetName,
    /// The data directory.
    pub directory: PathBuf,
    /// End of the last record that is or will be replayed.
    pub recovered_to: Lsn,
    /// The timeline that was followed.
    pub timeline: Timeline,
    /// The newest commit that came back, if it is known.
    pub last_commit: Option<DateTime<Utc>>,
    /// How long everything took.
    pub phases: Vec<PhaseTime>,
    /// Seconds in all.
    pub seconds: f64,
    /// The running server, if it was to be started.
    pub started: Option<Started>,
    /// Objects that were taken from another region.
    pub incidents: Vec<Incident>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// What to do next.
    pub next: Vec<String>,
    /// The name of the record of this in the regions.
    pub stored_as: Option<ReportId>,
    /// The file with the record, where this machine cannot sign one for the regions.
    pub record: Option<PathBuf>,
}

/// A phase and what it moved.
#[derive(Debug, Clone, Serialize)]
pub struct PhaseTime {
    /// `fetch`, `stage`, `replay`, `open`.
    pub name: &'static str,
    /// How long.
    pub seconds: f64,
    /// Bytes, if it moves any.
    pub bytes: Option<u64>,
    /// Bytes fetched from the regions, if that is another number.
    pub fetched_bytes: Option<u64>,
    /// Bytes that stood there already, of a restore that reuses what it finds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reused_bytes: Option<u64>,
}

/// A server that was started.
#[derive(Debug, Clone, Serialize)]
pub struct Started {
    /// Its postmaster.
    pub pid: u32,
    /// What it printed.
    pub log: PathBuf,
}

impl PhaseTime {
    /// A phase that took this long.
    pub const fn new(name: &'static str, took: Duration) -> Self {
        Self { name, seconds: took.as_secs_f64(), bytes: None, fetched_bytes: None, reused_bytes: None }
    }

    pub(super) const fn of(mut self, bytes: u64) -> Self {
        self.bytes = Some(bytes);
        self
    }
}
