//! What became of the slots of schedules, and when the next ones come.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::jobs::context::Context;
use crate::jobs::runs;
use crate::model::Result;
use crate::model::run::Run;
use crate::model::schedule::{Depth, Job, Schedule, Work};
use crate::observe::metrics::{Page, table};

/// Records that are read in search of the newest success.
const LOOK_BACK: usize = 20;
/// Slots and days that are looked at for the longest time between two: a schedule of working days has a week.
const SLOTS: usize = 200;
const DAYS: TimeDelta = TimeDelta::days(8);

/// The labels of every metric of a schedule.
pub fn labels(schedule: &Schedule) -> [&str; 3] {
    let target = schedule.work.target().map_or("", |target| target.as_str());
    [schedule.name.as_str(), target, schedule.work.job().as_str()]
}

pub(super) async fn add(context: &Context, schedules: &[Schedule], page: &mut Page) -> Result<()> {
    let now = context.clock.now();
    for schedule in schedules {
        let labels = labels(schedule);
        page.set_known(&table::SCHEDULE_MAX_AGE, labels, schedule.max_age.map(|age| age.as_secs_f64()));
        page.set_known(&table::SCHEDULE_INTERVAL, labels, interval(schedule, now).map(|time| time.as_secs_f64()));
        let newest = runs::history(context, Some(&schedule.name), 1).await?.runs.pop();
        if let Some(run) = newest {
            recorded(schedule, &run, page);
            let runs = match run.outcome.is_success() {
                true => vec![run],
                false => runs::history(context, Some(&schedule.name), LOOK_BACK).await?.runs,
            };
            if let Some(run) = runs.iter().find(|run| run.outcome.is_success()) {
                succeeded(context, schedule, run, page);
            }
        }
    }
    Ok(())
}

fn recorded(schedule: &Schedule, run: &Run, page: &mut Page) {
    page.set_time(&table::SCHEDULE_LAST_RUN, labels(schedule), Some(run.ended_at));
    if let (Job::Backup | Job::Dump | Job::Files, Some(target), Some(at)) = (run.job, &run.target, run.started_at) {
        page.set_latest(&table::BACKUP_LAST_ATTEMPT, [target.as_str()], at);
    }
}

fn succeeded(context: &Context, schedule: &Schedule, run: &Run, page: &mut Page) {
    page.set_time(&table::SCHEDULE_LAST_SUCCESS, labels(schedule), Some(run.ended_at));
    let Work::Verify { target, level, region, .. } = &schedule.work else { return };
    let proven: &[&str] = match level {
        Depth::L0 => &["L0"],
        Depth::L1 => &["L0", "L1"],
        Depth::L2 => &["L0", "L1", "L2"],
    };
    let targets = context.targets.iter().map(|known| &known.name);
    for target in targets.filter(|known| target.as_ref().is_none_or(|target| target == *known)) {
        let regions = context.repository.regions.all().iter().map(|known| &known.name);
        for region in regions.filter(|known| region.as_ref().is_none_or(|region| region == *known)) {
            for level in proven {
                let labels = [target.as_str(), region.as_str(), *level];
                page.set_latest(&table::VERIFY_LAST_SUCCESS, labels, run.ended_at);
            }
        }
    }
}

/// The longest time between two of the next slots.
fn interval(schedule: &Schedule, now: DateTime<Utc>) -> Option<Duration> {
    let mut slots: Vec<_> = schedule.slots_between(now, now + DAYS).take(SLOTS).collect();
    if slots.len() < 2 {
        slots = schedule.slots_after(now).take(2).collect();
    }
    slots.windows(2).filter_map(|pair| (*pair.get(1)? - *pair.first()?).to_std().ok()).max()
}
