//! Verify, repair, list, show and status over a small repository whose regions lose and rot things.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};

use crate::codec::SystemRng;
use crate::jobs::verify::{Level, Options};
use crate::jobs::{Context, Levels, ScratchPlace, list, repair, show, status, verify};
use crate::model::{Clock, Lsn};
use crate::notify::Courier;
use crate::observe::progress::Progress;
use crate::repository::mend::Scope;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::survey::State;
use crate::repository::survey::scrub::Trouble;
use crate::repository::testing::{Fault, Fixture, Made, log, need, tiny};
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::index::WalIndex;

pub(super) async fn context(fixture: &Fixture) -> Context {
    let repository = fixture.reopen().await.unwrap();
    let clock = Arc::clone(&fixture.writer.clock);
    Context {
        ring: Arc::new(fixture.ring.within(repository.regions.clone())),
        repository,
        writer: None,
        streamed: Vec::new(),
        targets: Vec::new(),
        retention: BTreeMap::new(),
        prune: crate::repository::prune::Limits::default(),
        levels: Levels { pages: 1, dumps: 1, wal: 1 },
        pack_size: crate::repository::pages::pack::OBJECT_LIMIT,
        state_dir: PathBuf::new(),
        guests: Vec::new(),
        scratch: ScratchPlace { directory: PathBuf::new(), run_as: None, preload: Vec::new() },
        progress: Progress::new(Arc::clone(&clock)),
        meters: Arc::default(),
        courier: Courier::default(),
        clock,
        rng: Arc::new(SystemRng),
    }
}

async fn contents(fixture: &Fixture, region: usize) -> BTreeMap<String, Bytes> {
    let contents = fixture.stores[region].contents().await.into_iter();
    contents.filter(|(key, _)| !key.starts_with("intents/")).collect()
}

async fn look(fixture: &Fixture, level: Level, scrub: bool) -> verify::Report {
    let options = Options { what: None, level, region: None, scrub };
    verify::run(&context(fixture).await, &options).await.unwrap()
}

async fn mend(fixture: &Fixture) -> repair::Report {
    repair::run(&context(fixture).await, &Scope::default()).await.unwrap()
}

fn changed(report: &repair::Report) -> (u64, usize) {
    let copied = report.regions.iter().map(|region| region.copied).sum();
    (copied, report.regions.iter().map(|region| region.replaced.len()).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_whole_is_found_whole() {
    let fixture = tiny(3, 2).await;
    let report = look(&fixture, Level::L1, true).await;
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.wal[0].scrubbed_frames, 9);
    assert!(report.beside.orphans.is_empty() && report.beside.in_progress.is_empty());
    assert_eq!(changed(&mend(&fixture).await), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_object_that_is_lost_or_rots_comes_back_as_it_was() {
    let fixture = tiny(3, 2).await;
    let good = contents(&fixture, 1).await;
    assert_eq!(contents(&fixture, 0).await, good);
    for (key, bytes) in &good {
        fixture.stores[0].lose(key).await;
        assert_eq!(changed(&mend(&fixture).await), (1, 0), "{key}");
        assert!(contents(&fixture, 0).await == good, "{key}");
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut wrong = bytes.to_vec();
            wrong[at] ^= 4;
            fixture.stores[0].damage(key, wrong).await;
            let report = mend(&fixture).await;
            assert_eq!(changed(&report), (0, 1), "byte {at} of {key}: {report:#?}");
            assert!(contents(&fixture, 0).await == good, "byte {at} of {key}");
        }
        fixture.stores[0].damage(key, Vec::new()).await;
        assert_eq!(changed(&mend(&fixture).await), (0, 1), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_nothing_tells_apart_are_left_alone() {
    let fixture = tiny(2, 2).await;
    let is_wrap = |bytes: &Bytes| bytes.windows(12).any(|text| text == b"\"ciphertext\"");
    let inventories: Vec<_> =
        contents(&fixture, 0).await.into_iter().filter(|(key, _)| key.starts_with("inv")).collect();
    let listed = |key: &str| inventories.iter().any(|(_, lines)| String::from_utf8_lossy(lines).contains(key));
    let wraps = contents(&fixture, 0).await.into_iter().filter(|(_, bytes)| is_wrap(bytes));
    let (key, bytes) = wraps.into_iter().find(|(key, _)| !listed(key)).unwrap();
    let mut wrong = bytes.to_vec();
    let at = wrong.len() - 20;
    wrong[at] = if wrong[at] == b'A' { b'B' } else { b'A' };
    fixture.stores[0].damage(&key, wrong.clone()).await;
    let report = mend(&fixture).await;
    assert!(report.has_debts() && changed(&report) == (0, 0), "{report:#?}");
    assert_eq!(contents(&fixture, 1).await[&key], bytes);
    assert_eq!(contents(&fixture, 0).await[&key], Bytes::from(wrong));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_region_is_built_again() {
    let fixture = tiny(2, 2).await;
    let good = contents(&fixture, 1).await;
    for key in contents(&fixture, 0).await.keys() {
        fixture.stores[0].lose(key).await;
    }
    let dry = Scope { dry_run: true, ..Scope::default() };
    let plan = repair::run(&context(&fixture).await, &dry).await.unwrap();
    assert_eq!(changed(&plan), (good.len() as u64, 0), "{plan:#?}");
    assert!(contents(&fixture, 0).await.is_empty());
    let quick = Scope { quick: true, ..Scope::default() };
    let report = repair::run(&context(&fixture).await, &quick).await.unwrap();
    assert!(!report.has_debts(), "{report:#?}");
    assert!(contents(&fixture, 0).await == good);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_not_copied_before_its_backup_is_there() {
    let fixture = tiny(2, 2).await;
    let keys: Vec<_> = contents(&fixture, 0).await.into_keys().collect();
    let of = |class: &str| keys.iter().find(|key| key.starts_with(class)).unwrap().clone();
    fixture.stores[0].lose(&of("packs/")).await;
    fixture.stores[1].lose(&of("packs/")).await;
    fixture.stores[0].lose(&of("commits/")).await;
    let report = mend(&fixture).await;
    assert!(report.has_debts());
    assert!(!contents(&fixture, 0).await.contains_key(&of("commits/")), "{report:#?}");
    let report = look(&fixture, Level::L1, false).await;
    assert!(!report.has_only_debts() && !report.backups[0].restorable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_named_where_it_is() {
    let fixture = tiny(3, 2).await;
    for class in ["packs/", "manifests/", "inventories/", "commits/", "wal/"] {
        let (key, bytes) = contents(&fixture, 1).await.into_iter().find(|(key, _)| key.starts_with(class)).unwrap();
        let mut wrong = bytes.to_vec();
        let last = wrong.len() - 5;
        wrong[last] ^= 1;
        fixture.stores[1].damage(&key, wrong).await;
        let report = look(&fixture, Level::L1, true).await;
        assert!(!report.is_clean() && !report.has_only_debts(), "{class}");
        let wal = report.wal.iter().flat_map(|wal| &wal.problems);
        let problems: Vec<_> =
            report.backups[0].regions.iter().flat_map(|region| &region.problems).chain(wal).collect();
        assert!(report.backups[0].restorable, "{class}: {report:#?}");
        assert_eq!(problems.len(), 1, "{class}: {problems:#?}");
        assert_eq!((problems[0].region.as_str(), &problems[0].key), ("b", &key));
        assert_eq!(problems[0].trouble, Trouble::Damaged, "{class}");
        fixture.stores[1].damage(&key, bytes.to_vec()).await;
    }
    assert!(look(&fixture, Level::L1, true).await.is_clean());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_frame_is_opened_at_level_two() {
    let fixture = Fixture::directories(2, 2).await;
    let pages: Vec<u8> = (0..200 * 8192u32).map(|at| (at / 7 % 251) as u8).collect();
    fixture.backup(&[Made::new("base/1", pages), Made::new("base/2", b"short".to_vec())], None).await;
    let report = look(&fixture, Level::L2, false).await;
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.backups[0].regions[1].level, Some(Level::L2));
    let (key, bytes) = contents(&fixture, 1).await.into_iter().find(|(key, _)| key.starts_with("packs/")).unwrap();
    let mut wrong = bytes.to_vec();
    wrong[bytes.len() / 3] ^= 1;
    fixture.stores[1].damage(&key, wrong).await;
    let report = look(&fixture, Level::L2, false).await;
    let regions = &report.backups[0].regions;
    assert_eq!((regions[0].level, regions[1].level), (Some(Level::L2), Some(Level::L1)));
    assert_eq!(regions[1].problems[0].key, key);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_never_committed_is_an_orphan_once_a_newer_one_began() {
    let fixture = tiny(2, 2).await;
    let unfinished = {
        use crate::repository::backup::parent::Basis;
        use crate::repository::backup::writer::BackupWriter;
        use crate::repository::testing::{options, send};
        fixture.clock.advance(5);
        let writer = BackupWriter::begin(&fixture.repository, &fixture.writer, options(), Basis::nothing("a test"));
        let mut writer = writer.await.unwrap();
        send(&mut writer, &[Made::new("base/1", vec![7; 70 * 8192])]).await;
        writer.flush().await.unwrap();
        writer.id().clone()
    };
    let report = look(&fixture, Level::L1, false).await;
    assert!(report.is_clean() && report.beside.orphans.is_empty());
    assert_eq!(report.beside.in_progress[0].id, unfinished);
    fixture.clock.advance(5);
    fixture.backup(&[Made::new("base/1", vec![7; 8192])], Some(need(1000, 1090))).await;
    let report = look(&fixture, Level::L1, false).await;
    assert!(report.is_clean() && report.beside.in_progress.is_empty());
    assert_eq!(report.beside.orphans[0].id, unfinished);
}

#[derive(Debug)]
struct Behind(Arc<dyn Clock>);

impl Clock for Behind {
    fn now(&self) -> DateTime<Utc> {
        self.0.now() - TimeDelta::days(1)
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_from_the_future_is_a_problem() {
    let fixture = tiny(2, 2).await;
    let mut context = context(&fixture).await;
    let of_clock = |report: &status::Report| report.targets[0].problems.iter().any(|what| what.starts_with("clock: "));
    assert!(!of_clock(&status::run(&context, &[]).await.unwrap()));
    context.clock = Arc::new(Behind(Arc::clone(&context.clock)));
    let report = status::run(&context, &[]).await.unwrap();
    assert!(of_clock(&report) && report.is_violated(), "{report:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_gap_that_nobody_can_read_is_a_problem() {
    let fixture = tiny(2, 2).await;
    let out = FanOut::new(&fixture.repository.regions, Patience::WAL);
    let now = fixture.writer.clock.now();
    let gap = Gap::new(&log().target, &log().branch_id(), (Lsn(1090), Lsn(1200)), "the slot was lost", now);
    gaps::record(&fixture.repository, &fixture.writer, &gap, &out).await.unwrap();
    out.drain().await;
    for store in &fixture.stores {
        store.damage(&gap.key(), b"rot".to_vec()).await;
    }
    let report = status::run(&context(&fixture).await, &[]).await.unwrap();
    let told = |what: &String| what.starts_with("a recorded gap is not readable: ");
    assert!(report.targets[0].problems.iter().any(told), "{report:#?}");
}

/// Whoever deleted it recorded nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_is_in_no_region_any_more_is_a_gap_until_a_backup_begins_behind_it() {
    let fixture = tiny(3, 2).await;
    fixture.epoch(1090, &[10, 20, 30, 40], true).await;
    let gaps = async || {
        let report = status::run(&context(&fixture).await, &[]).await.unwrap();
        let gaps: Vec<(Lsn, Lsn)> = report.targets[0].gaps.iter().map(|gap| (gap.from, gap.to)).collect();
        (gaps, report.is_violated())
    };
    let index = WalIndex::load(&fixture.repository.regions, log().branch_id()).await;
    let (epoch, _) = index.epochs().iter().find(|(_, seqs)| seqs.len() == 5).unwrap();
    let lost = [2, 3].map(|seq| index.place(epoch, seq).key());
    for (at, store) in fixture.stores.iter().enumerate() {
        assert_eq!(gaps().await.0, [], "{at} regions lost it");
        for key in &lost {
            store.lose(key).await;
        }
    }
    assert_eq!(gaps().await, (vec![(Lsn(1120), Lsn(1190))], true));
    // Another epoch holds the same.
    fixture.epoch(1120, &[70], true).await;
    assert_eq!(gaps().await.0, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_tells_region_by_region() {
    let fixture = tiny(3, 2).await;
    let until = fixture.writer.clock.now();
    let report = list::run(&context(&fixture).await, None).await.unwrap();
    let states =
        |report: &list::Report| report.backups[0].regions.iter().map(|region| region.state).collect::<Vec<_>>();
    assert_eq!(states(&report), [State::Complete; 3]);
    assert_eq!(report.backups[0].recoverable_until, Some(until));
    assert_eq!((report.windows[0].from, report.windows[0].to), (Some(until), Some(until)));

    let keys: Vec<_> = contents(&fixture, 0).await.into_keys().collect();
    let of = |class: &str| keys.iter().find(|key| key.starts_with(class)).unwrap();
    fixture.stores[0].lose(of("wal/")).await;
    fixture.stores[1].damage(of("packs/"), b"cut".to_vec()).await;
    fixture.stores[2].set(Fault::Fail);
    let report = list::run(&context(&fixture).await, None).await.unwrap();
    assert_eq!(states(&report), [State::Debt, State::Damaged, State::Unreachable]);
    let json = serde_json::to_value(&report.backups[0]).unwrap();
    let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    for name in ["id", "target", "source", "kind", "started_at", "finished_at", "size_bytes", "stored_bytes"] {
        assert!(names.contains(&name), "{name}");
    }
    assert_eq!(json["regions"][0]["state"], "debt");

    let shown = show::run(&context(&fixture).await, "latest").await.unwrap();
    assert_eq!(shown.wraps.len(), 1);
    assert!(shown.held[&"b".parse().unwrap()].damaged == 1);
    let status = status::run(&context(&fixture).await, &[]).await.unwrap();
    assert_eq!(status.targets[0].next.as_deref(), Some("drctl repair ledger --region a"));
}
