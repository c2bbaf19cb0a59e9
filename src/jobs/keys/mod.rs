//! Key wraps that are owed: made by whoever can open a keyset, for the holders that could not wrap it when it was drawn,
//! and for those that were added since.

use serde::Serialize;

use crate::jobs::Context;
use crate::model::{HolderId, KeysetId, Result, TargetName};
use crate::repository::keysets::{self, Holders};
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};

/// A wrap that was owed.
#[derive(Debug, Clone, Serialize)]
pub struct Owed {
    /// Whose data the keyset seals.
    pub target: TargetName,
    /// The keyset.
    pub keyset: KeysetId,
    /// Who had not wrapped it.
    pub holder: HolderId,
    /// Why it still has not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What was done, or with a dry run what would be.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Keysets that the repository holds.
    pub keysets: usize,
    /// Wraps that were owed and now stand; with a dry run, all that are owed.
    pub added: Vec<Owed>,
    /// Wraps that are owed still.
    pub owed: Vec<Owed>,
    /// What each region lacks of what was written.
    pub regions: Vec<LaneOutcome>,
}

impl Report {
    /// Whether something is still owed.
    pub fn has_debts(&self) -> bool {
        !self.owed.is_empty() || self.regions.iter().any(|region| region.missing_objects > 0)
    }
}

/// Makes every wrap that `holders` owe, keyset by keyset; what goes wrong with one is told in the report and stops no
/// other. Nothing is ever replaced: a wrap that stands stays.
///
/// # Errors
/// No region answers.
pub async fn rewrap(context: &Context, holders: &Holders, dry_run: bool) -> Result<Report> {
    let known = keysets::wrapped_by(&context.repository.regions).await?;
    let mut report = Report { dry_run, keysets: known.len(), added: Vec::new(), owed: Vec::new(), regions: Vec::new() };
    let phase = context.progress.begin("rewrap", Some(known.len() as u64));
    let out = FanOut::new(&context.repository.regions, Patience::BACKUP);
    for ((target, keyset), wrapped) in known {
        let missing = holders.without(&wrapped);
        let owed = |holder: &HolderId, why| Owed {
            target: target.clone(),
            keyset: keyset.clone(),
            holder: holder.clone(),
            why,
        };
        if dry_run || missing.list.is_empty() {
            report.added.extend(missing.list.iter().map(|holder| owed(holder.id(), None)));
        } else {
            let wraps = match context.ring.open(&target, &keyset).await {
                Ok(opened) => keysets::add_wraps(&opened, &missing.list, &out).await,
                Err(error) => Err(error),
            };
            match wraps {
                Ok(wraps) => {
                    for (holder, wrap) in wraps {
                        let why = wrap.err();
                        let list = if why.is_none() { &mut report.added } else { &mut report.owed };
                        list.push(owed(&holder, why));
                    }
                }
                Err(error) => {
                    report.owed.extend(missing.list.iter().map(|holder| owed(holder.id(), Some(error.to_string()))));
                }
            }
        }
        phase.advance(1);
    }
    report.regions = out.drain().await;
    Ok(report)
}
