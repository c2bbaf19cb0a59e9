//! What the heads of reports say; their bodies are sealed, and nothing is opened here.

use std::collections::BTreeMap;

use crate::observe::metrics::{Page, table};
use crate::repository::records::reports::ReportHead;

/// Every level that a restore proves on its way, the deepest last.
const PROVEN: [&str; 4] = ["L4", "L5", "L6", "L7"];

/// `heads` are oldest first.
pub(super) fn add(heads: &[ReportHead], page: &mut Page) {
    let (mut measured, mut checked): (BTreeMap<(&str, &str), &ReportHead>, BTreeMap<_, _>) = Default::default();
    for head in heads.iter().filter(|head| head.job == "drill") {
        let (target, region) = (head.target.as_str(), head.region.as_ref().map_or("", |region| region.as_str()));
        let ended = Some(head.finished_at);
        page.set_time(&table::VERIFY_LAST_RUN, [target, region, &head.outcome], ended);
        if head.outcome == "pass" {
            page.set_time(&table::NEGATIVE_CONTROL, [target], ended);
            let deepest = head.level.as_deref().unwrap_or_default();
            for level in PROVEN.into_iter().filter(|level| *level <= deepest) {
                page.set_time(&table::VERIFY_LAST_SUCCESS, [target, region, level], ended);
            }
        }
        if !head.checks.is_empty() {
            checked.insert((target, region), &head.checks);
        }
        page.set_known(&table::RPO_ACHIEVED, [target, region], head.rpo.1);
        if let Some(rto) = head.rto.1 {
            page.set(&table::RTO_ACHIEVED, [target, "restore", region], rto);
            measured.insert((target, region), head);
        }
    }
    for ((target, region), checks) in checked {
        for (check, passed) in checks {
            page.set(&table::VERIFY_CHECK_PASSED, [target, region, check], f64::from(u8::from(*passed)));
        }
    }
    // Of one drill, so that the phases add up.
    for ((target, region), head) in measured {
        for (phase, seconds) in &head.phases {
            page.set(&table::RECOVERY_PHASE, [target, region, phase], *seconds);
        }
    }
}
