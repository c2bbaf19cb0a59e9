//! `drill`: a real restore into a scratch cluster that starts, replays, is promoted, checked, measured and torn down.
//!
//! It reads one region alone, because what is to be proven is that this region alone is enough. What it cannot find out
//! is *inconclusive*, which is neither good nor bad news; a drill that measured nothing has failed.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::jobs::context::{Context, Target};
use crate::jobs::restore::{self, PhaseTime, Plan};
use crate::model::schedule::Pick;
use crate::model::{Error, Kind, Lsn, RegionName, Result, ResultExt, TargetName};
use crate::pg::instance::Instance;
use crate::pg::sql;
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::source::postgres::heartbeat::{self, Beat};

mod alike;
mod arrival;
mod checks;
mod evidence;
mod examine;
mod login;
mod report;
mod scratch;
mod select;
mod stop;
mod told;
mod verdict;

use arrival::Ready;
pub use report::{Asked, Check, Control, Level, Measured, Outcome, Report};
use scratch::Scratch;
use stop::Stop;

/// What is rehearsed, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The target.
    pub target: TargetName,
    /// The region that is read; the last one of the configuration if none is named.
    pub region: Option<RegionName>,
    /// Which recovery point.
    pub pick: Pick,
    /// This backup and no other.
    pub backup: Option<String>,
    /// The state at this time, instead of the newest.
    pub to_time: Option<DateTime<Utc>>,
    /// How long the scratch cluster is left to be looked at.
    pub keep: Option<Duration>,
}

impl Options {
    /// The newest point of a target, from the region that nobody would miss for a long time.
    pub const fn newest(target: TargetName) -> Self {
        Self { target, region: None, pick: Pick::Latest, backup: None, to_time: None, keep: None }
    }
}

/// Rehearses a recovery. Whatever stops it on the way is in the report; the scratch cluster is gone in every case, unless
/// it is to be kept.
///
/// # Errors
/// There is no such target or region, no region knows the backup that was named or one that leads to the time, or there
/// is no place for a scratch cluster. None of it says anything of recovery, so it leaves no report.
pub async fn run(context: &Context, options: &Options) -> Result<Report> {
    let target = context.target(&options.target)?;
    let region = chosen(context, options.region.as_ref())?;
    let alone = within(context, &region)?;
    asked_for_what_exists(context, options).await?;
    let mut scratch = Scratch::create(&context.scratch, &options.target, context).await?;
    let Options { pick, backup, to_time, .. } = options.clone();
    let asked = Asked { select: pick, backup, to_time };
    let mut report = Report::new(context, target, (region, asked), &scratch);
    if let Err(stop) = rehearse(&alone, target, &mut scratch, &mut report).await {
        report.stopped_by(&stop);
    }
    leave(context, options, scratch, &mut report);
    report.conclude(context.clock.now());
    keep(context, &mut report).await;
    told::tell(context, &report);
    Ok(report)
}

/// What a person named is looked for in all regions: that the one of the drill lacks it is what a drill finds. Without a
/// name there is nothing to mistype, and a target without any backup fails its drill.
async fn asked_for_what_exists(context: &Context, options: &Options) -> Result<()> {
    let Options { target, backup, to_time, .. } = options;
    if backup.is_none() && to_time.is_none() {
        return Ok(());
    }
    // What cannot be listed or read is for the drill to tell.
    let Ok((backups, damaged)) = catalog::backups(&context.repository, None).await else { return Ok(()) };
    if !damaged.is_empty() {
        return Ok(());
    }
    let see = format!("see: drctl list {target}");
    let mut commits: Vec<_> = backups.iter().map(|found| &found.commit).collect();
    if let Some(text) = backup {
        let found = catalog::select(&backups, text);
        let unknown = |error: Error| Error::usage(format!("--backup {text}")).because(error).hint(see.as_str());
        let found = found.map_err(unknown)?;
        if found.commit.target != *target {
            let id = &found.commit.id;
            return Err(Error::usage(format!("{id} is a backup of {}, not of {target}", found.commit.target)).hint(see));
        }
        commits.retain(|commit| commit.id == found.commit.id || text == target.as_str() || text == "latest");
    }
    let Some(time) = *to_time else { return Ok(()) };
    commits.retain(|commit| commit.target == *target && commit.wal.is_some());
    let reached = time <= context.clock.now() && commits.iter().any(|commit| commit.started_at <= time);
    match reached {
        true => Ok(()),
        false => {
            let oldest = commits.iter().map(|commit| commit.started_at).min();
            let why = match oldest {
                Some(oldest) if time < oldest => format!("the oldest one began at {}", oldest.to_rfc3339()),
                Some(_) => "that time is still to come".to_owned(),
                None => "there is none".to_owned(),
            };
            Err(Error::refused(format!("no backup of {target} leads to {}", time.to_rfc3339())).because(why).hint(see))
        }
    }
}

/// The scratch cluster goes, or stays for as long as was asked for.
fn leave(context: &Context, options: &Options, scratch: Scratch, report: &mut Report) {
    let until = options.keep.and_then(|keep| Some(context.clock.now() + TimeDelta::from_std(keep).ok()?));
    let left = match until {
        Some(until) => scratch.keep(until),
        None => scratch.tear_down(),
    };
    report.kept_until = until.filter(|_| left.is_ok());
    report.left_behind = left.err().map(|error| error.to_string());
}

/// The report goes into every region, beside what it reports on, now or as soon as they answer. A drill is no worse for it
/// if that fails; it is told.
async fn keep(context: &Context, report: &mut Report) {
    let Some(writer) = &context.writer else {
        report.warnings.push("the report was not stored: this machine has no signer".to_owned());
        return;
    };
    match evidence::store(context, writer, report).await {
        Ok(kept) => {
            if !kept.is_stored() {
                let state = context.state_dir.display();
                report.warnings.push(format!("no region took the report: it waits in {state} and goes there later"));
            }
            report.warnings.extend(kept.not_waiting.iter().map(|why| format!("the report does not wait here: {why}")));
            (report.stored_as, report.stored_in) = (Some(kept.id), kept.regions);
        }
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

async fn rehearse(
    context: &Context,
    target: &Target,
    scratch: &mut Scratch,
    report: &mut Report,
) -> std::result::Result<(), Stop> {
    let beat = match report.asked.is_newest() {
        true => precede(context, target, report).await,
        false => None,
    };
    let end = beat.as_ref().map(|(_, end)| *end);
    let Ready { request, prepared, planned_in, hole } = arrival::plan(context, scratch, (target, end), report).await?;
    // The fault happens now: whatever reaches the region from here on is lost to this drill.
    let fault_at = context.clock.now();
    report.faulted(fault_at, &prepared.plan, scratch);
    let arrived = beat.filter(|(_, end)| prepared.plan.end_lsn >= *end).map(|(beat, _)| beat);
    if end.is_some() && arrived.is_none() {
        report.warnings.push(format!("the beat before the drill did not reach {} in time", report.region));
    }
    check_plan(&prepared.plan, hole, target, report)?;
    let system_id = prepared.plan.wal.last().map(|leg| leg.system_id);
    let server = scratch.server(&prepared.plan).map_err(Stop::examining)?;
    report.phases.push(PhaseTime::new("provision", planned_in));
    let restored = restore::rehearse(context, &request, prepared, &server).await;
    let (restored, mut instance) = restored.map_err(|error| Stop::restoring(error, scratch))?;
    report.restored(restored);
    // Not a part of recovery, and of no scratch disk.
    alike::compare(context, report).await;
    let (began, seen) = (context.clock.monotonic(), report.checks.len());
    let examined = examine::all(context, (target, system_id), (scratch, arrived), report).await;
    report.phases.push(PhaseTime::new("validate", context.clock.monotonic() - began));
    let examined = match examined {
        Ok(()) => finish(&mut instance, scratch, report).await,
        failed => failed,
    };
    match scratch.is_full() && (report.excuse(seen) || examined.is_err()) {
        true => Err(Stop::full(examined.err())),
        false => examined.map_err(Stop::examining),
    }
}

/// What the plan says of the region before anything is restored from it.
fn check_plan(
    plan: &Plan,
    hole: Option<String>,
    target: &Target,
    report: &mut Report,
) -> std::result::Result<(), Stop> {
    if plan.target != target.name {
        let error = Error::usage(format!("{} is a backup of {}, not of {}", plan.backup, plan.target, target.name));
        return Err(Stop::planning(error));
    }
    let end = plan.end_lsn;
    let whole = match hole {
        Some(why) => Err(Error::damaged(why)),
        None => Ok(format!("to {end}")),
    };
    report.check("WAL without a gap", Level::L1, whole);
    let judges = plan.refused.iter().any(|refusal| refusal.judges);
    plan.refuse().map_err(|error| Stop::refused(error, judges))
}

/// One beat before the fault, so that even an idle cluster has something to be found. A primary that is gone cannot beat.
async fn precede(context: &Context, target: &Target, report: &mut Report) -> Option<(Beat, Lsn)> {
    let info = target.conninfo.primary().with_application_name("drctl drill").with_dbname(&*target.heartbeat_database);
    let beat = async {
        let client = sql::connect(&info).await.during(|| "reach the primary")?;
        let before = context.clock.now();
        heartbeat::beat(&client, &target.name).await.map(|(beat, end)| (before, beat, end))
    };
    let outcome = tokio::time::timeout(BEAT_LIMIT, beat).await;
    match outcome.unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "the primary did not answer in time"))) {
        Ok((before, beat, end)) => {
            report.compare_clocks(before, beat.at);
            Some((beat, end))
        }
        Err(error) => {
            report.warnings.push(format!("no heartbeat was written before the drill: {error}"));
            None
        }
    }
}

/// Nothing runs any more, and the files are looked at as they lie.
async fn finish(instance: &mut Instance, scratch: &Scratch, report: &mut Report) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(600);
    let stopped = instance.stop(crate::pg::instance::StopMode::Fast, LIMIT).await;
    stopped.during(|| "stop the scratch cluster")?;
    checks::offline(scratch, report).await
}

/// How long the primary may take for a beat.
const BEAT_LIMIT: Duration = Duration::from_secs(20);
