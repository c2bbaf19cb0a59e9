//! `restore`: a plan that says everything before anything is touched, and the run of exactly that plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::jobs::context::{Context, Target};
use crate::jobs::status::{self, Present};
use crate::model::commit::BackupKind;
use crate::model::{Error, RegionName, Result, ResultExt, SystemId};
use crate::repository::catalog::{self, Backup};
use crate::repository::handle::Repository;
pub use crate::repository::restore::Memory;

mod checks;
mod conf;
mod contents;
mod crossed;
mod delta;
pub mod feed;
mod files;
mod marker;
mod plan;
mod primary;
mod record;
mod recover;
mod report;
mod route;
mod run;
mod stage;
mod supply;
mod target;
mod words;

pub use crate::jobs::lineage::Follow;
pub use report::{PhaseTime, Report, Started};
pub use target::Point;
pub use words::{Feed, Needs, Plan, Refusal, RegionState, Reuse, WalLeg};

pub(in crate::jobs) use files::STANDBY_SIGNAL;
pub use plan::{Prepared, quoted};
pub use primary::Primary;
use record::Record;

use crate::pg::instance::{Instance, Network, User};

/// The marker of a restore that has not ended.
pub const MARKER: &str = "drctl-restore.json";
/// Where WAL is staged, below the data directory: in `pg_wal`, whose contents no backup and no `pg_verifybackup` reads.
pub const STAGING: &str = "pg_wal/drctl-wal";

/// The port in the name of a scratch server's socket.
pub const SCRATCH_PORT: u16 = 5432;

/// What is to be restored, and where.
#[derive(Debug, Clone)]
pub struct Request {
    /// A backup id or its beginning, a target, or `latest`.
    pub what: String,
    /// The data directory, absolute.
    pub directory: PathBuf,
    /// Location on the source → directory here.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// Read from this region first.
    pub region: Option<RegionName>,
    /// To when.
    pub point: Point,
    /// Follow this timeline instead of the newest.
    pub timeline: Option<Follow>,
    /// Start PostgreSQL and wait until it is promoted.
    pub start: bool,
    /// How WAL is to reach recovery; `None`: staged, and streamed where there is no room for that.
    pub feed: Option<Feed>,
    /// The directory becomes a standby that goes on recovering: nothing in it ends recovery.
    pub standby: bool,
    /// The account that PostgreSQL runs as, when drctl is root.
    pub run_as: Option<String>,
    /// Whether what stands in the directory is made the backup, page by page, and what the backup does not have is
    /// removed; otherwise the directory must be empty.
    pub delta: bool,
    /// What the restore may hold in memory.
    pub memory: Memory,
    /// The words before the verb, with which the command that the plan prints finds the same repository.
    pub invocation: Vec<String>,
    /// The backups that may be meant, if they were looked at just now.
    pub known: Option<Arc<Known>>,
}

/// The backups that the words of a request may mean.
#[derive(Debug)]
pub struct Known {
    backups: Vec<Backup>,
    damaged: Vec<Error>,
}

impl Known {
    /// Reads their COMMITs: of a whole id that one alone, of a target that is configured its own, else all.
    ///
    /// # Errors
    /// No region answers.
    pub async fn load(context: &Context, repository: &Repository, what: &str) -> Result<Self> {
        let target = context.targets.iter().map(|target| &target.name).find(|name| name.as_str() == what);
        let backups = match target {
            Some(target) => catalog::backups(repository, Some(target)).await,
            None => catalog::named(repository, what).await,
        };
        let (backups, damaged) = backups.during(|| "list the backups")?;
        Ok(Self { backups, damaged })
    }

    /// Whether they mean a dump or files, which another job restores.
    ///
    /// # Errors
    /// Nothing is named so.
    pub fn is_of_streams(&self, what: &str) -> Result<bool> {
        let kind = catalog::find((&self.backups, &self.damaged), what)?.commit.kind;
        Ok(matches!(kind, BackupKind::Dump | BackupKind::Files))
    }
}

/// Computes the plan; nothing is touched.
///
/// # Errors
/// No backup fits, the point cannot be reached, or no region answers. What merely stands in the way is in
/// [`Plan::refused`].
pub async fn plan(context: &Context, request: &Request) -> Result<Plan> {
    let mut plan = Prepared::new(context, request).await?.plan;
    if !plan.refused.is_empty() {
        plan.command.clear();
    }
    let present = Present { base_bytes: plan.write_bytes.0, wal_bytes: plan.wal_bytes };
    plan.predicted = status::predict_restore(context, &plan.target, present).await;
    let predicted = plan.predicted.as_ref().and_then(|known| Duration::try_from_secs_f64(known.seconds).ok());
    plan.expected_seconds = predicted.map_or(plan.expected_seconds, |predicted| predicted.as_secs() + 1);
    Ok(plan)
}

/// Runs the plan that has this digest (its beginning), or whatever plan the request gives now.
///
/// # Errors
/// The plan is another one than the one named, or refuses; or what stopped the run. Until the run ends well PostgreSQL
/// cannot start what is in the directory.
pub async fn run(context: &Context, request: &Request, digest: Option<&str>) -> Result<Report> {
    let prepared = Prepared::new(context, request).await?;
    if let Some(wanted) = digest {
        check_digest(&prepared.plan, wanted)?;
    }
    prepared.plan.refuse()?;
    let mut record = Record::begin(context, &prepared.plan, request.region.as_ref());
    let run = run::run(context, request, prepared, None).await;
    let mut report = run.map(|(report, server)| {
        server.map(Instance::leave_running);
        report
    });
    record.end(context.clock.now(), &report);
    let kept = record.keep(context).await;
    record.tell(context, kept.as_ref().ok());
    if let Ok(report) = &mut report {
        record::note(report, kept);
    }
    report
}

/// A server that is only to be examined: where it listens and logs, and settings that no file of the restored cluster
/// can override.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// Where its only socket goes.
    pub socket_dir: PathBuf,
    /// Where it logs.
    pub log_file: PathBuf,
    /// Settings for its command line.
    pub settings: Vec<(String, String)>,
    /// What it sees of the network.
    pub network: Network,
}

/// Plans and runs a restore whose server is examined instead of used: it listens on [`Scratch::socket_dir`] alone, at
/// [`SCRATCH_PORT`], and stops when the instance is dropped.
///
/// # Errors
/// As [`plan()`] and [`run()`].
pub async fn rehearse(
    context: &Context,
    request: &Request,
    prepared: Prepared,
    scratch: &Scratch,
) -> Result<(Report, Instance)> {
    prepared.plan.refuse()?;
    let (report, server) = run::run(context, request, prepared, Some(scratch)).await?;
    server.map(|server| (report, server)).ok_or_else(|| Error::failed("the rehearsal started no server"))
}

/// Restores the files of a standby: everything but the server's settings. `document` (name, contents) says what it is, and
/// lies there before the restore is over.
///
/// # Errors
/// As [`plan()`] and [`run()`].
pub async fn lay_standby(
    context: &Context,
    request: &Request,
    prepared: Prepared,
    document: (&str, Vec<u8>),
) -> Result<Report> {
    prepared.plan.refuse()?;
    run::lay(context, request, prepared, document).await
}

/// Hands a file to the account that PostgreSQL runs as.
///
/// # Errors
/// The disk's.
pub fn give(path: &Path, owner: Option<User>) -> Result<()> {
    stage::give(path, owner)
}

/// Asks whether the primary of a target still answers as the primary of this cluster.
pub async fn ask_primary(target: &Target, system_id: SystemId) -> Primary {
    primary::ask(target, system_id).await
}

/// Writes settings behind all others of a restored cluster, in place of those that drctl wrote there before.
///
/// # Errors
/// The disk's.
pub fn configure(directory: &Path, settings: &[(String, String)], owner: Option<User>) -> Result<()> {
    conf::append(directory, &conf::block_of(settings))?;
    stage::give(&directory.join(conf::AUTO_CONF), owner)
}

/// Takes those settings out again.
///
/// # Errors
/// The disk's.
pub fn unconfigure(directory: &Path, owner: Option<User>) -> Result<()> {
    conf::remove(directory)?;
    stage::give(&directory.join(conf::AUTO_CONF), owner)
}

/// Computes a plan that [`rehearse`] runs as it is.
///
/// # Errors
/// As [`plan()`].
pub async fn prepare(context: &Context, request: &Request) -> Result<Prepared> {
    Prepared::new(context, request).await
}

fn check_digest(plan: &Plan, wanted: &str) -> Result<()> {
    const LEAST: usize = 6;
    if wanted.len() >= LEAST && plan.digest.starts_with(wanted) {
        return Ok(());
    }
    let error = Error::refused(format!("the plan is not {wanted} any more, it is {}", plan.short_digest()));
    let error =
        error.because("the backup, the end of the WAL, the directory or the options differ from those of that plan");
    Err(error.hint(format!("look at the plan again, then: {}", plan.command)))
}
