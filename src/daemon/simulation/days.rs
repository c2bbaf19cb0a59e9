//! Days in which everything happens to a daemon.

use proptest::prelude::*;

use super::*;

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
