//! What every job works with. Built once by `app`; a job sees no bucket and no key.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Clock, Error, Result, Rng, TargetName};
use crate::observe::progress::Progress;
use crate::pg::conninfo::ConnInfo;
use crate::repository::handle::{Repository, Writer};
use crate::repository::keysets::KeyRing;
use crate::source::postgres::Method;

/// The hands of a job.
#[derive(Debug, Clone)]
pub struct Context {
    /// The open repository, its regions in the order of preference.
    pub repository: Repository,
    /// Signer and key holders; absent on a machine that only reads.
    pub writer: Option<Writer>,
    /// Opens keysets; without openers it says so when asked.
    pub ring: Arc<KeyRing>,
    /// Everything that the configuration protects.
    pub targets: Vec<Target>,
    /// zstd levels.
    pub levels: Levels,
    /// Bytes that a pack stays within.
    pub pack_size: usize,
    /// Caches, locks, the signer's key.
    pub state_dir: PathBuf,
    /// Where scratch clusters live.
    pub scratch: ScratchPlace,
    /// Accounts that may use the sockets beside their own and root.
    pub guests: Vec<String>,
    /// What is going on, for whoever draws it.
    pub progress: Progress,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub rng: Arc<dyn Rng>,
}

/// Where scratch clusters live.
#[derive(Debug, Clone)]
pub struct ScratchPlace {
    /// The directory; each drill has one of its own below it.
    pub directory: PathBuf,
    /// The account that they run as, when drctl is root.
    pub run_as: Option<String>,
}

/// zstd levels by kind of data.
#[derive(Debug, Clone, Copy)]
pub struct Levels {
    /// Pages.
    pub pages: i32,
    /// Dumps and files.
    pub dumps: i32,
    /// WAL.
    pub wal: i32,
}

/// One protected PostgreSQL cluster.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its name.
    pub name: TargetName,
    /// What was promised.
    pub objectives: Objectives,
    /// How to reach it, password included.
    pub conninfo: ConnInfo,
    /// How base backups are read.
    pub method: Method,
    /// The data directory, if it is not the one that the server names.
    pub data_dir: Option<PathBuf>,
    /// Its replication slot.
    pub slot: String,
    /// The longest that WAL waits before it is shipped.
    pub ship_interval: Duration,
    /// Bytes per second that base backups may read.
    pub max_read_rate: Option<u64>,
    /// Whether something is to happen when the slot fills the server's disk: `keep` or `drop-slot`.
    pub on_pressure: Option<String>,
    /// The size of the server's WAL disk, if it cannot be asked.
    pub wal_disk_bytes: Option<u64>,
    /// Whether its WAL is streamed; else `archive_command` alone brings it.
    pub stream: bool,
    /// Whether the heartbeat row is written while WAL is streamed.
    pub heartbeat: bool,
    /// Where the WAL receiver of this target answers.
    pub control_socket: PathBuf,
    /// Further configuration files to capture, as globs.
    pub config_files: Vec<String>,
    /// The database that holds the heartbeat row.
    pub heartbeat_database: String,
    /// What holds in every good copy of it.
    pub assertions: Vec<Assertion>,
}

/// A statement about the data of a target that holds in every good copy of it; its owner wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assertion {
    /// Its name.
    pub name: String,
    /// A query that gives one row with one column.
    pub sql: String,
    /// What it gives, as text.
    pub expect: String,
    /// The database to ask.
    pub database: String,
}

/// Recovery objectives of a target.
#[derive(Debug, Clone, Copy, Default)]
pub struct Objectives {
    /// Recovery point: how much may be lost.
    pub rpo: Option<Duration>,
    /// Recovery time by restore.
    pub rto_restore: Option<Duration>,
    /// Recovery time by failover.
    pub rto_failover: Option<Duration>,
}

impl Target {
    /// What the WAL receiver of this target calls itself to the server; `synchronous_standby_names` may name it.
    pub fn receiver_name(&self) -> String {
        format!("drctl wal {}", self.name)
    }
}

impl Context {
    /// A target by name.
    ///
    /// # Errors
    /// The configuration has none of that name.
    pub fn target(&self, name: &TargetName) -> Result<&Target> {
        let known = || self.targets.iter().map(|target| target.name.as_str()).collect::<Vec<_>>().join(", ");
        let missing = || match self.targets.is_empty() {
            true => Error::usage("the configuration protects nothing yet").hint("add a [targets.<name>] to drctl.toml"),
            false => Error::usage(format!("there is no target `{name}`")).hint(format!("targets: {}", known())),
        };
        self.targets.iter().find(|target| target.name == *name).ok_or_else(missing)
    }

    /// The writer.
    ///
    /// # Errors
    /// This machine cannot write: no configuration with key holders.
    pub fn writer(&self) -> Result<&Writer> {
        let error = || Error::usage("this needs a configuration with key holders").hint("drctl --config FILE …");
        self.writer.as_ref().ok_or_else(error)
    }
}
