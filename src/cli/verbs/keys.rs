//! `drctl keys`.

use std::fmt::Write as _;

use crate::app::{self, Role, World};
use crate::cli::exit::Exit;
use crate::cli::{Session, figures, progress};
use crate::jobs::keys::{self, Report};
use crate::model::Result;

/// Wraps named; the rest is counted.
const SHOWN: usize = 20;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Wrap stored keysets for key holders that owe it: those that did not answer, and those added since
    Rewrap {
        /// Show what is owed, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: &Args, session: &Session) -> Result<Exit> {
    let Action::Rewrap { dry_run } = args.action;
    let (settings, world) = (session.settings()?, World::real());
    let context = app::context(&settings, Role::Restore, &world).await?;
    let holders = app::holders(&settings, Role::Restore, &world).await?;
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = keys::rewrap(&context, &holders, dry_run).await;
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
    for owed in report.owed.iter().take(SHOWN) {
        let why = owed.why.as_deref().unwrap_or_default();
        let _ = writeln!(text, "STILL OWED  {} keyset {} by {}: {why}", owed.target, owed.keyset, owed.holder);
    }
    if report.owed.len() > SHOWN {
        let _ = writeln!(text, "and {} more   (--json shows them all)", report.owed.len() - SHOWN);
    }
    let (keysets, added) = (figures::count(report.keysets as u64), figures::count(report.added.len() as u64));
    text.push_str(&match (report.dry_run, report.added.is_empty(), report.owed.is_empty()) {
        (true, true, _) => format!("{keysets} keysets; every configured key holder has wrapped each"),
        (true, false, _) => format!("{keysets} keysets; {added} wraps are owed. Run it without --dry-run"),
        (false, true, true) => format!("{keysets} keysets; no wrap was owed"),
        (false, false, true) => format!("{keysets} keysets; {added} wraps added, none is owed any more"),
        (false, _, false) => format!("{keysets} keysets; {added} wraps added; run it again for the rest"),
    });
    text
}
