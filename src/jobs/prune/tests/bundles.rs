//! Frames that lie in bundles, too.

use bytes::Bytes;

use super::{DAY, Scene};
use crate::codec::SystemRng;
use crate::codec::seal::SealingKey;
use crate::jobs::pin::{self, Reason};
use crate::jobs::prune::{Consent, Look};
use crate::jobs::wal::bundle::{Options, Report, run};
use crate::repository::bundle::form;
use crate::repository::layout;
use crate::repository::prune::garbage::Why;
use crate::repository::prune::plan::Plan;
use crate::repository::prune::sweep::Sweep;
use crate::repository::testing::{log, need};
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FramePlace, FrameSealer};

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

    /// The frames 1 to 21 of the one epoch that has so many, changed.
    async fn changed(&self, change: impl Fn(FrameHeader, Bytes) -> Vec<u8>) -> (String, Vec<Bytes>) {
        let repository = self.fixture.reopen().await.unwrap();
        let contents = self.fixture.stores[0].contents().await;
        let last = contents.iter().find(|(key, _)| key.starts_with("wal/") && key.ends_with("/0000000021")).unwrap();
        let (prefix, log) = (last.0.strip_suffix("0000000021").unwrap(), log());
        let mut frames = Vec::new();
        for seq in 1..=21 {
            let epoch = prefix.split('/').nth(3).unwrap().parse().unwrap();
            let (system_id, timeline, branch) = (log.system_id, log.timeline, log.branch.clone());
            let place = FramePlace { system_id, timeline, branch, epoch, seq };
            let bytes = &contents.iter().find(|(key, _)| *key == place.key()).unwrap().1;
            let header = Frame::header(bytes, &repository.id, &place, &repository.trust).unwrap();
            frames.push(Bytes::from(change(header, bytes.clone())));
        }
        (prefix.to_owned(), frames)
    }

    /// A bundle of other frames than those that were received.
    async fn put_bundle(&self, prefix: &str, frames: &[Bytes]) -> String {
        let key = layout::wal_bundle(prefix, 1, 21);
        for store in &self.fixture.stores {
            store.damage(&key, form::pack(frames)).await;
        }
        key
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

/// Whoever may write signs other WAL in the name of the frames, and puts it where the bundle is to be. While the frames are there,
/// they are what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_stay_when_the_bundle_has_others_in_their_place() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    let (key, signer) = (SealingKey::generate(&SystemRng).unwrap(), scene.fixture.writer.signer.clone());
    let sealer = FrameSealer { signer: &signer, key: &key, level: 1 };
    let forge = |header: FrameHeader, good: Bytes| {
        let wal: Vec<u8> = (header.span.start.0 + 1..=header.span.end.0).map(|at| at.to_le_bytes()[0]).collect();
        let forged = sealer.encode(header, &wal).unwrap();
        assert_eq!(forged.len(), good.len());
        forged
    };
    let (prefix, mut frames) = scene.changed(|_, good| good.to_vec()).await;
    // One of them is enough.
    frames[7] = scene.changed(forge).await.1.remove(7);
    let key = scene.put_bundle(&prefix, &frames).await;
    let all = scene.frames(0).await;
    scene.fixture.clock.advance(DAY + 1);
    assert_eq!(scene.prune(Consent::Scheduled).await.planned.amount.objects, 2 * 21);
    scene.fixture.clock.advance(DAY + 1);
    let report = scene.prune(Consent::Scheduled).await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all, all));
    assert!(report.refusals.iter().any(|why| why.contains(&key) && why.contains("another one")), "{report:#?}");
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
}

/// Readers would have to guess which of two bundles is meant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_stay_while_another_bundle_claims_some_of_them() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    scene.bundle(true).await;
    let (key, all) = (scene.bundles().await.remove(0), scene.frames(0).await);
    let other = key.replace("0000000001-", "0000000005-");
    scene.fixture.stores[1].damage(&other, b"nothing".to_vec()).await;
    scene.fixture.clock.advance(DAY + 1);
    let planned = scene.prune(Consent::Scheduled).await;
    assert_eq!(planned.planned.amount.objects, 0);
    assert!(planned.notes.iter().any(|note| note.contains(&key) && note.contains("another bundle")), "{planned:#?}");
    scene.fixture.clock.advance(DAY + 1);
    scene.prune(Consent::Scheduled).await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all, all));
    scene.fixture.stores[1].lose(&other).await;
    scene.prune_twice().await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all - 21, all - 21));
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
}

/// The SEAL came too late in one region, and the other holds the frame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_stay_when_a_bundle_holds_the_seal_of_one_region_in_place_of_the_wal_of_the_other() {
    let mut scene = Scene::new(2).await;
    let end = scene.long_epoch().await;
    scene.drilled(2).await;
    scene.fixture.clock.advance(DAY);
    let signer = scene.fixture.writer.signer.clone();
    let seal = |header: FrameHeader, _| FrameHeader { kind: FrameKind::Seal, ..header }.encode_bare(&signer).unwrap();
    let (prefix, mut frames) = scene.changed(|_, good| good.to_vec()).await;
    frames[4] = scene.changed(seal).await.1.remove(4);
    scene.put_bundle(&prefix, &frames).await;
    scene.fixture.stores[1].damage(&layout::wal_frame(&prefix, 5), frames[4].to_vec()).await;
    let all = scene.frames(0).await;
    scene.fixture.clock.advance(DAY + 1);
    assert_eq!(scene.prune(Consent::Scheduled).await.planned.amount.objects, 0);
    scene.fixture.clock.advance(DAY + 1);
    scene.prune(Consent::Scheduled).await;
    assert_eq!((scene.frames(0).await, scene.frames(1).await), (all, all));
    assert_eq!(scene.wal((1000, end)).await.unwrap() as u64, end - 1000);
}

/// The plan takes an epoch as a whole, and its frames were never compared with their bundle. A pin that comes after the plan keeps
/// the WAL: then frames may go only if the bundle is what it should be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_that_a_late_pin_keeps_loses_no_frame_to_a_broken_bundle() {
    const SEGMENT: u64 = 16 << 20;
    let mut scene = Scene::new(2).await;
    let mut ids = Vec::new();
    for round in 0..4u64 {
        let (start, frames) = ((10 + 4 * round) * SEGMENT, if round == 0 { FRAMES } else { 2 });
        scene.fixture.clock.advance(DAY);
        scene.fixture.epoch(start, &vec![60; frames], true).await;
        let files = scene.files();
        let id = scene.fixture.backup(&files, Some(need(start + 5, start + 50))).await.commit.id;
        scene.drill(&id).await;
        ids.push(id);
    }
    scene.fixture.clock.advance(DAY);
    assert_eq!(scene.bundle(true).await.bundles, 1);
    let bundle = scene.bundles().await.remove(0);
    let good = scene.fixture.stores[1].contents().await.into_iter().find(|(known, _)| *known == bundle).unwrap().1;
    let mut wrong = good.to_vec();
    wrong[good.len() / 2] ^= 1;
    scene.fixture.stores[1].damage(&bundle, wrong).await;
    scene.fixture.clock.advance(DAY + 1);
    let prefix = bundle.strip_suffix("0000000001-0000000021").unwrap().to_owned();
    let of_epoch = async |region| scene.names(region).await.into_iter().filter(|key| key.starts_with(&prefix)).count();
    let context = scene.context().await;
    let mut look = Look::begin(&context).await.unwrap();
    let writer = context.writer().unwrap();
    let plan = Plan::new(writer, look.doomed.clone(), std::mem::take(&mut look.garbage.items)).unwrap();
    assert!(plan.items.iter().any(|item| item.why == Why::Wal && item.key == bundle));
    pin::pin(&context, ids[0].as_str(), Reason { text: "audit".into(), until: None }).await.unwrap();
    let all = of_epoch(0).await;
    let (repository, rules, keysets) = (&context.repository, &context.retention, &look.keysets);
    let sweep = Sweep { repository, writer, rules, grace: context.prune.grace, ripe: &plan, keysets, lock: None };
    let phase = context.progress.begin("remove", None);
    let inventories = std::mem::take(&mut look.facts.inventories);
    let swept = sweep.run(plan.items.clone(), inventories, &phase).await.unwrap();
    assert_eq!((of_epoch(0).await, of_epoch(1).await), (all, all));
    assert!(swept.objects > 0 && swept.doubts.len() == 1, "{swept:?}");
}
