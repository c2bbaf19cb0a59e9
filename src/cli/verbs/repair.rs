//! `drctl repair`.

use std::fmt::Write as _;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::{figures, progress};
use crate::jobs::repair::{self, Report};
use crate::model::{RegionName, Result, TargetName};
use crate::repository::mend::Scope;

/// Objects named per region; the rest is counted.
const SHOWN: usize = 20;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this target [default: all]
    pub target: Option<TargetName>,
    /// Only this region
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
    /// Compare names and sizes alone; without it every stored byte is read
    #[arg(long)]
    pub quick: bool,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    if !args.dry_run {
        // A directory that vanished is a region that was lost: here, and nowhere else, it is made anew and filled.
        app::create_directories(&settings).await?;
    }
    let context = app::context(&settings, Role::Write, &World::real()).await?;
    let Args { target, region, quick, dry_run } = args;
    let scope = Scope { target, region, quick, dry_run, unattended: false };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = repair::run(&context, &scope).await;
    shown.end().await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report))?,
    }
    Ok(if report.has_debts() { Exit::Debts } else { Exit::Ok })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let would = if report.dry_run { "would be " } else { "" };
    for region in &report.regions {
        let (copied, replaced) = (figures::count(region.copied), region.replaced.len());
        let bytes = figures::bytes(region.bytes);
        let name = &region.region;
        let _ = writeln!(text, "{name}: {copied} objects {would}copied, {replaced} {would}replaced, {bytes}");
        for key in region.replaced.iter().take(SHOWN) {
            let _ = writeln!(text, "  wrong bytes {would}replaced: {key}");
        }
        for missing in region.still_missing.iter().take(SHOWN) {
            let _ = writeln!(text, "  STILL MISSING  {}: {}", missing.key, missing.why);
        }
        let hidden = region.replaced.len().saturating_sub(SHOWN) + region.still_missing.len().saturating_sub(SHOWN);
        if hidden > 0 {
            let _ = writeln!(text, "  and {hidden} more   (--json shows them all)");
        }
    }
    for locks in report.locks.iter().filter(|locks| locks.objects + locks.owed > 0) {
        let (done, owed) = (figures::count(locks.objects), figures::count(locks.owed));
        let _ = match (report.dry_run, &locks.error) {
            (true, _) => writeln!(text, "{}: {owed} locks end too early and would be made longer", locks.region),
            (false, None) => writeln!(text, "{}: {done} locks made longer", locks.region),
            (false, Some(why)) => writeln!(text, "{}: {done} locks made longer, {owed} OWED: {why}", locks.region),
        };
    }
    text.push_str(match (report.has_debts(), report.dry_run) {
        (true, _) => "Some regions still lack something; run it again once they answer",
        (false, true) => "Nothing was changed. Run it without --dry-run",
        (false, false) => "All regions looked at hold the same",
    });
    text
}
