//! What every job works with. Built once by `app`; a job sees no bucket and no key.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::model::retention::Rules;
use crate::model::{Clock, Error, Result, Rng, TargetName};
use crate::notify::Courier;
use crate::observe::metrics::Meters;
use crate::observe::progress::Progress;
use crate::pg::conninfo::ConnInfo;
use crate::repository::handle::{Repository, Writer};
use crate::repository::keysets::KeyRing;
use crate::repository::prune::Limits;
use crate::source::postgres::{Lender, Method};
use crate::source::{StreamSource, dump, files};

/// The hands of a job.
#[derive(Debug, Clone)]
pub struct Context {
    /// The open repository, its regions in the order of preference.
    pub repository: Repository,
    /// Signer and key holders; absent on a machine that only reads.
    pub writer: Option<Writer>,
    /// Opens keysets; without openers it says so when asked.
    pub ring: Arc<KeyRing>,
    /// Every PostgreSQL cluster that the configuration protects.
    pub targets: Vec<Target>,
    /// Everything else that it protects.
    pub streamed: Vec<Streamed>,
    /// What is kept of each target; of one that is not named everything.
    pub retention: BTreeMap<TargetName, Rules>,
    /// What bounds a prune.
    pub prune: Limits,
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
    /// What this process counts.
    pub meters: Arc<Meters>,
    /// Who is told of what happened.
    pub courier: Courier,
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
    /// Preloaded libraries that they load; others may act by themselves and are left out.
    pub preload: Vec<String>,
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
    /// How base backups find what changed.
    pub detection: Detection,
    /// After this time a base backup stores every page again.
    pub full_every: Duration,
    /// The data directory, if it is not the one that the server names.
    pub data_dir: Option<PathBuf>,
    /// A standby on this host whose files are read instead of the primary's.
    pub standby: Option<Lender>,
    /// Its replication slot.
    pub slot: String,
    /// The longest that WAL waits before it is shipped.
    pub ship_interval: Duration,
    /// Bytes per second that base backups may read.
    pub max_read_rate: Option<u64>,
    /// What is to happen when the slot fills the server's disk; `None` = nobody decided.
    pub on_pressure: Option<OnPressure>,
    /// At which share of the space for WAL, in percent.
    pub pressure_percent: u8,
    /// The size of the server's WAL disk, if it cannot be asked.
    pub wal_disk_bytes: Option<u64>,
    /// Whether the slot is kept on the standbys among the servers of `conninfo`, too.
    pub standby_slots: bool,
    /// Whether its WAL is streamed; else `archive_command` alone brings it.
    pub stream: bool,
    /// Whether the heartbeat row is written while WAL is streamed.
    pub heartbeat: bool,
    /// Whether commits wait for the regions: received WAL is shipped at once.
    pub sync: bool,
    /// Where the WAL receiver of this target answers.
    pub control_socket: PathBuf,
    /// Further configuration files to capture, as globs.
    pub config_files: Vec<String>,
    /// The database that holds the heartbeat row.
    pub heartbeat_database: String,
    /// What holds in every good copy of it.
    pub assertions: Vec<Assertion>,
}

/// What is done when the slot fills the server's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPressure {
    /// Nothing but alarms.
    Keep,
    /// The slot goes.
    DropSlot,
}

impl OnPressure {
    /// As it is configured.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::DropSlot => "drop-slot",
        }
    }
}

/// How a base backup finds the pages that changed since its parent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Detection {
    /// It reads every page and compares.
    #[default]
    Read,
    /// It reads those that WAL says changed: the receiver's journal, else PostgreSQL's summaries; every page where neither
    /// can say.
    Auto,
    /// The same with the receiver's journal alone.
    Wal,
    /// The same with PostgreSQL's summaries alone.
    Summaries,
}

impl Detection {
    /// Whether a receiver notes which pages change.
    pub const fn reads_wal(self) -> bool {
        matches!(self, Self::Auto | Self::Wal)
    }

    /// Whether PostgreSQL's summaries of WAL are asked.
    pub const fn reads_summaries(self) -> bool {
        matches!(self, Self::Auto | Self::Summaries)
    }
}

/// A protected thing that is read as streams.
#[derive(Debug, Clone)]
pub struct Streamed {
    /// Its name.
    pub name: TargetName,
    /// What was promised.
    pub objectives: Objectives,
    /// What it is.
    pub what: What,
}

/// What is read as streams.
#[derive(Debug, Clone)]
pub enum What {
    /// The databases of a server, by `pg_dump`.
    Dump(Box<dump::Options>),
    /// Directories.
    Files(files::Options),
}

impl Streamed {
    /// The kind of the target.
    pub const fn source(&self) -> &'static str {
        match self.what {
            What::Dump(_) => "dump",
            What::Files(_) => "files",
        }
    }

    /// A reader of it.
    pub fn open(&self) -> Box<dyn StreamSource> {
        match &self.what {
            What::Dump(options) => Box::new(dump::Dump::new(*options.clone())),
            What::Files(options) => Box::new(files::Files::new(options.clone())),
        }
    }
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
    /// Statements that break what it is about: a drill runs them, sees the answer change, and rolls them back.
    pub control: Option<String>,
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
    /// A PostgreSQL cluster by the name of its target.
    ///
    /// # Errors
    /// The configuration has none of that name, or one that is no cluster.
    pub fn target(&self, name: &TargetName) -> Result<&Target> {
        let missing = || match self.streamed(name) {
            Some(streamed) => {
                let text = format!("{name} is a target of source \"{}\", not a PostgreSQL cluster", streamed.source());
                Error::refused(text).hint("it has backups (list, verify, restore), but no WAL and no drill")
            }
            None => self.unknown(name),
        };
        self.targets.iter().find(|target| target.name == *name).ok_or_else(missing)
    }

    /// A target that is read as streams.
    pub fn streamed(&self, name: &TargetName) -> Option<&Streamed> {
        self.streamed.iter().find(|target| target.name == *name)
    }

    /// The names of all targets and what was promised of each.
    pub fn promises(&self) -> impl Iterator<Item = (&TargetName, &Objectives)> {
        let clusters = self.targets.iter().map(|target| (&target.name, &target.objectives));
        clusters.chain(self.streamed.iter().map(|target| (&target.name, &target.objectives)))
    }

    fn unknown(&self, name: &TargetName) -> Error {
        let known = self.promises().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        match known.is_empty() {
            true => Error::usage("the configuration protects nothing yet").hint("add a [targets.<name>] to drctl.toml"),
            false => {
                Error::usage(format!("there is no target `{name}`")).hint(format!("targets: {}", known.join(", ")))
            }
        }
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
