//! `drctl runs`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::exit::Exit;
use crate::cli::render::{Colour, Output, Table};
use crate::cli::{Session, figures};
use crate::config::load_schedules;
use crate::jobs::runs::{self, History};
use crate::model::run::{Outcome, Run};
use crate::model::{Error, Result, ScheduleName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this schedule
    schedule: Option<ScheduleName>,
    /// How many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let context = app::context(&settings, Role::Restore, &World::real()).await?;
    let count = usize::try_from(args.count).unwrap_or(usize::MAX);
    let history = runs::history(&context, args.schedule.as_ref(), count).await?;
    if let Some(name) = &args.schedule
        && history.runs.is_empty()
        && history.unreadable.is_empty()
        // Of one that was removed the regions still tell.
        && load_schedules(&settings).is_ok_and(|known| !known.iter().any(|schedule| schedule.name == *name))
    {
        let error = Error::usage(format!("there is no schedule `{name}`"));
        return Err(error.hint("drctl schedule list shows them"));
    }
    match session.output.json {
        true => session.output.print_json(&history)?,
        false => session.output.print(&text(&history, session.clock.now(), &session.output))?,
    }
    Ok(if history.unreadable.is_empty() { Exit::Ok } else { Exit::Failed })
}

fn text(history: &History, now: DateTime<Utc>, output: &Output) -> String {
    let mut text = String::new();
    for unreadable in &history.unreadable {
        let _ = writeln!(text, "{}  {unreadable}", output.paint(Colour::Red, "UNREADABLE"));
    }
    let mut table = Table::new(["SLOT", "SCHEDULE", "OUTCOME", "TOOK", "DETAIL"]);
    for run in &history.runs {
        let took = run.started_at.and_then(|started| (run.ended_at - started).to_std().ok());
        table.row([
            figures::moment(now, run.slot),
            run.schedule.to_string(),
            outcome(run, output),
            took.map_or_else(|| "–".to_owned(), figures::duration),
            run.detail.clone().unwrap_or_default(),
        ]);
    }
    match table.is_empty() {
        true => text.push_str("No slot of any schedule was recorded yet. Next: drctl daemon"),
        false => text.push_str(&table.to_text()),
    }
    text
}

/// `success`, `success late`, `failed x3`, `missed 12 since 11-20 03:00 UTC`.
fn outcome(run: &Run, output: &Output) -> String {
    let mut text = run.outcome.as_str().replace('_', " ");
    if run.caught_up {
        text.push_str(" late");
    }
    if run.attempts > 1 {
        let _ = write!(text, " x{}", run.attempts);
    }
    if run.slots > 1 {
        let _ = write!(text, " {} since {}", run.slots, run.first_slot.format("%m-%d %H:%M UTC"));
    }
    match run.outcome {
        Outcome::Success => text,
        Outcome::Debts | Outcome::SkippedOverlap | Outcome::SkippedPaused => output.paint(Colour::Yellow, &text),
        Outcome::Failed | Outcome::Timeout | Outcome::Missed | Outcome::Interrupted => output.paint(Colour::Red, &text),
    }
}
