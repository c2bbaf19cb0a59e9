//! `drctl check`.

use std::fmt::Write as _;

use crate::app::{self, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::progress;
use crate::cli::render::{Colour, Output};
use crate::jobs::check::{self, Finding, Level, Report};
use crate::model::{Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Of the targets, look at this one only
    pub target: Option<TargetName>,
    /// Show every line, not only what needs attention
    #[arg(long)]
    pub all: bool,
    /// Do not ask regions that lock for the lock of every object: one small request for each
    #[arg(long)]
    pub no_locks: bool,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    if let Some(target) = &args.target {
        settings.target(target)?;
    }
    let subject = app::subject(&settings, &World::real()).await?;
    let shown = progress::show(subject.progress.clone(), &session.output);
    let report = check::run(&subject, args.target.as_ref(), !args.no_locks).await;
    shown.end().await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, args.all, &session.output))?,
    }
    Ok(if report.worst() == Level::Fail { Exit::Failed } else { Exit::Ok })
}

fn text(report: &Report, all: bool, output: &Output) -> String {
    let shown: Vec<_> = report.checks.iter().filter(|finding| all || finding.level > Level::Ok).collect();
    let name = |finding: &Finding| format!("{} {}", finding.area, finding.object);
    // A long name, such as a path, pushes only its own line.
    let width =
        shown.iter().map(|finding| name(finding).chars().count()).filter(|width| *width <= 24).max().unwrap_or(0);
    let mut text = String::new();
    for finding in &shown {
        let level = match finding.level {
            Level::Fail => output.paint(Colour::Red, "FAIL"),
            Level::Warn => output.paint(Colour::Yellow, "WARN"),
            Level::Ok => output.paint(Colour::Green, "ok  "),
        };
        let _ = writeln!(text, "{level}  {:width$}  {}", name(finding), finding.what);
        if let Some(fix) = &finding.fix {
            let _ = writeln!(text, "      {:width$}  fix: {fix}", "");
        }
    }
    let hidden = report.checks.len() - shown.len();
    if hidden > 0 {
        let other = if shown.is_empty() { "checks" } else { "other checks" };
        let _ = writeln!(text, "{}    {hidden} {other}   (--all to see them)", output.paint(Colour::Green, "ok"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(level: Level, area: &'static str, object: &str, what: &str, fix: Option<&str>) -> Finding {
        Finding { level, area, object: object.to_owned(), what: what.to_owned(), fix: fix.map(str::to_owned) }
    }

    #[test]
    fn what_needs_attention_comes_first_and_the_rest_is_counted() {
        let report = Report {
            checks: vec![
                finding(
                    Level::Fail,
                    "postgres",
                    "ledger",
                    "our slot can fill pg_wal",
                    Some("on_pressure = \"drop-slot\""),
                ),
                finding(Level::Warn, "region", "eu-west-1", "clock is 3.1 s ahead of ours", Some("run chrony")),
                finding(Level::Ok, "region", "eu-west-1", "can be reached", None),
                finding(Level::Ok, "keys", "all", "enough", None),
            ],
            locks: Vec::new(),
        };
        let golden = "\
FAIL  postgres ledger   our slot can fill pg_wal
                        fix: on_pressure = \"drop-slot\"
WARN  region eu-west-1  clock is 3.1 s ahead of ours
                        fix: run chrony
ok    2 other checks   (--all to see them)
";
        assert_eq!(text(&report, false, &Output::new(true)), golden);
        assert_eq!(text(&report, true, &Output::new(true)).lines().count(), 6);
    }
}
