//! Two epochs that hold the same part of the log: equal bytes are read as from one, and of two versions none is given out.

use std::ops::ControlFlow;

use crate::model::{Kind, Lsn, Result};
use crate::repository::handle::Repository;
use crate::repository::testing::{Fixture, log};
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::reader::BranchLog;

async fn loaded(fixture: &Fixture) -> (Repository, BranchLog) {
    let repository = fixture.reopen().await.unwrap();
    let log = log();
    let branch = BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch };
    let loaded = BranchLog::load(&repository, branch).await;
    (repository, loaded)
}

async fn read(fixture: &Fixture, range: (u64, u64)) -> Result<Vec<u8>> {
    let (repository, log) = loaded(fixture).await;
    let mut bytes = Vec::new();
    let mut sink = |at: Lsn, wal: &[u8]| {
        assert_eq!(at.0, range.0 + bytes.len() as u64);
        bytes.extend_from_slice(wal);
        Ok(ControlFlow::Continue(()))
    };
    log.read(&repository, &fixture.ring, (Lsn(range.0), Lsn(range.1)), &mut sink).await?;
    Ok(bytes)
}

async fn compared(fixture: &Fixture) -> Vec<u64> {
    let (repository, log) = loaded(fixture).await;
    let (found, unread) = log.compare(&repository, &fixture.ring, (Lsn(0), Lsn(u64::MAX))).await;
    assert!(unread.is_empty(), "{unread:?}");
    found.iter().map(|found| found.at.0).collect()
}

fn plain((from, to): (u64, u64)) -> Vec<u8> {
    (from..to).map(|at| at as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_epochs_read_as_one_however_they_lie() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &[40, 50, 60, 70], true).await;
    // Inside, across the end, around all of it, and the same once more.
    fixture.epoch_of(&fixture.writer, (EpochKind::Backup, 1030), &[45, 45], true).await;
    fixture.epoch_of(&fixture.writer, (EpochKind::Push, 1190), &[100], false).await;
    fixture.epoch_of(&fixture.writer, (EpochKind::Push, 990), &[7; 50], true).await;
    fixture.epoch(1000, &[40, 50, 60, 70], true).await;
    for range in [(990, 1290), (1000, 1220), (1033, 1111), (1220, 1290), (1119, 1120)] {
        assert_eq!(read(&fixture, range).await.unwrap(), plain(range));
    }
    assert_eq!(compared(&fixture).await, Vec::<u64>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_versions_none_is_given_out() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &[40, 50, 60, 70], true).await;
    // Signed by an enrolled signer, sealed with a keyset of its own: valid in all but its bytes.
    let forged = |at: u64| if at == 1100 { 0xFF } else { at as u8 };
    fixture.epoch_holding(&fixture.writer, (EpochKind::Push, 1080), (&[15, 35], true), forged).await;
    for range in [(1000, 1220), (1100, 1101), (1085, 1105)] {
        let error = read(&fixture, range).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
        let told = error.to_string();
        assert!(told.contains("two versions from 0/44C") && told.contains("streamed"), "{told}");
        assert!(told.contains("brought by archive_command"), "{told}");
        assert!(error.hint_text().unwrap().contains("--to-lsn 0/44C"), "{error:?}");
    }
    // What does not cross it is good.
    for range in [(1000, 1100), (1101, 1220), (1130, 1220)] {
        assert_eq!(read(&fixture, range).await.unwrap(), plain(range));
    }
    assert_eq!(compared(&fixture).await, [1100]);
}

/// A crashed server writes the torso of its last record differently.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_behind_the_last_complete_record_contradicts_nobody() {
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::wal::log::{Epoch, Marks};
    let fixture = Fixture::memory(2, 2).await;
    let out = std::sync::Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
    let opening = (log(), EpochKind::Stream, Lsn(1000));
    let mut epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, out).await.unwrap();
    let marks = Marks { first_record: Some(Lsn(1000)), last_record: Some((Lsn(1000), Lsn(1040))), commits: None };
    epoch.append(Lsn(1000), plain((1000, 1040)), marks).await.unwrap();
    epoch.append(Lsn(1040), vec![0xEE; 20], Marks::default()).await.unwrap();
    drop(epoch);
    fixture.epoch(1040, &[50, 60], true).await;
    // Also of a range that ends or begins in the torso, as the end of a segment may.
    for range in [(1000, 1150), (1000, 1050), (1000, 1060), (1050, 1055), (1000, 1040)] {
        assert_eq!(read(&fixture, range).await.unwrap(), plain(range), "{range:?}");
    }
    assert_eq!(compared(&fixture).await, Vec::<u64>::new());
}

/// An epoch that nobody can read any more is no reason not to give what is good, and is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_second_copy_does_not_stop_the_first() {
    let fixture = Fixture::memory(1, 1).await;
    fixture.epoch(1000, &[40, 50, 60, 70], true).await;
    let before: Vec<_> = fixture.stores[0].contents().await.into_iter().map(|(key, _)| key).collect();
    fixture.epoch_of(&fixture.writer, (EpochKind::Push, 1080), &[50], false).await;
    let after = fixture.stores[0].contents().await;
    let is_new = |key: &String| key.starts_with("wal/") && !before.contains(key);
    let (key, bytes) = after.into_iter().find(|(key, _)| is_new(key)).unwrap();
    let mut wrong = bytes.to_vec();
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    fixture.stores[0].damage(&key, wrong).await;
    assert_eq!(read(&fixture, (1000, 1220)).await.unwrap(), plain((1000, 1220)));
    let (repository, log) = loaded(&fixture).await;
    let (found, unread) = log.compare(&repository, &fixture.ring, (Lsn(0), Lsn(u64::MAX))).await;
    assert!(found.is_empty() && unread.len() == 1, "{found:?} {unread:?}");
}
