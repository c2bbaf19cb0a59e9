//! What a feed sees of a small repository in memory whose regions hide things and give them back.

use bytes::Bytes;

use super::*;
use crate::jobs::tests::context;
use crate::model::{Branch, Lsn, Timeline};
use crate::repository::bundle::form;
use crate::repository::layout;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::testing::{Fault, Fixture, log, need};
use crate::repository::wal::frame::{EpochKind, Frame, FrameHeader, FrameKind, FramePlace, WalSpan};
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Log, Marks, store_history};
use crate::store::{Digest, ObjectStore, PutOptions};

const START: u64 = 1000;

async fn open(fixture: &Fixture) -> Feed {
    let context = context(fixture).await;
    let socket_dir = fixture.files.path().join("feed");
    let origin = need(START, START);
    Feed::open(&context, Options { socket_dir, owner: None, origin, way: None }).await.unwrap()
}

/// An epoch that is written frame by frame.
struct Writing {
    epoch: Epoch,
    out: Arc<FanOut>,
}

impl Writing {
    async fn begin(fixture: &Fixture, log: Log, start: u64) -> Self {
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let opening = (log, EpochKind::Stream, Lsn(start));
        let epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, Arc::clone(&out)).await.unwrap();
        Self { epoch, out }
    }

    async fn write(&mut self, lengths: &[u64]) {
        for length in lengths {
            let start = self.epoch.position();
            let end = Lsn(start.0 + length);
            let marks = Marks { first_record: Some(start), last_record: Some((start, end)), commits: None };
            self.epoch.append(start, vec![7; usize::try_from(*length).unwrap()], marks).await.unwrap();
        }
    }

    fn place(&self, seq: u64) -> FramePlace {
        let Log { system_id, timeline, branch, .. } = self.epoch.log().clone();
        FramePlace { system_id, timeline, branch, epoch: self.epoch.id().clone(), seq }
    }

    async fn end(self) {
        self.epoch.close().await.unwrap();
        Arc::into_inner(self.out).unwrap().drain().await;
    }

    /// Every region holds what was written.
    async fn leave(self) {
        drop(self.epoch);
        Arc::into_inner(self.out).unwrap().drain().await;
    }
}

async fn object(fixture: &Fixture, key: &str) -> Bytes {
    fixture.stores[2].contents().await.into_iter().find(|(name, _)| name == key).unwrap().1
}

fn end(feed: &Feed) -> (u32, u64) {
    let end = feed.position().end.unwrap();
    (end.timeline.0, end.lsn.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_end_is_told_in_front_of_a_timeline_or_a_gap() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(START, &[40, 50], true).await;
    let feed = open(&fixture).await;
    assert_eq!((end(&feed), feed.hole().await), ((1, 1090), None));

    // Timeline 2 left behind WAL of timeline 1 that nobody stored, and went on.
    let history = Bytes::from_static(b"1\t0/4B0\tno recovery target specified\n");
    let out = FanOut::new(&fixture.repository.regions, Patience::WAL);
    let branch = store_history(&fixture.repository, (log().system_id, Timeline(2)), &history, &out).await.unwrap();
    let second = Log { timeline: Timeline(2), branch: branch.clone(), ..log() };
    let mut writing = Writing::begin(&fixture, second, 1200).await;
    writing.write(&[30, 30]).await;
    feed.look().await.unwrap();
    feed.look().await.unwrap();
    let position = feed.position();
    assert_eq!((end(&feed), position.newest), ((1, 1090), Some(Timeline(2))));
    let trouble = position.trouble.unwrap();
    assert!(trouble.contains("timeline 2 left it behind that, at 0/4B0, and WAL of timeline 2 is stored"), "{trouble}");

    // It was only late.
    fixture.epoch(1090, &[110], true).await;
    feed.look().await.unwrap();
    assert_eq!((end(&feed), feed.hole().await, feed.position().trouble), ((2, 1260), None, None));
    assert_eq!(feed.position().streaming, Some(fixture.writer.clock.now()));

    // A gap that its receiver recorded, before anything behind it is stored.
    writing.end().await;
    let id = BranchId { system_id: log().system_id, timeline: Timeline(2), branch };
    let now = fixture.writer.clock.now();
    let gap = Gap::new(&log().target, &id, (Lsn(1260), Lsn(1300)), "the slot was lost", now);
    gaps::record(&fixture.repository, &fixture.writer, &gap, &out).await.unwrap();
    out.drain().await;
    feed.look().await.unwrap();
    feed.look().await.unwrap();
    let trouble = feed.position().trouble.unwrap();
    assert!(trouble.contains("was never stored: the slot was lost"), "{trouble}");
    assert_eq!(feed.position().streaming, None);
    let late_branch = id.branch.clone();
    let mut late = Writing::begin(&fixture, Log { timeline: Timeline(2), branch: id.branch, ..log() }, 1260).await;
    late.write(&[50]).await;
    late.end().await;
    feed.look().await.unwrap();
    assert_eq!((end(&feed), feed.hole().await), ((2, 1310), None));

    // Bytes that nobody signed stop nothing, unless they may be what is left of a record.
    let prefix = layout::gaps(id.system_id, id.timeline, &late_branch);
    let garbage = async |name: String, stores: usize| {
        for store in &fixture.stores[..stores] {
            let body = Bytes::from_static(b"{}\n");
            let digest = Digest::of(&body);
            store.put(&format!("{prefix}{name}"), body, digest, &PutOptions::default()).await.unwrap();
        }
        feed.look().await
    };
    garbage("garbage".to_owned(), 2).await.unwrap();
    garbage(layout::gap("", Lsn(1300), Lsn(1305)) + "-contradiction", 1).await.unwrap();
    assert_eq!((end(&feed), feed.position().trouble), ((2, 1310), None));
    let stopped = garbage(layout::gap("", Lsn(1270), Lsn(1280)) + "-contradiction", 2).await.unwrap_err();
    assert!(stopped.to_string().contains("from 0/4F6 to 0/500 was stored in two versions"), "{stopped}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seal_in_one_region_hides_no_frame_of_the_others() {
    let fixture = Fixture::memory(3, 2).await;
    let mut writing = Writing::begin(&fixture, log(), START).await;
    writing.write(&[40, 50, 60, 70]).await;
    let places = [1, 2, 3].map(|seq| writing.place(seq));
    writing.leave().await;
    let [before, frame, last] = places.map(|place| place.key());
    let (wal, behind) = (object(&fixture, &frame).await, object(&fixture, &last).await);
    for store in &fixture.stores {
        store.lose(&frame).await;
        store.lose(&last).await;
    }
    // A takeover that reached one region alone.
    let trust = &fixture.repository.trust;
    let place = FramePlace { seq: 1, ..place_of(&before) };
    let header = Frame::header(&object(&fixture, &before).await, &fixture.repository.id, &place, trust).unwrap();
    let span = WalSpan { start: header.span.end, first_record: None, ..header.span };
    let seal = FrameHeader { place: FramePlace { seq: 2, ..place }, kind: FrameKind::Seal, span, ..header };
    fixture.stores[0].damage(&frame, seal.encode_bare(&fixture.writer.signer).unwrap()).await;

    let feed = open(&fixture).await;
    feed.shared.look(Depth::Next).await.unwrap();
    assert_eq!(end(&feed), (1, 1090));
    for store in &fixture.stores[1..] {
        store.damage(&frame, wal.to_vec()).await;
        store.damage(&last, behind.to_vec()).await;
    }
    feed.look().await.unwrap();
    assert_eq!(end(&feed), (1, 1220));
}

fn place_of(key: &str) -> FramePlace {
    let epoch = key.rsplit('/').nth(1).unwrap().parse().unwrap();
    FramePlace { system_id: log().system_id, timeline: Timeline::FIRST, branch: Branch::root(), epoch, seq: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_comes_back_is_asked_for_all_that_it_holds() {
    let fixture = Fixture::memory(3, 2).await;
    let mut writing = Writing::begin(&fixture, log(), START).await;
    writing.write(&[10; 40]).await;
    let lost = [3, 4].map(|seq| writing.place(seq).key());
    writing.leave().await;
    for store in &fixture.stores[1..] {
        for key in &lost {
            store.lose(key).await;
        }
    }
    let context = context(&fixture).await;
    fixture.stores[0].set(Fault::Fail);
    let (socket_dir, origin) = (fixture.files.path().join("feed"), need(START, START));
    let feed = Feed::open(&context, Options { socket_dir, owner: None, origin, way: None }).await.unwrap();
    assert_eq!((end(&feed), feed.position().silent.len()), ((1, START + 30), 1));
    assert!(feed.hole().await.is_some_and(|hole| hole.contains("it goes on at")));
    fixture.stores[0].set(Fault::None);
    feed.look().await.unwrap();
    assert_eq!((end(&feed), feed.hole().await), ((1, START + 400), None));
    assert!(feed.position().silent.is_empty());
}

/// Puts frames into a bundle and takes them away, as bundling does and prune when its grace is over.
async fn bundle(fixture: &Fixture, place: &FramePlace, (first, last): (u64, u64)) {
    let keys: Vec<_> = (first..=last).map(|seq| FramePlace { seq, ..place.clone() }.key()).collect();
    let mut frames = Vec::new();
    for key in &keys {
        frames.push(object(fixture, key).await);
    }
    let name = layout::wal_bundle(&place.epoch_prefix(), first, last);
    for store in &fixture.stores {
        store.damage(&name, form::pack(&frames)).await;
        for key in &keys {
            store.lose(key).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_slept_over_bundling_and_prune_lists_everything_anew() {
    let fixture = Fixture::memory(3, 2).await;
    let mut writing = Writing::begin(&fixture, log(), START).await;
    writing.write(&[10, 10]).await;
    let feed = open(&fixture).await;
    assert_eq!(end(&feed), (1, START + 20));

    let asleep = feed.shared.looking.lock().await;
    let place = writing.place(0);
    writing.write(&[10; 8]).await;
    writing.end().await;
    bundle(&fixture, &place, (1, 9)).await;
    fixture.clock.advance(31 * 60);
    drop(asleep);
    feed.look().await.unwrap();
    assert_eq!((end(&feed), feed.hole().await), ((1, START + 100), None));

    // An epoch that is met for the first time when it is bundled.
    let asleep = feed.shared.looking.lock().await;
    let mut writing = Writing::begin(&fixture, log(), START + 100).await;
    let place = writing.place(0);
    writing.write(&[10; 4]).await;
    writing.end().await;
    bundle(&fixture, &place, (1, 2)).await;
    drop(asleep);
    feed.look().await.unwrap();
    assert_eq!(end(&feed), (1, START + 140));

    // Before a promotion nobody trusts a clock.
    let asleep = feed.shared.looking.lock().await;
    let mut writing = Writing::begin(&fixture, log(), START + 140).await;
    let place = writing.place(0);
    writing.write(&[10; 6]).await;
    drop(asleep);
    feed.look().await.unwrap();
    let asleep = feed.shared.looking.lock().await;
    writing.write(&[10; 6]).await;
    writing.end().await;
    bundle(&fixture, &place, (1, 11)).await;
    drop(asleep);
    feed.look_anew().await.unwrap();
    assert_eq!(end(&feed), (1, START + 260));
}

#[tokio::test]
async fn a_socket_goes_into_no_directory_of_others() {
    let files = tempfile::tempdir().unwrap();
    let precious = files.path().join("precious");
    std::fs::DirBuilder::new().mode(0o755).create(&precious).unwrap();
    std::fs::set_permissions(&precious, std::fs::Permissions::from_mode(0o755)).unwrap();
    let linked = place_in(files.path(), &crate::codec::SystemRng).unwrap();
    std::os::unix::fs::symlink(&precious, &linked).unwrap();
    let options = |socket_dir: &Path| {
        let socket_dir = socket_dir.to_owned();
        Options { socket_dir, owner: None, origin: need(START, START), way: None }
    };
    listen(&options(&linked)).unwrap_err();
    assert_eq!(precious.metadata().unwrap().mode() & 0o777, 0o755);
    assert_eq!(std::fs::read_dir(&precious).unwrap().count(), 0);

    let own = place_in(files.path(), &crate::codec::SystemRng).unwrap();
    let first = listen(&options(&own)).unwrap();
    drop(first);
    let _again = listen(&options(&own)).unwrap();
    assert_eq!(socket(&own).symlink_metadata().unwrap().mode() & 0o777, 0o600);
    assert!(is_place_in(files.path(), &own));
    for wrong in ["/etc", "/etc/drctl-feed-01234567", "drctl-feed-01234567"] {
        assert!(!is_place_in(files.path(), Path::new(wrong)), "{wrong}");
    }
    assert!(!is_place_in(files.path(), &files.path().join("base/drctl-feed-01234567")));
    assert!(!is_place_in(files.path(), &files.path().join("x/../drctl-feed-01234567")));
}
