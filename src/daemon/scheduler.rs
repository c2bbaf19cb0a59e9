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

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::model::run::{FORMAT, Open, Outcome, Pause, Run};
use crate::model::schedule::{CatchUp, Job, Overlap, Schedule, Work};
use crate::model::{Error, Result, ScheduleName, TargetName};

/// A slot that is noticed later than this was missed: nobody was there, or the machine slept.
const ON_TIME: TimeDelta = TimeDelta::seconds(60);
/// The longest sleep, because wall time can jump.
const LONGEST_SLEEP: Duration = Duration::from_secs(20);
/// Characters of a record's own words.
const LONGEST_DETAIL: usize = 1000;
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Its name.
    pub schedule: ScheduleName,
    /// What it does.
    pub job: Job,
    /// About which target; `null` = all.
    pub target: Option<TargetName>,
    /// What runs, or is between two attempts.
    pub running: Option<Open>,
    /// Why the last attempt failed, between two.
    pub failed: Option<String>,
    /// What waits.
    pub waiting: Option<Open>,
    /// Whether it is paused.
    pub paused: Option<Pause>,
    /// The next slot.
    pub next: Option<DateTime<Utc>>,
}

/// The state.
#[derive(Debug)]
pub struct Scheduler {
    host: String,
    lanes: BTreeMap<ScheduleName, Lane>,
    draining: bool,
}

#[derive(Debug)]
struct Lane {
    schedule: Schedule,
    /// Every slot up to here is open or recorded.
    cursor: DateTime<Utc>,
    /// The slot after it.
    upcoming: Option<DateTime<Utc>>,
    waiting: Option<Waiting>,
    running: Option<Running>,
    paused: Option<Pause>,
    /// Its file is gone; it stays until what runs has ended.
    retired: bool,
}

#[derive(Debug)]
struct Waiting {
    open: Open,
    from: Duration,
}

#[derive(Debug)]
struct Running {
    open: Open,
    deadline: Duration,
    /// Between two attempts: until when, and why the last one failed.
    pausing: Option<(Duration, String)>,
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

    /// How many jobs run or are between two attempts.
    pub fn running(&self) -> usize {
        self.lanes.values().filter(|lane| lane.running.is_some()).count()
    }

    /// How long nothing will happen by itself.
    pub fn idle(&self, now: Now) -> Duration {
        let next = self.lanes.values().filter_map(|lane| lane.next(!self.draining, now)).min();
        next.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
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

/// One call into the state machine: when it is, and what comes of it.
struct Turn<'h> {
    host: &'h str,
    now: Now,
    actions: Vec<Action>,
}

impl<'h> Turn<'h> {
    const fn new(host: &'h str, now: Now) -> Self {
        Self { host, now, actions: Vec::new() }
    }

    /// A schedule that was not known before: its first slot is still to come, also if this process dies before it.
    fn begin(&mut self, schedule: Schedule) -> Lane {
        self.actions.push(Action::Settle(schedule.name.clone(), self.now.wall));
        Lane::new(schedule, self.now.wall)
    }

    fn record(&mut self, open: &Open, outcome: Outcome, why: &str) {
        let run = self.run(open, outcome, why);
        self.actions.push(Action::Record(run));
    }

    fn run(&self, open: &Open, outcome: Outcome, why: &str) -> Run {
        let Open { schedule, slot, job, target, caught_up, attempts, started_at } = open.clone();
        Run {
            format: FORMAT,
            schedule,
            slot,
            first_slot: slot,
            slots: 1,
            job,
            target,
            outcome,
            caught_up,
            attempts,
            started_at,
            ended_at: self.now.wall,
            // A server may have said anything at any length; the record stays small.
            detail: Some(why.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST_DETAIL).collect()),
            host: self.host.to_owned(),
            drctl: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl Lane {
    fn new(schedule: Schedule, cursor: DateTime<Utc>) -> Self {
        let upcoming = schedule.slots_after(cursor).next();
        Self { schedule, cursor, upcoming, waiting: None, running: None, paused: None, retired: false }
    }

    fn settle(&mut self, cursor: DateTime<Utc>) {
        self.cursor = cursor;
        self.upcoming = self.schedule.slots_after(cursor).next();
    }

    /// The slots that have come, beside those that an earlier process left waiting: the newest may run, if it is on time
    /// or caught up.
    fn notice(&mut self, left: Vec<Open>, turn: &mut Turn<'_>) {
        let now = turn.now.wall;
        let is_late = |slot: DateTime<Utc>| now - slot > ON_TIME;
        let come = self.upcoming.is_some_and(|slot| slot <= now);
        let slots: Vec<_> = self.schedule.slots_between(self.cursor, now).take_while(|_| come).collect();
        if let Some(last) = slots.last() {
            self.settle(*last);
        }
        let newest = slots.last().copied().max(left.iter().map(|open| open.slot).max());
        let catches_up = self.schedule.catch_up == CatchUp::One;
        let is_missed = |slot: DateTime<Utc>| is_late(slot) && !(catches_up && Some(slot) == newest);
        let mut come = Vec::new();
        for open in left {
            match is_missed(open.slot) {
                true => turn.record(&open, Outcome::Missed, "no daemon ran"),
                false => come.push(open),
            }
        }
        let missed: Vec<_> = slots.iter().copied().filter(|slot| is_missed(*slot)).collect();
        if let (Some(first), Some(last)) = (missed.first(), missed.last()) {
            let run = turn.run(&self.open(*last), Outcome::Missed, "no daemon ran");
            turn.actions.push(Action::Record(Run { first_slot: *first, slots: missed.len() as u64, ..run }));
        }
        come.extend(slots.into_iter().filter(|slot| !is_missed(*slot)).map(|slot| self.open(slot)));
        for mut open in come {
            if let Some(pause) = self.paused.as_ref().filter(|pause| open.slot < pause.until) {
                turn.record(&open, Outcome::SkippedPaused, &pause.reason);
                continue;
            }
            open.caught_up = is_late(open.slot);
            self.accept(open, turn);
        }
    }

    fn accept(&mut self, open: Open, turn: &mut Turn<'_>) {
        let free = match self.schedule.overlap {
            Overlap::Skip => self.running.is_none() && self.waiting.is_none(),
            Overlap::QueueOne => self.waiting.is_none(),
        };
        if !free {
            let why = "an earlier slot runs or waits";
            return turn.record(&open, Outcome::SkippedOverlap, why);
        }
        let delay = if open.caught_up { TimeDelta::zero() } else { self.schedule.start_of(open.slot) - turn.now.wall };
        let from = turn.now.monotonic + delay.to_std().unwrap_or_default();
        turn.actions.push(Action::Accept(open.clone()));
        self.waiting = Some(Waiting { open, from });
    }

    fn trigger(&mut self, slot: DateTime<Utc>, turn: &mut Turn<'_>) -> Result<DateTime<Utc>> {
        if self.running.is_some() || self.waiting.is_some() {
            return Err(Error::refused(format!("{} runs or waits already", self.schedule.name)));
        }
        if slot <= self.cursor {
            return Err(Error::refused("a slot of this very moment is accounted for").hint("try again in a second"));
        }
        self.settle(slot);
        let open = self.open(slot);
        turn.actions.push(Action::Accept(open.clone()));
        self.waiting = Some(Waiting { open, from: turn.now.monotonic });
        Ok(slot)
    }

    fn view(&self, now: Now) -> View {
        let running = self.running.as_ref();
        let pausing = running.and_then(|running| running.pausing.as_ref());
        View {
            schedule: self.schedule.name.clone(),
            job: self.schedule.work.job(),
            target: self.schedule.work.target().cloned(),
            running: running.map(|running| running.open.clone()),
            failed: pausing.map(|(_, why)| why.clone()),
            waiting: self.waiting.as_ref().map(|waiting| waiting.open.clone()),
            paused: self.paused.clone().filter(|pause| pause.until > now.wall),
            next: self.upcoming.filter(|_| !self.retired),
        }
    }

    fn open(&self, slot: DateTime<Utc>) -> Open {
        Open {
            schedule: self.schedule.name.clone(),
            slot,
            job: self.schedule.work.job(),
            target: self.schedule.work.target().cloned(),
            caught_up: false,
            attempts: 0,
            started_at: None,
        }
    }

    fn start(&mut self, blocked: bool, turn: &mut Turn<'_>) {
        if self.running.is_none() {
            let ready = self.waiting.take_if(|waiting| !blocked && waiting.from <= turn.now.monotonic);
            let Some(Waiting { open, .. }) = ready else { return };
            let open = Open { started_at: Some(turn.now.wall), job: self.schedule.work.job(), ..open };
            let deadline = turn.now.monotonic.saturating_add(self.schedule.timeout);
            self.running = Some(Running { open, deadline, pausing: Some((turn.now.monotonic, String::new())) });
        }
        if let Some(running) = &mut self.running
            && running.pausing.take_if(|(until, _)| *until <= turn.now.monotonic).is_some()
        {
            running.open.attempts += 1;
            turn.actions.push(Action::Start(running.open.clone(), self.schedule.work.clone()));
        }
    }

    fn ended(&mut self, end: End, last: bool, turn: &mut Turn<'_>) {
        let Some(running) = &mut self.running else { return };
        let (outcome, detail) = match end {
            End::Done(outcome, detail) => (outcome, detail),
            End::Failed(why) => {
                let doublings = running.open.attempts.saturating_sub(1).min(20);
                let pause = self.schedule.retry.pause.saturating_mul(1 << doublings);
                let until = turn.now.monotonic.saturating_add(pause.min(LONGEST_PAUSE));
                if !last && running.open.attempts <= self.schedule.retry.max && until < running.deadline {
                    running.pausing = Some((until, why));
                    return;
                }
                (Outcome::Failed, why)
            }
        };
        self.close(outcome, &detail, turn);
    }

    fn expire(&mut self, turn: &mut Turn<'_>) {
        if self.running.as_ref().is_some_and(|running| running.deadline <= turn.now.monotonic) {
            let limit = self.schedule.timeout.as_secs();
            self.cut(Outcome::Timeout, &format!("it did not end within {limit} s"), turn);
        }
    }

    fn retire(&mut self, turn: &mut Turn<'_>) {
        self.retired = true;
        if let Some(Waiting { open, .. }) = self.waiting.take() {
            turn.record(&open, Outcome::Missed, "its schedule was removed");
        }
        self.give_up_pausing(turn);
    }

    fn give_up_pausing(&mut self, turn: &mut Turn<'_>) {
        let paused = self.running.as_ref().and_then(|running| running.pausing.clone());
        if let Some((_, why)) = paused {
            self.close(Outcome::Failed, &why, turn);
        }
    }

    /// Stops what runs, with an outcome.
    fn cut(&mut self, outcome: Outcome, why: &str, turn: &mut Turn<'_>) {
        if let Some(running) = &self.running {
            turn.actions.push(Action::Stop(running.open.clone()));
            self.close(outcome, why, turn);
        }
    }

    fn close(&mut self, outcome: Outcome, why: &str, turn: &mut Turn<'_>) {
        if let Some(Running { open, .. }) = self.running.take() {
            turn.record(&open, outcome, why);
        }
    }

    /// The earliest slot that has not ended.
    fn earliest(&self) -> Option<DateTime<Utc>> {
        let running = self.running.as_ref().map(|running| running.open.slot);
        running.into_iter().chain(self.waiting.as_ref().map(|waiting| waiting.open.slot)).min()
    }

    /// How long this lane has nothing to do.
    fn next(&self, slots_count: bool, now: Now) -> Option<Duration> {
        let until = |moment: Duration| moment.saturating_sub(now.monotonic);
        let slot = self.upcoming.filter(|_| slots_count && !self.retired);
        let slot = slot.map(|slot| (slot - now.wall).to_std().unwrap_or_default());
        // One that could start and does not waits for another to end, which is an event.
        let later = self.waiting.as_ref().filter(|waiting| slots_count && waiting.from > now.monotonic);
        let running = self.running.as_ref().map(|running| {
            let pause = running.pausing.as_ref().map_or(Duration::MAX, |(moment, _)| until(*moment));
            pause.min(until(running.deadline))
        });
        [slot, later.map(|waiting| until(waiting.from)), running].into_iter().flatten().min()
    }
}
