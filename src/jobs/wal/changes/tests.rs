//! What the journal covers, and that nothing that is not right in it is believed.

use std::fs;
use std::sync::Arc;

use super::tracker::Tracker;
use super::*;
use crate::disk::place::place;
use crate::observe::clock::SystemClock;
use crate::pg::wal::{Locator, Record, RecordKind, Touch};
use crate::repository::wal::log::Log;

const SPACE: u64 = 100;

fn log(timeline: u32) -> Log {
    Log {
        target: "ledger".parse().unwrap(),
        system_id: "7000000000000000001".parse().unwrap(),
        timeline: Timeline(timeline),
        branch: Branch::root(),
        wal_segment_size: (16 << 20).try_into().unwrap(),
    }
}

fn relation() -> Locator {
    Locator { tablespace: 1663, database: 5, node: 16384 }
}

/// The `number`th record: it changes the page of its number.
fn record(number: u64) -> Record {
    let at = |number: u64| Lsn(number * SPACE);
    let block = u32::try_from(number).unwrap();
    Record {
        start: at(number),
        end: at(number + 1),
        xid: 0,
        rmgr: 10,
        info: 0,
        previous: at(number.saturating_sub(1)),
        kind: RecordKind::Other,
        touched: vec![Touch::Block { relation: relation(), fork: 0, block }],
    }
}

fn open(path: &Path) -> Tracker {
    Tracker::open(path.to_owned(), path.with_extension("pages"), Arc::new(SystemClock::default()))
}

fn see(tracker: &mut Tracker, numbers: std::ops::Range<u64>) {
    for number in numbers {
        tracker.see(&record(number));
        tracker.save();
    }
}

fn wanted(from: u64, to: u64) -> Stretch {
    let Log { system_id, timeline, branch, .. } = log(1);
    let (from, to) = (Lsn(from * SPACE), Lsn(to * SPACE));
    Stretch { system_id, timeline, branch, from, to, last: from, anew: false }
}

/// The pages that changed between two records.
fn changed(path: &Path, from: u64, to: u64) -> Result<Vec<u32>, String> {
    match ask(path, &wanted(from, to)) {
        Answer::Covered(set) => {
            let quiet = set.unchanged(&relation(), 0..1000);
            Ok((0..1000).filter(|page| !quiet.iter().any(|range| range.contains(page))).collect())
        }
        Answer::NotYet(to) => Err(format!("up to {to}")),
        Answer::Unknown(why) => Err(why),
    }
}

fn journal() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.changed");
    (dir, path)
}

fn put(path: &Path, bytes: &[u8]) {
    place(path, bytes, 0o600).unwrap();
}

#[test]
fn what_passed_is_covered_across_sessions_and_processes() {
    let (_dir, path) = journal();
    assert!(changed(&path, 1, 2).unwrap_err().starts_with("no receiver"));
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(10 * SPACE));
    see(&mut tracker, 10..20);
    tracker.begin(&log(1), Lsn(20 * SPACE));
    see(&mut tracker, 20..25);
    drop(tracker);
    let mut tracker = open(&path);
    // What was not durable is streamed again.
    tracker.begin(&log(1), Lsn(22 * SPACE));
    see(&mut tracker, 22..30);
    assert_eq!(changed(&path, 10, 30).unwrap(), (10..30).collect::<Vec<_>>());
    assert_eq!(changed(&path, 15, 20).unwrap(), (15..30).collect::<Vec<_>>(), "more is no harm");
    assert_eq!(changed(&path, 15, 31).unwrap_err(), format!("up to {}", Lsn(30 * SPACE)));
    assert!(changed(&path, 9, 20).unwrap_err().contains("not from"));
}

#[test]
fn a_hole_another_history_and_the_unknown_end_what_is_covered() {
    for (name, break_it) in [
        ("hole", (|tracker: &mut Tracker| tracker.begin(&log(1), Lsn(21 * SPACE))) as fn(&mut Tracker)),
        ("history", |tracker| tracker.begin(&log(2), Lsn(20 * SPACE))),
        ("unknown", |tracker| {
            tracker.see(&Record { touched: vec![Touch::Unknown("for a test")], ..record(20) });
        }),
        ("set back", |tracker| {
            tracker.begin(&log(1), Lsn(20 * SPACE));
            // It follows by its position, and names another record as the one before.
            tracker.see(&Record { previous: Lsn(17 * SPACE), ..record(20) });
        }),
    ] {
        let (_dir, path) = journal();
        let mut tracker = open(&path);
        tracker.begin(&log(1), Lsn(10 * SPACE));
        see(&mut tracker, 10..20);
        break_it(&mut tracker);
        see(&mut tracker, 21..30);
        drop(tracker);
        assert!(changed(&path, 10, 30).is_err(), "{name}");
        if name != "history" {
            let covered = changed(&path, 21, 30).unwrap();
            assert!(covered.iter().all(|page| (20..30).contains(page)) && covered.len() >= 9, "{name}: {covered:?}");
        }
    }
}

#[test]
fn nothing_is_believed_behind_a_wrong_byte() {
    let (_dir, path) = journal();
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(10 * SPACE));
    see(&mut tracker, 10..40);
    drop(tracker);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(211) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        put(&path, &bytes);
        assert!(changed(&path, 10, 40).is_err(), "{at}");
        put(&path, &whole[..at]);
        assert!(changed(&path, 10, 40).is_err(), "{at}");
    }
    // Whoever goes on writes behind the last good entry, and what is covered begins anew or goes on there.
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(39 * SPACE));
    see(&mut tracker, 39..50);
    assert_eq!(changed(&path, 39, 50).unwrap().last(), Some(&49));
    assert!(fs::read(&path).unwrap().starts_with(MAGIC));
}

#[test]
fn a_journal_without_its_head_is_begun_again() {
    let (_dir, path) = journal();
    put(&path, b"something else");
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(10 * SPACE));
    see(&mut tracker, 10..12);
    assert_eq!(changed(&path, 10, 12).unwrap(), [10, 11]);
}

#[test]
fn a_long_journal_is_made_shorter_and_says_the_same() {
    let (_dir, path) = journal();
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(10 * SPACE));
    tracker.shorten_beyond(4096);
    see(&mut tracker, 10..200);
    assert_eq!(changed(&path, 10, 200).unwrap(), (10..200).collect::<Vec<_>>());
    let short = fs::metadata(&path).unwrap().len();
    assert!(short < 20_000, "{short}");
    drop(tracker);
    let mut tracker = open(&path);
    tracker.begin(&log(1), Lsn(200 * SPACE));
    see(&mut tracker, 200..210);
    assert_eq!(changed(&path, 10, 210).unwrap().len(), 200);
}
