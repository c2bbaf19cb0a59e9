//! `drctl pin`, `unpin`, `hold` and `release`.

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::{Session, figures, time};
use crate::jobs::Context;
use crate::jobs::pin::{self, Reason, Report};
use crate::model::{Error, Result, TargetName};

/// Arguments of `pin`.
#[derive(Debug, clap::Args)]
pub struct PinArgs {
    /// A backup id, or the beginning of one; a target for its newest
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    id: Option<String>,
    /// Why it must stay
    #[arg(long, required_unless_present = "list")]
    reason: Option<String>,
    /// When the pin ends by itself: '2027-01-31 00:00' (UTC)
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    until: Option<DateTime<Utc>>,
    /// Show what is pinned and held
    #[arg(long)]
    list: bool,
}

/// Arguments of `unpin`.
#[derive(Debug, clap::Args)]
pub struct UnpinArgs {
    /// A backup id, the beginning of one, or the id of a pin
    id: String,
    /// Why it may go
    #[arg(long)]
    reason: String,
}

/// Arguments of `hold`.
#[derive(Debug, clap::Args)]
pub struct HoldArgs {
    /// Of what everything stays
    target: TargetName,
    /// Why
    #[arg(long)]
    reason: String,
    /// When the hold ends by itself: '2027-01-31 00:00' (UTC)
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    until: Option<DateTime<Utc>>,
}

/// Arguments of `release`.
#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    /// The target that is held
    target: TargetName,
    /// Why retention counts again
    #[arg(long)]
    reason: String,
}

async fn context(session: &Session) -> Result<Context> {
    app::context(&session.settings()?, Role::Write, &World::real()).await
}

/// Runs `pin`.
///
/// # Errors
/// What stopped it.
pub async fn pin(args: PinArgs, session: &Session) -> Result<Exit> {
    let context = context(session).await?;
    if args.list {
        let pins = pin::active(&context, None).await?;
        match session.output.json {
            true => session.output.print_json(&pins)?,
            false => session.output.print(&listed(&pins, session.clock.now()))?,
        }
        return Ok(Exit::Ok);
    }
    let (Some(id), Some(text)) = (args.id, args.reason) else { return Err(Error::usage("which backup, and why?")) };
    let report = pin::pin(&context, &id, Reason { text, until: args.until }).await?;
    end(session, &report, "is pinned: no prune takes it")
}

/// Runs `unpin`.
///
/// # Errors
/// What stopped it.
pub async fn unpin(args: UnpinArgs, session: &Session) -> Result<Exit> {
    let report = pin::unpin(&context(session).await?, &args.id, &args.reason).await?;
    end(session, &report, "is no longer pinned: retention counts again")
}

/// Runs `hold`.
///
/// # Errors
/// What stopped it.
pub async fn hold(args: HoldArgs, session: &Session) -> Result<Exit> {
    let reason = Reason { text: args.reason, until: args.until };
    let report = pin::hold(&context(session).await?, &args.target, reason).await?;
    end(session, &report, "is held: no prune takes any backup or WAL of it")
}

/// Runs `release`.
///
/// # Errors
/// What stopped it.
pub async fn release(args: ReleaseArgs, session: &Session) -> Result<Exit> {
    let report = pin::release(&context(session).await?, &args.target, &args.reason).await?;
    end(session, &report, "is no longer held: retention counts again")
}

fn end(session: &Session, report: &Report, what: &str) -> Result<Exit> {
    let mut text = String::new();
    if let Some(pin) = report.pins.first() {
        let subject = pin.backup.as_ref().map_or_else(|| pin.target.to_string(), ToString::to_string);
        text = format!("{subject} {what}");
    }
    for lane in report.regions.iter().filter(|lane| lane.missing_objects > 0) {
        let why = lane.last_error.as_deref().unwrap_or_default();
        text.push_str(&format!("\n{} does not know it yet ({why}); drctl repair brings it there", lane.region));
    }
    match session.output.json {
        true => session.output.print_json(report)?,
        false => session.output.print(&text)?,
    }
    Ok(if report.has_debts() { Exit::Debts } else { Exit::Ok })
}

fn listed(pins: &[crate::repository::records::pins::Pin], now: DateTime<Utc>) -> String {
    let mut table = Table::new(["PIN", "WHAT", "SINCE", "UNTIL", "WHY"]);
    for pin in pins {
        let what = pin.backup.as_ref().map_or_else(|| format!("all of {}", pin.target), ToString::to_string);
        let until = pin.until.map_or_else(|| "–".to_owned(), |until| figures::moment(now, until));
        table.row([pin.id.to_string(), what, figures::moment(now, pin.at), until, pin.reason.clone()]);
    }
    if table.is_empty() { "Nothing is pinned or held".to_owned() } else { table.to_text() }
}
