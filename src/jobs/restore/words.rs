//! The words of a plan, as `--json` shows them.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::restore::target::Point;
use crate::jobs::status::Prediction;
use crate::model::{BackupId, Branch, Lsn, RegionName, SystemId, TargetName, Timeline};

/// Everything that a restore will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Identifies the plan; its first six digits are enough.
    pub digest: String,
    /// The backup.
    pub backup: BackupId,
    /// What was backed up.
    pub target: TargetName,
    /// When the backup ended.
    pub backup_finished_at: DateTime<Utc>,
    /// The point that was asked for.
    pub point: Point,
    /// The regions in the order in which they are read, and what they lack.
    pub regions: Vec<RegionState>,
    /// The WAL to replay.
    pub wal: Vec<WalLeg>,
    /// Where the backup is consistent.
    pub consistent_at: Lsn,
    /// Start of the last record that is replayed.
    pub last_record: Lsn,
    /// End of that record.
    pub end_lsn: Lsn,
    /// The timeline aimed at.
    pub timeline: Timeline,
    /// The newest commit that comes back, if it is known.
    pub last_commit: Option<DateTime<Utc>>,
    /// The newest commit that the regions hold, if it is known.
    pub newest_commit: Option<DateTime<Utc>>,
    /// WAL that exists and cannot be reached.
    pub unreachable: Option<String>,
    /// Newer timelines that nobody asked for and that only the history is stored of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_followed: Vec<String>,
    /// Bytes to fetch for the base, at most.
    pub fetch_bytes: u64,
    /// Bytes of WAL to replay.
    pub wal_bytes: u64,
    /// Bytes to write: the data directory, and the staged WAL.
    pub write_bytes: (u64, u64),
    /// How WAL reaches recovery.
    pub feed: Feed,
    /// What stands there already, if that is to be reused.
    pub reuse: Option<Reuse>,
    /// Free space where the directory is to stand.
    pub free_bytes: Option<u64>,
    /// Seconds that this takes: as predicted, or at the assumed rate.
    pub expected_seconds: u64,
    /// From the drills that passed; `null` = none has measured it.
    pub predicted: Option<Prediction>,
    /// The rate that is assumed without a drill, bytes per second.
    pub assumed_rate: u64,
    /// What opened the keyset just now.
    pub opens_with: Option<String>,
    /// What must be installed.
    pub needs: Needs,
    /// The data directory.
    pub directory: PathBuf,
    /// Where tablespaces come to stand: location on the source, directory here.
    pub tablespaces: Vec<(String, Option<PathBuf>)>,
    /// Whether PostgreSQL is started.
    pub start: bool,
    /// What stands in the way.
    pub refused: Vec<Refusal>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// The command that runs this plan; absent when something stands in the way.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub command: String,
}

/// How WAL reaches recovery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Feed {
    /// All of it is written beside the data directory first, and goes after promotion.
    #[default]
    Staged,
    /// drctl serves it as a primary would, and PostgreSQL keeps what it needs.
    Streamed,
}

/// What a restore over an existing data directory finds there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Reuse {
    /// Files of the backup that stand there.
    pub files: u64,
    /// The most that may stay of them; which pages do is seen when they are compared.
    pub bytes: u64,
    /// Files that the backup does not have, and that are removed.
    pub remove_files: u64,
    /// Their bytes.
    pub remove_bytes: u64,
    /// Those of them that are the server's logs.
    pub remove_logs: u64,
    /// The names of some.
    pub examples: Vec<String>,
}

/// A region and what it lacks of the backup.
#[derive(Debug, Clone, Serialize)]
pub struct RegionState {
    /// The region.
    pub name: RegionName,
    /// Objects that it lacks or holds with a wrong size.
    pub missing: usize,
    /// Why it could not be read.
    pub unreadable: Option<String>,
}

/// WAL of one timeline.
#[derive(Debug, Clone, Serialize)]
pub struct WalLeg {
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// First byte.
    pub from: Lsn,
    /// Behind the last byte.
    pub to: Lsn,
    /// How many.
    pub bytes: u64,
}

/// What the restored cluster needs on its machine.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Needs {
    /// PostgreSQL's major version.
    pub major: u32,
    /// `server_version_num` of the source.
    pub server_version: u32,
    /// Where that version is installed here.
    pub found_at: Option<PathBuf>,
    /// Extensions.
    pub extensions: Vec<String>,
    /// `shared_preload_libraries` of the source.
    pub preload: String,
    /// Collation providers and their versions on the source; others here mean: reindex.
    pub collations: Vec<String>,
}

/// Why the plan cannot run.
#[derive(Debug, Clone, Serialize)]
pub struct Refusal {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
    /// What to do.
    pub next: String,
    /// Whether it says something of what is stored, and not of this machine or of what is away just now.
    #[serde(skip)]
    pub judges: bool,
}
