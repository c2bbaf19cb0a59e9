//! The settings as the rest of drctl sees them: complete, validated, in the order of the file.
//!
//! Their serialised form is the file format again, with every default filled in.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::config::daemon::Daemon;
use crate::config::drill::{Assertion, Drill};
use crate::config::file::nearest;
use crate::config::notify::{Grafana, Notify, Url};
use crate::config::place::{BucketPath, Place};
use crate::config::retention::{Prune, Retention};
use crate::config::secret::Secret;
use crate::config::show;
use crate::model::pattern::Pattern;
use crate::model::{Error, RegionName, Result, SignerId, TargetName};

/// Everything that the configuration says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The file it came from; `None` when the regions were named on the command line.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// `[repository]`.
    pub repository: Repository,
    /// `[schedules]`.
    pub schedules: Schedules,
    /// `[regions.NAME]`, at least one. Restores prefer the first, drills the last.
    #[serde(serialize_with = "show::by_name")]
    pub regions: Vec<Region>,
    /// `[keys.NAME]`: key holders beside those of the regions.
    #[serde(serialize_with = "show::by_name", skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<OfflineKey>,
    /// `[targets.NAME]`.
    #[serde(serialize_with = "show::by_name", skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<Target>,
    /// `[drill]`.
    pub drill: Drill,
    /// `[prune]`.
    pub prune: Prune,
    /// `[daemon]`.
    pub daemon: Daemon,
    /// `[grafana]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grafana: Option<Grafana>,
    /// `[notify]`.
    pub notify: Notify,
    /// What only the command line says about opening what is sealed.
    #[serde(skip)]
    pub openers: Openers,
}

impl Settings {
    /// A target by name.
    ///
    /// # Errors
    /// There is no such target; the hint names the nearest one, or all.
    pub fn target(&self, name: &TargetName) -> Result<&Target> {
        let names = || self.targets.iter().map(|target| target.name.as_str());
        let found = self.targets.iter().find(|target| target.name == *name);
        found.ok_or_else(|| unknown("target", name.as_str(), names))
    }

    /// The target of this name; without a name the only one that there is.
    ///
    /// # Errors
    /// There is no such target, or no name and several targets.
    pub fn the_target(&self, name: Option<&TargetName>) -> Result<&Target> {
        match (name, self.targets.as_slice()) {
            (Some(name), _) => self.target(name),
            (None, [only]) => Ok(only),
            (None, targets) => {
                let names = targets.iter().map(|target| target.name.as_str()).collect::<Vec<_>>().join(", ");
                Err(Error::usage("which target is meant?").hint(format!("--target with one of: {names}")))
            }
        }
    }

    /// A region by name.
    ///
    /// # Errors
    /// There is no such region; the hint names the nearest one, or all.
    pub fn region(&self, name: &RegionName) -> Result<&Region> {
        let names = || self.regions.iter().map(|region| region.name.as_str());
        let found = self.regions.iter().find(|region| region.name == *name);
        found.ok_or_else(|| unknown("region", name.as_str(), names))
    }

    /// Every secret that the settings refer to.
    pub fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let stores = self.regions.iter().filter_map(|region| match &region.store {
            Store::S3(s3) => Some(&s3.credentials),
            Store::Directory { .. } => None,
        });
        let roles = stores.flat_map(|roles| [&roles.write, &roles.restore, &roles.prune]);
        let keys = self.keys.iter().filter_map(|key| key.identity.as_ref());
        let passwords = self.targets.iter().filter_map(|target| match &target.source {
            Source::Postgres(postgres) => postgres.password.as_ref(),
            Source::Dump(dump) => dump.password.as_ref(),
            Source::Files(_) => None,
        });
        let grafana = self.grafana.iter().flat_map(|grafana| [Some(&grafana.token), grafana.url.secret()]).flatten();
        let notify = &self.notify;
        let told =
            [notify.webhook.as_ref().map(|webhook| &webhook.url), notify.dead_man.as_ref().map(|dead| &dead.url)];
        let told = told.into_iter().flatten().filter_map(Url::secret);
        let ours = roles.flat_map(AwsAccess::secrets).chain(keys).chain(passwords);
        ours.chain(&self.daemon.token).chain(&self.openers.age_identities).chain(grafana).chain(told)
    }
}

fn unknown<'n, I: Iterator<Item = &'n str>>(what: &str, name: &str, names: impl Fn() -> I) -> Error {
    let error = Error::usage(format!("there is no {what} `{name}` in the configuration"));
    let all = names().collect::<Vec<_>>().join(", ");
    match nearest(name, names()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None if all.is_empty() => error.hint(format!("the configuration names no {what} at all")),
        None => error.hint(format!("there are: {all}")),
    }
}

/// `[schedules]`: where the schedules are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedules {
    /// The folder with one file per schedule.
    pub dir: PathBuf,
}

/// `[repository]`: what holds for all regions together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repository {
    /// Regions that must hold a write before it is acknowledged.
    pub write_quorum: usize,
    /// When the quorum may be lowered, and to what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degrade: Option<Degrade>,
    /// Signers that are trusted; none listed means that every signer is shown and none is refused.
    pub signers: Vec<SignerId>,
    /// Where caches, sockets and the writer's signing key are.
    pub state_dir: PathBuf,
    /// Wraps of every keyset that must remain when any one region is lost.
    pub min_wraps: usize,
    /// How long a region may lag behind the quorum before a job goes on without it; `None` leaves it to the job.
    #[serde(serialize_with = "show::optional_duration", skip_serializing_if = "Option::is_none")]
    pub detach_after: Option<Duration>,
    /// Bytes that a pack stays within.
    #[serde(serialize_with = "show::size")]
    pub pack_size: usize,
    /// zstd levels.
    pub compression_level: CompressionLevels,
}

impl Repository {
    /// The lowest quorum at which a write may ever have been acknowledged.
    pub fn lowest_quorum(&self) -> usize {
        self.degrade.as_ref().map_or(self.write_quorum, |degrade| degrade.to)
    }
}

/// Permission to acknowledge at fewer regions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Degrade {
    /// The lower quorum.
    pub to: usize,
    /// How long the full quorum must have been out of reach.
    #[serde(serialize_with = "show::duration")]
    pub after: Duration,
}

/// zstd levels by what is compressed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompressionLevels {
    /// Pages and files of base backups.
    pub pages: i32,
    /// Logical dumps.
    pub dumps: i32,
    /// WAL frames.
    pub wal: i32,
}

impl Settings {
    /// The settings as a configuration file with every default written out. It reads back as the same settings.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| show::unshowable(&error))
    }

    /// The same facts as JSON.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        serde_json::to_value(self).map_err(|error| show::unshowable(&error))
    }
}

impl show::Named for Region {
    fn name(&self) -> &str {
        self.name.as_str()
    }
}

impl show::Named for OfflineKey {
    fn name(&self) -> &str {
        &self.name
    }
}

impl show::Named for Target {
    fn name(&self) -> &str {
        self.name.as_str()
    }
}

/// `[regions.NAME]`: one independent copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Its name.
    #[serde(skip)]
    pub name: RegionName,
    /// Its objects.
    #[serde(flatten)]
    pub store: Store,
    /// The key holder that is lost together with this region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kms: Option<KmsKey>,
}

impl Region {
    /// Where its objects are, for people and for comparison.
    pub fn place(&self) -> Place {
        match &self.store {
            Store::S3(s3) => Place::Bucket(s3.bucket.clone()),
            Store::Directory { path } => Place::Directory(path.clone()),
        }
    }
}

/// How a region's objects are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Store {
    /// A bucket.
    S3(Box<S3Settings>),
    /// A directory.
    Directory {
        /// Absolute.
        #[serde(rename = "url", serialize_with = "show::directory_url")]
        path: PathBuf,
    },
}

/// A bucket and how to speak to its server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct S3Settings {
    /// The bucket and the prefix in it.
    #[serde(rename = "url", serialize_with = "show::displayed")]
    pub bucket: BucketPath,
    /// Another server than AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The AWS region; `None` leaves it to the AWS chain (environment, profile).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aws_region: Option<String>,
    /// Whether the bucket stands in the path instead of the host name.
    pub path_style: bool,
    /// Accept a server that ignores `If-None-Match`, because nobody else writes there.
    pub single_writer: bool,
    /// When request checksums are sent.
    pub checksum: Checksum,
    /// The longest that one request may take, its body included.
    #[serde(serialize_with = "show::duration")]
    pub timeout: Duration,
    /// Who we are, per role.
    #[serde(skip_serializing_if = "Credentials::is_chain")]
    pub credentials: Credentials,
}

/// When request checksums are sent to an S3 server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checksum {
    /// With every request that can carry one.
    WhenSupported,
    /// Only where the protocol demands one, for servers that do not know them.
    WhenRequired,
}

/// Credentials by role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Credentials {
    /// Backup, WAL, reports, repair.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub write: AwsAccess,
    /// Restore, verify, drill.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub restore: AwsAccess,
    /// Prune.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub prune: AwsAccess,
}

impl Credentials {
    fn is_chain(&self) -> bool {
        [&self.write, &self.restore, &self.prune].into_iter().all(AwsAccess::is_chain)
    }
}

/// Where AWS credentials come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum AwsAccess {
    /// The AWS chain: environment, default profile, instance or container role.
    Chain,
    /// A named profile.
    Profile {
        /// Its name.
        profile: String,
    },
    /// A key pair by reference.
    Keys {
        /// The id.
        access_key_id: Secret,
        /// The secret.
        secret_access_key: Secret,
        /// For temporary credentials.
        #[serde(skip_serializing_if = "Option::is_none")]
        session_token: Option<Secret>,
    },
}

impl AwsAccess {
    fn is_chain(&self) -> bool {
        *self == Self::Chain
    }

    fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let keys = match self {
            Self::Chain | Self::Profile { .. } => [None, None, None],
            Self::Keys { access_key_id, secret_access_key, session_token } => {
                [Some(access_key_id), Some(secret_access_key), session_token.as_ref()]
            }
        };
        keys.into_iter().flatten()
    }
}

/// A KMS key that wraps keysets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KmsKey {
    /// Alias, id or ARN.
    pub key: String,
    /// The AWS region of the key.
    pub aws_region: String,
    /// Another server than AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// `[keys.NAME]`: an age recipient whose identity is kept away from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OfflineKey {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// The recipient, `age1…`.
    #[serde(rename = "age")]
    pub recipient: String,
    /// The identity, on a machine that restores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Secret>,
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
    /// Whether its WAL is streamed; else `archive_command` alone brings it.
    pub stream: bool,
    /// Whether the heartbeat row is written while WAL is streamed.
    pub heartbeat: bool,
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

/// What to do when the slot fills the server's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPressure {
    /// Keep the slot and alarm: no gap, and the server may stop for lack of space.
    Keep,
    /// Drop the slot: the server lives, and a gap in the WAL is recorded.
    DropSlot,
}

/// What only the command line says about opening what is sealed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Openers {
    /// Age identity files.
    pub age_identities: Vec<Secret>,
    /// Servers for KMS keys of an AWS region.
    pub kms_endpoints: Vec<KmsEndpoint>,
}

/// Another server for the KMS keys of one AWS region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KmsEndpoint {
    /// The AWS region.
    pub aws_region: String,
    /// The server.
    pub endpoint: String,
}
