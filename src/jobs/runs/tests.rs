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

#[test]
fn a_state_directory_that_takes_nothing_holds_up_no_slot_and_forgets_none() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = RunLog::open(dir.path()).unwrap();
    for part in [OPEN, DONE, CURSORS] {
        std::fs::remove_dir(log.dir.join(part)).unwrap();
    }
    log.note(&open(1)).unwrap_err();
    log.record(&run(1, Outcome::Success)).unwrap_err();
    log.note(&open(2)).unwrap_err();
    log.flush().unwrap_err();
    let owed: Vec<_> = log.owed().unwrap().into_iter().map(|run| (run.slot, run.outcome)).collect();
    assert_eq!(owed, [(slot(1), Outcome::Success)], "the regions are told all the same");
    for part in [OPEN, DONE, CURSORS] {
        std::fs::create_dir(log.dir.join(part)).unwrap();
    }
    log.flush().unwrap();
    drop(log);
    let (log, memory) = RunLog::open(dir.path()).unwrap();
    assert_eq!((memory.open, memory.cursors.into_values().collect::<Vec<_>>()), (vec![open(2)], vec![slot(2)]));
    assert_eq!(log.owed().unwrap().len(), 1);
}

#[test]
fn what_cannot_be_read_is_set_aside_and_the_rest_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = RunLog::open(dir.path()).unwrap();
    log.note(&open(1)).unwrap();
    log.record(&run(2, Outcome::Success)).unwrap();
    for (part, name) in [(CURSORS, "empty"), (OPEN, "other.20261120t010000z"), (PAUSED, "junk"), (DONE, "junk")] {
        let text: &[u8] = if part == CURSORS { b"" } else { b"{" };
        place::place(&log.dir.join(part).join(name), text, 0o600).unwrap();
    }
    drop(log);
    for _ in 0..2 {
        let (log, memory) = RunLog::open(dir.path()).unwrap();
        assert_eq!((memory.open, memory.cursors.len(), memory.pauses.len()), (vec![open(1)], 1, 0));
        assert_eq!(log.owed().unwrap().len(), 1);
        assert!(log.dir.join(CURSORS).join(".unreadable.empty").exists());
    }
}
