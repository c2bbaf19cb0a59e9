//! `drctl backup`.

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::cli::progress;
use crate::jobs::backup::{self, Options, Report, Told};
use crate::model::{Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The target
    pub target: TargetName,
    /// Ask the server for an immediate checkpoint instead of one spread over minutes
    #[arg(long)]
    pub fast: bool,
    /// Store every page, also those that the newest backup holds
    #[arg(long)]
    pub full: bool,
    /// Read every page, and prove that change detection would have found those that changed
    #[arg(long, conflicts_with = "full")]
    pub verify_detection: bool,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Write, &World::real()).await?;
    let Args { target, fast, full, verify_detection } = args;
    let options = Options { fast, full, verify_detection };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = backup::run(&context, &target, options).await;
    shown.end().await;
    let report = report?;
    if session.output.json {
        session.output.print_json(&report)?;
    } else {
        session.output.print(&text(&report, context.repository.regions.quorum()))?;
    }
    if report.detection.is_wrong() {
        return Ok(Exit::Failed);
    }
    Ok(if report.has_debts() { Exit::Debts } else { Exit::Ok })
}

fn text(report: &Report, quorum: usize) -> String {
    let commit = &report.backup;
    let seconds = (commit.finished_at - commit.started_at).to_std().unwrap_or_default();
    let regions = report.regions.len();
    let whole = report.regions.iter().filter(|region| region.missing_objects == 0).count();
    let mut lines = vec![
        format!(
            "{}  {} of {} is safe in {whole} of {regions} regions (quorum {quorum})",
            commit.id,
            commit.kind.as_str(),
            commit.target
        ),
        format!(
            "  size {}, stored {} per region, in {}, read {}",
            figures::bytes(commit.size_bytes),
            figures::bytes(commit.stored_bytes),
            figures::duration(seconds),
            commit.provenance.method,
        ),
    ];
    for stream in &report.streams {
        lines.push(format!("  {}  {}", stream.name, figures::bytes(stream.bytes)));
    }
    let (read, changed) = (figures::count(report.pages.read), figures::count(report.pages.changed));
    match (&commit.parent, &report.full_because) {
        _ if !report.streams.is_empty() => lines.push(format!("  brings back {}", figures::utc(commit.started_at))),
        (Some(parent), _) => {
            lines.push(format!(
                "  {changed} of {} pages changed since {parent}",
                figures::count(report.pages.read + report.pages.unread)
            ));
            lines.extend(detection(report));
        }
        (None, because) => {
            lines.push(format!("  all {read} pages: {}", because.as_deref().unwrap_or("it has no parent")));
        }
    }
    if let Some(wal) = &commit.wal {
        let by = if report.wal_by == "own" { "by its own receiver" } else { "by the running WAL receiver" };
        lines.push(format!("  WAL {} to {}, timeline {}, {by}", wal.start_lsn, wal.stop_lsn, wal.timeline));
    }
    if commit.damaged_pages > 0 {
        let count = figures::count(commit.damaged_pages);
        lines
            .push(format!("  DAMAGED on the source: {count} pages fail their checksum; see: drctl show {}", commit.id));
    }
    for region in report.regions.iter().filter(|region| region.missing_objects > 0) {
        let reason = region.last_error.as_deref().unwrap_or("unknown");
        lines.push(format!("  debt in {}: {} objects ({reason})", region.region, region.missing_objects));
    }
    for locks in report.locks.iter().filter(|locks| locks.owed > 0) {
        let reason = locks.error.as_deref().unwrap_or("unknown");
        lines.push(format!("  locks owed in {}: {} objects that it shares ({reason})", locks.region, locks.owed));
    }
    lines.extend(
        report.wrap_debts.iter().map(|(holder, reason)| format!("  key holder {holder} owes a wrap: {reason}")),
    );
    lines.extend(shortened("LEFT OUT", &report.left_out));
    lines.extend(shortened("note", &report.notes));
    lines.extend(report.not_captured.iter().map(|what| format!("  not captured: {what}")));
    if let Some(why) = &report.not_remembered {
        lines.push(format!("  the next backup will be a full one: {why}"));
    }
    let owed = report.regions.iter().any(|region| region.missing_objects > 0)
        || report.locks.iter().any(|locks| locks.owed > 0)
        || !report.wrap_debts.is_empty();
    if owed {
        lines.push(format!("Next: drctl repair {}", commit.target));
    }
    lines.join("\n")
}

/// How the changed pages were found.
fn detection(report: &Report) -> Vec<String> {
    let Told { by, because, proof, unproved } = &report.detection;
    let read = figures::count(report.pages.read);
    let by = match by {
        Some("wal") => "by the WAL that passed the receiver",
        Some("summaries") => "by PostgreSQL's summaries of WAL",
        _ => "by reading all",
    };
    let mut lines = vec![format!("  found {by}, {read} pages read")];
    lines.extend(because.iter().map(|why| format!("  every page was read: {why}")));
    match proof {
        Some(missed) if missed.pages > 0 => {
            lines.push(format!(
                "  WRONG: change detection missed {} pages; this backup holds them",
                figures::count(missed.pages)
            ));
            lines.extend(shortened("missed", &missed.examples));
            lines.push(
                "  detection is switched off; backups that used it may be wrong: take one with --full".to_owned(),
            );
        }
        Some(missed) => {
            lines.push("  proved: change detection missed nothing".to_owned());
            if missed.hints > 0 {
                lines.push(format!("  {} pages differ in hint bits alone", figures::count(missed.hints)));
            }
        }
        None if *unproved => lines.push("  NOT PROVED: there was no detection to compare with".to_owned()),
        None => {}
    }
    lines
}

/// The first of many lines; `--json` has all of them.
fn shortened(what: &str, list: &[String]) -> Vec<String> {
    const SHOWN: usize = 20;
    let mut lines: Vec<_> = list.iter().take(SHOWN).map(|text| format!("  {what}  {text}")).collect();
    if list.len() > SHOWN {
        lines.push(format!("  {what}  and {} more", list.len() - SHOWN));
    }
    lines
}
