//! The scheduler: a state machine over time, schedules and what ended. It runs nothing, writes nothing and reads no clock;
//! it answers what is to be done, in order.
//!
//! # Contract
//! - Every slot of every schedule is in exactly one [`Action::Record`], or is noted as open and will be in one.
//! - An action is done, durably where it says so, before the next one is looked at.
//! - Wall time says which slots have come; it may jump either way. Waiting, time limits and pauses are counted on the
//!   monotonic clock.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use serde::{Deserialize, Serialize};

use crate::model::run::{Open, Outcome, Pause, Run};
use crate::model::schedule::{Job, Schedule, Work};
use crate::model::{Error, Result, ScheduleName, TargetName};

mod lane;
pub mod rehearsal;

use lane::{Lane, Turn};

/// The longest sleep, because wall time can jump.
const LONGEST_SLEEP: Duration = Duration::from_secs(20);

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For slots and for people.
    pub wall: DateTime<Utc>,
    /// For everything that is counted.
    pub monotonic: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Note durably that this schedule owes nothing for any slot up to here.
    Settle(ScheduleName, DateTime<Utc>),
    /// Note durably that a clock that was wrong had moved this schedule ahead, and that it begins anew now. Its slots in
    /// between may be told twice: once as those of the wrong clock, once as what they became.
    Rewind {
        /// The schedule.
        schedule: ScheduleName,
        /// What was noted.
        from: DateTime<Utc>,
        /// Now.
        to: DateTime<Utc>,
    },
    /// Note durably that this schedule is paused, or no longer.
    Pause(ScheduleName, Option<Pause>),
    /// Note durably that the slot is on its way.
    Accept(Open),
    /// Note durably that it runs, then run it.
    Start(Open, Work),
    /// Stop the job of this slot; its end is of no interest any more.
    Stop(Open),
    /// Record an outcome durably.
    Record(Run),
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Done, or done with debts.
    Done(Outcome, String),
    /// Not done.
    Failed(String),
    /// Not begun, because somebody else does the same: a person at this moment, who may be left to it.
    Busy(String),
}

/// What an earlier process left.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Up to where every slot is open or recorded.
    pub cursors: BTreeMap<ScheduleName, DateTime<Utc>>,
    /// Schedules that are paused, or were.
    pub pauses: BTreeMap<ScheduleName, Pause>,
    /// Slots without an outcome.
    pub left: Vec<Open>,
}

/// How a schedule stands, for people.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Its name.
    pub schedule: ScheduleName,
    /// What it does.
    pub job: Job,
    /// About which target; `null` = all.
    pub target: Option<TargetName>,
    /// What runs, or is between two attempts.
    pub running: Option<Open>,
    /// How far it has come.
    #[serde(default)]
    pub going: Option<Going>,
    /// Why the last attempt failed, between two.
    pub failed: Option<String>,
    /// What waits.
    pub waiting: Option<Open>,
    /// Whether it is paused.
    pub paused: Option<Pause>,
    /// The next slot.
    pub next: Option<DateTime<Utc>>,
}

/// How far a job has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Going {
    /// What it does: `fetch`, `replay`.
    pub phase: String,
    /// For how long.
    pub seconds: f64,
    /// Bytes done in this phase.
    pub done_bytes: u64,
    /// Bytes in all, if they are known.
    pub total_bytes: Option<u64>,
    /// What it waits for.
    pub note: Option<String>,
}

/// Whether a slot is one that a right clock can have come to: of one far ahead, a clock told that was wrong.
pub fn is_believable(slot: DateTime<Utc>, now: DateTime<Utc>) -> bool {
    slot - now <= lane::BELIEVED_AHEAD
}

/// The state.
#[derive(Debug)]
pub struct Scheduler {
    host: String,
    lanes: BTreeMap<ScheduleName, Lane>,
    draining: bool,
}

impl Scheduler {
    /// A scheduler for `schedules`, and what is to be done about the slots that an earlier process left open. A schedule
    /// without a cursor begins now.
    pub fn new(host: String, schedules: Vec<Schedule>, known: Known, now: Now) -> (Self, Vec<Action>) {
        let Known { cursors, mut pauses, left } = known;
        let mut turn = Turn::new(&host, now);
        let mut lanes = BTreeMap::new();
        for schedule in schedules {
            let mut lane = match cursors.get(&schedule.name) {
                Some(cursor) => Lane::new(schedule, *cursor),
                None => turn.begin(schedule),
            };
            lane.paused = pauses.remove(&lane.schedule.name);
            lanes.insert(lane.schedule.name.clone(), lane);
        }
        let mut late: BTreeMap<ScheduleName, Vec<Open>> = BTreeMap::new();
        for open in left {
            let (outcome, why) = match (open.started_at.is_some(), lanes.contains_key(&open.schedule)) {
                (true, _) => (Outcome::Interrupted, "the daemon that ran it died"),
                (false, false) => (Outcome::Missed, "its schedule was removed"),
                (false, true) => {
                    late.entry(open.schedule.clone()).or_default().push(open);
                    continue;
                }
            };
            turn.record(&open, outcome, why);
        }
        for lane in lanes.values_mut() {
            let late = late.remove(&lane.schedule.name).unwrap_or_default();
            lane.notice(late, &mut turn);
        }
        let actions = turn.actions;
        (Self { host, lanes, draining: false }, actions)
    }

    /// Notices slots that have come, ends what took too long, starts what may start.
    pub fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut turn = Turn::new(&self.host, now);
        for lane in self.lanes.values_mut() {
            lane.expire(&mut turn);
            if !self.draining && !lane.retired {
                lane.notice(Vec::new(), &mut turn);
            }
        }
        if !self.draining {
            start(&mut self.lanes, &mut turn);
        }
        self.lanes.retain(|_, lane| !(lane.retired && lane.running.is_none()));
        turn.actions
    }

    /// An attempt has ended by itself. One that was stopped meanwhile is of no interest.
    pub fn ended(&mut self, schedule: &ScheduleName, slot: DateTime<Utc>, end: End, now: Now) -> Vec<Action> {
        let mut turn = Turn::new(&self.host, now);
        if let Some(lane) = self.lanes.get_mut(schedule)
            && lane.running.as_ref().is_some_and(|running| running.open.slot == slot && running.pausing.is_none())
        {
            let last = self.draining || lane.retired;
            lane.ended(end, last, &mut turn);
        }
        let mut actions = turn.actions;
        actions.extend(self.tick(now));
        actions
    }

    /// Works with other schedules from now on. What runs goes on as it was begun.
    pub fn reload(&mut self, schedules: Vec<Schedule>, now: Now) -> Vec<Action> {
        // Slots that came until now belong to the old schedules.
        let mut actions = self.tick(now);
        let mut turn = Turn::new(&self.host, now);
        let mut fresh: BTreeMap<_, _> =
            schedules.into_iter().map(|schedule| (schedule.name.clone(), schedule)).collect();
        for (name, lane) in &mut self.lanes {
            match fresh.remove(name) {
                Some(schedule) => {
                    lane.schedule = schedule;
                    lane.retired = false;
                    lane.settle(lane.cursor.max(now.wall));
                    turn.actions.push(Action::Settle(name.clone(), lane.cursor));
                }
                None => lane.retire(&mut turn),
            }
        }
        for (name, schedule) in fresh {
            self.lanes.insert(name, turn.begin(schedule));
        }
        actions.append(&mut turn.actions);
        actions.extend(self.tick(now));
        actions
    }

    /// Starts nothing any more. Slots that wait stay open for the next process.
    pub fn drain(&mut self, now: Now) -> Vec<Action> {
        self.draining = true;
        let mut turn = Turn::new(&self.host, now);
        for lane in self.lanes.values_mut() {
            lane.give_up_pausing(&mut turn);
        }
        turn.actions
    }

    /// Stops what still runs.
    pub fn abandon(&mut self, now: Now) -> Vec<Action> {
        let mut turn = Turn::new(&self.host, now);
        for lane in self.lanes.values_mut() {
            let why = "the daemon was told to stop and could wait no longer";
            lane.cut(Outcome::Interrupted, why, &mut turn);
        }
        turn.actions
    }

    /// How everything stands.
    pub fn view(&self, now: Now) -> Vec<View> {
        self.lanes.values().map(|lane| lane.view(now)).collect()
    }

    /// Runs a schedule at once, as a slot of its own; says which, or why not.
    pub fn trigger(&mut self, schedule: &ScheduleName, now: Now) -> (Result<DateTime<Utc>>, Vec<Action>) {
        let mut actions = self.tick(now);
        let slot = now.wall.trunc_subsecs(0);
        let mut turn = Turn::new(&self.host, now);
        let triggered = match self.lanes.get_mut(schedule) {
            _ if self.draining => Err(Error::refused("the daemon is about to stop")),
            None => Err(Error::not_found(format!("there is no schedule `{schedule}`"))),
            Some(lane) => lane.trigger(slot, &mut turn),
        };
        actions.append(&mut turn.actions);
        actions.extend(self.tick(now));
        (triggered, actions)
    }

    /// Pauses a schedule, or ends its pause. What runs goes on.
    ///
    /// # Errors
    /// There is no such schedule.
    pub fn pause(&mut self, schedule: &ScheduleName, pause: Option<Pause>, now: Now) -> Result<Vec<Action>> {
        let mut actions = self.tick(now);
        let lane = self.lanes.get_mut(schedule);
        let lane = lane.ok_or_else(|| Error::not_found(format!("there is no schedule `{schedule}`")))?;
        lane.paused.clone_from(&pause);
        actions.push(Action::Pause(schedule.clone(), pause));
        Ok(actions)
    }

    /// How many schedules there are.
    pub fn count(&self) -> usize {
        self.lanes.values().filter(|lane| !lane.retired).count()
    }

    /// How many jobs run or are between two attempts.
    pub fn running(&self) -> usize {
        self.lanes.values().filter(|lane| lane.running.is_some()).count()
    }

    /// The earliest slot that runs or waits.
    fn earliest(&self) -> Option<DateTime<Utc>> {
        self.lanes.values().filter_map(Lane::earliest).min()
    }

    /// How long nothing will happen by itself, and no longer than a clock may be believed.
    pub fn idle(&self, now: Now) -> Duration {
        self.next(now).unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
    }

    /// The same, for a world whose clock never jumps; `None` = for ever.
    fn next(&self, now: Now) -> Option<Duration> {
        self.lanes.values().filter_map(|lane| lane.next(!self.draining, now)).min()
    }
}

/// Starts what waits and may. A slot waits for those of the schedule that it comes after, of the same moment or earlier.
fn start(lanes: &mut BTreeMap<ScheduleName, Lane>, turn: &mut Turn<'_>) {
    let busy = lanes.iter().filter_map(|(name, lane)| Some((name.clone(), lane.earliest()?)));
    let busy: BTreeMap<_, _> = busy.collect();
    for lane in lanes.values_mut() {
        let before = lane.schedule.after.as_ref().and_then(|after| busy.get(after));
        let waits = lane.waiting.as_ref().zip(before);
        let blocked = waits.is_some_and(|(waiting, before)| *before <= waiting.open.slot);
        lane.start(blocked, turn);
    }
}
