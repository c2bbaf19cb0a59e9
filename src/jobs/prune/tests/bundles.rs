//! Frames that lie in bundles, too.

use super::{DAY, Scene};
use crate::jobs::prune::Consent;
use crate::jobs::wal::bundle::{Options, Report, run};
use crate::repository::layout;

const FRAMES: usize = 30;

impl Scene {
    /// WAL behind the first backup's.
    async fn long_epoch(&self) -> u64 {
        let lengths: Vec<usize> = (0..FRAMES).map(|number| 20 + number).collect();
        self.fixture.epoch(1090, &lengths, true).await;
        1090 + lengths.iter().sum::<usize>() as u64
    }

    async fn bundle(&self, execute: bool) -> Report {
        let options = Options { target: None, older_than: std::time::Duration::from_secs(2 * 24 * 3600), execute };
        run(&self.context().await, &options).await.unwrap()
    }

    async fn frames(&self, region: usize) -> usize {
        let is_frame = |key: &&String| {
            key.starts_with(layout::WAL) && key.rsplit('/').next().and_then(layout::parse_seq).is_some()
        };
        self.names(region).await.iter().filter(is_frame).count()
    }

    async fn bundles(&self) -> Vec<String> {
        let bundle = |key: &String| key.rsplit('/').next().and_then(layout::parse_bundle).is_some();
        self.names(0).await.into_iter().filter(bundle).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_go_in_two_runs_once_every_region_has_had_their_bundle_for_the_grace_period() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    assert_eq!(scene.bundle(true).await.bundles, 0, "too young");
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    let planned = scene.bundle(false).await;
    assert_eq!((planned.bundles, planned.frames, scene.bundles().await.len()), (1, 21, 0), "{planned:?}");
    let made = scene.bundle(true).await;
    assert_eq!((made.bundles, made.owed, scene.bundles().await.len()), (1, 0, 1), "{made:?}");
    assert_eq!(scene.bundle(true).await.bundles, 0);

    let all = scene.frames(0).await;
    assert_eq!(scene.prune(Consent::Scheduled).await.planned.amount.objects, 0, "the bundle is young");
    scene.fixture.clock.advance(DAY + 1);
    assert_eq!(scene.prune(Consent::Scheduled).await.planned.amount.objects, 2 * 21);
    assert_eq!(scene.frames(0).await, all, "one look removes nothing");
    scene.fixture.clock.advance(DAY + 1);
    let swept = scene.prune(Consent::Scheduled).await.swept.unwrap();
    assert_eq!((swept.objects, scene.frames(0).await, scene.frames(1).await), (2 * 21, all - 21, all - 21));
    scene.is_whole().await;
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
    assert_eq!(scene.bundles().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_stay_while_their_bundle_is_not_whole_in_every_region() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    scene.bundle(true).await;
    let (key, all) = (scene.bundles().await.remove(0), scene.frames(0).await);
    scene.fixture.clock.advance(DAY + 1);
    assert_eq!(scene.prune(Consent::Scheduled).await.planned.amount.objects, 2 * 21);
    // As long as it was, and one bit of it is wrong.
    let good = scene.fixture.stores[1].contents().await.into_iter().find(|(known, _)| *known == key).unwrap().1;
    let mut wrong = good.to_vec();
    wrong[good.len() / 2] ^= 1;
    scene.fixture.stores[1].damage(&key, wrong).await;
    scene.fixture.clock.advance(DAY + 1);
    scene.prune(Consent::Scheduled).await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all, all));
    scene.fixture.stores[1].lose(&key).await;
    scene.prune_twice().await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all, all));
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_of_frames_that_is_killed_again_and_again_loses_nothing() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    scene.bundle(true).await;
    scene.fixture.clock.advance(DAY + 1);
    let all = scene.frames(0).await;
    assert!(scene.prune_with_kills(4).await > 2);
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all - 21, all - 21));
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
}
