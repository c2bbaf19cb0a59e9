//! What a drill tells beside its report.

use crate::jobs::context::Context;
use crate::jobs::drill::evidence::word;
use crate::jobs::drill::report::{Outcome, Report};
use crate::jobs::verdict::Verdict;
use crate::observe::metrics::table;

pub(super) fn tell(context: &Context, report: &Report) {
    let (target, region, meters) = (report.target.as_str(), report.region.as_str(), &context.meters);
    for outcome in [Outcome::Pass, Outcome::Fail, Outcome::Inconclusive] {
        let happened = f64::from(u8::from(report.outcome == outcome));
        meters.add(&table::VERIFY_RUNS, [target, region, word(outcome)], happened);
    }
    let verdict = Verdict {
        job: "drill",
        target: Some(&report.target),
        region: Some(&report.region),
        outcome: word(report.outcome),
        level: report.level.map(|level| format!("{level:?}")),
        rpo_seconds: report.rpo.measured_seconds,
        rto_seconds: report.rto.measured_seconds,
        report: report.stored_as.as_ref(),
        phases: report.phases.iter().map(|phase| (phase.name, phase.seconds)).collect(),
        began: report.started_at,
        ended: report.finished_at,
    };
    verdict.tell(context);
}
