//! The scheduler in a world whose clocks, jobs, deaths and disk are made up.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};

use crate::daemon::scheduler::{Action, End, Known, Now, Scheduler};
use crate::model::ScheduleName;
use crate::model::run::{Open, Outcome, Pause, Run};
use crate::model::schedule::{CatchUp, Overlap, Retry, Schedule, Work};

mod days;
mod stories;

fn at(text: &str) -> DateTime<Utc> {
    NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M").unwrap().and_utc()
}

fn schedule(name: &str, cron: &str) -> Schedule {
    Schedule {
        name: name.parse().unwrap(),
        description: None,
        enabled: true,
        work: Work::Backup { target: "ledger".parse().unwrap(), fast: false, verify_detection: false },
        cron: cron.parse().unwrap(),
        timezone: chrono_tz::Tz::UTC,
        jitter: Duration::ZERO,
        catch_up: CatchUp::One,
        overlap: Overlap::Skip,
        timeout: Duration::from_secs(3600 * 6),
        retry: Retry { max: 0, pause: Duration::from_secs(60) },
        after: None,
        max_age: None,
    }
}

/// What a job does: how long it takes, and how each attempt ends.
type Nature = fn(&Open) -> (u64, End);

/// The state directory and the regions together: what is here outlives the process.
#[derive(Default)]
struct Disk {
    open: BTreeMap<(ScheduleName, DateTime<Utc>), Open>,
    done: Vec<Run>,
    cursors: BTreeMap<ScheduleName, DateTime<Utc>>,
    pauses: BTreeMap<ScheduleName, Pause>,
}

struct World {
    wall: DateTime<Utc>,
    monotonic: u64,
    disk: Disk,
    jobs: Vec<(Open, u64, End)>,
    scheduler: Option<Scheduler>,
    nature: Nature,
    starts: Vec<(String, DateTime<Utc>, u32)>,
    /// Dies after this many further actions.
    fuse: Option<usize>,
}

impl World {
    fn new(wall: DateTime<Utc>, schedules: Vec<Schedule>, nature: Nature) -> Self {
        let disk = Disk::default();
        let mut world = Self {
            wall,
            monotonic: 0,
            disk,
            jobs: Vec::new(),
            scheduler: None,
            nature,
            starts: Vec::new(),
            fuse: None,
        };
        world.boot(schedules);
        world
    }

    fn now(&self) -> Now {
        Now { wall: self.wall, monotonic: Duration::from_secs(self.monotonic) }
    }

    fn boot(&mut self, schedules: Vec<Schedule>) {
        let left = self.disk.open.values().cloned().collect();
        let (cursors, pauses) = (self.disk.cursors.clone(), self.disk.pauses.clone());
        let known = Known { cursors, pauses, left };
        let (scheduler, actions) = Scheduler::new("host".into(), schedules, known, self.now());
        self.scheduler = Some(scheduler);
        self.act(actions);
    }

    fn kill(&mut self) {
        self.scheduler = None;
        self.jobs.clear();
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            if let Some(fuse) = &mut self.fuse {
                if *fuse == 0 {
                    self.fuse = None;
                    return self.kill();
                }
                *fuse -= 1;
            }
            match action {
                Action::Settle(schedule, until) => self.move_cursor(&schedule, until),
                Action::Rewind { schedule, to, .. } => drop(self.disk.cursors.insert(schedule, to)),
                Action::Pause(schedule, Some(pause)) => drop(self.disk.pauses.insert(schedule, pause)),
                Action::Pause(schedule, None) => drop(self.disk.pauses.remove(&schedule)),
                Action::Accept(open) => self.note(open),
                Action::Start(open, _) => {
                    self.note(open.clone());
                    self.starts.push((open.schedule.to_string(), self.wall, open.attempts));
                    let (takes, end) = (self.nature)(&open);
                    self.jobs.push((open, self.monotonic.saturating_add(takes), end));
                }
                Action::Stop(open) => {
                    let before = self.jobs.len();
                    self.jobs.retain(|(job, ..)| (&job.schedule, job.slot) != (&open.schedule, open.slot));
                    assert_eq!(self.jobs.len() + 1, before, "what is stopped runs: {open:?}");
                }
                Action::Record(run) => {
                    self.disk.open.remove(&(run.schedule.clone(), run.slot));
                    self.move_cursor(&run.schedule, run.slot);
                    self.disk.done.push(run);
                }
            }
        }
    }

    fn note(&mut self, open: Open) {
        self.move_cursor(&open.schedule, open.slot);
        self.disk.open.insert((open.schedule.clone(), open.slot), open);
    }

    fn move_cursor(&mut self, schedule: &ScheduleName, slot: DateTime<Utc>) {
        let cursor = self.disk.cursors.entry(schedule.clone()).or_insert(slot);
        *cursor = slot.max(*cursor);
    }

    fn ask(&mut self, ask: impl FnOnce(&mut Scheduler, Now) -> Vec<Action>) {
        let now = self.now();
        if let Some(scheduler) = &mut self.scheduler {
            let actions = ask(scheduler, now);
            self.act(actions);
        }
    }

    /// Lets time pass as the daemon's loop does: it sleeps as long as it is told to, or until a job ends.
    fn pass(&mut self, seconds: u64) {
        let end = self.monotonic + seconds;
        while self.monotonic < end {
            let idle =
                self.scheduler.as_ref().map_or(u64::MAX, |scheduler| scheduler.idle(self.now()).as_secs().max(1));
            let job = self.jobs.iter().map(|(_, ends, _)| *ends).min().unwrap_or(u64::MAX).max(self.monotonic + 1);
            let next = self.monotonic.saturating_add(idle).min(job).min(end);
            self.wall += TimeDelta::seconds(i64::try_from(next - self.monotonic).unwrap());
            self.monotonic = next;
            while let Some(index) = self.jobs.iter().position(|(_, ends, _)| *ends <= self.monotonic) {
                let (open, _, end) = self.jobs.remove(index);
                self.ask(|scheduler, now| scheduler.ended(&open.schedule, open.slot, end, now));
            }
            self.ask(Scheduler::tick);
        }
    }

    fn pass_hours(&mut self, hours: u64) {
        self.pass(hours * 3600);
    }

    /// `name slot outcome`, with `late` and the number of attempts where they say something.
    fn told(&self) -> Vec<String> {
        let told = |run: &Run| {
            let mut text = format!("{} {} {}", run.schedule, run.slot.format("%d %H:%M"), run.outcome.as_str());
            if run.caught_up {
                text.push_str(" late");
            }
            if run.attempts > 1 {
                text.push_str(&format!(" x{}", run.attempts));
            }
            if run.slots > 1 {
                text.push_str(&format!(" {} since {}", run.slots, run.first_slot.format("%d %H:%M")));
            }
            text
        };
        self.disk.done.iter().map(told).collect()
    }

    fn starts_of(&self, name: &str) -> Vec<String> {
        let of = self.starts.iter().filter(|(schedule, ..)| schedule == name);
        of.map(|(_, wall, _)| wall.format("%d %H:%M:%S").to_string()).collect()
    }
}

fn good(_: &Open) -> (u64, End) {
    (600, End::Done(Outcome::Success, "done".into()))
}

fn slow(_: &Open) -> (u64, End) {
    (5400, End::Done(Outcome::Debts, "done".into()))
}

/// What is called `hung` never ends; everything else is quick.
fn hung(open: &Open) -> (u64, End) {
    if open.schedule.as_str() == "hung" { (u64::MAX, End::Failed("never".into())) } else { good(open) }
}

/// Somebody else does it.
fn busy(_: &Open) -> (u64, End) {
    (1, End::Busy("another backup of ledger runs".into()))
}

/// Fails twice.
fn shaky(open: &Open) -> (u64, End) {
    if open.attempts <= 2 { (60, End::Failed("no region answers".into())) } else { good(open) }
}

const START: &str = "2026-11-20 12:00";
