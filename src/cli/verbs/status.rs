//! `drctl status`.

use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::cli::render::{Colour, Output, Table};
use crate::jobs::status::{self, Proven, RegionStatus, Report, TargetStatus};
use crate::model::Result;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(_: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Restore, &World::real()).await?;
    let report = status::run(&context).await?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, session.clock.now(), &session.output))?,
    }
    Ok(if report.is_violated() { Exit::Failed } else { Exit::Ok })
}

fn text(report: &Report, now: DateTime<Utc>, output: &Output) -> String {
    let mut text = String::new();
    for unreadable in &report.unreadable {
        let _ = writeln!(text, "{}  {unreadable}", output.paint(Colour::Red, "UNREADABLE"));
    }
    if let Some(worst) = report.targets.first().filter(|target| !target.problems.is_empty()) {
        let problem = worst.problems.first().map(String::as_str).unwrap_or_default();
        let next = worst.next.as_ref().map(|next| format!("  →  {next}")).unwrap_or_default();
        let _ = writeln!(text, "{}  {}  {problem}{next}\n", output.paint(Colour::Red, "WORST"), worst.target);
    }
    if report.targets.is_empty() {
        text.push_str("Nothing is protected yet. Next: add a [targets.<name>] to drctl.toml");
        return text;
    }
    let mut table = Table::new(["TARGET", "EXPOSURE (objective)", "LAST BACKUP", "PROVEN", "STATE"]);
    for target in &report.targets {
        let state = target.problems.first().map_or("ok", String::as_str);
        let backup = target.last_backup_at.map_or_else(|| "none".to_owned(), |at| figures::moment(now, at));
        let proven = target.proven.as_ref().map_or_else(|| "–".to_owned(), |proven| proof(proven, now));
        let mut regions = target.regions.iter().map(|region| exposure(region, now));
        let first = format!("{}{}", regions.next().unwrap_or_default(), objective(target));
        table.row([target.target.to_string(), first, backup, proven, state.to_owned()]);
        let mut further = target.problems.iter().skip(1);
        for region in regions {
            let problem = further.next().cloned().unwrap_or_default();
            table.row([String::new(), region, String::new(), String::new(), problem]);
        }
        for problem in further {
            table.row([String::new(), String::new(), String::new(), String::new(), problem.clone()]);
        }
    }
    text.push_str(&table.to_text());
    text
}

fn proof(proven: &Proven, now: DateTime<Utc>) -> String {
    let level = proven.level.as_deref().unwrap_or_default();
    format!("{level} {}", figures::relative(now, proven.at)).trim_start().to_owned()
}

fn objective(target: &TargetStatus) -> String {
    target.rpo_seconds.map(|rpo| format!(" ({})", figures::duration(Duration::from_secs(rpo)))).unwrap_or_default()
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
