//! `compact`: packs that are mostly dead are left, by copies of the backups that still need a little of them.
//!
//! It needs the keys that a restore needs, and writes; the writer beside PostgreSQL, which cannot decrypt, cannot do it. It
//! deletes nothing: what it leaves goes when its copies are drilled and prune finds their originals superfluous.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::disk::lock::Lock;
use crate::jobs::Context;
use crate::model::retention::{Rules, judge};
use crate::model::{BackupId, Error, Result, ResultExt, TargetName};
use crate::repository::catalog;
use crate::repository::compact::{self, Copied, Hands, Plan};
use crate::repository::prune::proofs::Proofs;
use crate::repository::records::pins::{self, Pin};
use crate::repository::regions::fan_out::LaneOutcome;

/// What a compaction found and did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of what.
    pub target: TargetName,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// What is mostly dead, and what leaving it takes.
    pub plan: Plan,
    /// The copies.
    pub copies: Vec<Copied>,
    /// What each region owes of them.
    pub regions: Vec<LaneOutcome>,
}

impl Report {
    /// Whether a region lacks something of the copies.
    pub fn has_debts(&self) -> bool {
        self.regions.iter().any(|region| region.missing_objects > 0)
    }
}

/// Compacts one target, or shows what that would do.
///
/// # Errors
/// The target has no retention, another compaction of it runs here, something cannot be read or opened, or writing failed.
/// Copies that were complete by then stay.
pub async fn run(context: &Context, target: &TargetName, execute: bool) -> Result<Report> {
    let hands = Hands {
        repository: &context.repository,
        writer: context.writer()?,
        ring: &context.ring,
        pack_size: context.pack_size,
        progress: &context.progress,
    };
    let rules = context.retention.get(target).filter(|rules| !rules.keep_everything());
    let rules = rules.ok_or_else(|| {
        let error = Error::refused(format!("{target} keeps everything: copies would only add to it"));
        error.hint(format!("say what is to be kept: [targets.{target}.retention]"))
    })?;
    let _alone = Lock::acquire(&context.state_dir.join(format!("{target}.compact.lock")))
        .map_err(|error| Error::from(error).during(format!("another compaction of {target} runs on this host")))?;
    let expiring = expiring(context, target, rules).await.during(|| "see what expires")?;
    let survey = compact::survey(hands, target, &expiring).await?;
    let (mut copies, mut regions) = (Vec::new(), Vec::new());
    if execute && !survey.plan.backups.is_empty() {
        let done = compact::run(hands, &survey, &mut copies).await;
        regions = done.map_err(|error| match copies.len() {
            0 => error,
            made => error.because(format!("{made} copies were complete by then, and stay")),
        })?;
    }
    Ok(Report { target: target.clone(), dry_run: !execute, plan: survey.plan, copies, regions })
}

/// The backups that prune takes anyway.
async fn expiring(context: &Context, target: &TargetName, rules: &Rules) -> Result<BTreeSet<BackupId>> {
    let repository = &context.repository;
    let own = context.writer.as_ref().map(|writer| writer.signer.id());
    let proofs = Proofs::load(repository, own, Some(target)).await?;
    let (pins, _) = pins::active(repository, Some(target), context.clock.now()).await?;
    let (backups, _) = catalog::backups(repository, Some(target)).await?;
    let pinned = |id: &BackupId| pins.iter().filter(|pin| pin.keeps(target, id)).map(Pin::words).collect();
    let candidates = proofs.candidates(&backups.iter().collect::<Vec<_>>(), rules, pinned);
    let verdicts = judge(&candidates, rules);
    Ok(verdicts.into_iter().filter(|(_, verdict)| !verdict.keeps()).map(|(id, _)| id).collect())
}
