//! WAL goes with the backups that it leads to.

use std::sync::Arc;

use super::{DAY, Scene};
use crate::jobs::prune::Consent;
use crate::model::{Kind, Lsn};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::testing::{log, need};
use crate::repository::wal::adopt::Era;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Log, Marks};

/// WAL goes with the backups that it leads to; an epoch that nobody closed keeps its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_goes_up_to_the_oldest_backup_that_stays() {
    const SEGMENT: u64 = 16 << 20;
    let mut scene = Scene::new(2).await;
    let mut at = 10 * SEGMENT;
    for round in 0..6u64 {
        scene.fixture.clock.advance(DAY);
        let length = usize::try_from(4 * SEGMENT).unwrap() / 3;
        // An epoch of frames without gaps, the second one left open by a writer that died.
        scene.fixture.epoch(at, &[length, length, length], round != 1).await;
        let end = at + 3 * length as u64;
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(at + 5, at + 50))).await.commit.id;
        scene.drill(&id).await;
        at = end;
    }
    let frames = async || scene.names(0).await.into_iter().filter(|key| key.starts_with("wal/")).count();
    let keysets = async || scene.names(0).await.into_iter().filter(|key| key.starts_with("keysets/")).count();
    let (all, keys) = (frames().await, keysets().await);
    assert_eq!(all, 3 + 5 * 4 + 3);
    assert!(scene.prune_with_kills(5).await > 2);
    assert_eq!(scene.exist().await.len(), 2);
    // Six epochs and the one at the very beginning: those of the two that stay and the one before them (PostgreSQL looks
    // back one segment) are left whole, of the open one its last frame.
    assert_eq!(frames().await, 3 * 4 + 1);
    // Four backups, and the epochs that are gone.
    assert_eq!(keysets().await, keys - 4 - 3);
    scene.is_whole().await;
    assert_eq!(scene.prune(Consent::None).await.planned.amount.objects, 0);
}

/// The SEAL is what stops a writer that was only asleep, however long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_was_sealed_out_stays_so_when_its_wal_is_gone() {
    const SEGMENT: u64 = 16 << 20;
    let mut scene = Scene::new(1).await;
    let start = 10 * SEGMENT;
    let out = Arc::new(FanOut::new(&scene.fixture.repository.regions, Patience::WAL));
    let opening = (log(), EpochKind::Stream, Lsn(start));
    let (repository, writer) = (&scene.fixture.repository, &scene.fixture.writer);
    let mut asleep = Epoch::open(repository, writer, opening, 1, out).await.unwrap();
    for at in [start, start + 40] {
        let marks = Marks { first_record: Some(Lsn(at)), last_record: Some((Lsn(at), Lsn(at + 40))), commits: None };
        asleep.append(Lsn(at), vec![1; 40], marks).await.unwrap();
    }
    let Log { system_id, timeline, branch, .. } = log();
    let eras = [Era { branch: BranchId { system_id, timeline, branch }, end: None }];
    assert_eq!(scene.fixture.take_over(&eras, None).await.unwrap().unwrap().sealed, 1);
    // Its WAL leads to the first backup alone; the two that stay are far behind.
    for at in [start, 100 * SEGMENT, 200 * SEGMENT] {
        scene.fixture.clock.advance(DAY);
        if at > start {
            scene.fixture.epoch(at, &[200], true).await;
        }
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(at + 5, at + 50))).await.commit.id;
        scene.drill(&id).await;
    }
    let prefix = format!("{}/", asleep.id());
    let frames = async || {
        scene.names(0).await.into_iter().filter(|key| key.starts_with("wal/") && key.contains(&prefix)).count()
    };
    assert_eq!(frames().await, 3);
    assert!(scene.prune_twice().await.swept.is_some());
    assert_eq!(frames().await, 1, "the SEAL");
    let error = asleep.append(Lsn(start + 80), vec![1; 40], Marks::default()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert_eq!(scene.fixture.take_over(&eras, None).await.unwrap().unwrap().sealed, 0);
    scene.is_whole().await;
}
