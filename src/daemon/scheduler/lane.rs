//! One schedule in the scheduler: its cursor, what waits, what runs.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::daemon::scheduler::{Action, End, Now, View, is_believable};
use crate::model::run::{FORMAT, Open, Outcome, Pause, Run};
use crate::model::schedule::{CatchUp, Overlap, Schedule};
use crate::model::{Error, Result};

/// A slot that is noticed later than this was missed: nobody was there, or the machine slept.
const ON_TIME: TimeDelta = TimeDelta::seconds(60);
/// A cursor that lies farther ahead of the clock than this was set by a clock that was wrong: believing it would silence
/// the schedule until that day.
pub(super) const BELIEVED_AHEAD: TimeDelta = TimeDelta::hours(24);
/// Characters of a record's own words.
const LONGEST_DETAIL: usize = 1000;
/// How long a slot that is queued waits before it looks again whether somebody else has ended.
const BUSY_PAUSE: Duration = Duration::from_secs(30);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) schedule: Schedule,
    /// Every slot up to here is open or recorded.
    pub(super) cursor: DateTime<Utc>,
    /// The slot after it.
    pub(super) upcoming: Option<DateTime<Utc>>,
    pub(super) waiting: Option<Waiting>,
    pub(super) running: Option<Running>,
    pub(super) paused: Option<Pause>,
    /// Its file is gone; it stays until what runs has ended.
    pub(super) retired: bool,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) open: Open,
    pub(super) from: Duration,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) open: Open,
    pub(super) deadline: Duration,
    /// Between two attempts: until when, and why the last one failed.
    pub(super) pausing: Option<(Duration, String)>,
}

/// One call into the state machine: when it is, and what comes of it.
pub(super) struct Turn<'h> {
    pub(super) host: &'h str,
    pub(super) now: Now,
    pub(super) actions: Vec<Action>,
}

impl<'h> Turn<'h> {
    pub(super) const fn new(host: &'h str, now: Now) -> Self {
        Self { host, now, actions: Vec::new() }
    }

    /// A schedule that was not known before: its first slot is still to come, also if this process dies before it.
    pub(super) fn begin(&mut self, schedule: Schedule) -> Lane {
        self.actions.push(Action::Settle(schedule.name.clone(), self.now.wall));
        Lane::new(schedule, self.now.wall)
    }

    pub(super) fn record(&mut self, open: &Open, outcome: Outcome, why: &str) {
        let run = self.run(open, outcome, why);
        self.actions.push(Action::Record(run));
    }

    pub(super) fn run(&self, open: &Open, outcome: Outcome, why: &str) -> Run {
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
    pub(super) fn new(schedule: Schedule, cursor: DateTime<Utc>) -> Self {
        let upcoming = schedule.slots_after(cursor).next();
        Self { schedule, cursor, upcoming, waiting: None, running: None, paused: None, retired: false }
    }

    pub(super) fn settle(&mut self, cursor: DateTime<Utc>) {
        self.cursor = cursor;
        self.upcoming = self.schedule.slots_after(cursor).next();
    }

    /// The slots that have come, beside those that an earlier process left waiting: the newest may run, if it is on time
    /// or caught up.
    pub(super) fn notice(&mut self, left: Vec<Open>, turn: &mut Turn<'_>) {
        let now = turn.now.wall;
        if !is_believable(self.cursor, now) {
            turn.actions.push(Action::Rewind { schedule: self.schedule.name.clone(), from: self.cursor, to: now });
            self.settle(now);
        }
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

    pub(super) fn accept(&mut self, open: Open, turn: &mut Turn<'_>) {
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

    pub(super) fn trigger(&mut self, slot: DateTime<Utc>, turn: &mut Turn<'_>) -> Result<DateTime<Utc>> {
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

    pub(super) fn view(&self, now: Now) -> View {
        let running = self.running.as_ref();
        let pausing = running.and_then(|running| running.pausing.as_ref());
        View {
            schedule: self.schedule.name.clone(),
            job: self.schedule.work.job(),
            target: self.schedule.work.target().cloned(),
            running: running.map(|running| running.open.clone()),
            going: None,
            failed: pausing.map(|(_, why)| why.clone()),
            waiting: self.waiting.as_ref().map(|waiting| waiting.open.clone()),
            paused: self.paused.clone().filter(|pause| pause.until > now.wall),
            next: self.upcoming.filter(|_| !self.retired),
        }
    }

    pub(super) fn open(&self, slot: DateTime<Utc>) -> Open {
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

    pub(super) fn start(&mut self, blocked: bool, turn: &mut Turn<'_>) {
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

    pub(super) fn ended(&mut self, end: End, last: bool, turn: &mut Turn<'_>) {
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
            End::Busy(why) => {
                let until = turn.now.monotonic.saturating_add(BUSY_PAUSE);
                if !last && self.schedule.overlap == Overlap::QueueOne && until < running.deadline {
                    // It was no attempt.
                    running.open.attempts = running.open.attempts.saturating_sub(1);
                    running.pausing = Some((until, why));
                    return;
                }
                (Outcome::SkippedOverlap, why)
            }
        };
        self.close(outcome, &detail, turn);
    }

    pub(super) fn expire(&mut self, turn: &mut Turn<'_>) {
        if self.running.as_ref().is_some_and(|running| running.deadline <= turn.now.monotonic) {
            let limit = self.schedule.timeout.as_secs();
            self.cut(Outcome::Timeout, &format!("it did not end within {limit} s"), turn);
        }
    }

    pub(super) fn retire(&mut self, turn: &mut Turn<'_>) {
        self.retired = true;
        if let Some(Waiting { open, .. }) = self.waiting.take() {
            turn.record(&open, Outcome::Missed, "its schedule was removed");
        }
        self.give_up_pausing(turn);
    }

    pub(super) fn give_up_pausing(&mut self, turn: &mut Turn<'_>) {
        let paused = self.running.as_ref().and_then(|running| running.pausing.clone());
        if let Some((_, why)) = paused {
            self.close(Outcome::Failed, &why, turn);
        }
    }

    /// Stops what runs, with an outcome.
    pub(super) fn cut(&mut self, outcome: Outcome, why: &str, turn: &mut Turn<'_>) {
        if let Some(running) = &self.running {
            turn.actions.push(Action::Stop(running.open.clone()));
            self.close(outcome, why, turn);
        }
    }

    pub(super) fn close(&mut self, outcome: Outcome, why: &str, turn: &mut Turn<'_>) {
        if let Some(Running { open, .. }) = self.running.take() {
            turn.record(&open, outcome, why);
        }
    }

    /// The earliest slot that has not ended.
    pub(super) fn earliest(&self) -> Option<DateTime<Utc>> {
        let running = self.running.as_ref().map(|running| running.open.slot);
        running.into_iter().chain(self.waiting.as_ref().map(|waiting| waiting.open.slot)).min()
    }

    /// How long this lane has nothing to do.
    pub(super) fn next(&self, slots_count: bool, now: Now) -> Option<Duration> {
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
