//! `drctl schedule dry-run`.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::{Session, figures, time};
use crate::config::{load_schedules, units};
use crate::daemon::scheduler::rehearsal::rehearse;
use crate::model::run::{Outcome, Run};
use crate::model::schedule::{Job, Schedule};
use crate::model::{Error, Result, ScheduleName};

/// The longest time that is looked ahead.
const LONGEST: Duration = Duration::from_secs(400 * 24 * 3600);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How far to look ahead
    #[arg(long = "for", value_name = "DURATION", default_value = "14d", value_parser = units::parse_duration)]
    span: Duration,
    /// How long each job is taken to last
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = units::parse_duration)]
    takes: Duration,
    /// From this time on instead of now: '2026-11-20 03:55', UTC unless an offset follows
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    from: Option<DateTime<Utc>>,
}

/// What became of the slots of one schedule.
#[derive(Debug, Serialize)]
struct Rehearsed {
    schedule: ScheduleName,
    job: Job,
    slots: u64,
    done: u64,
    skipped: u64,
    timeout: u64,
    first_start: Option<DateTime<Utc>>,
    /// Seconds between a slot and its start, at most: jitter, and waiting for others.
    longest_wait_seconds: u64,
    /// Whether `max_age` would have been exceeded between two successes.
    too_old: bool,
}

/// What `--json` shows.
#[derive(Debug, Serialize)]
struct Report {
    from: DateTime<Utc>,
    until: DateTime<Utc>,
    takes_seconds: u64,
    schedules: Vec<Rehearsed>,
    /// Jobs that ran at the same time, at most.
    at_once: usize,
}

/// Runs the verb.
///
/// # Errors
/// The schedules are wrong.
pub(super) fn run(args: &Args, session: &Session) -> Result<Exit> {
    if args.span > LONGEST {
        return Err(Error::usage("--for looks 400 days ahead at most"));
    }
    let schedules = load_schedules(&session.settings()?)?;
    let from = args.from.unwrap_or_else(|| session.clock.now());
    let until = from + TimeDelta::from_std(args.span).unwrap_or_default();
    let runs = rehearse(schedules.clone(), (from, until), args.takes);
    let report = Report {
        from,
        until,
        takes_seconds: args.takes.as_secs(),
        schedules: schedules.iter().map(|schedule| rehearsed(schedule, &runs, (from, until))).collect(),
        at_once: at_once(&runs),
    };
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, args))?,
    }
    let all_run = report.schedules.iter().all(|of| of.done == of.slots && !of.too_old);
    Ok(if all_run { Exit::Ok } else { Exit::Failed })
}

fn rehearsed(schedule: &Schedule, runs: &[Run], (from, until): (DateTime<Utc>, DateTime<Utc>)) -> Rehearsed {
    let mut runs: Vec<_> = runs.iter().filter(|run| run.schedule == schedule.name).collect();
    runs.sort_by_key(|run| run.slot);
    let count = |wanted: Outcome| runs.iter().filter(|run| run.outcome == wanted).map(|run| run.slots).sum();
    let starts = || runs.iter().filter_map(|run| Some((run.slot, run.started_at?)));
    let waits = starts().filter_map(|(slot, start)| (start - slot).to_std().ok());
    let ends = runs.iter().filter(|run| run.outcome.is_success()).map(|run| run.ended_at);
    let moments: Vec<_> = [from].into_iter().chain(ends).chain([until]).collect();
    let too_old =
        |age: Duration| moments.windows(2).any(|pair| (pair[1] - pair[0]).to_std().is_ok_and(|gap| gap > age));
    Rehearsed {
        schedule: schedule.name.clone(),
        job: schedule.work.job(),
        slots: runs.iter().map(|run| run.slots).sum(),
        done: count(Outcome::Success),
        skipped: count(Outcome::SkippedOverlap),
        timeout: count(Outcome::Timeout),
        first_start: starts().next().map(|(_, start)| start),
        longest_wait_seconds: waits.max().unwrap_or_default().as_secs(),
        too_old: schedule.max_age.is_some_and(too_old),
    }
}

/// How many ran at once, at most.
fn at_once(runs: &[Run]) -> usize {
    // An end comes before a start of the same moment.
    let mut changes: BTreeMap<(DateTime<Utc>, bool), usize> = BTreeMap::new();
    for (start, end) in runs.iter().filter_map(|run| Some((run.started_at?, run.ended_at))) {
        *changes.entry((start, true)).or_default() += 1;
        *changes.entry((end, false)).or_default() += 1;
    }
    let running = changes.into_iter().scan(0usize, |running, ((_, begins), count)| {
        *running = if begins { running.saturating_add(count) } else { running.saturating_sub(count) };
        Some(*running)
    });
    running.max().unwrap_or_default()
}

fn text(report: &Report, args: &Args) -> String {
    let Report { from, until, at_once, .. } = report;
    let takes = figures::duration(args.takes);
    let mut text =
        format!("{} to {}, if every job succeeds after {takes}:\n\n", figures::utc(*from), figures::utc(*until));
    let mut table = Table::new(["SCHEDULE", "JOB", "SLOTS", "RUN", "SKIPPED", "TIMEOUT", "LONGEST WAIT", ""]);
    for of in &report.schedules {
        table.row([
            of.schedule.to_string(),
            of.job.to_string(),
            figures::count(of.slots),
            figures::count(of.done),
            figures::count(of.skipped),
            figures::count(of.timeout),
            figures::duration(Duration::from_secs(of.longest_wait_seconds)),
            if of.too_old { "OLDER THAN max_age" } else { "" }.to_owned(),
        ]);
    }
    text.push_str(&table.to_text());
    text.push_str(&format!("\nAt most {at_once} at once. Nothing was run.\n"));
    text
}
