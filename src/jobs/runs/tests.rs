//! A daemon that dies between any two writes.

use chrono::TimeDelta;

use super::*;
use crate::model::run::{FORMAT, Outcome};
use crate::model::schedule::Job;

fn slot(minutes: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000) + TimeDelta::minutes(minutes)
}

fn open(minutes: i64) -> Open {
    Open {
        schedule: "base".parse().unwrap(),
        slot: slot(minutes),
        job: Job::Backup,
        target: None,
        caught_up: false,
        attempts: 0,
        started_at: None,
    }
}

fn run(minutes: i64, outcome: Outcome) -> Run {
    let Open { schedule, slot, job, target, .. } = open(minutes);
    Run {
        format: FORMAT,
        schedule,
        slot,
        first_slot: slot,
        slots: 1,
        job,
        target,
        outcome,
        caught_up: false,
        attempts: 1,
        started_at: Some(slot),
        ended_at: slot,
        detail: None,
        host: "h".into(),
        drctl: "0".into(),
    }
}

#[test]
fn what_was_open_or_recorded_is_known_to_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let (log, memory) = RunLog::open(dir.path()).unwrap();
    assert_eq!(memory, Memory::default());
    let refused = RunLog::open(dir.path()).unwrap_err();
    assert!(refused.message().contains("another drctl daemon"), "{refused}");
    let started = Open { attempts: 1, started_at: Some(slot(1)), ..open(1) };
    log.note(&open(1)).unwrap();
    log.note(&started).unwrap();
    log.note(&open(3)).unwrap();
    log.record(&run(2, Outcome::SkippedOverlap)).unwrap();
    log.record(&run(3, Outcome::Success)).unwrap();
    // Only the first record of a slot counts.
    log.record(&run(3, Outcome::Failed)).unwrap();
    drop(log);

    let (log, memory) = RunLog::open(dir.path()).unwrap();
    assert_eq!((memory.open, memory.cursors.into_values().collect::<Vec<_>>()), (vec![started], vec![slot(3)]));
    let owed: Vec<_> = log.owed().unwrap().into_iter().map(|run| (run.slot, run.outcome)).collect();
    assert_eq!(owed, [(slot(2), Outcome::SkippedOverlap), (slot(3), Outcome::Success)]);
}

#[test]
fn a_death_between_the_record_and_its_note_leaves_one_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = RunLog::open(dir.path()).unwrap();
    log.record(&run(1, Outcome::Success)).unwrap();
    log.note(&open(1)).unwrap();
    drop(log);
    let (log, memory) = RunLog::open(dir.path()).unwrap();
    assert_eq!((memory.open, log.owed().unwrap().len()), (vec![], 1));
}
