//! Backups that will go without ever having been proven, for those who look on.

use crate::jobs::Context;
use crate::model::retention::{Verdict, judge};
use crate::repository::prune::proofs::Proofs;
use crate::repository::records::reports::ReportHead;
use crate::repository::survey::Survey;

/// How many backups of a target its rules let go although no drill ever proved them; `None` without rules. Pins are not
/// looked at: a backup that stays by a pin alone is proven no better. Who looks on need not be who prunes, and takes every
/// drill that it can read at its word.
pub fn unproven(context: &Context, survey: &Survey, heads: &[ReportHead]) -> Option<u64> {
    let rules = context.retention.get(&survey.target).filter(|rules| !rules.keep_everything())?;
    let own: Vec<_> = survey.backups.iter().map(|(backup, _)| backup).collect();
    let proofs = Proofs::by_anybody(heads);
    let verdicts = judge(&proofs.candidates(&own, rules, |_| Vec::new()), rules);
    Some(verdicts.values().filter(|verdict| **verdict == Verdict::NeverProven).count() as u64)
}
