//! What comes between a plan and its sweep, or in the middle of one: a pin, a lock.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::{DAY, Scene, noise};
use crate::jobs::pin::{self, Reason};
use crate::jobs::prune::{Consent, Options, run};
use crate::jobs::repair;
use crate::model::retention::Verdict;
use crate::model::{Clock, Lsn, Result};
use crate::repository::handle::Writer;
use crate::repository::mend::Scope;
use crate::repository::testing::{Fault, FaultyStore, Made, TestClock, log, need};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::reader::BranchLog;
use crate::store::ObjectStore as _;

const SEGMENT: u64 = 16 << 20;

impl Scene {
    /// Reads WAL as a restore does, with keys.
    pub(super) async fn wal(&self, range: (u64, u64)) -> Result<usize> {
        let (context, log) = (self.context().await, log());
        let branch = BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch };
        let (log, mut length) = (BranchLog::load(&context.repository, branch).await, 0);
        let mut sink = |_: Lsn, bytes: &[u8]| {
            length += bytes.len();
            Ok(ControlFlow::Continue(()))
        };
        log.read(&context.repository, &context.ring, (Lsn(range.0), Lsn(range.1)), &mut sink).await?;
        Ok(length)
    }
}

/// The plan took an epoch of WAL with its keyset; the pin that came after it keeps both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_a_late_pin_keeps_still_opens() {
    let mut scene = Scene::new(2).await;
    let (mut ids, start) = (Vec::new(), |round: u64| (10 + 4 * round) * SEGMENT);
    for round in 0..5 {
        scene.fixture.clock.advance(DAY);
        scene.fixture.epoch(start(round), &[60, 70], true).await;
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(start(round) + 5, start(round) + 50))).await.commit.id;
        scene.drill(&id).await;
        ids.push(id);
    }
    let planned = scene.prune(Consent::None).await;
    assert_eq!(planned.refusals, Vec::<String>::new());
    pin::pin(&scene.context().await, ids[0].as_str(), Reason { text: "audit".into(), until: None }).await.unwrap();
    scene.fixture.clock.advance(DAY + 1);
    let swept = scene.prune(Consent::Scheduled).await.swept.unwrap();
    assert_eq!(swept.backups, ids[1..3]);
    scene.prune_twice().await;
    assert_eq!(scene.wal((start(0), start(0) + 130)).await.unwrap(), 130);
    scene.is_whole().await;
    // When the pin ends, so does the WAL; what stays opens as before.
    pin::unpin(&scene.context().await, ids[0].as_str(), "over").await.unwrap();
    scene.fixture.clock.advance(2);
    scene.prune_twice().await;
    assert!(scene.wal((start(0), start(0) + 130)).await.is_err());
    assert_eq!(scene.wal((start(4), start(4) + 130)).await.unwrap(), 130);
    scene.is_whole().await;
}

/// Nobody but the store knows of a lock: the COMMIT stays, and with it everything that it leads to, also what it has in
/// common with a backup that goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_whose_commit_is_locked_stays_whole() {
    let scene = Scene::new(2).await;
    let mut ids = Vec::new();
    // What the first two have in common is in none of those that stay.
    for (round, pair) in [1, 1, 2, 2].into_iter().enumerate() {
        scene.fixture.clock.advance(DAY);
        let files =
            [Made::new("base/pair", noise(pair, 40 * 8192)), Made::new("base/own", noise(50 + round as u64, 8192))];
        let id = scene.fixture.next_backup(&files).await.commit.id;
        scene.drill(&id).await;
        ids.push(id);
    }
    let until = scene.fixture.writer.clock.now() + TimeDelta::days(100);
    for store in &scene.fixture.stores {
        store.lock(&format!("commits/ledger/{}", ids[1]), until).await;
    }
    let swept = scene.prune_twice().await.swept.unwrap();
    assert_eq!((swept.backups.as_slice(), swept.retained), (&ids[..1], 2));
    assert_eq!(scene.exist().await, ids[1..]);
    scene.is_whole().await;
    scene.prune_twice().await;
    assert_eq!(scene.exist().await, ids[1..]);
    scene.is_whole().await;
    scene.fixture.clock.advance(101 * DAY);
    scene.prune_twice().await;
    assert_eq!(scene.exist().await, ids[2..]);
    scene.is_whole().await;
}

/// When a lock comes, or is found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comes {
    BeforeThePlan,
    BeforeTheSweep,
    /// After the sweep has looked for locks once, and has written down what it takes.
    AfterTheTombs,
    /// A hold by law, put between the question and the delete.
    InTheSweep,
}

/// Gone in one region and locked in the other, a backup would be hidden as pruned, and what it needs would follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_whose_commit_is_locked_in_one_region_only_stays_whole() {
    for comes in [Comes::BeforeThePlan, Comes::BeforeTheSweep, Comes::AfterTheTombs, Comes::InTheSweep] {
        let mut scene = Scene::new(2).await;
        let ids = scene.drilled(4).await;
        let until = scene.fixture.writer.clock.now() + TimeDelta::days(50);
        let commit = format!("commits/ledger/{}", ids[1]);
        if comes == Comes::BeforeThePlan {
            scene.fixture.stores[1].lock(&commit, until).await;
        }
        let planned = scene.prune(Consent::None).await;
        let verdict = &planned.targets[0].backups.iter().find(|backup| backup.id == ids[1]).unwrap().verdict;
        let region = "b".parse().unwrap();
        let retained = Verdict::Retained { region, until: Some(until) };
        assert_eq!(*verdict, if comes == Comes::BeforeThePlan { retained } else { Verdict::Expired }, "{comes:?}");
        match comes {
            Comes::BeforeThePlan => {}
            Comes::BeforeTheSweep => scene.fixture.stores[1].extend(&commit, until).await.unwrap(),
            Comes::AfterTheTombs => scene.fixture.stores[1].lock_when_put("pruned/backups/", &commit, until),
            Comes::InTheSweep => scene.fixture.stores[1].hold_late(&commit),
        }
        let version = async || {
            let page = scene.fixture.stores[0].list_versions(&commit, None).await.unwrap();
            page.versions.into_iter().map(|listed| listed.version).collect::<Vec<_>>()
        };
        let before = version().await;
        scene.fixture.clock.advance(DAY + 1);
        let swept = scene.prune(Consent::Scheduled).await.swept.unwrap();
        assert_eq!((swept.backups.as_slice(), swept.retained), (&ids[..1], 1), "{comes:?}");
        assert_eq!(swept.retained_until, (comes != Comes::InTheSweep).then_some(until));
        assert_eq!(scene.exist().await, ids[1..], "{comes:?}");
        for store in &scene.fixture.stores {
            assert!(store.contents().await.iter().any(|(key, _)| *key == commit), "{comes:?}: {}", store.address());
        }
        // What is known before anything goes is left alone: no tomb was written, and nothing had to be put back.
        assert_eq!(version().await == before, comes != Comes::InTheSweep, "{comes:?}");
        for record in ["backups", "spared"] {
            let prefix = format!("pruned/{record}/ledger/{}", ids[1]);
            let buried = scene.fixture.stores[0].contents().await.iter().any(|(key, _)| key.starts_with(&prefix));
            assert_eq!(buried, matches!(comes, Comes::AfterTheTombs | Comes::InTheSweep), "{comes:?} {record}");
        }
        scene.is_whole().await;
        // Nor does a later run take what it needs.
        scene.prune_twice().await;
        assert_eq!(scene.exist().await, ids[1..], "{comes:?}");
        scene.is_whole().await;
        if comes == Comes::InTheSweep {
            // What the sweep announced is over: a COMMIT that is lost now is a debt, and no end of the backup.
            scene.fixture.stores[0].lose(&commit).await;
            assert_eq!(scene.exist().await, ids[1..]);
        } else {
            scene.fixture.clock.advance(51 * DAY);
            scene.prune_twice().await;
            assert_eq!(scene.exist().await, ids[2..], "{comes:?}");
            scene.is_whole().await;
        }
    }
}

/// A hold is on one object: that of a COMMIT keeps its backup, in every region, and no copy of the COMMIT is ever touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_whose_commit_is_held_is_left_alone_until_the_hold_is_lifted() {
    for planned_before in [false, true] {
        let mut scene = Scene::new(2).await;
        let ids = scene.drilled(4).await;
        let commit = format!("commits/ledger/{}", ids[1]);
        if planned_before {
            scene.prune(Consent::None).await;
            // Plans of one second have no order among themselves.
            scene.fixture.clock.advance(2);
        }
        scene.fixture.stores[1].hold(&commit);
        let version = async || scene.fixture.stores[0].list_versions(&commit, None).await.unwrap().versions;
        let before = version().await;
        let report = scene.prune(Consent::None).await;
        let judged = report.targets[0].backups.iter().find(|backup| backup.id == ids[1]).unwrap();
        assert_eq!(judged.verdict, Verdict::Retained { region: "b".parse().unwrap(), until: None });
        scene.fixture.clock.advance(DAY + 1);
        let swept = scene.prune(Consent::Scheduled).await.swept.unwrap();
        assert_eq!((swept.backups.as_slice(), swept.retained, swept.retained_until), (&ids[..1], 1, None));
        assert_eq!((scene.exist().await.as_slice(), version().await), (&ids[1..], before));
        let records = scene.names(0).await;
        assert!(!records.iter().any(|key| key.starts_with(&format!("pruned/backups/ledger/{}", ids[1]))));
        scene.is_whole().await;
        scene.fixture.stores[1].release(&commit);
        scene.fixture.clock.advance(2);
        assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[1..2]);
        scene.is_whole().await;
    }
}

/// A hold that came a moment too late, and a sweep that could not put back what it took.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_backup_whose_sweep_died_comes_back() {
    for killed in [false, true] {
        let mut scene = Scene::new(2).await;
        let ids = scene.drilled(4).await;
        let commit = format!("commits/ledger/{}", ids[0]);
        scene.prune(Consent::None).await;
        scene.fixture.clock.advance(DAY + 1);
        scene.fixture.stores[1].hold_late(&commit);
        scene.fixture.stores[0].break_after_deletes(1);
        let error = scene.try_prune(Consent::Scheduled).await.unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        scene.fixture.stores[0].break_after_deletes(i64::MAX);
        if killed {
            // It could not write another word.
            scene.fixture.stores[0].lose(&commit).await;
            for (region, store) in scene.fixture.stores.iter().enumerate() {
                let said = scene.names(region).await.into_iter();
                for key in said.filter(|key| key.starts_with("pruned/spared/") || key.ends_with("/ended")) {
                    store.lose(&key).await;
                }
            }
            assert!(!scene.exist().await.contains(&ids[0]));
        }
        let report = scene.prune(Consent::None).await;
        assert_eq!(report.refusals, Vec::<String>::new(), "killed: {killed}");
        assert!(scene.exist().await.contains(&ids[0]), "killed: {killed}");
        for region in 0..2 {
            assert!(scene.names(region).await.contains(&commit), "killed: {killed}, {region}");
        }
        scene.is_whole().await;
        // It is one that a region may lose a part of, like any other.
        scene.fixture.stores[0].lose(&commit).await;
        assert!(scene.exist().await.contains(&ids[0]), "killed: {killed}");
        let mended = repair::run(&scene.context().await, &Scope::default()).await.unwrap();
        assert_eq!(mended.regions[0].copied, 1);
        scene.prune_twice().await;
        assert!(scene.exist().await.contains(&ids[0]), "killed: {killed}");
        scene.is_whole().await;
    }
}

/// Objects whose lock is longer than that of their COMMIT are garbage that waits, and no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_of_a_pruned_backup_goes_when_the_lock_is_over() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(3).await;
    let until = scene.fixture.writer.clock.now() + TimeDelta::days(20);
    let own = format!("manifests/ledger/{}/", ids[0]);
    let mine = async |scene: &Scene| {
        let contents = scene.fixture.stores[0].contents().await;
        contents.into_iter().map(|(key, _)| key).filter(|key| key.starts_with(&own)).collect::<Vec<_>>()
    };
    let before = mine(&scene).await;
    for key in &before {
        scene.fixture.stores[0].extend(key, until).await.unwrap();
    }
    let first = scene.prune_twice().await.swept.unwrap();
    assert_eq!((first.backups.as_slice(), first.retained_until), (&ids[..1], Some(until)));
    assert!(first.retained == before.len() as u64 && first.objects > 0, "{first:?}");
    assert_eq!(mine(&scene).await, before);
    // Tried again, and told again.
    let again = scene.prune_twice().await;
    assert_eq!((again.swept.unwrap().retained, again.refusals), (first.retained, Vec::new()));
    scene.fixture.clock.advance(21 * DAY);
    assert_eq!(scene.prune_twice().await.swept.unwrap().retained, 0);
    assert_eq!(mine(&scene).await, Vec::<String>::new());
    scene.is_whole().await;
}

/// Whoever may not see locks must not find them out half way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_does_not_say_what_is_locked_refuses_the_run() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(3).await;
    scene.prune(Consent::None).await;
    scene.fixture.clock.advance(DAY + 1);
    for hide in [FaultyStore::hide_locks, FaultyStore::hide_holds] {
        hide(&scene.fixture.stores[1], true);
        let report = scene.prune(Consent::Scheduled).await;
        assert!(report.swept.is_none() && report.refusals[0].contains("locked"), "{report:#?}");
        assert_eq!(scene.exist().await, ids);
        hide(&scene.fixture.stores[1], false);
    }
    assert_eq!(scene.prune(Consent::Scheduled).await.swept.unwrap().backups, ids[..1]);
}

/// A host that slept counts no time meanwhile; writers took its sweep for dead after six hours, and lean on what it was about to
/// take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_that_slept_takes_nothing_any_more() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    scene.prune(Consent::None).await;
    scene.fixture.clock.advance(DAY + 1);
    let mut context = scene.context().await;
    context.clock = Arc::new(Asleep(Arc::clone(&scene.fixture.clock)));
    context.writer = Some(Writer { clock: Arc::clone(&context.clock), ..scene.fixture.writer.clone() });
    let scheduled = Options { dry_run: false, consent: Consent::Scheduled };
    scene.fixture.stores.iter().for_each(|store| store.set(Fault::Slow(Duration::from_millis(5))));
    let sleeps = async {
        while !scene.names(0).await.iter().any(|key| key.starts_with("pruned/backups/")) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        scene.fixture.clock.advance(7 * 3600);
    };
    let (done, ()) = tokio::join!(run(&context, &scheduled), sleeps);
    scene.fixture.stores.iter().for_each(|store| store.set(Fault::None));
    let error = done.unwrap_err();
    assert!(error.to_string().contains("takes too long"), "{error}");
    assert_eq!(scene.exist().await, ids);
    scene.is_whole().await;
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[..2]);
}

/// What a host shows that is asleep whenever nobody looks: the time is right, and none passes.
#[derive(Debug)]
struct Asleep(Arc<TestClock>);

impl Clock for Asleep {
    fn now(&self) -> DateTime<Utc> {
        self.0.now()
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}
