//! A SEAL under the name of a frame that counts: the region tells that it lacks the frame, and repair brings it beside.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::model::{Kind, Lsn, Result};
use crate::observe::progress::Progress;
use crate::repository::bundle::form;
use crate::repository::handle::Repository;
use crate::repository::mend::{Mended, Scope, mend};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::survey::scrub::{self, Trouble};
use crate::repository::testing::{Fixture, log};
use crate::repository::wal::adopt::{Era, Tail};
use crate::repository::wal::claim::Known;
use crate::repository::wal::closing::key_beside;
use crate::repository::wal::frame::{EpochKind, FramePlace};
use crate::repository::wal::index::{BranchId, WalIndex, windows};
use crate::repository::wal::log::{Epoch, Marks};
use crate::repository::wal::reader::BranchLog;
use crate::store::{Digest, ObjectStore as _, PutOptions};

const START: u64 = 1000;
const FRAME: u64 = 40;

fn branch() -> BranchId {
    let log = log();
    BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
}

async fn take_over(fixture: &Fixture) -> Tail {
    fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap()
}

/// An epoch of so many frames, still open.
async fn epoch(fixture: &Fixture, frames: u64) -> Epoch {
    let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
    let opening = (log(), EpochKind::Stream, Lsn(START));
    let mut epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, out).await.unwrap();
    epoch.claim(&Known::default()).await.unwrap();
    for _ in 0..frames {
        append(&mut epoch).await.unwrap();
    }
    epoch
}

async fn append(epoch: &mut Epoch) -> Result<Lsn> {
    let (start, end) = (epoch.position(), Lsn(epoch.position().0 + FRAME));
    let marks = Marks { first_record: Some(start), last_record: Some((start, end)), commits: None };
    epoch.append(start, expected(start.0, end.0), marks).await
}

fn expected(from: u64, to: u64) -> Vec<u8> {
    (from..to).map(|at| at.to_le_bytes()[0]).collect()
}

/// As it is when a SEAL came first in region `a` and a frame in `b`, and neither to any other region yet.
async fn beaten(fixture: &Fixture, epoch: &Epoch, seq: u64) -> FramePlace {
    let BranchId { system_id, timeline, branch } = branch();
    let place = FramePlace { system_id, timeline, branch, epoch: epoch.id().clone(), seq };
    let key = place.key();
    for store in &fixture.stores {
        // At the quorum, it may still be on its way to the others.
        while store.head(&key).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let frame = fixture.stores[0].get(&key, None).await.unwrap();
    for store in &fixture.stores {
        store.lose(&key).await;
    }
    take_over(fixture).await;
    for store in fixture.stores.iter().skip(1) {
        store.lose(&key).await;
    }
    let digest = Digest::of(&frame);
    fixture.stores[1].put(&key, frame, digest, &PutOptions::default()).await.unwrap();
    place
}

/// Three regions; the frame of `a` has lost against a SEAL, and a successor went on behind it.
async fn settled() -> (Fixture, Epoch, FramePlace, u64) {
    let fixture = Fixture::memory(3, 2).await;
    let epoch = epoch(&fixture, 3).await;
    let place = beaten(&fixture, &epoch, 3).await;
    let tail = take_over(&fixture).await;
    assert_eq!((tail.end, tail.sealed, tail.adopted), (Lsn(1120), 1, 1));
    fixture.epoch(1120, &[40, 40], true).await;
    (fixture, epoch, place, 1200)
}

async fn repair(fixture: &Fixture, scope: &Scope) -> Vec<Mended> {
    let repository = fixture.reopen().await.unwrap();
    let progress = Progress::new(Arc::clone(&fixture.writer.clock));
    let mended = mend(&repository, scope, &progress.begin("mend", None)).await.unwrap();
    for region in &mended {
        assert!(region.still_missing.is_empty(), "{region:?}");
    }
    mended
}

fn copied(mended: &[Mended]) -> Vec<u64> {
    mended.iter().map(|region| region.copied).collect()
}

async fn read(fixture: &Fixture, repository: &Repository, end: u64) -> Result<Vec<u8>> {
    let ring = fixture.ring.within(repository.regions.clone());
    let (log, mut wal) = (BranchLog::load(repository, branch()).await, Vec::new());
    let mut sink = |_: Lsn, bytes: &[u8]| {
        wal.extend_from_slice(bytes);
        Ok(ControlFlow::Continue(()))
    };
    log.read(repository, &ring, (Lsn(START), Lsn(end)), &mut sink).await?;
    Ok(wal)
}

/// What each region gives when it is alone.
async fn each_alone(fixture: &Fixture, end: u64) -> Vec<Result<Vec<u8>>> {
    let repository = fixture.reopen().await.unwrap();
    let mut read_alone = Vec::new();
    for region in repository.regions.all() {
        read_alone.push(read(fixture, &scrub::alone(&repository, &region.name).unwrap(), end).await);
    }
    read_alone
}

/// The windows of each region, and how many of its frames are told as lacking.
async fn told(fixture: &Fixture) -> Vec<(Vec<(u64, u64)>, usize)> {
    let repository = fixture.reopen().await.unwrap();
    let index = WalIndex::load(&repository.regions, branch()).await;
    let mut told = Vec::new();
    for region in repository.regions.all() {
        let (runs, errors) = index.runs(&repository, Some(&region.name)).await;
        assert!(errors.is_empty(), "{errors:?}");
        let problems = scrub::displaced_frames(&repository, &index, region).await;
        assert!(problems.iter().all(|problem| problem.trouble == Trouble::Missing));
        told.push((windows(&runs).iter().map(|window| (window.start.0, window.end.0)).collect(), problems.len()));
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_tells_that_a_seal_has_the_name_of_a_frame_and_repair_brings_the_frame_beside_it() {
    let (fixture, mut old, place, end) = settled().await;
    let whole = (vec![(START, end)], 0);
    assert_eq!(told(&fixture).await, [(vec![(1000, 1080), (1120, 1200)], 1), whole.clone(), whole.clone()]);
    let alone = each_alone(&fixture, end).await;
    assert!(alone[0].as_ref().unwrap_err().to_string().contains("hole at 0/438"), "{alone:?}");
    assert!(alone[1..].iter().all(|read| *read.as_ref().unwrap() == expected(START, end)));
    let together = fixture.reopen().await.unwrap();
    assert_eq!(read(&fixture, &together, end).await.unwrap(), expected(START, end));

    let dry = Scope { dry_run: true, ..Scope::default() };
    let seal = fixture.stores[0].get(&place.key(), None).await.unwrap();
    assert_eq!(copied(&repair(&fixture, &dry).await), [1, 1, 1]);
    assert!(fixture.stores[0].head(&key_beside(&place)).await.is_err());
    let quick = Scope { quick: true, ..Scope::default() };
    assert_eq!(copied(&repair(&fixture, &quick).await), [1, 1, 1]);
    assert_eq!(copied(&repair(&fixture, &Scope::default()).await), [0, 0, 0]);
    assert_eq!(fixture.stores[0].get(&place.key(), None).await.unwrap(), seal, "nothing is overwritten");

    assert_eq!(told(&fixture).await, [whole.clone(), whole.clone(), whole]);
    for read in each_alone(&fixture, end).await {
        assert_eq!(read.unwrap(), expected(START, end));
    }
    let repository = fixture.reopen().await.unwrap();
    for region in repository.regions.all() {
        let alone = scrub::alone(&repository, &region.name).unwrap();
        let index = WalIndex::load(&alone.regions, branch()).await;
        assert_eq!(scrub::scrub_wal(&alone, &index, region).await.1, []);
    }
    // The log has the end and the owner that it had, and who was sealed out stays so.
    let tail = take_over(&fixture).await;
    assert_eq!((tail.end, tail.sealed, tail.adopted), (Lsn(end), 0, 0));
    assert_eq!(append(&mut old).await.unwrap_err().kind(), Kind::Refused);
}

/// What is put beside a SEAL is signed for its place like any frame, or counts for nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_frame_itself_is_taken_from_beside_a_seal() {
    let (fixture, _old, place, end) = settled().await;
    let key = key_beside(&place);
    let frame = fixture.stores[1].get(&place.key(), None).await.unwrap();
    let seal = fixture.stores[0].get(&place.key(), None).await.unwrap();
    let earlier = fixture.stores[1].get(&FramePlace { seq: 2, ..place.clone() }.key(), None).await.unwrap();
    let mut flipped = frame.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    for forged in [Bytes::from(flipped), seal, earlier, Bytes::new()] {
        fixture.stores[0].damage(&key, form::pack(&[forged])).await;
        assert!(each_alone(&fixture, end).await[0].is_err());
        assert_eq!(told(&fixture).await[0].1, 1);
        let mended = repair(&fixture, &Scope::default()).await;
        assert_eq!(mended[0].replaced, [key.as_str()]);
        assert_eq!(each_alone(&fixture, end).await[0].as_ref().unwrap(), &expected(START, end));
        for store in &fixture.stores {
            store.lose(&key).await;
        }
    }
    assert_eq!(take_over(&fixture).await.end, Lsn(end));
}

/// With two regions the SEAL wins, and with one that is still open nobody knows yet who does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_lost_or_may_lose_is_put_nowhere() {
    for regions in [2, 3] {
        let fixture = Fixture::memory(regions, 2).await;
        let epoch = epoch(&fixture, 3).await;
        let place = beaten(&fixture, &epoch, 3).await;
        if regions == 2 {
            assert_eq!(take_over(&fixture).await.end, Lsn(1080));
        }
        assert!(told(&fixture).await.iter().all(|(_, lacking)| *lacking == 0));
        repair(&fixture, &Scope { region: Some("a".parse().unwrap()), ..Scope::default() }).await;
        assert!(fixture.stores[0].head(&key_beside(&place)).await.is_err());
    }
}

/// With all eight frames on their way the first may be the one that lost its name in a region.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_of_all_that_were_on_their_way_is_adopted() {
    let fixture = Fixture::memory(3, 2).await;
    let epoch = epoch(&fixture, 9).await;
    let place = beaten(&fixture, &epoch, 2).await;
    let tail = take_over(&fixture).await;
    assert_eq!((tail.end, tail.sealed, tail.adopted), (Lsn(START + 9 * FRAME), 1, 1));
    assert!(fixture.stores[2].head(&place.key()).await.is_ok(), "one region alone would hold what was taken over");
    assert_eq!(told(&fixture).await[0].1, 1);
    assert_eq!(copied(&repair(&fixture, &Scope::default()).await), [1, 1, 1]);
    assert_eq!(each_alone(&fixture, tail.end.0).await[0].as_ref().unwrap(), &expected(START, tail.end.0));
}
