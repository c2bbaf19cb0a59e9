//! Schedules whose newest success is older than they allow.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::jobs::{Context, runs};
use crate::model::schedule::{Job, Schedule};
use crate::model::{Result, ScheduleName, TargetName};

/// Records of one schedule that are looked through for a success.
const LOOK_BACK: usize = 50;

/// A schedule that has not succeeded for too long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Overdue {
    /// The schedule.
    pub schedule: ScheduleName,
    /// What it does.
    pub job: Job,
    /// About which target; `null` = all.
    pub target: Option<TargetName>,
    /// How old its newest success may become.
    pub max_age_seconds: u64,
    /// Its newest success; `null` = none is on record.
    pub last_success_at: Option<DateTime<Utc>>,
}

/// What else succeeded without a schedule: the newest backup and the newest drill of a target.
#[derive(Debug, Clone, Default)]
pub(super) struct Otherwise {
    pub(super) backup: Option<DateTime<Utc>>,
    pub(super) drill: Option<DateTime<Utc>>,
}

/// The schedules that are overdue.
pub(super) async fn overdue(
    context: &Context,
    schedules: &[Schedule],
    otherwise: impl Fn(&TargetName) -> Otherwise,
) -> Result<Vec<Overdue>> {
    let now = context.clock.now();
    let mut found = Vec::new();
    for schedule in schedules.iter().filter(|schedule| schedule.enabled) {
        let Some(max_age) = schedule.max_age else { continue };
        let (job, target) = (schedule.work.job(), schedule.work.target().cloned());
        let otherwise = target.as_ref().map(&otherwise).unwrap_or_default();
        let by_hand = match job {
            Job::Backup | Job::Dump | Job::Files => otherwise.backup,
            Job::Drill => otherwise.drill,
            _ => None,
        };
        let history = runs::history(context, Some(&schedule.name), LOOK_BACK).await?;
        let newest = history.runs.iter().filter(|run| run.outcome.is_success()).map(|run| run.ended_at).max();
        let last_success_at = newest.max(by_hand);
        let allowed = TimeDelta::from_std(max_age).unwrap_or(TimeDelta::MAX);
        if last_success_at.is_none_or(|at| now - at > allowed) {
            let (schedule, max_age_seconds) = (schedule.name.clone(), max_age.as_secs());
            found.push(Overdue { schedule, job, target, max_age_seconds, last_success_at });
        }
    }
    Ok(found)
}
