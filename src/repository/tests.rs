//! The vault as a whole: what is written comes back, whatever one region does; a flipped bit never does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::{prop_assert, prop_assert_eq, proptest};

use crate::model::commit::Commit;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Kind, Lsn, Result};
use crate::observe::SystemClock;
use crate::observe::progress::Progress;
use crate::repository::backup::parent::Basis;
use crate::repository::backup::writer::BackupWriter;
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::restore::{CONTROL_FILE, CONTROL_FILE_PENDING, Destination, KeptParts, restore_files};
use crate::repository::testing::{Fault, Fixture, HISTORY, Made, log, options, send, tiny};
use crate::repository::wal::index::{BranchId, Stretch, WalIndex, cover, windows};
use crate::repository::wal::log::read_history;
use crate::store::Digest;

pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Restores a backup into a new directory and gives back every file.
pub(super) async fn read_back(
    repository: &Repository,
    ring: &KeyRing,
    commit: &Commit,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let directory = tempfile::tempdir().unwrap();
    let destination = Destination::empty(directory.path().to_owned(), BTreeMap::new());
    let inventory = catalog::inventory(repository, commit).await?;
    let phase = Arc::new(Progress::new(Arc::new(SystemClock::new())).begin("fetch", None));
    let mut written = Vec::new();
    let mut tell = |file| {
        written.push(file);
        Ok(())
    };
    let restored =
        restore_files(repository, ring, (commit, &inventory, KeptParts::default()), &destination, (&phase, &mut tell))
            .await?;
    assert_eq!(restored.files, written.len() as u64);
    let mut files = BTreeMap::new();
    for file in written {
        let path = if file.path == CONTROL_FILE { CONTROL_FILE_PENDING } else { &file.path };
        let bytes = std::fs::read(directory.path().join(path)).unwrap();
        assert_eq!((crc32c::crc32c(&bytes), bytes.len() as u64), (file.crc32c, file.size), "{}", file.path);
        files.insert(file.path, bytes);
    }
    Ok(files)
}

pub(super) fn expected(files: &[Made]) -> BTreeMap<String, Vec<u8>> {
    files.iter().map(|file| (file.path.clone(), file.bytes.clone())).collect()
}

pub(super) fn awkward_files() -> Vec<Made> {
    let mut sparse = vec![0; 300 * PAGE_SIZE];
    sparse[17 * PAGE_SIZE..19 * PAGE_SIZE].copy_from_slice(&noise(3, 2 * PAGE_SIZE));
    let mut files = vec![
        Made::new("base/large", noise(1, 3000 * PAGE_SIZE)),
        Made::new("base/sparse", sparse),
        Made::new("base/zeros", vec![0; 70 * PAGE_SIZE]),
        Made::new("base/short", noise(2, 5 * PAGE_SIZE + 100)),
        Made::new("base/short-zeros", vec![0; 100]),
        Made::new("base/large-short", noise(4, 1500 * PAGE_SIZE + 1)),
        Made::new("base/empty", Vec::new()),
    ];
    files.extend((0..1500).map(|at| Made::new(&format!("base/small-{at}"), noise(at, (at as usize * 37) % 9000))));
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_comes_back() {
    for fixture in [Fixture::memory(3, 2).await, Fixture::directories(2, 2).await] {
        let files = awkward_files();
        let written = fixture.backup(&files, None).await;
        assert!(written.regions.iter().all(|region| region.missing_objects == 0), "{:?}", written.regions);
        assert_eq!(written.commit.size_bytes, files.iter().map(|file| file.bytes.len() as u64).sum::<u64>());

        let repository = fixture.reopen().await.unwrap();
        let (backups, unreadable) = catalog::backups(&repository, None).await.unwrap();
        assert!(unreadable.is_empty());
        assert_eq!(backups[0].commit, written.commit);
        for region in repository.regions.all() {
            let alone = Repository { regions: repository.regions.only(&region.name).unwrap(), ..repository.clone() };
            let back = read_back(&alone, &fixture.ring.within(alone.regions.clone()), &written.commit).await.unwrap();
            assert!(back == expected(&files), "region {}", region.name);
        }
        let debts = catalog::debts(&repository, &backups).await.unwrap();
        assert!(debts[&written.commit.id].iter().all(|(_, debt)| debt.is_none()), "{debts:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_outlives_a_region_that_fails() {
    for fault in [Fault::Fail, Fault::Deny] {
        let fixture = Fixture::memory(3, 2).await;
        fixture.stores[0].set(fault);
        let files = [Made::new("base/1", noise(9, 100 * PAGE_SIZE))];
        let mut writer = BackupWriter::begin(&fixture.repository, &fixture.writer, options(), Basis::nothing("a test"))
            .await
            .unwrap();
        send(&mut writer, &files).await;
        writer.flush().await.unwrap();
        let commit = tokio::time::timeout(Duration::from_secs(70), async {
            // A region that may come back keeps its queue for half a minute; the next one is told at once.
            writer.commit(None).await.unwrap()
        });
        if fault == Fault::Fail {
            tokio::time::sleep(Duration::from_millis(50)).await;
            fixture.stores[0].set(Fault::Deny);
        }
        let written = commit.await.unwrap();
        assert!(written.regions[0].missing_objects >= 4, "{:?}", written.regions);
        assert_eq!(written.regions[1].missing_objects + written.regions[2].missing_objects, 0);

        fixture.stores[0].set(Fault::None);
        let repository = fixture.reopen().await.unwrap();
        let (backups, _) = catalog::backups(&repository, None).await.unwrap();
        let debts = catalog::debts(&repository, &backups).await.unwrap();
        let owes: Vec<_> = debts[&written.commit.id].iter().map(|(_, debt)| !debt.is_none()).collect();
        assert_eq!(owes, [true, false, false]);
        assert!(read_back(&repository, &fixture.ring, &written.commit).await.unwrap() == expected(&files));
    }
}

fn object(text: &'static [u8]) -> (Bytes, Digest) {
    (Bytes::from_static(text), Digest::of(text))
}

#[tokio::test(start_paused = true)]
async fn the_quorum_holds_while_one_region_fails_hangs_or_is_slow() {
    for fault in [Fault::Fail, Fault::Deny, Fault::Hang, Fault::Slow(Duration::from_secs(90))] {
        let fixture = Fixture::memory(3, 2).await;
        fixture.stores[1].set(fault);
        let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
        let started = tokio::time::Instant::now();
        for at in 0..6 {
            let (body, digest) = object(b"pack");
            out.put(format!("packs/{at}"), body, digest).await.unwrap();
        }
        assert!(started.elapsed() <= Duration::from_secs(31), "{fault:?}: {:?}", started.elapsed());
        let owes: Vec<_> = out.drain().await.into_iter().map(|region| region.missing_objects).collect();
        assert_eq!(owes, [0, 6, 0], "{fault:?}");
        fixture.stores[1].set(Fault::None);
        for (at, store) in fixture.stores.iter().enumerate() {
            let held = store.contents().await.iter().filter(|(key, _)| key.starts_with("packs/")).count();
            assert_eq!(held, if at == 1 { 0 } else { 6 });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_acknowledged_below_the_quorum() {
    for fault in [Fault::Fail, Fault::Deny, Fault::Hang] {
        let fixture = Fixture::memory(3, 2).await;
        fixture.stores[0].set(fault);
        fixture.stores[2].set(fault);
        let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
        let (body, digest) = object(b"pack");
        let error = out.put("packs/1".into(), body, digest).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");

        // WAL waits for ever instead, and goes on by itself once a region is back.
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let (body, digest) = object(b"frame");
        let waiting = {
            let out = Arc::clone(&out);
            crate::observe::task::spawn("put", async move { out.put("wal/1".into(), body, digest).await })
        };
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!waiting.is_finished(), "{fault:?}");
        fixture.stores[2].set(Fault::None);
        if fault == Fault::Hang {
            // A request that hangs ends with the adapter's own attempt timeout, which this store does not have.
            continue;
        }
        tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_is_given_up_leaves_no_region_behind() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.stores[1].set(Fault::Slow(Duration::from_secs(5)));
    let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
    let (body, digest) = object(b"given up");
    let given_up = tokio::time::timeout(Duration::from_secs(1), out.put("packs/1".into(), body, digest)).await;
    assert!(given_up.is_err(), "{given_up:?}");
    fixture.stores[1].set(Fault::Slow(Duration::from_secs(20)));
    let (body, digest) = object(b"pack");
    out.put("packs/2".into(), body, digest).await.unwrap();
    let outcomes = out.drain().await;
    assert!(outcomes.iter().all(|region| region.last_error.is_none()), "{outcomes:?}");
    assert_eq!(outcomes[1].missing_objects, 1);
}

/// Given up while it still waits for a place in a queue: what no region was asked to take is lacking in all of them, and is no WAL
/// that anybody waits for.
#[tokio::test(start_paused = true)]
async fn a_write_that_is_given_up_before_it_began_is_accounted_for_in_every_region() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.stores[0].set(Fault::Hang);
    let out = FanOut::new(&fixture.repository.regions, Patience::WAL);
    let puts = (0..5).map(|put| out.put_wal(format!("wal/{put}"), object(b"frame"), 10));
    let given_up = tokio::time::timeout(Duration::from_secs(1), futures::future::join_all(puts)).await;
    assert!(given_up.is_err(), "{given_up:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(out.unheld(), [0, 0]);
    let missing: Vec<_> = out.outcomes().iter().map(|region| region.missing_objects).collect();
    assert_eq!(missing, [5, 1]);
}

/// The quorum holds the object, and then a region says that it has another one of that name.
#[tokio::test(start_paused = true)]
async fn other_bytes_that_are_found_after_the_quorum_are_owed() {
    let fixture = Fixture::memory(3, 2).await;
    fixture.stores[2].damage("wal/1", b"another".to_vec()).await;
    fixture.stores[2].set(Fault::Slow(Duration::from_secs(1)));
    let out = FanOut::new(&fixture.repository.regions, Patience::WAL);
    out.put_wal("wal/1".into(), object(b"frame"), 10).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(out.unheld(), [0, 0, 10]);
    let outcomes = out.drain().await;
    let missing: Vec<_> = outcomes.iter().map(|region| region.missing_objects).collect();
    assert_eq!(missing, [0, 0, 1]);
    assert!(outcomes[2].last_error.as_ref().is_some_and(|why| why.contains("wal/1")), "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn other_bytes_under_a_name_stop_the_writer() {
    let fixture = Fixture::memory(3, 2).await;
    fixture.stores[2].damage("packs/1", b"another".to_vec()).await;
    fixture.stores[0].set(Fault::Slow(Duration::from_millis(10)));
    fixture.stores[1].set(Fault::Slow(Duration::from_millis(10)));
    let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
    let (body, digest) = object(b"pack");
    let error = out.put("packs/1".into(), body, digest).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
}

#[tokio::test(start_paused = true)]
async fn wal_tries_a_lost_region_again_however_busy_it_is() {
    let fixture = Fixture::memory(3, 2).await;
    fixture.stores[0].set(Fault::Hang);
    let out = FanOut::new(&fixture.repository.regions, Patience::WAL);
    let mut put = 0;
    let mut frames = async |count: usize| {
        for _ in 0..count {
            let (body, digest) = object(b"frame");
            out.put(format!("wal/{put}"), body, digest).await.unwrap();
            put += 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    frames(30).await;
    fixture.stores[0].set(Fault::None);
    frames(40).await;
    let held = fixture.stores[0].contents().await;
    assert!(held.iter().any(|(key, _)| key == "wal/69"), "the region that is back got nothing");
    assert!(out.drain().await[0].missing_objects < 60);
}

async fn index(repository: &Repository) -> WalIndex {
    let log = log();
    let branch = BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch };
    WalIndex::load(&repository.regions, branch).await
}

async fn shown(repository: &Repository) -> Vec<(u64, u64)> {
    let index = index(repository).await;
    let (runs, errors) = index.runs(repository, None).await;
    assert!(errors.is_empty(), "{errors:?}");
    windows(&runs).iter().map(|window| (window.start.0, window.end.0)).collect()
}

#[tokio::test]
async fn windows_join_what_touches_and_break_at_holes() {
    let fixture = Fixture::memory(2, 2).await;
    let repository = &fixture.repository;
    assert_eq!(shown(repository).await, []);
    fixture.epoch(1000, &[10, 20, 30], true).await;
    assert_eq!(shown(repository).await, [(1000, 1060)]);
    fixture.epoch(1060, &[40], false).await;
    assert_eq!(shown(repository).await, [(1000, 1100)]);
    fixture.epoch(2000, &[5, 5000, 5], true).await;
    assert_eq!(shown(repository).await, [(1000, 1100), (2000, 7010)]);
    fixture.epoch(1050, &[500, 1000], false).await;
    assert_eq!(shown(repository).await, [(1000, 7010)]);
}

#[tokio::test]
async fn a_lost_frame_is_a_hole_in_that_region_only() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &[10, 10, 10, 10], true).await;
    let index = index(&fixture.repository).await;
    let place = index.frames().nth(1).unwrap().0;
    drop(index);
    crate::store::ObjectStore::delete(fixture.stores[0].as_ref(), &place.key()).await.unwrap();
    let index = self::index(&fixture.repository).await;
    let seen = async |region: &str| {
        let (runs, _) = index.runs(&fixture.repository, Some(&region.parse().unwrap())).await;
        windows(&runs).iter().map(|window| (window.start.0, window.end.0)).collect::<Vec<_>>()
    };
    assert_eq!(seen("a").await, [(1000, 1010), (1020, 1040)]);
    assert_eq!(seen("b").await, [(1000, 1040)]);
}

/// Whatever a search asks for at once, it finds the frame that one by one would find, around one that is damaged.
#[tokio::test]
async fn the_frame_of_every_byte_is_found() {
    let fixture = Fixture::memory(1, 1).await;
    let lengths: Vec<usize> = (0..70).map(|number| 1 + number * 7 % 5).collect();
    fixture.epoch(1000, &lengths, true).await;
    let located = async |index: &WalIndex| {
        let (runs, errors) = index.spans(&fixture.repository).await;
        assert!(errors.is_empty() && runs.len() == 1, "{errors:?}");
        let mut found = Vec::new();
        for at in runs[0].start().0..runs[0].end().0 {
            found.push(index.locate(&fixture.repository, &runs[0], Lsn(at)).await);
        }
        found
    };
    let expected: Vec<u64> = (0..).zip(&lengths).flat_map(|(seq, length)| std::iter::repeat_n(seq, *length)).collect();
    let found: Vec<_> = located(&index(&fixture.repository).await).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(found, expected);
    let place = index(&fixture.repository).await.frames().nth(40).unwrap().0;
    fixture.stores[0].damage(&place.key(), b"another".to_vec()).await;
    for (found, expected) in located(&index(&fixture.repository).await).await.into_iter().zip(expected) {
        match found {
            Ok(found) => assert_eq!(found, expected),
            // Only who wants the damaged frame or the one behind it cannot know which of the two it is.
            Err(_) => assert!((40..=41).contains(&expected), "{expected}"),
        }
    }
}

#[tokio::test]
async fn two_epochs_that_overlap_cover_a_range_together() {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &[100, 100, 50], false).await;
    fixture.clock.advance(10);
    fixture.epoch(1200, &[100, 5000], true).await;
    fixture.epoch(9000, &[10], false).await;
    let repository = &fixture.repository;
    let index = index(repository).await;
    let (runs, _) = index.runs(repository, None).await;
    let covered = cover(&index, repository, &runs, (Lsn(1150), Lsn(6000))).await.unwrap().unwrap();
    let steps: Vec<_> = covered.iter().map(|Stretch { first_seq, from, to, .. }| (*first_seq, from.0, to.0)).collect();
    assert_eq!(steps, [(1, 1150, 1250), (0, 1250, 6000)]);
    assert_eq!(cover(&index, repository, &runs, (Lsn(1150), Lsn(6301))).await.unwrap(), Err(Lsn(6300)));
    assert_eq!(cover(&index, repository, &runs, (Lsn(900), Lsn(1000))).await.unwrap(), Err(Lsn(900)));
    assert_eq!(cover(&index, repository, &runs, (Lsn(8000), Lsn(9005))).await.unwrap(), Err(Lsn(8000)));
}

#[test]
fn any_epochs_give_the_windows_of_their_union() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    proptest!(proptest::prelude::ProptestConfig::with_cases(12), |(epochs in proptest::collection::vec((0u64..300, proptest::collection::vec(1usize..40, 1..4)), 1..5))| {
        runtime.block_on(async {
            let fixture = Fixture::memory(1, 1).await;
            let mut held = vec![false; 600];
            for (start, lengths) in &epochs {
                let start = start + 8192;
                fixture.epoch(start, lengths, lengths.len() % 2 == 0).await;
                let length: usize = lengths.iter().sum();
                let from = start as usize - 8192;
                held[from..from + length].fill(true);
            }
            let shown = shown(&fixture.repository).await;
            for window in &shown {
                let (from, to) = (window.0 as usize - 8192, window.1 as usize - 8192);
                prop_assert!(held[from..to].iter().all(|held| *held));
                prop_assert!(from == 0 || !held[from - 1]);
                prop_assert!(!held[to]);
            }
            let index = index(&fixture.repository).await;
            let (runs, _) = index.runs(&fixture.repository, None).await;
            let total: u64 = shown.iter().map(|(from, to)| to - from).sum();
            prop_assert_eq!(total, held.iter().filter(|held| **held).count() as u64);
            for (from, to) in shown {
                let covered = cover(&index, &fixture.repository, &runs, (Lsn(from), Lsn(to))).await.unwrap();
                let covered = covered.unwrap();
                prop_assert_eq!((covered[0].from, covered[covered.len() - 1].to), (Lsn(from), Lsn(to)));
                prop_assert!(covered.windows(2).all(|pair| pair[0].to == pair[1].from));
            }
            Ok(())
        })?;
    });
}

/// Everything that a reader can learn: each backup's files, each frame's bytes, each history.
async fn learn(fixture: &Fixture) -> Result<(Vec<BTreeMap<String, Vec<u8>>>, Vec<Vec<u8>>, Bytes)> {
    let repository = fixture.reopen().await?;
    let ring = fixture.ring.within(repository.regions.clone());
    let (backups, unreadable) = catalog::backups(&repository, None).await?;
    if let Some(error) = unreadable.into_iter().next() {
        return Err(error);
    }
    let mut files = Vec::new();
    for backup in &backups {
        files.push(read_back(&repository, &ring, &backup.commit).await?);
    }
    let index = index(&repository).await;
    let (runs, errors) = index.runs(&repository, None).await;
    if let Some(error) = errors.into_iter().next() {
        return Err(error);
    }
    assert_eq!(windows(&runs).len(), 1);
    let mut wal = Vec::new();
    for (place, _) in index.frames() {
        let check = |bytes: Bytes| {
            crate::repository::wal::frame::Frame::decode(&bytes, &repository.id, &place, &repository.trust)
        };
        let (frame, _) = repository.regions.read(&place.key(), None, check).await?;
        let keyset = ring.open(&frame.header.target, &frame.header.keyset).await?;
        wal.push(frame.open(keyset.data().ok_or_else(|| Error::failed("no data secret"))?)?);
    }
    let history = histories(&repository).await?;
    Ok((files, wal, history))
}

async fn histories(repository: &Repository) -> Result<Bytes> {
    let branch = crate::model::Branch::from_history_digest(&Digest::of(HISTORY).0);
    read_history(repository, log().system_id, crate::model::Timeline(2), &branch).await
}

/// Classes of objects whose bytes a reader relies on.
const READ: [&str; 8] =
    ["drctl.json", "signers/", "keysets/", "history/", "wal/", "packs/", "manifests/", "inventories/"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flipped_bit_is_ever_read() {
    let fixture = tiny(1, 1).await;
    let good = learn(&fixture).await.unwrap();
    let contents = fixture.stores[0].contents().await;
    assert!(READ.iter().chain(&["commits/"]).all(|class| contents.iter().any(|(key, _)| key.starts_with(class))));
    for (key, bytes) in contents {
        for at in 0..bytes.len() {
            let mut wrong = bytes.to_vec();
            wrong[at] ^= 1 << (at % 8);
            fixture.stores[0].damage(&key, wrong).await;
            match learn(&fixture).await {
                Err(_) => {}
                Ok(read) => assert!(read == good, "byte {at} of {key} was believed"),
            }
        }
        fixture.stores[0].damage(&key, bytes.to_vec()).await;
    }
    assert!(learn(&fixture).await.unwrap() == good);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_one_region_is_healed_from_the_other() {
    let fixture = tiny(2, 2).await;
    let good = learn(&fixture).await.unwrap();
    for (key, bytes) in fixture.stores[0].contents().await {
        for at in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            let mut wrong = bytes.to_vec();
            wrong[at] ^= 1 << (at % 8);
            fixture.stores[0].damage(&key, wrong).await;
            let read = learn(&fixture).await.unwrap_or_else(|error| panic!("byte {at} of {key}: {error}"));
            assert!(read == good, "byte {at} of {key} was believed");
        }
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fixture.stores[0].damage(&key, bytes[..cut].to_vec()).await;
            let read = learn(&fixture).await.unwrap_or_else(|error| panic!("{key} cut to {cut}: {error}"));
            assert!(read == good, "{key} cut to {cut} was believed");
        }
        fixture.stores[0].damage(&key, bytes.to_vec()).await;
    }
}
