//! Pins and holds: what must stay, whatever retention says.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::model::{BackupId, Error, PinId, Result, TargetName};
use crate::repository::catalog;
use crate::repository::records::pins::{self, Pin};
use crate::repository::regions::fan_out::LaneOutcome;
use crate::repository::sweeps;

/// What was done.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The pins and holds that were made or ended.
    pub pins: Vec<Pin>,
    /// What each region made of it.
    pub regions: Vec<LaneOutcome>,
}

impl Report {
    /// Whether a region lacks a record.
    pub fn has_debts(&self) -> bool {
        self.regions.iter().any(|lane| lane.missing_objects > 0)
    }
}

/// Why something stays or no longer stays.
#[derive(Debug, Clone)]
pub struct Reason {
    /// In words.
    pub text: String,
    /// When it ends by itself.
    pub until: Option<DateTime<Utc>>,
}

/// Pins the backup that `what` names.
///
/// # Errors
/// There is none; it is being pruned; the quorum was not reached.
pub async fn pin(context: &Context, what: &str, reason: Reason) -> Result<Report> {
    refuse_the_past(context, &reason)?;
    let (backups, unreadable) = catalog::backups(&context.repository, None).await?;
    let commit = catalog::find((&backups, &unreadable), what)?.commit.clone();
    let report = keep(context, (commit.target, Some(commit.id.clone())), reason).await?;
    // Only now: a sweep that begins from here on sees the pin, and one that began before is seen here.
    let checked = sweeps::refuse_if_condemned(&context.repository, &commit.id, context.clock.now()).await;
    match checked {
        Ok(()) => Ok(report),
        Err(error) => {
            withdraw(context, &report.pins).await;
            Err(error.during(format!("{} cannot be pinned any more", commit.id)))
        }
    }
}

/// Holds everything of a target: backups and WAL.
///
/// # Errors
/// A sweep is at work; the quorum was not reached.
pub async fn hold(context: &Context, target: &TargetName, reason: Reason) -> Result<Report> {
    refuse_the_past(context, &reason)?;
    let configured = context.promises().any(|(name, _)| name == target);
    if !configured && catalog::backups(&context.repository, Some(target)).await?.0.is_empty() {
        return Err(Error::usage(format!("there is no target `{target}`")));
    }
    let report = keep(context, (target.clone(), None), reason).await?;
    let running = sweeps::running(&context.repository, context.clock.now()).await?;
    match running.first() {
        None => Ok(report),
        Some(sweep) => {
            withdraw(context, &report.pins).await;
            let error = Error::refused(format!("{target} cannot be held while sweep {} is at work", sweep.id));
            Err(error.hint(format!("it began at {} on {}; try again when it has ended", sweep.at, sweep.host)))
        }
    }
}

/// Ends pins of the backup that `what` names, or the pin of this id.
///
/// # Errors
/// There is none; the quorum was not reached.
pub async fn unpin(context: &Context, what: &str, reason: &str) -> Result<Report> {
    let pins = active(context, None).await?;
    let id = what.parse::<PinId>().ok();
    let is_meant = |backup: &BackupId| backup.as_str() == what || backup.as_str().starts_with(what);
    let meant = pins.iter().filter(|pin| Some(&pin.id) == id.as_ref() || pin.backup.as_ref().is_some_and(is_meant));
    let meant: Vec<_> = meant.filter(|pin| pin.backup.is_some()).cloned().collect();
    if meant.iter().any(|pin| pin.backup != meant[0].backup) {
        return Err(Error::usage(format!("`{what}` fits pins of several backups")).hint("drctl pin --list shows them"));
    }
    end(context, meant, (what, reason)).await
}

/// Ends every hold of a target.
///
/// # Errors
/// There is none; the quorum was not reached.
pub async fn release(context: &Context, target: &TargetName, reason: &str) -> Result<Report> {
    let holds = active(context, Some(target)).await?.into_iter().filter(|pin| pin.backup.is_none()).collect();
    end(context, holds, (target.as_str(), reason)).await
}

/// The pins and holds that count now.
///
/// # Errors
/// No region answers, or a record is in no region intact.
pub async fn active(context: &Context, target: Option<&TargetName>) -> Result<Vec<Pin>> {
    let (pins, unreadable) = pins::active(&context.repository, target, context.clock.now()).await?;
    unreadable.into_iter().next().map_or(Ok(pins), Err)
}

async fn keep(context: &Context, subject: (TargetName, Option<BackupId>), reason: Reason) -> Result<Report> {
    let made = pins::pin(&context.repository, context.writer()?, subject, (reason.text, reason.until)).await?;
    Ok(Report { pins: vec![made.0], regions: made.1 })
}

async fn end(context: &Context, pins: Vec<Pin>, (what, reason): (&str, &str)) -> Result<Report> {
    if pins.is_empty() {
        return Err(Error::not_found(format!("nothing keeps `{what}`")).hint("drctl pin --list shows pins and holds"));
    }
    let mut regions = Vec::new();
    for pin in &pins {
        regions = pins::unpin(&context.repository, context.writer()?, pin, reason.to_owned()).await?;
    }
    Ok(Report { pins, regions })
}

/// A record that keeps nothing is only confusing; that it could not be withdrawn is no harm.
async fn withdraw(context: &Context, pins: &[Pin]) {
    for pin in pins {
        let Ok(writer) = context.writer() else { return };
        let ended = pins::unpin(&context.repository, writer, pin, "it came too late".to_owned()).await;
        if let Err(error) = ended {
            tracing::warn!(%error, "a pin that came too late stands");
        }
    }
}

fn refuse_the_past(context: &Context, reason: &Reason) -> Result<()> {
    let over = reason.until.is_some_and(|until| until <= context.clock.now());
    if over { Err(Error::usage("--until is over already")) } else { Ok(()) }
}
