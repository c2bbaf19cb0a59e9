//! A drill's end, as people read it.

use std::time::Duration;

use crate::cli::figures;
use crate::cli::render::{Colour, Output};
use crate::jobs::drill::{Check, Measured, Outcome, Report};
use crate::jobs::restore::{PhaseTime, quoted};

/// The longest bar.
const BAR: f64 = 24.0;
/// What a check saw is cut to this on the screen; `--json` has all of it.
const DETAIL: usize = 60;

/// The report.
pub(super) fn text(report: &Report, output: &Output) -> String {
    let (word, colour) = match report.outcome {
        Outcome::Pass => ("PASS", Colour::Green),
        Outcome::Fail => ("FAIL", Colour::Red),
        Outcome::Inconclusive => ("INCONCLUSIVE", Colour::Yellow),
    };
    let level = report.level.map_or_else(String::new, |level| format!(", level {level:?}"));
    let stored = report.stored_as.as_ref().map_or_else(String::new, |id| format!("   report {id}"));
    let (word, target, region) = (output.paint(colour, word), &report.target, &report.region);
    let mut lines = vec![format!("{word}  drill of {target} from {region} alone{level}{stored}")];
    lines.extend(report.reasons.iter().map(|reason| format!("  {}", reason.replace('\n', "\n    "))));
    lines.push(figures_line("asked", |measured| measured.objective_seconds, report));
    lines.push(figures_line("measured", |measured| measured.measured_seconds, report));
    lines.push(String::new());
    let longest = report.phases.iter().map(|phase| phase.seconds).fold(0.001, f64::max);
    lines.extend(report.phases.iter().map(|phase| phase_line(phase, longest)));
    lines.push(String::new());
    lines.extend(report.checks.iter().map(check_line));
    if let Some(control) = &report.control {
        let (mark, told) = if control.caught { ("✓", "was caught") } else { ("✗", "was NOT caught") };
        lines.push(format!("  {mark} negative control: a wrong expectation for `{}` {told}", control.name));
    }
    lines.extend(report.controls.iter().map(|control| {
        let (mark, told) = if control.caught { ("✓", "was caught") } else { ("✗", "was NOT caught") };
        format!("  {mark} negative control: `{}`, broken on purpose, {told}", control.name)
    }));
    lines.extend(report.warnings.iter().map(|warning| format!("  warning  {warning}")));
    if let Some(until) = report.kept_until {
        let directory = &report.environment.directory;
        let (data, socket) = (quoted(&format!("{directory}/data")), quoted(&format!("{directory}/s")));
        lines.push(format!("  kept until {}: pg_ctl -D {data} start; psql -h {socket}", figures::utc(until)));
        lines.push(format!("  earlier: stop it, then rm -r {}", quoted(directory)));
    }
    if report.left_behind.is_some() {
        lines.push(format!("  a copy of production remains: rm -r {}", quoted(&report.environment.directory)));
    }
    lines.join("\n")
}

fn seconds(value: f64) -> String {
    figures::duration(Duration::try_from_secs_f64(value).unwrap_or_default())
}

fn figures_line(name: &str, figure: impl Fn(&Measured) -> Option<f64>, report: &Report) -> String {
    let show = |measured: &Measured| figure(measured).map_or_else(|| "–".to_owned(), seconds);
    let (rpo, rto) = (show(&report.rpo), show(&report.rto));
    format!("  {name:<10}RPO {rpo:<12}technical recovery time {rto}")
}

fn phase_line(phase: &PhaseTime, longest: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few characters, never negative")]
    let width = (phase.seconds / longest * BAR).round() as usize;
    let bytes = phase.bytes.map_or_else(String::new, |bytes| format!("  {}", figures::bytes(bytes)));
    let beside = if phase.name == "stage" { ", beside replay" } else { "" };
    format!("  {:<10}{}▏ {}{bytes}{beside}", phase.name, "█".repeat(width), seconds(phase.seconds))
}

fn check_line(check: &Check) -> String {
    let mark = match check.outcome {
        Outcome::Pass => "✓",
        Outcome::Fail => "✗",
        Outcome::Inconclusive => "?",
    };
    let line = check.detail.lines().next().unwrap_or_default();
    let detail: String = line.chars().take(DETAIL).collect();
    format!("  {mark} {}: {detail}", check.name)
}
