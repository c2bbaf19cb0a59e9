//! The scheduler in a world whose clocks, jobs, deaths and disk are made up.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use proptest::prelude::*;

use crate::daemon::scheduler::{Action, End, Known, Now, Scheduler};
use crate::model::ScheduleName;
use crate::model::run::{Open, Outcome, Pause, Run};
use crate::model::schedule::{CatchUp, Overlap, Retry, Schedule, Work};

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

/// Fails twice.
fn shaky(open: &Open) -> (u64, End) {
    if open.attempts <= 2 { (60, End::Failed("no region answers".into())) } else { good(open) }
}

const START: &str = "2026-11-20 12:00";

#[test]
fn a_slot_runs_when_its_share_of_the_jitter_is_over() {
    let jittered = Schedule { jitter: Duration::from_secs(600), ..schedule("base", "0 */2 * * *") };
    let mut world = World::new(at(START), vec![jittered.clone()], good);
    world.pass_hours(5);
    assert_eq!(world.told(), ["base 20 14:00 success", "base 20 16:00 success"]);
    let expected = ["2026-11-20 14:00", "2026-11-20 16:00"].map(|slot| {
        // Seconds are as fine as this world's clocks are.
        let start = jittered.start_of(at(slot)) + TimeDelta::milliseconds(999);
        start.format("%d %H:%M:%S").to_string()
    });
    assert_eq!(world.starts_of("base"), expected);
    assert_eq!(world.disk.done[0].started_at, Some(world.starts[0].1));
    assert!(world.disk.open.is_empty());
}

#[test]
fn a_slot_that_comes_too_early_is_skipped_or_waits() {
    let skip = schedule("skip", "0 * * * *");
    let queue = Schedule { overlap: Overlap::QueueOne, ..schedule("queue", "*/30 * * * *") };
    let mut world = World::new(at(START), vec![skip, queue], slow);
    world.pass(3 * 3600 + 60);
    let told = world.told();
    let of = |name: &str| told.iter().filter(|told| told.starts_with(name)).cloned().collect::<Vec<_>>();
    assert_eq!(of("skip"), ["skip 20 14:00 skipped_overlap", "skip 20 13:00 debts"]);
    // 12:30 runs until 14:00, 13:00 waits and then runs until 15:30.
    let queued = ["queue 20 13:30 skipped_overlap", "queue 20 14:00 debts"];
    assert_eq!(of("queue")[..1], queued[..1], "{told:?}");
    assert_eq!(world.starts_of("queue"), ["20 12:30:00", "20 14:00:00"]);
    assert!(of("queue").contains(&"queue 20 12:30 debts".to_owned()), "{told:?}");
}

#[test]
fn a_job_that_hangs_is_stopped_and_holds_nobody_up() {
    let hung_one = Schedule { timeout: Duration::from_secs(5400), ..schedule("hung", "0 * * * *") };
    let mut world = World::new(at(START), vec![hung_one, schedule("other", "15 * * * *")], hung);
    world.pass_hours(4);
    let expected = [
        "other 20 12:15 success",
        "other 20 13:15 success",
        "hung 20 14:00 skipped_overlap",
        "other 20 14:15 success",
        "hung 20 13:00 timeout",
        "other 20 15:15 success",
        "hung 20 16:00 skipped_overlap",
    ];
    assert_eq!(world.told(), expected);
    assert_eq!(world.starts_of("hung"), ["20 13:00:00", "20 15:00:00"]);
}

#[test]
fn failures_are_tried_again_with_growing_pauses_inside_the_time_limit() {
    let retry = Retry { max: 2, pause: Duration::from_secs(120) };
    let twice = Schedule { retry, ..schedule("twice", "0 13 * * *") };
    let once = Schedule { retry: Retry { max: 1, ..retry }, ..schedule("once", "0 13 * * *") };
    let short = Schedule { timeout: Duration::from_secs(200), ..twice.clone() };
    let short = Schedule { name: "short".parse().unwrap(), ..short };
    let mut world = World::new(at(START), vec![twice, once, short], shaky);
    world.pass_hours(3);
    let mut told = world.told();
    told.sort();
    assert_eq!(told, ["once 20 13:00 failed x2", "short 20 13:00 timeout x2", "twice 20 13:00 success x3"]);
    assert_eq!(world.starts_of("twice"), ["20 13:00:00", "20 13:03:00", "20 13:08:00"]);
    let failed = world.disk.done.iter().find(|run| run.outcome == Outcome::Failed).unwrap();
    assert_eq!(failed.detail.as_deref(), Some("no region answers"));
}

#[test]
fn what_comes_after_waits_for_the_end_of_the_same_moment() {
    let second = Schedule { after: Some("first".parse().unwrap()), ..schedule("a-second", "0 13 * * *") };
    let mut world = World::new(at(START), vec![schedule("first", "0 13 * * *"), second], slow);
    world.pass_hours(6);
    assert_eq!(world.told(), ["first 20 13:00 debts", "a-second 20 13:00 debts"]);
    assert_eq!(world.starts_of("a-second"), ["20 14:30:00"]);
}

#[test]
fn after_days_without_a_daemon_the_newest_slot_is_caught_up() {
    let none = Schedule { catch_up: CatchUp::None, ..schedule("none", "0 1 * * *") };
    let schedules = vec![schedule("one", "0 1 * * *"), none];
    let mut world = World::new(at(START), schedules.clone(), good);
    world.pass_hours(24);
    world.kill();
    world.pass_hours(72);
    world.boot(schedules);
    world.pass_hours(1);
    let told = [
        "none 21 01:00 success",
        "one 21 01:00 success",
        "none 24 01:00 missed 3 since 22 01:00",
        "one 23 01:00 missed 2 since 22 01:00",
        "one 24 01:00 success late",
    ];
    let mut found = world.told();
    found[..2].sort();
    assert_eq!(found, told);
}

#[test]
fn a_killed_daemon_tells_at_its_next_start_what_it_was_doing() {
    let waits = Schedule { after: Some("runs".parse().unwrap()), ..schedule("waits", "0 13 * * *") };
    let schedules = vec![schedule("runs", "0 13 * * *"), waits];
    let mut world = World::new(at(START), schedules.clone(), slow);
    world.pass(3600 + 600);
    world.kill();
    world.pass(600);
    world.boot(schedules.clone());
    world.pass_hours(2);
    assert_eq!(world.told(), ["runs 20 13:00 interrupted", "waits 20 13:00 debts late"]);

    let mut world = World::new(at(START), schedules, slow);
    world.pass(3600 + 600);
    world.kill();
    // Both files are gone at the next start.
    world.boot(Vec::new());
    assert_eq!(world.told(), ["runs 20 13:00 interrupted", "waits 20 13:00 missed"]);
    assert!(world.disk.open.is_empty());
}

#[test]
fn a_reload_leaves_what_runs_alone() {
    let (base, other) = (schedule("base", "0 13 * * *"), schedule("other", "0 14 * * *"));
    let mut world = World::new(at(START), vec![base, other], slow);
    world.pass(3600 + 600);
    let moved = vec![schedule("other", "30 13 * * *"), schedule("new", "40 13 * * *")];
    world.ask(|scheduler, now| scheduler.reload(moved, now));
    world.pass_hours(6);
    let mut told = world.told();
    told.sort();
    assert_eq!(told, ["base 20 13:00 debts", "new 20 13:40 debts", "other 20 13:30 debts"]);
}

#[test]
fn a_daemon_that_drains_starts_nothing_and_leaves_waiting_slots_to_the_next() {
    let schedules = vec![schedule("long", "0 13 * * *"), schedule("next", "30 13 * * *")];
    let mut world = World::new(at(START), schedules.clone(), slow);
    world.pass(3600 + 600);
    world.ask(Scheduler::drain);
    world.pass(1800);
    assert_eq!((world.scheduler.as_ref().unwrap().running(), world.told()), (1, vec![]));
    world.ask(Scheduler::abandon);
    assert_eq!(world.told(), ["long 20 13:00 interrupted"]);
    world.kill();
    world.boot(schedules);
    world.pass_hours(2);
    assert_eq!(world.told()[1..], ["next 20 13:30 debts late"]);
}

#[test]
fn a_clock_that_jumps_makes_no_slot_run_twice_or_vanish() {
    let mut world = World::new(at(START), vec![schedule("base", "0 * * * *")], good);
    world.pass(3600 + 900);
    world.wall -= TimeDelta::hours(2);
    world.pass_hours(3);
    assert_eq!(world.told(), ["base 20 13:00 success", "base 20 14:00 success"]);
    world.wall += TimeDelta::hours(5);
    world.pass(900);
    let told = ["base 20 18:00 missed 4 since 20 15:00", "base 20 19:00 success late"];
    assert_eq!(world.told()[2..], told);
}

#[test]
fn a_clock_that_was_years_ahead_silences_nothing() {
    let schedules = vec![schedule("base", "0 * * * *")];
    let mut world = World::new(at(START), schedules.clone(), good);
    world.pass(900);
    for restart in [false, true] {
        let before = world.wall;
        world.wall += TimeDelta::days(365 * 4);
        world.pass(900);
        world.wall = before + TimeDelta::seconds(900);
        let told = world.told().len();
        if restart {
            world.kill();
            world.boot(schedules.clone());
        }
        world.pass_hours(2);
        let since = &world.told()[told..];
        assert_eq!(since.len(), 2, "{since:?}");
        assert!(since.iter().all(|told| told.ends_with("success")), "{since:?}");
        assert!(world.disk.cursors.values().all(|cursor| *cursor <= world.wall));
    }
}

#[test]
fn nights_in_which_the_clock_is_moved_have_one_backup_each() {
    let berlin = Schedule { timezone: chrono_tz::Tz::Europe__Berlin, ..schedule("base", "30 2 * * *") };
    for (start, slots) in [
        ("2026-03-28 12:00", ["base 29 01:00 success", "base 30 00:30 success"]),
        ("2026-10-24 12:00", ["base 25 00:30 success", "base 26 01:30 success"]),
    ] {
        let mut world = World::new(at(start), vec![berlin.clone()], good);
        world.pass_hours(40);
        assert_eq!(world.told(), slots);
    }
}

#[test]
fn a_pause_has_an_end_and_outlives_the_daemon() {
    let schedules = vec![schedule("base", "0 * * * *")];
    let mut world = World::new(at(START), schedules.clone(), good);
    let name: ScheduleName = "base".parse().unwrap();
    let pause = Pause { until: at("2026-11-20 14:30"), reason: "the server moves".into() };
    world.ask(|scheduler, now| scheduler.pause(&name, Some(pause), now).unwrap());
    world.pass(3600 + 60);
    world.kill();
    world.boot(schedules);
    world.pass_hours(3);
    let told = ["base 20 13:00 skipped_paused", "base 20 14:00 skipped_paused", "base 20 15:00 success"];
    assert_eq!(world.told()[..3], told);
    assert_eq!(world.disk.done[0].detail.as_deref(), Some("the server moves"));
    assert!(
        world
            .scheduler
            .as_mut()
            .unwrap()
            .pause(&"other".parse().unwrap(), None, Now { wall: at(START), monotonic: Duration::ZERO })
            .is_err()
    );
}

#[test]
fn a_schedule_that_is_asked_for_runs_at_once_as_a_slot_of_its_own() {
    let mut world = World::new(at(START), vec![schedule("base", "0 13 * * *")], slow);
    let name: ScheduleName = "base".parse().unwrap();
    world.pass(600);
    let asked = |world: &mut World| {
        let now = world.now();
        let (slot, actions) = world.scheduler.as_mut().unwrap().trigger(&name, now);
        world.act(actions);
        slot
    };
    assert_eq!(asked(&mut world).unwrap(), at("2026-11-20 12:10"));
    assert!(asked(&mut world).unwrap_err().message().contains("runs or waits already"));
    world.pass_hours(3);
    assert_eq!(world.told(), ["base 20 13:00 skipped_overlap", "base 20 12:10 debts"]);
}

/// Ten schedules as people mix them.
fn ten() -> Vec<Schedule> {
    let berlin = chrono_tz::Tz::Europe__Berlin;
    let retry = Retry { max: 2, pause: Duration::from_secs(300) };
    vec![
        Schedule { timezone: berlin, ..schedule("base", "30 2 * * *") },
        Schedule { after: Some("base".parse().unwrap()), timezone: berlin, ..schedule("verify", "30 2 * * *") },
        Schedule { overlap: Overlap::QueueOne, ..schedule("queue", "*/20 * * * *") },
        Schedule { catch_up: CatchUp::None, ..schedule("often", "*/5 * * * *") },
        Schedule { timeout: Duration::from_secs(2400), ..schedule("hung", "0 * * * *") },
        Schedule { retry, ..schedule("shaky", "10 */2 * * *") },
        Schedule { jitter: Duration::from_secs(900), ..schedule("jitter", "0 */3 * * *") },
        Schedule { timezone: chrono_tz::Tz::Australia__Lord_Howe, ..schedule("far", "*/30 * * * *") },
        Schedule { after: Some("queue".parse().unwrap()), catch_up: CatchUp::None, ..schedule("chain", "40 * * * *") },
        Schedule { enabled: false, ..schedule("off", "* * * * *") },
    ]
}

/// Some take long, some fail, one hangs: always the same for the same slot and attempt.
fn mixed(open: &Open) -> (u64, End) {
    let letter = open.schedule.as_str().bytes().map(i64::from).sum::<i64>();
    let draw = open.slot.timestamp() / 60 * 7 + i64::from(open.attempts) * 13 + letter;
    let takes = u64::try_from(draw % 47).unwrap() * 60;
    match (open.schedule.as_str(), draw % 5) {
        ("hung", _) => (u64::MAX, End::Failed("never".into())),
        (_, 0) => (takes, End::Failed("no region answers".into())),
        (_, 1) => (takes, End::Done(Outcome::Debts, "done".into())),
        _ => (takes, End::Done(Outcome::Success, "done".into())),
    }
}

/// What happens to a daemon.
#[derive(Debug, Clone)]
enum Blow {
    /// Nothing.
    Quiet,
    /// kill -9, and this long no daemon.
    Kill(u64),
    /// It dies between two actions.
    DieAfter(usize),
    /// SIGTERM with this grace, and a new start.
    Stop(u64),
    /// SIGHUP.
    Reload,
    /// The wall clock jumps.
    Jump(i64),
}

fn blow() -> impl Strategy<Value = Blow> {
    prop_oneof![
        Just(Blow::Quiet),
        (0u64..20_000).prop_map(Blow::Kill),
        (0usize..8).prop_map(Blow::DieAfter),
        (0u64..3000).prop_map(Blow::Stop),
        Just(Blow::Reload),
        (-7200i64..7200).prop_map(Blow::Jump),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// A day around a clock change, with everything that can happen to a daemon.
    #[test]
    fn every_slot_has_exactly_one_outcome(
        autumn: bool,
        blows in proptest::collection::vec((100u64..9000, blow()), 4..14),
    ) {
        let start = at(if autumn { "2026-10-24 20:07" } else { "2026-03-28 20:07" });
        let mut world = World::new(start, ten(), mixed);
        let mut farthest = start;
        for (quiet, blow) in blows {
            world.pass(quiet);
            farthest = farthest.max(world.wall);
            match blow {
                Blow::Quiet => {}
                Blow::Kill(seconds) => {
                    world.kill();
                    world.pass(seconds);
                    world.boot(ten());
                }
                Blow::DieAfter(actions) => {
                    world.fuse = Some(actions);
                    world.pass(3000);
                    world.fuse = None;
                    world.kill();
                    world.boot(ten());
                }
                Blow::Stop(grace) => {
                    world.ask(Scheduler::drain);
                    world.pass(grace);
                    world.ask(Scheduler::abandon);
                    prop_assert!(world.jobs.is_empty());
                    world.kill();
                    world.boot(ten());
                }
                Blow::Reload => world.ask(|scheduler, now| scheduler.reload(ten(), now)),
                Blow::Jump(seconds) => world.wall += TimeDelta::seconds(seconds),
            }
            farthest = farthest.max(world.wall);
        }
        world.pass_hours(3);
        farthest = farthest.max(world.wall);
        for schedule in ten() {
            let of = |run: &&Run| run.schedule == schedule.name;
            for slot in schedule.slots_between(start, farthest) {
                let recorded = world.disk.done.iter().filter(of).filter(|run| run.first_slot <= slot && slot <= run.slot);
                let open = world.disk.open.contains_key(&(schedule.name.clone(), slot));
                prop_assert_eq!(recorded.count() + usize::from(open), 1, "{} {} {:#?}", schedule.name, slot, world.told());
            }
            let counted: u64 = world.disk.done.iter().filter(of).map(|run| run.slots).sum();
            let open = world.disk.open.values().filter(|open| open.schedule == schedule.name).count() as u64;
            let slots = schedule.slots_between(start, farthest).count() as u64;
            prop_assert_eq!(counted + open, slots, "{}", schedule.name);
        }
        let hung = world.disk.done.iter().filter(|run| run.schedule.as_str() == "hung");
        prop_assert!(hung.clone().all(|run| !run.outcome.is_success()), "{:#?}", world.told());
    }
}
