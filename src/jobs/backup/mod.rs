//! `backup`: one backup of one target, into every region at once. What is no cluster is stored as streams, whole each time;
//! see [`streams`]. Of a cluster it stores the pages that changed since the newest
//! backup, if this machine remembers that one's pages, and all of them otherwise; either restores on its own.
//!
//! It exists when COMMIT is at the write quorum, and COMMIT is written only when every page and all WAL from the start to
//! the stop of the backup are durable there.

use serde::Serialize;

use crate::disk::DiskError;
use crate::disk::lock::Lock;
use crate::jobs::context::{Context, Target};
use crate::model::commit::{Commit, WalNeed};
use crate::model::{Error, HolderId, Kind, Result, ResultExt, TargetName};
use crate::repository::backup::parent::{self, Basis, Parent, state_path};
use crate::repository::backup::repack::Moved;
use crate::repository::backup::stream::StreamLine;
use crate::repository::backup::writer::{BackupOptions, BackupWriter, PageCounts};
use crate::repository::locks::extend::Extended;
use crate::repository::regions::fan_out::LaneOutcome;
use crate::source::postgres;
use crate::source::{Begun, Finished};

mod around;
mod detect;
pub mod streams;
mod transfer;
mod wal;

pub use around::CONFIGURATION;
pub use detect::Told;

use wal::WalCover;

/// Threads that pack at the same time; more cores than this are left to PostgreSQL.
///
/// A backup stays below 256 MiB. A batch is 8 MiB, a pack 16 MiB, and with `w` workers there are at most
/// - `w / 2` + 3 + `w` batches: at the readers, on their way (one queued by the source, one in hand, one queued for
///   the workers), at the workers;
/// - `w` + 2 + 6 packs that are shared by all regions: filled (one more with maps), queued, and going out, where a region
///   that lags holds four beside the two of the others;
///
/// which is 232 MiB for three workers when nothing compresses and a region lags, and 20 MiB for the process itself. The
/// files of a cluster add some hundred bytes each for their names.
const WORKERS: usize = 3;

/// What a backup came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The COMMIT.
    pub backup: Commit,
    /// What each region owes; the backup itself is safe at the quorum.
    pub regions: Vec<LaneOutcome>,
    /// Key holders that could not wrap its keyset, and why.
    pub wrap_debts: Vec<(HolderId, String)>,
    /// What it shares with earlier backups, locked anew in each region that locks.
    pub locks: Vec<Extended>,
    /// Configuration that could not be captured, and why.
    pub not_captured: Vec<String>,
    /// Who made the WAL durable: `receiver` (a running `drctl wal stream`), `own`, or `none` where there is no WAL.
    pub wal_by: &'static str,
    /// The streams, of a target that is read as such.
    pub streams: Vec<StreamLine>,
    /// What happened to the source while it was read.
    pub notes: Vec<String>,
    /// What should be in the backup and is not.
    pub left_out: Vec<String>,
    /// Why it stores every page; `None` for an incremental backup.
    pub full_because: Option<String>,
    /// Pages read, and those of them that changed since the parent.
    pub pages: PageCounts,
    /// What it took along from packs of earlier backups that were mostly dead.
    pub moved: Moved,
    /// How those were found.
    pub detection: Told,
    /// Why this machine does not remember its pages, so that the next backup will be a full one.
    pub not_remembered: Option<String>,
}

impl Report {
    /// Whether something is still owed.
    pub fn has_debts(&self) -> bool {
        !self.left_out.is_empty()
            || self.detection.unproved
            || !self.wrap_debts.is_empty()
            || self.locks.iter().any(|locks| locks.owed > 0)
            || self.regions.iter().any(|region| region.missing_objects > 0)
    }
}

/// How to take it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Ask for an immediate checkpoint instead of one spread over minutes.
    pub fast: bool,
    /// Store every page, whatever the newest backup holds.
    pub full: bool,
    /// Read every page, and prove that change detection would have found those that changed.
    pub verify_detection: bool,
}

/// Takes a backup of `name`.
///
/// # Errors
/// Whatever stopped it. There is then no backup, and what was written is orphaned.
pub async fn run(context: &Context, name: &TargetName, options: Options) -> Result<Report> {
    let report = match context.streamed(name) {
        Some(streamed) => streams::run(context, streamed, options).await?,
        None => cluster(context, context.target(name)?, options).await?,
    };
    let backup = &report.backup;
    let took = (backup.finished_at - backup.started_at).to_std().unwrap_or_default();
    context.meters.backup(name.as_str(), backup.kind.as_str(), took);
    Ok(report)
}

/// One backup of a target at a time on this host.
fn alone(context: &Context, name: &TargetName) -> Result<Lock> {
    Lock::acquire(&context.state_dir.join(format!("{name}.backup.lock"))).map_err(|error| match error {
        DiskError::Locked { .. } => {
            let busy = Error::new(Kind::Busy, format!("another backup of {name} runs on this host")).because(error);
            busy.transient(true).hint("wait until it has ended: drctl jobs")
        }
        error => error.into(),
    })
}

async fn cluster(context: &Context, target: &Target, options: Options) -> Result<Report> {
    let name = &target.name;
    detect::check(target, options.verify_detection)?;
    let writer = context.writer()?;
    let _alone = alone(context, name)?;
    let mut source =
        postgres::open(source_options(context, target, options)).await.during(|| format!("reach {name}"))?;
    let cover = WalCover::prepare(context, target).await.during(|| "secure the WAL of the backup")?;
    let begun = source.begin().await.during(|| format!("begin the backup of {name}"))?;
    let basis = basis(context, target, &begun, options).await.during(|| "find the parent of the backup")?;
    let looking = (&cover, source.method(), options.verify_detection);
    let found = detect::find(context, target, &begun, &basis, looking).await.tell(source.as_mut());
    let how = BackupOptions {
        detection: found.by.map(str::to_owned),
        proof: found.proof,
        ..backup_options(context, target, &begun, source.method())
    };
    let mut backup = BackupWriter::begin(&context.repository, writer, how, basis).await?;
    let around = around::capture(target, source.method()).await;
    transfer::run(context, source.as_mut(), &mut backup, &begun).await.during(|| format!("back up {name}"))?;
    let finished = source.finish().await.during(|| format!("end the backup of {name}"))?;
    transfer::small_files(&mut backup, &finished).await?;
    let not_captured = around::store(&mut backup, around).await?;
    backup.flush().await.during(|| "store pages")?;
    let wal = cover.secure(context, target, &begun, &finished).await.during(|| "secure the WAL of the backup")?;
    let written = backup.commit(Some(wal_need(&begun, &finished, wal.branch))).await?;
    let detection = found.told(context, target, written.commit.id.as_str(), &written.pages);
    Ok(Report {
        backup: written.commit,
        regions: together(written.regions, wal.regions),
        wrap_debts: written.wrap_debts,
        locks: written.locks,
        not_captured,
        wal_by: wal.by,
        streams: Vec::new(),
        notes: Vec::new(),
        left_out: Vec::new(),
        full_because: written.full_because,
        pages: written.pages,
        moved: written.moved,
        detection,
        not_remembered: written.not_remembered,
    })
}

async fn basis(context: &Context, target: &Target, begun: &Begun, options: Options) -> Result<Basis> {
    if options.full {
        return Ok(Basis::nothing("it was asked for"));
    }
    let state = state_path(&context.state_dir, &target.name);
    let holders = &context.writer()?.holders;
    let wanted = (&target.name, begun.cluster.system_id);
    let basis = parent::choose(&context.repository, holders, wanted, state).await?;
    // One wrong bit in a page that never changes would be in every backup that follows: generations end.
    let began = basis.parent().map(Parent::generation);
    let age = began.and_then(|began| (context.clock.now() - began).to_std().ok());
    match began.filter(|_| age.is_some_and(|age| age >= target.full_every)) {
        Some(began) => Ok(Basis::nothing(format!("the last full backup began at {}", began.format("%F %T UTC")))),
        None => Ok(basis),
    }
}

/// What each region lacks of the pages and of the WAL.
fn together(pages: Vec<LaneOutcome>, wal: Vec<LaneOutcome>) -> Vec<LaneOutcome> {
    let mut sum = pages;
    for lane in &mut sum {
        for other in wal.iter().filter(|other| other.region == lane.region) {
            lane.missing_objects += other.missing_objects;
            lane.last_error = lane.last_error.take().or_else(|| other.last_error.clone());
        }
    }
    sum
}

fn source_options(context: &Context, target: &Target, options: Options) -> postgres::Options {
    postgres::Options {
        conninfo: target.conninfo.primary().with_application_name("drctl backup"),
        method: target.method,
        data_directory: target.data_dir.clone(),
        standby: target.standby.as_ref().map(|lender| postgres::Lender {
            conninfo: lender.conninfo.clone().with_application_name("drctl backup"),
            patience: lender.patience,
        }),
        fast: options.fast,
        label: format!("drctl {}", target.name),
        max_read_rate: target.max_read_rate,
        // Half of the workers: reading and checking is that much faster than packing.
        reader_threads: Some((workers() / 2).max(1)),
        clock: std::sync::Arc::clone(&context.clock),
    }
}

fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(WORKERS)
}

fn backup_options(context: &Context, target: &Target, begun: &Begun, method: &str) -> BackupOptions {
    BackupOptions {
        target: target.name.clone(),
        source: "postgres",
        method: method.to_owned(),
        kind: None,
        level: context.levels.pages,
        workers: workers(),
        page_checksums: begun.cluster.checksums,
        pack_size: context.pack_size,
        start_lsn: Some(begun.start_lsn),
        detection: None,
        proof: None,
        state: Some(state_path(&context.state_dir, &target.name)),
    }
}

fn wal_need(begun: &Begun, finished: &Finished, branch: crate::model::Branch) -> WalNeed {
    WalNeed {
        system_id: begun.cluster.system_id,
        timeline: begun.timeline,
        branch,
        start_lsn: begun.start_lsn,
        stop_lsn: finished.stop_lsn,
        wal_segment_size: begun.cluster.wal_segment_size,
        server_version: begun.cluster.version,
    }
}
