//! The words of a promotion, as its order and its answer carry them.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{Lsn, RegionName, ReportId, TargetName, Timeline};

/// How it is to be promoted.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Although WAL may be missing.
    pub accept_loss: bool,
    /// Although the primary may live: somebody else keeps clients away from it.
    #[serde(default)]
    pub primary_lives: bool,
}

/// What may be overridden.
#[derive(Debug, Clone, Copy, Default)]
pub struct Overrides {
    /// The primary may live: somebody else keeps clients away from it.
    pub primary_lives: bool,
    /// WAL may be missing.
    pub accept_loss: bool,
}

/// What promotion came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Promoted {
    /// Whose standby it was.
    pub target: TargetName,
    /// Its data directory.
    pub directory: PathBuf,
    /// The end of what was stored: all of it is back.
    pub recovered_to: Lsn,
    /// Where the new timeline began.
    pub switch: Lsn,
    /// The old timeline is stored up to here by now: what lies behind `switch` is not in this server.
    #[serde(default)]
    pub lost_to: Option<Lsn>,
    /// The timeline that was followed.
    pub old_timeline: Timeline,
    /// The timeline that it writes.
    pub timeline: Timeline,
    /// The newest commit that is back, if it is known.
    pub last_commit: Option<DateTime<Utc>>,
    /// When the newest WAL was stored: what the primary committed later and did not ship is not back.
    pub stored_at: Option<DateTime<Utc>>,
    /// Regions that could not be asked.
    pub silent: Vec<RegionName>,
    /// How long each phase took: `drain`, `promote`.
    pub phases: Vec<(String, f64)>,
    /// Seconds in all.
    pub seconds: f64,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// What to do next.
    pub next: Vec<String>,
    /// The name of the record of this in the regions.
    #[serde(default)]
    pub stored_as: Option<ReportId>,
    /// The file with the record, where this machine cannot sign one for the regions.
    #[serde(default)]
    pub record: Option<PathBuf>,
}
