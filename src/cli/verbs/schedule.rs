//! `drctl schedule`.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::verbs::schedule_dry_run;
use crate::cli::{Session, figures, time};
use crate::config::{Mistake, load_schedules, units};
use crate::model::schedule::{CatchUp, Overlap, Schedule, Work};
use crate::model::{Result, ScheduleName, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Look for mistakes in every file; all are told at once
    Lint,
    /// List the schedules and when each comes next
    List,
    /// Show the slots that come next
    Next {
        /// Only this schedule
        schedule: Option<ScheduleName>,
        /// How many
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        count: u32,
        /// After this time instead of now: '2026-11-20 03:55', UTC unless an offset follows
        #[arg(long, value_name = "TIME", value_parser = time::parse)]
        from: Option<DateTime<Utc>>,
    },
    /// Show what a daemon would make of the schedules: how many slots run, and which would be skipped or cut off
    DryRun(schedule_dry_run::Args),
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub fn run(args: Args, session: &Session) -> Result<Exit> {
    match args.action {
        Action::Lint => lint(session),
        Action::List => list(session),
        Action::Next { schedule, count, from } => next(session, schedule.as_ref(), count, from),
        Action::DryRun(args) => schedule_dry_run::run(&args, session),
    }
}

/// What `lint` found.
#[derive(Debug, Serialize)]
struct Linted<'a> {
    dir: &'a std::path::Path,
    schedules: Vec<&'a ScheduleName>,
    mistakes: &'a [Mistake],
}

fn lint(session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let dir = settings.schedules.dir.as_path();
    let read = load_schedules(&settings);
    if session.output.json {
        let linted = match &read {
            Ok(schedules) => {
                let schedules = schedules.iter().map(|schedule| &schedule.name).collect();
                Linted { dir, schedules, mistakes: &[] }
            }
            Err(mistakes) => Linted { dir, schedules: Vec::new(), mistakes: &mistakes.list },
        };
        session.output.print_json(&linted)?;
    } else {
        let text = match &read {
            Ok(schedules) if schedules.is_empty() => nothing_yet(dir),
            Ok(schedules) => format!("{} schedules in {} are good", schedules.len(), dir.display()),
            Err(mistakes) => mistakes.list.iter().map(|mistake| format!("{mistake}\n")).collect(),
        };
        session.output.print(&text)?;
    }
    Ok(if read.is_ok() { Exit::Ok } else { Exit::Usage })
}

fn nothing_yet(dir: &std::path::Path) -> String {
    format!("There is no schedule in {} yet. Next: docs/schedules.md has examples", dir.display())
}

/// A schedule as `list --json` shows it.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a ScheduleName,
    description: Option<&'a str>,
    enabled: bool,
    #[serde(flatten)]
    work: &'a Work,
    cron: String,
    timezone: &'static str,
    jitter: String,
    catch_up: CatchUp,
    overlap: Overlap,
    timeout: String,
    retry: Retried,
    after: Option<&'a ScheduleName>,
    max_age: Option<String>,
    next: Option<DateTime<Utc>>,
}

#[derive(Debug, Serialize)]
struct Retried {
    max: u32,
    pause: String,
}

impl<'a> Listed<'a> {
    fn of(schedule: &'a Schedule, now: DateTime<Utc>) -> Self {
        Self {
            name: &schedule.name,
            description: schedule.description.as_deref(),
            enabled: schedule.enabled,
            work: &schedule.work,
            cron: schedule.cron.to_string(),
            timezone: schedule.timezone.name(),
            jitter: units::format_duration(schedule.jitter),
            catch_up: schedule.catch_up,
            overlap: schedule.overlap,
            timeout: units::format_duration(schedule.timeout),
            retry: Retried { max: schedule.retry.max, pause: units::format_duration(schedule.retry.pause) },
            after: schedule.after.as_ref(),
            max_age: schedule.max_age.map(units::format_duration),
            next: schedule.slots_after(now).next(),
        }
    }
}

fn list(session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let schedules = load_schedules(&settings)?;
    let now = session.clock.now();
    if session.output.json {
        session.output.print_json(&schedules.iter().map(|schedule| Listed::of(schedule, now)).collect::<Vec<_>>())?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["SCHEDULE", "JOB", "TARGET", "NEXT", "WHEN"]);
    for schedule in &schedules {
        let next = match schedule.slots_after(now).next() {
            Some(slot) => figures::moment(now, slot),
            None if schedule.enabled => "never".to_owned(),
            None => "not enabled".to_owned(),
        };
        let when = format!("{}  {}", schedule.cron, schedule.timezone);
        table.row([schedule.name.to_string(), schedule.work.job().to_string(), target(&schedule.work), next, when]);
    }
    session.output.print(&if table.is_empty() { nothing_yet(&settings.schedules.dir) } else { table.to_text() })?;
    Ok(Exit::Ok)
}

fn target(work: &Work) -> String {
    work.target().map_or_else(|| "all".to_owned(), ToString::to_string)
}

/// One slot to come.
#[derive(Debug, Serialize)]
struct Coming<'a> {
    slot: DateTime<Utc>,
    starts_at: DateTime<Utc>,
    schedule: &'a ScheduleName,
    job: crate::model::schedule::Job,
    target: Option<&'a TargetName>,
    timezone: &'static str,
}

fn next(session: &Session, only: Option<&ScheduleName>, count: u32, from: Option<DateTime<Utc>>) -> Result<Exit> {
    let settings = session.settings()?;
    let schedules = load_schedules(&settings)?;
    if let Some(name) = only.filter(|name| !schedules.iter().any(|schedule| schedule.name == **name)) {
        let error = crate::model::Error::usage(format!("there is no schedule `{name}`"));
        return Err(error.hint("drctl schedule list shows them"));
    }
    let now = from.unwrap_or_else(|| session.clock.now());
    let coming = coming(&schedules, only, usize::try_from(count).unwrap_or(usize::MAX), now);
    if session.output.json {
        session.output.print_json(&coming)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["SLOT", "STARTS", "SCHEDULE", "JOB", "TARGET", "LOCAL TIME"]);
    for Coming { slot, starts_at, schedule, job, target, timezone } in &coming {
        let zone: chrono_tz::Tz = timezone.parse().unwrap_or(chrono_tz::Tz::UTC);
        table.row([
            figures::moment(now, *slot),
            starts_at.format("%H:%M:%S").to_string(),
            schedule.to_string(),
            job.to_string(),
            target.map_or_else(|| "all".to_owned(), ToString::to_string),
            slot.with_timezone(&zone).format("%a %m-%d %H:%M %Z").to_string(),
        ]);
    }
    session.output.print(&match table.is_empty() {
        false => table.to_text(),
        true if schedules.is_empty() => nothing_yet(&settings.schedules.dir),
        true => no_slot(&schedules, only, now),
    })?;
    Ok(Exit::Ok)
}

/// Why schedules that there are have no slot to come.
fn no_slot(schedules: &[Schedule], only: Option<&ScheduleName>, now: DateTime<Utc>) -> String {
    let mut chosen = schedules.iter().filter(|schedule| only.is_none_or(|only| schedule.name == *only));
    let after = format!("after {}; times end with the year 2100", figures::utc(now));
    match (only, chosen.any(|schedule| schedule.enabled)) {
        (Some(name), false) => format!("{name} is not enabled. Next: enabled = true in its file"),
        (None, false) => "No schedule is enabled. Next: drctl schedule list".to_owned(),
        (Some(name), true) => format!("{name} has no slot {after}"),
        (None, true) => format!("No schedule has a slot {after}"),
    }
}

/// The first `count` slots of all schedules together.
fn coming<'a>(
    schedules: &'a [Schedule],
    only: Option<&ScheduleName>,
    count: usize,
    now: DateTime<Utc>,
) -> Vec<Coming<'a>> {
    let chosen = schedules.iter().filter(|schedule| only.is_none_or(|only| schedule.name == *only));
    let mut coming: Vec<_> = chosen
        .flat_map(|schedule| {
            schedule.slots_after(now).take(count).map(move |slot| Coming {
                slot,
                starts_at: schedule.start_of(slot),
                schedule: &schedule.name,
                job: schedule.work.job(),
                target: schedule.work.target(),
                timezone: schedule.timezone.name(),
            })
        })
        .collect();
    coming.sort_by(|a, b| (a.slot, a.schedule).cmp(&(b.slot, b.schedule)));
    coming.truncate(count);
    coming
}
