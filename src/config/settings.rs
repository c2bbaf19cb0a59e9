//! The settings as the rest of drctl sees them: complete, validated, in the order of the file.
//!
//! Their serialised form is the file format again, with every default filled in.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::config::daemon::Daemon;
use crate::config::drill::Drill;
use crate::config::file::nearest;
use crate::config::notify::{Grafana, Notify, Url};
use crate::config::retention::Prune;
use crate::config::secret::Secret;
use crate::config::show;
use crate::model::{Error, RegionName, Result, SignerId, TargetName};

mod region;
mod target;

pub use region::{
    AwsAccess, Checksum, Credentials, KmsEndpoint, KmsKey, LockMode, ObjectLock, OfflineKey, Openers, Region,
    S3Settings, Store,
};
pub use target::{Detection, DumpTarget, FilesTarget, Method, Objectives, OnPressure, PostgresTarget, Source, Target};

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
