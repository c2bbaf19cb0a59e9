//! What is protected, and what was promised of it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::config::drill::Assertion;
use crate::config::retention::Retention;
use crate::config::secret::Secret;
use crate::config::show;
use crate::model::TargetName;
use crate::model::pattern::Pattern;

impl show::Named for Target {
    fn name(&self) -> &str {
        self.name.as_str()
    }
}

/// `[targets.NAME]`: one protected thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Its name.
    #[serde(skip)]
    pub name: TargetName,
    /// What is measured against.
    #[serde(flatten)]
    pub objectives: Objectives,
    /// What it is.
    #[serde(flatten)]
    pub source: Source,
    /// What is kept of it; `None` keeps everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// What holds in every good copy of it; drills ask.
    #[serde(serialize_with = "show::by_name", skip_serializing_if = "Vec::is_empty")]
    pub assertions: Vec<Assertion>,
}

/// What the owner of a target was promised; nothing promised is nothing violated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Objectives {
    /// The most that may be lost.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub rpo: Option<Duration>,
    /// The longest that a restore from backup may take.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub rto_restore: Option<Duration>,
    /// The longest that a failover to a standby may take.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub rto_failover: Option<Duration>,
}

/// The kind of a target and its own keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "source", rename_all = "lowercase")]
pub enum Source {
    /// A PostgreSQL cluster, physically.
    Postgres(Box<PostgresTarget>),
    /// The databases of a PostgreSQL server, logically.
    Dump(Box<DumpTarget>),
    /// Directories.
    Files(FilesTarget),
}

impl Source {
    /// The word for it.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Postgres(_) => "postgres",
            Self::Dump(_) => "dump",
            Self::Files(_) => "files",
        }
    }
}

/// Directories.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FilesTarget {
    /// Directories or files, absolute.
    pub roots: Vec<PathBuf>,
    /// Only what these cover; none listed means everything.
    pub include: Vec<Pattern>,
    /// Never what these cover.
    pub exclude: Vec<Pattern>,
}

/// The databases of a PostgreSQL server, logically.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DumpTarget {
    /// libpq keywords or a URI, without a password.
    pub conninfo: String,
    /// The password; `None` leaves it to the server's own way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// The databases; none listed means all that may be connected to.
    pub databases: Vec<String>,
    /// Whether roles and tablespaces are dumped as well.
    pub globals: bool,
    /// Where `pg_dump` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bin_dir: Option<PathBuf>,
    /// Only these schemas, as patterns of `pg_dump`.
    pub schemas: Vec<String>,
    /// Not these schemas.
    pub exclude_schemas: Vec<String>,
    /// Only these tables.
    pub tables: Vec<String>,
    /// Not these tables.
    pub exclude_tables: Vec<String>,
    /// These tables without their rows.
    pub exclude_table_data: Vec<String>,
    /// How long a lock on a table is waited for.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub lock_wait_timeout: Option<Duration>,
}

/// A PostgreSQL cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PostgresTarget {
    /// libpq keywords or a URI, without a password.
    pub conninfo: String,
    /// The password; `None` leaves it to the server's own way (peer, certificate, password file).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// How the data directory is read.
    pub method: Method,
    /// How a base backup finds the pages that changed.
    pub detection: Detection,
    /// After this time a base backup stores every page again.
    #[serde(serialize_with = "show::duration")]
    pub full_every: Duration,
    /// The data directory, where the server's own answer does not fit (another mount, another container).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// A standby on this machine whose files are read instead of the primary's, when it can be; libpq keywords or a URI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// How long a backup waits for the standby to reach its start.
    #[serde(serialize_with = "show::duration")]
    pub standby_patience: Duration,
    /// The replication slot.
    pub slot: String,
    /// The longest that received WAL waits before it is shipped.
    #[serde(serialize_with = "show::duration")]
    pub ship_interval: Duration,
    /// Bytes per second read from the data directory; `None` = no limit.
    #[serde(serialize_with = "show::optional_size", skip_serializing_if = "Option::is_none")]
    pub max_read_rate: Option<u64>,
    /// What to do when the slot fills the server's disk; `None` = nobody decided, which `check` fails unless the server
    /// guards itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_pressure: Option<OnPressure>,
    /// Percent of the space for WAL at which `on_pressure` acts.
    pub pressure_percent: u8,
    /// The space for WAL on the server, where it cannot be measured.
    #[serde(serialize_with = "show::optional_size", skip_serializing_if = "Option::is_none")]
    pub wal_disk_bytes: Option<u64>,
    /// Whether the slot is kept on the standbys among the servers of `conninfo`, too.
    pub standby_slots: bool,
    /// Whether its WAL is streamed; else `archive_command` alone brings it.
    pub stream: bool,
    /// Whether the heartbeat row is written while WAL is streamed.
    pub heartbeat: bool,
    /// Whether commits wait for the regions.
    pub sync: bool,
    /// The socket on which the WAL receiver of this target answers.
    pub control_socket: PathBuf,
    /// Further configuration files to capture, as glob patterns on the server's machine.
    pub config_files: Vec<String>,
    /// The database that holds the heartbeat row.
    pub heartbeat_database: String,
}

/// How the data directory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Local when the data directory can be read here, else stream.
    Auto,
    /// From the file system of this machine.
    Local,
    /// Through the replication protocol.
    Stream,
}

/// How a base backup finds the pages that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Detection {
    /// It reads every page.
    Read,
    /// From the WAL receiver, else from PostgreSQL's summaries, else by reading.
    Auto,
    /// From the WAL receiver, else by reading.
    Wal,
    /// From PostgreSQL's summaries, else by reading.
    Summaries,
}

/// What to do when the slot fills the server's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPressure {
    /// Keep the slot and alarm: no gap, and the server may stop for lack of space.
    Keep,
    /// Drop the slot: the server lives, and a gap in the WAL is recorded.
    DropSlot,
}
