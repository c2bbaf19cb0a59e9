//! Backups that will go without ever having been proven, for those who look on.

use std::collections::BTreeSet;

use crate::jobs::Context;
use crate::model::commit::Commit;
use crate::model::retention::{Candidate, Verdict, judge};
use crate::repository::catalog;
use crate::repository::records::reports::ReportHead;
use crate::repository::survey::Survey;

/// How many backups of a target its rules let go although no drill ever proved them; `None` without rules. Pins are not
/// looked at: a backup that stays by a pin alone is proven no better.
pub fn unproven(context: &Context, survey: &Survey, heads: &[ReportHead]) -> Option<u64> {
    let rules = context.retention.get(&survey.target).filter(|rules| !rules.keep_everything())?;
    let proven: BTreeSet<_> =
        heads.iter().filter(|head| head.proves()).filter_map(|head| head.backup.as_ref()).collect();
    let own: Vec<_> = survey.backups.iter().map(|(backup, _)| &backup.commit).collect();
    let candidate = |commit: &&Commit| Candidate {
        id: commit.id.clone(),
        at: commit.started_at,
        proven: rules.undrilled || proven.contains(&commit.id),
        needed: Vec::new(),
        copy: catalog::copy_among(commit, &own),
    };
    let candidates: Vec<_> = own.iter().map(candidate).collect();
    let verdicts = judge(&candidates, rules);
    Some(verdicts.values().filter(|verdict| **verdict == Verdict::NeverProven).count() as u64)
}
