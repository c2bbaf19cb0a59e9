//! Copies that compaction made: they count when they are drilled, take the place of one backup and never of two, and what they
//! left goes.

use chrono::TimeDelta;

use super::*;
use crate::jobs::compact;
use crate::model::commit::CopyOf;

/// Five days, each drilled. The third needs a little of a pack that the first filled; from the fourth on nobody does.
async fn fragmented(scene: &mut Scene) -> Vec<BackupId> {
    let (mut ids, mut stays) = (Vec::new(), noise(1, 600 * 8192));
    for changed in [0..0, 0..240, 240..480, 480..600, 0..1] {
        let bytes = changed.start * 8192..changed.end * 8192;
        stays[bytes.clone()].copy_from_slice(&noise(50 + ids.len() as u64, bytes.len()));
        scene.fixture.clock.advance(DAY);
        let files = [Made::new("base/large", stays.clone()), Made::new("base/small", noise(3, 9000))];
        let id = scene.fixture.next_backup(&files).await.commit.id;
        scene.drill(&id).await;
        ids.push(id);
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drilled_copy_takes_the_place_of_its_original_and_of_nobody_else() {
    let mut scene = Scene::new(3).await;
    let ids = fragmented(&mut scene).await;
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[..2]);
    let target = options().target;
    let dry = compact::run(&scene.context().await, &target, false).await.unwrap();
    assert!(dry.copies.is_empty() && !dry.plan.packs.is_empty(), "{dry:#?}");
    assert_eq!(scene.exist().await, ids[2..]);
    let made = compact::run(&scene.context().await, &target, true).await.unwrap();
    assert_eq!((made.copies.len(), &made.copies[0].original, &made.plan), (1, &ids[2], &dry.plan));
    let copy = made.copies[0].copy.clone();
    scene.is_whole().await;

    // Not drilled yet it counts for nothing, and stays as long as its original.
    let report = scene.prune_twice().await;
    assert_eq!((&report.swept, report.alarms().count(), report.planned.amount.objects), (&None, 0, 0));
    scene.drill(&copy).await;
    let swept = scene.prune_twice().await.swept.unwrap();
    assert_eq!(swept.backups, ids[2..3], "{swept:?}");
    let mut left = scene.exist().await;
    left.retain(|id| *id != copy);
    assert_eq!(left, ids[3..], "the copy is one of the three that stay");
    scene.is_whole().await;
    let names = scene.names(0).await;
    let dead: Vec<_> = dry.plan.packs.iter().filter(|pack| names.contains(&pack.key)).collect();
    assert!(dead.is_empty(), "{dead:?}");
    // Nothing was done that would have to be done again.
    let again = compact::run(&scene.context().await, &target, true).await.unwrap();
    assert_eq!((again.plan.packs.len(), again.copies.len()), (0, 0));

    // What a stranger calls an older copy of that moment takes it no place, whatever the good one was compared with.
    let stranger = scene.stranger();
    scene.enroll(&stranger).await;
    let at = scene.fixture.writer.clock.now() - TimeDelta::days(30);
    let forged = scene.forge_copy_like(&copy, CopyOf { backup: ids[2].clone(), at }, &stranger).await;
    let report = scene.prune_twice().await;
    let gone = report.swept.iter().flat_map(|swept| &swept.backups);
    assert!(gone.chain(report.alarms().map(|judged| &judged.id)).all(|id| *id == forged), "{report:#?}");
    assert!(scene.exist().await.contains(&copy));
}

/// By the signer of the target itself: a host that was taken over. Its copy starts, and the drill that it passed is honest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drilled_copy_that_was_compared_with_nothing_takes_no_place() {
    let mut scene = Scene::new(3).await;
    let ids = fragmented(&mut scene).await;
    scene.prune_twice().await;
    let target = options().target;
    let copy = compact::run(&scene.context().await, &target, true).await.unwrap().copies.remove(0).copy;
    // Another one of that moment, which says the same of itself and holds other pages. Of one second the older is told by its id.
    scene.fixture.clock.advance(2);
    let forged = scene.forge_copy(&ids[2], &scene.fixture.writer).await;
    assert_eq!(scene.same_as(&forged).await, []);
    scene.drill(&forged).await;
    let report = scene.prune_twice().await;
    assert_eq!((&report.swept, report.alarms().count()), (&None, 0), "{report:#?}");
    let left = scene.exist().await;
    assert!([&ids[2], &copy, &forged].iter().all(|id| left.contains(id)), "{left:?}");
    // Beside it the good one takes the place of the original all the same: it is older.
    scene.fixture.clock.advance(2);
    scene.drill(&copy).await;
    let report = scene.prune_twice().await;
    assert_eq!(report.swept.as_ref().map(|swept| &swept.backups[..]), Some(&ids[2..3]), "{report:#?}");
    assert!(scene.exist().await.contains(&copy));
}

/// A pin is of one backup, and a copy is another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_that_is_pinned_stays_and_a_copy_goes_with_what_it_is_of() {
    let mut scene = Scene::new(3).await;
    let ids = fragmented(&mut scene).await;
    scene.prune_twice().await;
    let target = options().target;
    let copy = compact::run(&scene.context().await, &target, true).await.unwrap().copies.remove(0).copy;
    scene.rules.last = 2;
    let swept = scene.prune_twice().await.swept.unwrap();
    assert!(swept.backups.contains(&copy) && swept.backups.contains(&ids[2]), "{swept:?}");
    assert_eq!(scene.exist().await, ids[3..]);
    scene.is_whole().await;

    let mut scene = Scene::new(3).await;
    let ids = fragmented(&mut scene).await;
    scene.prune_twice().await;
    let reason = Reason { text: "audit".into(), until: None };
    pin::pin(&scene.context().await, ids[2].as_str(), reason).await.unwrap();
    let copy = compact::run(&scene.context().await, &target, true).await.unwrap().copies.remove(0).copy;
    scene.drill(&copy).await;
    assert_eq!(scene.prune_twice().await.swept, None);
    assert!(scene.exist().await.contains(&ids[2]));
    scene.is_whole().await;
}

/// What is kept for ever is not copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_retention_there_is_nothing_to_gain() {
    let mut scene = Scene::new(0).await;
    fragmented(&mut scene).await;
    let error = compact::run(&scene.context().await, &options().target, true).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
}
