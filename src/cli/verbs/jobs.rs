//! `drctl jobs`, `drctl run`, `drctl pause`, `drctl resume`: what a running daemon is asked for.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::cli::exit::Exit;
use crate::cli::render::{Colour, Output, Table};
use crate::cli::{Session, figures};
use crate::config::{Secret, units};
use crate::daemon::control::{self, Door};
use crate::daemon::scheduler::{Going, View};
use crate::model::run::Pause;
use crate::model::{Error, Kind, Result, ScheduleName};

/// A pause that nobody ends would be the end of a schedule.
const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 86_400);

/// Which daemon is asked.
#[derive(Debug, clap::Args)]
pub struct Whom {
    /// The daemon at this address instead of the one of this host: http://HOST:PORT
    #[arg(long, value_name = "URL", requires = "token")]
    daemon: Option<String>,
    /// Where its token is: env:VARIABLE or file:/path
    #[arg(long, value_name = "SECRET", requires = "daemon")]
    token: Option<String>,
}

impl Whom {
    fn door(&self, session: &Session) -> Result<Door> {
        match (&self.daemon, &self.token) {
            (Some(url), Some(token)) => Door::at(url, Secret::parse(token, Path::new("."))?.read()?),
            _ => Ok(Door::here(&session.settings()?.repository.state_dir)),
        }
    }
}

/// Arguments of `jobs`.
#[derive(Debug, clap::Args)]
pub struct JobsArgs {
    #[command(flatten)]
    whom: Whom,
}

/// Arguments of `run` and `resume`.
#[derive(Debug, clap::Args)]
pub struct Named {
    /// The schedule
    schedule: ScheduleName,
    #[command(flatten)]
    whom: Whom,
}

/// Arguments of `pause`.
#[derive(Debug, clap::Args)]
pub struct PauseArgs {
    /// The schedule
    schedule: ScheduleName,
    /// How long, at most 30d
    #[arg(long = "for", value_name = "DURATION", value_parser = length)]
    length: Duration,
    /// Why; it stands in the record of every slot that is skipped
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    whom: Whom,
}

fn reason(text: &str) -> Result<String> {
    match text.trim() {
        "" => Err(Error::usage("a pause has a reason")),
        text => Ok(text.to_owned()),
    }
}

fn length(text: &str) -> Result<Duration> {
    match units::parse_duration(text)? {
        length if length > LONGEST_PAUSE || length.is_zero() => Err(Error::usage("a pause takes from 1s to 30d")),
        length => Ok(length),
    }
}

/// A schedule that the daemon does not know was mistyped here.
fn unknown(error: Error) -> Error {
    match error.kind() {
        Kind::NotFound => Error::usage(error.to_string()).hint("drctl jobs shows those that the daemon knows"),
        _ => error,
    }
}

/// `drctl jobs`.
///
/// # Errors
/// No daemon answers.
pub async fn list(args: JobsArgs, session: &Session) -> Result<Exit> {
    let views = control::ask_jobs(&args.whom.door(session)?).await?;
    match session.output.json {
        true => session.output.print_json(&views)?,
        false => session.output.print(&text(&views, session.clock.now(), &session.output))?,
    }
    Ok(Exit::Ok)
}

/// `drctl run`.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn run(args: Named, session: &Session) -> Result<Exit> {
    let triggered = control::ask_run(&args.whom.door(session)?, &args.schedule).await.map_err(unknown)?;
    match session.output.json {
        true => session.output.print_json(&triggered)?,
        false => {
            let (name, slot) = (&args.schedule, figures::utc(triggered.slot));
            session
                .output
                .print(&format!("{name} starts, as slot {slot}. Next: drctl jobs, then drctl runs {name}"))?;
        }
    }
    Ok(Exit::Ok)
}

/// `drctl pause`.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn pause(args: PauseArgs, session: &Session) -> Result<Exit> {
    let until = session.clock.now() + TimeDelta::from_std(args.length).unwrap_or_default();
    let pause = Pause { until, reason: args.reason };
    control::ask_pause(&args.whom.door(session)?, &args.schedule, Some(&pause)).await.map_err(unknown)?;
    match session.output.json {
        true => session.output.print_json(&pause)?,
        false => session.output.print(&format!("{} is paused until {}", args.schedule, figures::utc(until)))?,
    }
    Ok(Exit::Ok)
}

/// What `resume` did.
#[derive(Debug, Serialize)]
struct Resumed<'a> {
    schedule: &'a ScheduleName,
    paused: bool,
}

/// `drctl resume`.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn resume(args: Named, session: &Session) -> Result<Exit> {
    control::ask_pause(&args.whom.door(session)?, &args.schedule, None).await.map_err(unknown)?;
    match session.output.json {
        true => session.output.print_json(&Resumed { schedule: &args.schedule, paused: false })?,
        false => session.output.print(&format!("{} goes on with its next slot", args.schedule))?,
    }
    Ok(Exit::Ok)
}

fn text(views: &[View], now: DateTime<Utc>, output: &Output) -> String {
    if views.is_empty() {
        return "The daemon has no schedule. Next: drctl schedule list".to_owned();
    }
    let mut table = Table::new(["SCHEDULE", "JOB", "TARGET", "STATE", "NEXT"]);
    for view in views {
        table.row([
            view.schedule.to_string(),
            view.job.to_string(),
            view.target.as_ref().map_or_else(|| "all".to_owned(), ToString::to_string),
            state(view, now, output),
            view.next.map_or_else(|| "–".to_owned(), |next| figures::moment(now, next)),
        ]);
    }
    table.to_text()
}

fn state(view: &View, now: DateTime<Utc>, output: &Output) -> String {
    if let Some(open) = &view.running {
        let since = open.started_at.and_then(|started| (now - started).to_std().ok()).unwrap_or_default();
        let attempt = if open.attempts > 1 { format!(", attempt {}", open.attempts) } else { String::new() };
        let running = format!("runs for {}{attempt}", figures::duration(since));
        let running = view.going.as_ref().map_or(running.clone(), |going| format!("{running}: {}", progress(going)));
        let failed = view.failed.as_ref().map(|why| format!("failed, is tried again: {why}"));
        return failed.map_or(running, |failed| output.paint(Colour::Yellow, &failed));
    }
    if view.waiting.is_some() {
        return "waits".to_owned();
    }
    let paused = view.paused.as_ref();
    let paused = paused.map(|pause| format!("paused until {}: {}", figures::moment(now, pause.until), pause.reason));
    paused.map_or_else(|| "idle".to_owned(), |paused| output.paint(Colour::Yellow, &paused))
}

/// `fetch 79 % of 1.65 GB`, `replay 312 MB`.
fn progress(going: &Going) -> String {
    let Going { phase, done_bytes, total_bytes, note, .. } = going;
    let done = match total_bytes.filter(|total| *total > 0) {
        // Totals are estimates.
        Some(total) => format!(" {} % of {}", (done_bytes.saturating_mul(100) / total).min(100), figures::bytes(total)),
        None if *done_bytes > 0 => format!(" {}", figures::bytes(*done_bytes)),
        None => String::new(),
    };
    let note = note.as_ref().map(|note| format!(", {note}")).unwrap_or_default();
    format!("{phase}{done}{note}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_has_a_reason_and_an_end() {
        assert!(reason(" ").is_err() && reason("").is_err() && length("31d").is_err());
        assert_eq!(reason(" migration ").unwrap(), "migration");
    }

    #[test]
    fn progress_is_told_with_what_is_known() {
        let told = |done_bytes, total_bytes, note: Option<&str>| {
            let note = note.map(str::to_owned);
            progress(&Going { phase: "fetch".to_owned(), seconds: 2.0, done_bytes, total_bytes, note })
        };
        assert_eq!(told(1_300_000_000, Some(1_650_000_000), None), "fetch 78 % of 1.65 GB");
        assert_eq!(told(312_000_000, None, None), "fetch 312 MB");
        assert_eq!(told(2_000, Some(1_000), Some("waits for a")), "fetch 100 % of 1.00 kB, waits for a");
        assert_eq!(told(0, Some(0), None), "fetch");
    }
}
