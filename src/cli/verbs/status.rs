//! `drctl status`.

use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::cli::render::{Colour, Output, Table};
use crate::config::{Settings, load_schedules};
use crate::daemon::control::{Door, ask_jobs};
use crate::daemon::scheduler::View;
use crate::jobs::status::{self, Proven, RegionStatus, Report, TargetStatus};
use crate::model::schedule::{Job, Schedule};
use crate::model::{Error, Result, ScheduleName, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(_: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let context = app::context(&settings, Role::Restore, &World::real()).await?;
    // Whoever restores from another machine has no schedules, and a mistake in them must not hide how things stand.
    let schedules = match load_schedules(&settings) {
        Ok(schedules) => schedules,
        Err(mistakes) => {
            let error = Error::from(mistakes);
            tracing::info!(%error, "the schedules are not readable here");
            Vec::new()
        }
    };
    let report = status::run(&context, &schedules).await?;
    let (next, told_by) = upcoming(&settings, &schedules, session.clock.now()).await;
    let violated = report.is_violated();
    match session.output.json {
        true => session.output.print_json(&Shown { report: &report, next: &next, next_told_by: told_by })?,
        false => {
            let mut text = text(&report, session.clock.now(), &session.output);
            text.push_str(&next_text(&next, session.clock.now()));
            session.output.print(&text)?;
        }
    }
    Ok(if violated { Exit::Failed } else { Exit::Ok })
}

#[derive(Debug, Serialize)]
struct Shown<'r> {
    #[serde(flatten)]
    report: &'r Report,
    /// The next slots, the earliest first.
    next: &'r [NextRun],
    /// `daemon`, or `schedules` when none answers: then nobody may be there to run them.
    next_told_by: &'static str,
}

#[derive(Debug, Serialize)]
struct NextRun {
    schedule: ScheduleName,
    job: Job,
    target: Option<TargetName>,
    at: DateTime<Utc>,
    running: bool,
}

/// Slots that are shown to people.
const NEXT_SHOWN: usize = 4;
/// A status does not wait for a daemon.
const DAEMON_TIME: Duration = Duration::from_secs(2);

/// What comes next: as the daemon of this host says, else as the schedules say.
async fn upcoming(settings: &Settings, schedules: &[Schedule], now: DateTime<Utc>) -> (Vec<NextRun>, &'static str) {
    let door = Door::here(&settings.repository.state_dir);
    let (mut next, told_by): (Vec<_>, _) = match tokio::time::timeout(DAEMON_TIME, ask_jobs(&door)).await {
        Ok(Ok(views)) => {
            let one = |view: View| {
                let (schedule, job, target, running) = (view.schedule, view.job, view.target, view.running.is_some());
                Some(NextRun { schedule, job, target, at: view.next?, running })
            };
            (views.into_iter().filter_map(one).collect(), "daemon")
        }
        _ => {
            let one = |schedule: &Schedule| {
                let at = schedule.slots_after(now).next()?;
                let (job, target) = (schedule.work.job(), schedule.work.target().cloned());
                Some(NextRun { schedule: schedule.name.clone(), job, target, at, running: false })
            };
            (schedules.iter().filter_map(one).collect(), "schedules")
        }
    };
    next.sort_by(|a, b| (a.at, &a.schedule).cmp(&(b.at, &b.schedule)));
    (next, told_by)
}

fn next_text(next: &[NextRun], now: DateTime<Utc>) -> String {
    let mut text = String::new();
    for (index, run) in next.iter().take(NEXT_SHOWN).enumerate() {
        let head = if index == 0 { "NEXT" } else { "" };
        text.push_str(if index == 0 { "\n" } else { "" });
        let running = if run.running { ", runs now" } else { "" };
        let _ = writeln!(text, "{head:<6}{}  {}{running}", run.schedule, figures::moment(now, run.at));
    }
    text
}

/// Problems are not wider.
const WIDTH: usize = 80;

fn text(report: &Report, now: DateTime<Utc>, output: &Output) -> String {
    let mut text = String::new();
    for unreadable in &report.unreadable {
        let _ = writeln!(text, "{}  {unreadable}", output.paint(Colour::Red, "UNREADABLE"));
    }
    if let Some(worst) = report.targets.first().filter(|target| !target.problems.is_empty()) {
        let problem = worst.problems.first().map(String::as_str).unwrap_or_default();
        let line = format!("{}  {problem}", worst.target);
        let next = worst.next.as_ref().map(|next| format!("→  {next}")).unwrap_or_default();
        // The command stays in one piece, to be copied.
        let fits = line.chars().count() + next.chars().count() <= 100;
        let gap = if fits { "  " } else { "\n       " };
        let told = format!("{line}{gap}{next}");
        let _ = writeln!(text, "{}  {}\n", output.paint(Colour::Red, "WORST"), told.trim_end());
    }
    if report.targets.is_empty() {
        text.push_str("Nothing is protected yet. Next: add a [targets.<name>] to drctl.toml\n");
        return text;
    }
    let mut table = Table::new(["TARGET", "EXPOSURE (objective)", "BACKUP", "PROVEN", "RTO NOW (objective)"]);
    for target in &report.targets {
        let backup = target.last_backup_at.map_or_else(|| "none".to_owned(), |at| figures::relative(now, at));
        let proven = target.proven.as_ref().map_or_else(|| "never".to_owned(), |proven| proof(proven, now));
        let mut regions = target.regions.iter().map(|region| exposure(region, now));
        let first = format!("{}{}", regions.next().unwrap_or_default(), objective(target.rpo_seconds));
        table.row([target.target.to_string(), first, backup, proven, time_to_recover(target)]);
        for region in regions {
            table.row([String::new(), region]);
        }
    }
    text.push_str(&table.to_text());
    for target in &report.targets {
        states(&mut text, target, now, output);
    }
    for late in &report.overdue {
        let since = late
            .last_success_at
            .map_or_else(|| "never succeeded".to_owned(), |at| format!("succeeded {}", figures::relative(now, at)));
        let allowed = figures::duration(Duration::from_secs(late.max_age_seconds));
        let word = output.paint(Colour::Red, "OVERDUE");
        let _ = writeln!(text, "{word}  {} {since}, allowed are {allowed}", late.schedule);
    }
    text
}

/// What is wrong with a target, or that nothing is, and what its server keeps for it.
fn states(text: &mut String, target: &TargetStatus, now: DateTime<Utc>, output: &Output) {
    let name = &target.target;
    if target.problems.is_empty() {
        let _ = writeln!(text, "\n{name}: {}", output.paint(Colour::Green, "ok"));
    } else {
        let _ = writeln!(text, "\n{name}:");
    }
    for problem in &target.problems {
        for line in wrapped(problem, WIDTH - 4) {
            let _ = writeln!(text, "  {line}");
        }
    }
    for gap in &target.gaps {
        let met = figures::relative(now, gap.at);
        let what = if gap.contradiction { "two versions" } else { "gap" };
        let _ = writeln!(text, "  {what} {} to {} on timeline {}, met {met}", gap.from, gap.to, gap.timeline);
    }
    if let Some(slot) = target.slot.as_ref().filter(|slot| slot.retained_bytes.is_some_and(|bytes| bytes > 0)) {
        let kept = figures::bytes(slot.retained_bytes.unwrap_or_default());
        let idle = if slot.active { "" } else { ", and nobody reads it" };
        let room = slot.room_bytes.map(|room| format!(", room for {} more", figures::bytes(room))).unwrap_or_default();
        let _ = writeln!(text, "  the server keeps {kept} of WAL for slot {}{room}{idle}", slot.name);
    }
}

/// Words in lines of at most `width`.
fn wrapped(words: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in words.split_whitespace() {
        let Some(line) = lines.last_mut() else { break };
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(format!("  {word}"));
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

fn time_to_recover(target: &TargetStatus) -> String {
    let predicted = target.rto_predicted.as_ref().and_then(|rto| Duration::try_from_secs_f64(rto.seconds).ok());
    let predicted = predicted.map_or_else(|| "unknown".to_owned(), figures::duration);
    format!("{predicted}{}", objective(target.rto_seconds))
}

fn proof(proven: &Proven, now: DateTime<Utc>) -> String {
    let level = proven.level.as_deref().unwrap_or_default();
    format!("{level} {}", figures::relative(now, proven.at)).trim_start().to_owned()
}

fn objective(seconds: Option<u64>) -> String {
    seconds.map(|seconds| format!(" ({})", figures::duration(Duration::from_secs(seconds)))).unwrap_or_default()
}

fn exposure(region: &RegionStatus, now: DateTime<Utc>) -> String {
    match (region.exposure_seconds, region.unknown_since) {
        (Some(seconds), _) => format!("{} {}", figures::duration(Duration::from_secs(seconds)), region.name),
        (None, Some(since)) => {
            let age = (now - since).to_std().unwrap_or_default();
            format!("unknown for {} {}", figures::duration(age), region.name)
        }
        (None, None) => format!("unknown {}", region.name),
    }
}
