//! Sweeps that took nothing: what they announced stays, whatever a region loses later.

use super::{DAY, Scene, rules};
use crate::jobs::prune::{Consent, Options, run};
use crate::jobs::verify::{self, Level};
use crate::jobs::{Context, repair};
use crate::model::{BackupId, Kind, PruneId};
use crate::repository::handle::Writer;
use crate::repository::layout;
use crate::repository::mend::Scope;
use crate::repository::prune::spare;
use crate::repository::records;
use crate::repository::records::tombs::{self, Tomb, WalCut};
use crate::repository::testing::{Fixture, log, need};
use crate::repository::wal::frame::{Frame, FramePlace};

const SEGMENT: u64 = 16 << 20;

impl Scene {
    /// A sweep whose every delete is refused; if `killed`, it could not write another word then.
    async fn sweep_in_vain(&self, killed: bool) {
        self.prune(Consent::None).await;
        self.fixture.clock.advance(DAY + 1);
        self.fixture.stores.iter().for_each(|store| store.break_after_deletes(0));
        let error = self.try_prune(Consent::Scheduled).await.unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        self.fixture.stores.iter().for_each(|store| store.break_after_deletes(i64::MAX));
        for (region, store) in self.fixture.stores.iter().enumerate().filter(|_| killed) {
            let names = self.names(region).await;
            for key in names.iter().filter(|key| key.starts_with("pruned/spared/") || key.ends_with("/ended")) {
                store.lose(key).await;
            }
        }
    }

    async fn below(&self, region: usize, prefix: &str) -> Vec<String> {
        self.names(region).await.into_iter().filter(|key| key.starts_with(prefix)).collect()
    }

    async fn repair(&self) -> Vec<u64> {
        let mended = repair::run(&self.context().await, &Scope::default()).await.unwrap();
        assert!(!mended.has_debts(), "{mended:#?}");
        mended.regions.iter().map(|region| region.copied).collect()
    }

    fn commit(id: &BackupId) -> String {
        layout::commit(&id.target().unwrap(), id)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_sweep_left_alone_is_hidden_by_no_empty_region() {
    for killed in [false, true] {
        let mut scene = Scene::new(2).await;
        let ids = scene.drilled(5).await;
        scene.sweep_in_vain(killed).await;
        assert_eq!(scene.below(0, "pruned/backups/").await.len(), 3);
        assert_eq!(scene.below(0, "pruned/spared/").await.len(), if killed { 0 } else { 3 });
        scene.rules = rules(10);
        for key in scene.names(1).await.iter().filter(|key| *key != layout::REPOSITORY) {
            scene.fixture.stores[1].lose(key).await;
        }
        assert_eq!(scene.exist().await, ids, "killed: {killed}");
        scene.repair().await;
        assert_eq!(scene.below(1, "commits/").await, scene.below(0, "commits/").await);
        // Before anybody has spoken for the dead sweep, too.
        scene.fixture.stores[1].lose(&Scene::commit(&ids[1])).await;
        assert_eq!(scene.exist().await, ids, "killed: {killed}");
        assert_eq!(scene.repair().await, [0, 1]);
        assert!(scene.prune_twice().await.swept.is_none());
        assert_eq!(scene.below(0, "pruned/spared/").await.len(), 3);
        assert_eq!(scene.exist().await, ids);
        scene.is_whole().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_lost_after_a_sweep_in_vain_is_brought_back() {
    for killed in [false, true] {
        let mut scene = Scene::new(2).await;
        let ids = scene.drilled(5).await;
        scene.sweep_in_vain(killed).await;
        scene.rules = rules(10);
        if killed {
            scene.prune(Consent::None).await;
        }
        scene.fixture.stores[1].lose(&Scene::commit(&ids[0])).await;
        assert_eq!(scene.exist().await, ids, "killed: {killed}");
        assert_eq!(scene.repair().await, [0, 1]);
        scene.is_whole().await;
    }
}

/// That one sweep spared a backup says nothing of the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_sweep_that_is_killed_half_way_brings_nothing_back() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(5).await;
    scene.sweep_in_vain(false).await;
    assert_eq!(scene.exist().await, ids);
    scene.fixture.clock.advance(2);
    assert!(scene.prune_with_kills(3).await > 2);
    assert_eq!(scene.exist().await, ids[3..]);
    assert_eq!(scene.names(0).await, scene.names(1).await);
    // A region that missed the records of what was spared knows of the later sweep nevertheless.
    for key in scene.below(1, "pruned/spared/").await {
        scene.fixture.stores[1].lose(&key).await;
    }
    assert_eq!(scene.exist().await, ids[3..]);
    scene.repair().await;
    assert_eq!(scene.below(0, "pruned/spared/").await, scene.below(1, "pruned/spared/").await);
    assert_eq!(scene.exist().await, ids[3..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_speaks_for_a_sweep_that_may_be_at_work() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(5).await;
    scene.sweep_in_vain(true).await;
    let elsewhere = Writer { host: "there".to_owned(), ..scene.fixture.writer.clone() };
    let repository = scene.fixture.reopen().await.unwrap();
    // A host of the same name, or a second state directory on this one, is not the one that died.
    for writer in [&elsewhere, &scene.fixture.writer] {
        for lock in [None, Some("another")] {
            assert!(spare::after_dead_sweeps(&repository, writer, lock).await.unwrap().is_empty());
        }
    }
    scene.fixture.clock.advance(7 * 3600);
    let spared = spare::after_dead_sweeps(&repository, &elsewhere, None).await.unwrap();
    assert!(spared.iter().eq(&ids[..3]), "{spared:?}");
    assert!(spare::after_dead_sweeps(&repository, &elsewhere, None).await.unwrap().is_empty());
}

/// Two pruners under one name: containers, a cloned machine, a second state directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_pruners_with_one_host_name_neither_takes_the_other_for_dead() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    // What the first one says while it is at work.
    scene.sweep_in_vain(true).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let second = Context { state_dir: elsewhere.path().to_owned(), ..scene.context().await };
    let scheduled = Options { dry_run: false, consent: Consent::Scheduled };
    let refused = run(&second, &scheduled).await.unwrap_err();
    assert!(refused.kind() == Kind::Refused && refused.to_string().contains("another prune is at work"), "{refused}");
    assert_eq!(scene.exist().await, ids);
    scene.is_whole().await;
    // The first one is known to be gone by whoever holds its lock now.
    assert_eq!(scene.prune(Consent::Scheduled).await.swept.unwrap().backups, ids[..2]);
    assert_eq!(scene.exist().await, ids[2..]);
}

/// Whoever may write can write a tomb, and some region may owe a COMMIT: that is no end of the backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tomb_that_no_sweep_wrote_ends_no_backup_that_a_region_owes() {
    let mut scene = Scene::of(Fixture::memory(3, 2).await, 10).await;
    let ids = scene.drilled(4).await;
    let (writer, at) = (&scene.fixture.writer, scene.fixture.writer.clock.now());
    let forged = Tomb {
        format: 1,
        backup: ids[0].clone(),
        target: ids[0].target().unwrap(),
        prune: PruneId::new(at, writer.rng.as_ref()).unwrap(),
        at,
        why: String::new(),
        keysets: Vec::new(),
        wal: None,
        host: "there".to_owned(),
    };
    let (repository, key) = (scene.fixture.reopen().await.unwrap(), forged.key());
    records::put_everywhere(&repository, writer, (tombs::TOMB, &key), &forged).await.unwrap();
    scene.fixture.stores[2].lose(&Scene::commit(&ids[0])).await;
    assert_eq!(scene.exist().await, ids);
    assert_eq!(scene.repair().await, [0, 0, 1]);
    scene.is_whole().await;

    // A sweep that dies after one COMMIT took nothing yet, and the next one takes it all.
    scene.rules = rules(2);
    scene.prune(Consent::None).await;
    scene.fixture.clock.advance(DAY + 1);
    scene.fixture.stores.iter().enumerate().for_each(|(at, store)| store.break_after_deletes(i64::from(at == 0)));
    scene.try_prune(Consent::Scheduled).await.unwrap_err();
    scene.fixture.stores.iter().for_each(|store| store.break_after_deletes(i64::MAX));
    assert_eq!(scene.exist().await, ids);
    assert_eq!(scene.repair().await, [1, 0, 0]);
    scene.is_whole().await;
    scene.fixture.clock.advance(2);
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[..2]);
    assert_eq!(scene.exist().await, ids[2..]);
    assert_eq!(scene.repair().await, [0, 0, 0]);
    scene.is_whole().await;
}

/// Two regions leave no majority: but no sweep buries a backup in one of them alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tomb_in_one_region_alone_hides_no_backup_that_this_region_lost() {
    let scene = &mut Scene::new(10).await;
    let ids = scene.drilled(3).await;
    let (writer, at) = (&scene.fixture.writer, scene.fixture.writer.clock.now());
    let forged = Tomb {
        format: 1,
        backup: ids[0].clone(),
        target: ids[0].target().unwrap(),
        prune: PruneId::new(at, writer.rng.as_ref()).unwrap(),
        at,
        why: String::new(),
        keysets: Vec::new(),
        wal: None,
        host: "there".to_owned(),
    };
    let (repository, key) = (scene.fixture.reopen().await.unwrap(), forged.key());
    for lost in scene.names(1).await.iter().filter(|key| *key != layout::REPOSITORY) {
        scene.fixture.stores[1].lose(lost).await;
    }
    let bytes = records::encode(&repository.id, writer, (tombs::TOMB, &key), &forged).unwrap();
    scene.fixture.stores[1].damage(&key, bytes.to_vec()).await;
    assert_eq!(scene.exist().await, ids);
    scene.repair().await;
    assert_eq!(scene.below(1, "commits/").await, scene.below(0, "commits/").await);
    assert_eq!(scene.below(0, "pruned/backups/").await, Vec::<String>::new());
    assert_eq!(scene.exist().await, ids);
    scene.is_whole().await;
    assert_eq!(scene.prune_twice().await.swept, None);
    assert_eq!(scene.exist().await, ids);
}

/// A record that WAL is gone, while it is not, would keep repair from bringing it where it is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_wal_is_called_gone_before_it_goes() {
    let mut scene = Scene::new(2).await;
    for round in 0..5u64 {
        scene.fixture.clock.advance(DAY);
        let start = (10 + 4 * round) * SEGMENT;
        scene.fixture.epoch(start, &[60, 70], true).await;
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(start + 5, start + 50))).await.commit.id;
        scene.drill(&id).await;
    }
    scene.sweep_in_vain(false).await;
    assert_eq!(scene.below(0, "pruned/wal/").await, Vec::<String>::new());
    scene.rules = rules(10);
    let frames = scene.below(1, "wal/").await;
    scene.fixture.stores[1].lose(&frames[4]).await;
    assert_eq!(scene.repair().await, [0, 1]);
    assert_eq!(scene.below(1, "wal/").await, frames);
    scene.rules = rules(2);
    scene.fixture.clock.advance(2);
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups.len(), 3);
    assert!(!scene.below(0, "pruned/wal/").await.is_empty());
    scene.is_whole().await;
}

/// Nor where whoever may write says so: what enough regions hold was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_that_no_sweep_wrote_keeps_no_wal_from_a_region_that_lost_it() {
    let mut scene = Scene::of(Fixture::memory(3, 2).await, 10).await;
    scene.drilled(2).await;
    let frame = scene.below(2, "wal/").await.remove(0);
    let place = FramePlace::parse(&frame).unwrap();
    let (writer, at) = (&scene.fixture.writer, scene.fixture.writer.clock.now());
    let repository = scene.fixture.reopen().await.unwrap();
    let bytes = scene.fixture.stores[2].contents().await.into_iter().find(|(key, _)| *key == frame).unwrap().1;
    let keyset = Frame::header(&bytes, &repository.id, &place, &repository.trust).unwrap().keyset;
    let FramePlace { system_id, timeline, branch, epoch, .. } = place;
    let cut = WalCut {
        format: 1,
        target: log().target,
        system_id,
        timeline,
        branch,
        epoch,
        before: 1000,
        keyset: Some(keyset.clone()),
        prune: PruneId::new(at, writer.rng.as_ref()).unwrap(),
        at,
    };
    records::put_everywhere(&repository, writer, (tombs::CUT, &cut.key()), &cut).await.unwrap();
    let wrap = scene.below(2, &layout::keyset(&log().target, &keyset)).await.remove(0);
    for key in [&frame, &wrap] {
        scene.fixture.stores[2].lose(key).await;
    }
    let options = verify::Options { what: None, level: Level::L1, region: None, scrub: false };
    let report = verify::run(&scene.context().await, &options).await.unwrap();
    assert!(report.wal.iter().any(|wal| wal.problems.iter().any(|problem| problem.key == frame)), "{report:#?}");
    assert_eq!(scene.repair().await, [0, 0, 2]);
    scene.is_whole().await;
}
