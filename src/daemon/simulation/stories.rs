//! One thing at a time happens to a daemon.

use super::*;

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
fn a_slot_that_meets_a_manual_backup_is_skipped_or_waits_and_has_not_failed() {
    let retry = Retry { max: 3, pause: Duration::from_secs(60) };
    let skip = Schedule { retry, ..schedule("skip", "0 13 * * *") };
    let queue = Schedule { overlap: Overlap::QueueOne, ..schedule("queue", "0 13 * * *") };
    let mut world = World::new(at(START), vec![skip, queue], busy);
    world.pass(3600 + 120);
    assert_eq!(world.told(), ["skip 20 13:00 skipped_overlap"]);
    world.nature = good;
    world.pass(3600);
    assert_eq!(world.told(), ["skip 20 13:00 skipped_overlap", "queue 20 13:00 success"]);
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
