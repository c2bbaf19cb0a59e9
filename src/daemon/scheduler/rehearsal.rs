//! What a daemon would do: the scheduler itself, over made-up time, with jobs that all succeed.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::daemon::scheduler::{Action, End, Known, Now, Scheduler};
use crate::model::run::{Open, Outcome, Run};
use crate::model::schedule::Schedule;

/// Time passes in steps of this at least: finer than any schedule, and no rehearsal stands still.
const STEP: Duration = Duration::from_secs(1);
/// Where nothing is to come at all.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// The records that a daemon would make of all slots in `(from, until]`, in the order in which it would make them, if
/// every job took `takes`.
pub fn rehearse(schedules: Vec<Schedule>, (from, until): (DateTime<Utc>, DateTime<Utc>), takes: Duration) -> Vec<Run> {
    let cursors = schedules.iter().map(|schedule| (schedule.name.clone(), from)).collect();
    let known = Known { cursors, ..Known::default() };
    let mut stage =
        Stage { takes, now: Now { wall: from, monotonic: Duration::ZERO }, jobs: Vec::new(), runs: Vec::new() };
    let (mut scheduler, actions) = Scheduler::new(String::new(), schedules, known, stage.now);
    stage.act(actions);
    // What has come by then runs to its end; what comes later is left out.
    while stage.now.wall < until || scheduler.earliest().is_some_and(|slot| slot <= until) {
        stage.pass(&scheduler);
        stage.turn(&mut scheduler);
    }
    stage.runs.retain(|run| run.slot <= until);
    stage.runs
}

struct Stage {
    takes: Duration,
    now: Now,
    /// What runs, and until when.
    jobs: Vec<(Open, Duration)>,
    runs: Vec<Run>,
}

impl Stage {
    /// Sleeps as the daemon does: until something comes due or ends.
    fn pass(&mut self, scheduler: &Scheduler) {
        let ends = self.jobs.iter().map(|(_, ends)| ends.saturating_sub(self.now.monotonic)).min();
        let sleep = scheduler.next(self.now).into_iter().chain(ends).min().unwrap_or(LONG).max(STEP);
        self.now.monotonic += sleep;
        self.now.wall += TimeDelta::from_std(sleep).unwrap_or_default();
    }

    fn turn(&mut self, scheduler: &mut Scheduler) {
        while let Some(index) = self.jobs.iter().position(|(_, ends)| *ends <= self.now.monotonic) {
            let (open, _) = self.jobs.swap_remove(index);
            let actions =
                scheduler.ended(&open.schedule, open.slot, End::Done(Outcome::Success, String::new()), self.now);
            self.act(actions);
        }
        let actions = scheduler.tick(self.now);
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Start(open, _) => self.jobs.push((open, self.now.monotonic + self.takes)),
                Action::Stop(open) => {
                    self.jobs.retain(|(job, _)| (&job.schedule, job.slot) != (&open.schedule, open.slot))
                }
                Action::Record(run) => self.runs.push(run),
                Action::Settle(..) | Action::Rewind { .. } | Action::Pause(..) | Action::Accept(_) => {}
            }
        }
    }
}
