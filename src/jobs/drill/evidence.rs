//! A drill's report as it is stored: head, body, and Markdown for people who have no drctl.

use std::fmt::Write as _;

use crate::jobs::context::Context;
use crate::jobs::drill::report::{Measured, Outcome, Report};
use crate::jobs::reports::outbox::{self, Kept};
use crate::model::{Error, ReportId, Result};
use crate::pg::instance::Network;
use crate::repository::FORMAT;
use crate::repository::handle::Writer;
use crate::repository::records::reports::{ReportBody, ReportHead};

/// Brings the report to every region, or keeps it until they answer.
///
/// # Errors
/// It could not be kept anywhere.
pub(super) async fn store(context: &Context, writer: &Writer, report: &Report) -> Result<Kept> {
    let id = ReportId::new(&report.target, report.started_at, context.rng.as_ref())?;
    let head = head(&id, report);
    let value = serde_json::to_value(report).map_err(|error| Error::failed("a report is not JSON").because(error))?;
    let body = ReportBody { report: value, markdown: markdown(&id, report) };
    outbox::keep(context, writer, &head, &body).await
}

fn head(id: &ReportId, report: &Report) -> ReportHead {
    let pair = |measured: &Measured| (measured.objective_seconds, measured.measured_seconds);
    ReportHead {
        format: FORMAT,
        id: id.clone(),
        job: "drill".to_owned(),
        target: report.target.clone(),
        backup: report.backup.clone(),
        region: Some(report.region.clone()),
        outcome: word(report.outcome).to_owned(),
        level: report.level.map(|level| format!("{level:?}")),
        started_at: report.started_at,
        finished_at: report.finished_at,
        rpo: pair(&report.rpo),
        rto: pair(&report.rto),
        phases: report.phases.iter().map(|phase| (phase.name.to_owned(), phase.seconds)).collect(),
        checks: report.checks.iter().map(|check| (check.name.clone(), check.outcome == Outcome::Pass)).collect(),
        same_as: report.same_as.clone(),
        host: report.environment.host.clone(),
        drctl: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

pub(super) const fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Fail => "fail",
        Outcome::Inconclusive => "inconclusive",
    }
}

fn markdown(id: &ReportId, report: &Report) -> String {
    let mut text = String::new();
    let environment = &report.environment;
    let (outcome, level) = (word(report.outcome), report.level.map_or_else(|| "none".to_owned(), |l| format!("{l:?}")));
    let _ = writeln!(text, "# Drill of {}: {outcome}\n", report.target);
    for reason in &report.reasons {
        let _ = writeln!(text, "- {}", in_line(reason));
    }
    let seconds = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
    let backup = report.backup.as_ref().map_or_else(|| "–".to_owned(), ToString::to_string);
    let _ = writeln!(text, "\n| | |\n|---|---|\n| report | {id} |\n| backup | {backup} |");
    let _ = writeln!(text, "| region, alone | {} |\n| level proven | {level} |", report.region);
    let point = match (&report.asked.select, &report.asked.to_time) {
        (pick, None) => format!("{pick:?}").to_lowercase(),
        (_, Some(time)) => time.to_string(),
    };
    let network = match environment.network {
        Network::Isolated => "isolated",
        Network::Shared => "shared",
    };
    let _ = writeln!(text, "| recovery point | {point} |\n| network | {network} |");
    let _ = writeln!(text, "| began | {} |\n| ended | {} |", report.started_at, report.finished_at);
    let _ = writeln!(text, "| on | {}, {} cores |\n", environment.host, environment.cores);
    let _ = writeln!(text, "| seconds | objective | measured |\n|---|---|---|");
    for (name, measured) in [("RPO", &report.rpo), ("technical recovery time", &report.rto)] {
        let (objective, measured) = (seconds(measured.objective_seconds), seconds(measured.measured_seconds));
        let _ = writeln!(text, "| {name} | {objective} | {measured} |");
    }
    let _ = writeln!(text, "\n| phase | seconds | bytes |\n|---|---|---|");
    for phase in &report.phases {
        let bytes = phase.bytes.map_or_else(String::new, |bytes| bytes.to_string());
        let _ = writeln!(text, "| {} | {:.2} | {bytes} |", phase.name, phase.seconds);
    }
    let _ = writeln!(text, "\n| check | level | outcome | seen |\n|---|---|---|---|");
    for check in &report.checks {
        let outcome = word(check.outcome);
        let _ = writeln!(text, "| {} | {:?} | {outcome} | {} |", check.name, check.level, in_line(&check.detail));
    }
    if let Some(control) = &report.control {
        let told = if control.caught { "was caught" } else { "was NOT caught" };
        let _ = writeln!(text, "\nNegative control: a wrong expectation for `{}` {told}.", control.name);
    }
    for control in &report.controls {
        let told = if control.caught { "was caught" } else { "was NOT caught" };
        let _ = writeln!(text, "\nNegative control: `{}`, broken on purpose, {told}.", control.name);
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "\nWarning: {}", in_line(warning));
    }
    text
}

/// As a cell of a table can hold it.
fn in_line(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ")
}
