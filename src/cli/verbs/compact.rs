//! `drctl compact`.

use std::fmt::Write as _;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::{figures, progress};
use crate::jobs::compact::{self, Report};
use crate::model::{Result, TargetName};

/// Packs named; the rest is counted.
const SHOWN: usize = 20;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The target
    pub target: TargetName,
    /// Make the copies; without it, only show what is mostly dead and what leaving it would take
    #[arg(long)]
    pub execute: bool,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Write, &World::real()).await?;
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = compact::run(&context, &args.target, args.execute).await;
    shown.end().await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report))?,
    }
    Ok(if report.has_debts() { Exit::Debts } else { Exit::Ok })
}

fn text(report: &Report) -> String {
    let (plan, target) = (&report.plan, &report.target);
    let mut text = String::new();
    if let Some(why) = &plan.not_worth {
        let _ = writeln!(text, "Not worth it: {why}");
    }
    if plan.packs.is_empty() {
        text.push_str("No pack is mostly dead that compaction could leave");
        return text;
    }
    let mut table = Table::new(["PACK", "BYTES", "LIVE"]);
    for pack in plan.packs.iter().take(SHOWN) {
        let live = format!("{} %", pack.live_bytes * 100 / pack.bytes.max(1));
        table.row([pack.key.clone(), figures::bytes(pack.bytes), live]);
    }
    text.push_str(&table.to_text());
    if plan.packs.len() > SHOWN {
        let _ = writeln!(text, "and {} more   (--json shows them all)", plan.packs.len() - SHOWN);
    }
    let [moved, renewed, frees] = [plan.moved_bytes, plan.renewed_bytes, plan.frees_bytes].map(figures::bytes);
    let _ = writeln!(text, "Moves {moved} and {renewed} of maps, for {} backups", plan.backups.len());
    let _ = writeln!(text, "Frees {frees} in each region, when copies are drilled and prune takes their originals");
    for copied in &report.copies {
        let stored = figures::bytes(copied.stored_bytes);
        let _ = writeln!(text, "{} is a copy of {}, stored {stored} per region", copied.copy, copied.original);
    }
    for region in report.regions.iter().filter(|region| region.missing_objects > 0) {
        let reason = region.last_error.as_deref().unwrap_or("unknown");
        let _ = writeln!(text, "debt in {}: {} objects ({reason})", region.region, region.missing_objects);
    }
    text.push_str(&match report.copies.first() {
        None => format!("Nothing was written. Next: drctl compact {target} --execute"),
        Some(_) if report.has_debts() => format!("Next: drctl repair {target}"),
        Some(copied) => format!("Next: drctl drill {target} --backup {}, and each other copy", copied.copy),
    });
    text
}
