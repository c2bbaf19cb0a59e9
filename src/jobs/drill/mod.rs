//! `drill`: a real restore into a scratch cluster that starts, replays, is promoted, checked, measured and torn down.
//!
//! It reads one region alone, because what is to be proven is that this region alone is enough. What it cannot find out
//! is *inconclusive*, which is neither good nor bad news; a drill that measured nothing has failed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::jobs::context::{Context, Target};
use crate::jobs::restore::{self, PhaseTime, Point, Prepared, Request};
use crate::model::{Error, Kind, Lsn, RegionName, Result, ResultExt, TargetName};
use crate::pg::instance::Instance;
use crate::pg::sql;
use crate::repository::handle::Repository;
use crate::source::postgres::heartbeat::{self, Beat};

mod checks;
mod evidence;
mod examine;
mod login;
mod report;
mod scratch;
mod told;

pub use report::{Check, Control, Level, Measured, Outcome, Report};
use scratch::Scratch;

/// How long the region may take to hold the beat that precedes the drill. Afterwards the drill goes on, and finds an
/// older beat: that is what it measures.
const BEAT_ARRIVES: Duration = Duration::from_secs(10);

/// What is rehearsed, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The target.
    pub target: TargetName,
    /// The region that is read; the last one of the configuration if none is named.
    pub region: Option<RegionName>,
}

/// Rehearses a recovery. Whatever stops it on the way is in the report; the scratch cluster is gone in every case.
///
/// # Errors
/// There is no such target or region, or no place for a scratch cluster.
pub async fn run(context: &Context, options: &Options) -> Result<Report> {
    let target = context.target(&options.target)?;
    let region = chosen(context, options.region.as_ref())?;
    let alone = within(context, &region)?;
    let scratch = Scratch::create(&context.scratch, &options.target, context).await?;
    let mut report = Report::new(context, target, region, &scratch);
    let rehearsed = rehearse(&alone, target, &scratch, &mut report).await;
    if let Err(error) = rehearsed {
        report.stopped_by(&error);
    }
    report.left_behind = scratch.tear_down().err().map(|error| error.to_string());
    report.conclude(context.clock.now());
    keep(context, &mut report).await;
    told::tell(context, &report);
    Ok(report)
}

/// The report goes into every region, beside what it reports on. A drill is no worse for it if that fails; it is told.
async fn keep(context: &Context, report: &mut Report) {
    let Some(writer) = &context.writer else {
        report.warnings.push("the report was not stored: this machine has no signer".to_owned());
        return;
    };
    match evidence::store(context, writer, report).await {
        Ok((id, regions)) => (report.stored_as, report.stored_in) = (Some(id), regions),
        Err(error) => report.warnings.push(format!("the report was not stored: {error}")),
    }
}

fn chosen(context: &Context, wanted: Option<&RegionName>) -> Result<RegionName> {
    let regions = &context.repository.regions;
    match wanted {
        Some(name) => Ok(regions.named(name)?.name.clone()),
        // Restores prefer the first, so the last is the one that nobody would miss for a long time.
        None => {
            regions.all().last().map(|region| region.name.clone()).ok_or_else(|| Error::usage("there is no region"))
        }
    }
}

/// The same hands, for one region: nothing is taken from another, and the keys of the others are lost with them.
fn within(context: &Context, region: &RegionName) -> Result<Context> {
    let regions = context.repository.regions.only(region)?;
    let lost = context.writer.as_ref().map(|writer| writer.holders.of_others(region)).unwrap_or_default();
    let ring = Arc::new(context.ring.within(regions.clone()).without(lost));
    let repository = Repository { regions, ..context.repository.clone() };
    Ok(Context { repository, ring, ..context.clone() })
}

async fn rehearse(context: &Context, target: &Target, scratch: &Scratch, report: &mut Report) -> Result<()> {
    let beat = precede(context, target, report).await;
    let end = beat.as_ref().map(|(_, end)| *end);
    let (request, prepared, planned_in) = prepare(context, scratch, &target.name, end).await?;
    // The fault happens now: whatever reaches the region from here on is lost to this drill.
    let fault_at = context.clock.now();
    report.faulted(fault_at, &prepared.plan);
    let arrived = beat.filter(|(_, end)| prepared.plan.end_lsn >= *end).map(|(beat, _)| beat);
    if end.is_some() && arrived.is_none() {
        report.warnings.push(format!("the beat before the drill did not reach {} in time", report.region));
    }
    let server = scratch.server(&prepared.plan)?;
    report.phases.push(PhaseTime::new("provision", planned_in));
    let (restored, mut instance) = restore::rehearse(context, &request, prepared, &server).await?;
    report.restored(restored);
    let began = context.clock.monotonic();
    let examined = examine::all(context, target, (scratch, arrived), report).await;
    report.phases.push(PhaseTime::new("validate", context.clock.monotonic() - began));
    examined?;
    stop(&mut instance).await?;
    checks::offline(scratch, report).await
}

/// One beat before the fault, so that even an idle cluster has something to be found. A primary that is gone cannot beat.
async fn precede(context: &Context, target: &Target, report: &mut Report) -> Option<(Beat, Lsn)> {
    let info = target.conninfo.clone().with_application_name("drctl drill").with_dbname(&*target.heartbeat_database);
    let beat = async {
        let client = sql::connect(&info).await.during(|| "reach the primary")?;
        heartbeat::beat(&client, &target.name).await
    };
    let asked = context.clock.now();
    let outcome = tokio::time::timeout(BEAT_LIMIT, beat).await;
    match outcome.unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "the primary did not answer in time"))) {
        Ok((beat, end)) => {
            report.compare_clocks((asked, context.clock.now()), beat.at);
            Some((beat, end))
        }
        Err(error) => {
            report.warnings.push(format!("no heartbeat was written before the drill: {error}"));
            None
        }
    }
}

/// The plan, once the region holds the beat or is given up waiting for, and how long the planning took: the wait belongs
/// to the drill, not to a recovery.
async fn prepare(
    context: &Context,
    scratch: &Scratch,
    target: &TargetName,
    beat: Option<Lsn>,
) -> Result<(Request, Prepared, Duration)> {
    let give_up = context.clock.monotonic() + BEAT_ARRIVES;
    let mut request = request(context, scratch, target, &[]);
    loop {
        let began = context.clock.monotonic();
        let prepared = restore::prepare(context, &request).await.during(|| "plan the restore")?;
        let homeless: Vec<_> = prepared.plan.tablespaces.iter().filter(|(_, place)| place.is_none()).collect();
        if !homeless.is_empty() {
            let locations: Vec<_> = prepared.plan.tablespaces.iter().map(|(location, _)| location.clone()).collect();
            request = self::request(context, scratch, target, &locations);
            continue;
        }
        let arrived = beat.is_none_or(|beat| prepared.plan.end_lsn >= beat);
        let now = context.clock.monotonic();
        if arrived || now >= give_up {
            return Ok((request, prepared, now - began));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn request(context: &Context, scratch: &Scratch, target: &TargetName, tablespaces: &[String]) -> Request {
    let place = |(number, location): (usize, &String)| (location.clone(), scratch.tablespace(number));
    let tablespaces: BTreeMap<String, PathBuf> = tablespaces.iter().enumerate().map(place).collect();
    Request {
        what: target.to_string(),
        directory: scratch.data(),
        tablespaces,
        region: None,
        point: Point::End,
        timeline: None,
        start: true,
        run_as: context.scratch.run_as.clone(),
        invocation: vec!["drctl".to_owned()],
    }
}

async fn stop(instance: &mut Instance) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(600);
    let stopped = instance.stop(crate::pg::instance::StopMode::Fast, LIMIT).await;
    stopped.during(|| "stop the scratch cluster")
}

/// How long the primary may take for a beat.
const BEAT_LIMIT: Duration = Duration::from_secs(20);

/// Whether an error says something about the backup, or only that nothing could be found out.
fn is_inconclusive(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unavailable | Kind::Cancelled | Kind::Refused | Kind::Usage)
}
