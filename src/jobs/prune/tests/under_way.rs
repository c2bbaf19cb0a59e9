//! Backups that are under way while others go, and what is left of those that were killed.

use super::{DAY, Scene, noise};
use crate::model::SystemId;
use crate::model::retention::{Keep, Verdict};
use crate::repository::backup::parent::{Basis, choose, state_path};
use crate::repository::backup::writer::{BackupOptions, BackupWriter};
use crate::repository::testing::{Made, need, options, send};

async fn begin(scene: &Scene) -> (Basis, BackupOptions) {
    let target = options().target;
    let state = state_path(scene.fixture.files.path(), &target);
    let holders = &scene.fixture.writer.holders;
    let basis = choose(&scene.fixture.repository, holders, (&target, SystemId(7)), state).await.unwrap();
    (basis, BackupOptions { state: None, ..options() })
}

/// An incremental that runs for days keeps its parent; one that starts on a parent that is gone gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_way_keeps_its_parent_and_never_leans_on_one_that_is_gone() {
    let mut scene = Scene::new(2).await;
    let parent = scene.drilled(1).await.remove(0);
    let (basis, how) = begin(&scene).await;
    let mut slow = BackupWriter::begin(&scene.fixture.repository, &scene.fixture.writer, how, basis).await.unwrap();
    let (late_basis, late_how) = begin(&scene).await;
    // Others of another host, which share nothing with it.
    let mut newer = Vec::new();
    for _ in 0..3 {
        scene.fixture.clock.advance(DAY / 2);
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(1000, 1090))).await.commit.id;
        scene.drill(&id).await;
        newer.push(id);
    }
    let report = scene.prune_twice().await;
    let judged = report.targets[0].backups.iter().find(|backup| backup.id == parent).unwrap();
    assert!(matches!(&judged.verdict, Verdict::Keep(why) if matches!(&why[..], [Keep::Needed(_)])), "{judged:?}");
    assert!(scene.exist().await.contains(&parent));

    let files = scene.files();
    send(&mut slow, &files).await;
    slow.flush().await.unwrap();
    let child = slow.commit(Some(need(1000, 1090))).await.unwrap().commit;
    assert_eq!(child.parent.as_ref(), Some(&parent));
    let swept = scene.prune_twice().await.swept.unwrap();
    assert!(swept.backups.contains(&parent), "{swept:?}");
    // What it shares with its parent stays.
    scene.is_whole().await;
    let late = BackupWriter::begin(&scene.fixture.repository, &scene.fixture.writer, late_how, late_basis).await;
    let error = late.unwrap_err();
    assert!(error.to_string().contains("was pruned"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_backup_left_goes_when_it_cannot_be_alive() {
    let mut scene = Scene::new(2).await;
    scene.drilled(2).await;
    let (fixture, basis) = (&scene.fixture, Basis::nothing("a test"));
    let mut killed = BackupWriter::begin(&fixture.repository, &fixture.writer, options(), basis).await.unwrap();
    let id = killed.id().clone();
    send(&mut killed, &[Made::new("base/1", noise(7, 600 * 8192))]).await;
    killed.flush().await.unwrap();
    drop(killed);
    let packs = format!("packs/ledger/{id}/");
    let left = async || scene.names(0).await.into_iter().filter(|key| key.starts_with(&packs)).count();
    assert!(left().await > 0);
    for _ in 0..3 {
        assert!(scene.prune_twice().await.swept.is_none());
    }
    scene.fixture.clock.advance(6 * DAY);
    let swept = scene.prune_twice().await.swept.unwrap();
    assert_eq!((swept.backups.len(), left().await), (0, 0));
    assert!(!scene.names(1).await.iter().any(|key| key.contains(id.as_str())));
    scene.is_whole().await;
}
