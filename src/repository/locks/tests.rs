//! Locks over a small repository in memory: backups share packs, time passes, regions refuse.

use chrono::{DateTime, TimeDelta, Utc};

use super::look::{BackupLocks, Looked, State, look, renew};
use crate::observe::progress::Progress;
use crate::repository::catalog;
use crate::repository::layout;
use crate::repository::mend::{Scope, mend};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::testing::{Fault, Fixture, Made, log};
use crate::repository::wal::bundling::{find, make};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::Log;
use crate::store::{ObjectStore as _, StoreError};

const DAY: i64 = 24 * 3600;
const KEEP: TimeDelta = TimeDelta::days(30);

fn files(changing: u8) -> Vec<Made> {
    // What stays is more than half of its pack, which is therefore shared and not repacked.
    let stays: Vec<u8> = (0..64 * 8192u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    vec![Made::new("base/stays", stays), Made::new("base/changes", vec![changing; 9000])]
}

async fn locked() -> Fixture {
    let mut fixture = Fixture::memory(2, 1).await;
    fixture.lock_for(KEEP).await;
    fixture.epoch(1000, &[40, 50], true).await;
    fixture
}

async fn looked(fixture: &Fixture) -> Looked {
    let (backups, _) = catalog::backups(&fixture.repository, None).await.unwrap();
    let now = fixture.writer.clock.now();
    look(&fixture.repository, &backups, now, &Progress::new(fixture.writer.clock.clone()).begin("look", None)).await
}

fn states(looked: &Looked) -> Vec<State> {
    looked.backups.iter().map(|locks| locks.state).collect()
}

async fn until(fixture: &Fixture, region: usize, key: &str) -> Option<DateTime<Utc>> {
    fixture.stores[region].locked_until(key, None).await.unwrap()
}

/// The whole point: a backup is locked no longer than the oldest pack that it reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_backup_shares_is_locked_as_long_as_its_commit() {
    let mut fixture = locked().await;
    let first = fixture.next_backup(&files(1)).await;
    for day in 0..3 {
        fixture.clock.advance(20 * DAY);
        let next = fixture.next_backup(&files(2 + day)).await;
        assert!(next.locks.iter().all(|locks| locks.owed == 0 && locks.objects > 0), "{:?}", next.locks);
        let promised = next.commit.started_at + KEEP;
        let commit = format!("commits/ledger/{}", next.commit.id);
        let lines = catalog::inventory(&fixture.repository, &next.commit).await.unwrap();
        let shared: Vec<_> = lines.iter().filter(|line| line.key.contains(first.commit.id.as_str())).collect();
        assert!(!shared.is_empty(), "it shares nothing: {lines:?}");
        for region in 0..2 {
            assert_eq!(until(&fixture, region, &commit).await, Some(promised));
            for key in lines.iter().map(|line| line.key.as_str()).chain(["drctl.json"]) {
                assert!(until(&fixture, region, key).await >= Some(promised), "{key}");
            }
            for (key, _) in
                fixture.stores[region].contents().await.iter().filter(|(key, _)| key.starts_with("intents/"))
            {
                assert_eq!(until(&fixture, region, key).await, None);
            }
        }
        // Nobody removes what the first one left behind, though its own lock is over.
        let gone = fixture.stores[0].delete(&shared[0].key).await;
        assert!(matches!(gone, Err(StoreError::Retained { .. })), "{gone:?}");
    }
    // The WAL of these backups was written once, long ago: nobody promised that it is there still.
    fixture.lock_for(KEEP).await;
    let looked = looked(&fixture).await;
    let of = |state| looked.backups.iter().filter(|locks| locks.state == state).count();
    assert_eq!((of(State::Over), of(State::Weak), looked.backups.len()), (4, 4, 8), "{:#?}", looked.backups);
    let weakest =
        looked.backups.iter().filter(|locks| locks.state == State::Weak).map(|locks| locks.weakest.as_deref());
    assert!(weakest.into_iter().all(|key| key.is_some_and(|key| key.starts_with("wal/"))), "{:#?}", looked.backups);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_refuses_owes_its_locks_until_it_is_repaired() {
    let fixture = locked().await;
    let first = fixture.next_backup(&files(1)).await;
    assert_eq!(states(&looked(&fixture).await), [State::Locked; 2]);
    fixture.clock.advance(DAY);
    fixture.stores[1].allow_locks(false);
    let second = fixture.next_backup(&files(2)).await;
    let owed: Vec<_> = second.locks.iter().map(|locks| (locks.owed > 0, locks.error.is_some())).collect();
    assert_eq!(owed, [(false, false), (true, true)], "{:?}", second.locks);
    let found = looked(&fixture).await;
    let weak: Vec<_> = found.backups.iter().filter(|locks| locks.state == State::Weak).collect();
    let [BackupLocks { backup, region, promised_until, weakest_until, .. }] = weak[..] else { panic!("{found:#?}") };
    assert_eq!((backup, region.as_str()), (&second.commit.id, "b"));
    assert_eq!(
        (*promised_until, *weakest_until),
        (second.commit.started_at + KEEP, Some(first.commit.started_at + KEEP))
    );
    // As long as it refuses, nothing is better.
    let refused = renew(&fixture.repository, &found, None).await;
    assert!(refused.iter().any(|locks| locks.owed > 0), "{refused:?}");
    fixture.stores[1].allow_locks(true);
    let renewed = renew(&fixture.repository, &found, None).await;
    assert!(renewed.iter().all(|locks| locks.owed == 0), "{renewed:?}");
    assert_eq!(states(&looked(&fixture).await), [State::Locked; 4]);
}

/// What was written before locks were configured, and a region that may not be asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_locked_is_weak_and_what_does_not_answer_is_unknown() {
    let mut fixture = Fixture::memory(2, 1).await;
    fixture.epoch(1000, &[40, 50], true).await;
    fixture.next_backup(&files(1)).await;
    assert_eq!(states(&looked(&fixture).await), []);
    fixture.lock_for(KEEP).await;
    let found = looked(&fixture).await;
    assert_eq!(states(&found), [State::Weak; 2]);
    assert!(
        found.backups.iter().all(|locks| locks.weak == locks.objects && locks.weakest_until.is_none()),
        "{found:#?}"
    );
    assert_eq!(found.asked, found.backups.iter().map(|locks| locks.objects).sum::<u64>());
    renew(&fixture.repository, &found, Some(&"a".parse().unwrap())).await;
    assert_eq!(states(&looked(&fixture).await), [State::Locked, State::Weak]);
    fixture.stores[1].set(Fault::Deny);
    assert_eq!(states(&looked(&fixture).await), [State::Locked, State::Unknown]);
    fixture.stores[1].set(Fault::None);
    // A month later nothing is promised any more, and nothing asked.
    fixture.clock.advance(31 * DAY);
    let over = looked(&fixture).await;
    assert_eq!((states(&over), over.asked), (vec![State::Over; 2], 0));
}

/// The frames of a backup went when they lay in a bundle, and the bundle is what has to be locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_is_locked_in_place_of_its_frames() {
    let mut fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &[20; 30], true).await;
    fixture.clock.advance(DAY);
    let Log { system_id, timeline, branch, .. } = log();
    let branch = BranchId { system_id, timeline, branch };
    let found = find(&fixture.repository, &branch, fixture.writer.clock.now()).await.unwrap().0;
    let out = FanOut::new(&fixture.repository.regions, Patience::PUSH);
    make(&fixture.repository, &out, &found[0], found[0].bundles[0].0).await.unwrap();
    out.drain().await;
    fixture.lock_for(KEEP).await;
    fixture.next_backup(&files(1)).await;
    let mut bundle = String::new();
    for store in &fixture.stores {
        for (key, _) in store.contents().await.iter().filter(|(key, _)| key.starts_with("wal/")) {
            match key.rsplit('/').next().unwrap() {
                name if layout::parse_bundle(name).is_some() => bundle.clone_from(key),
                "0000000000" => store.extend(key, fixture.writer.clock.now() + KEEP + KEEP).await.unwrap(),
                _ => store.lose(key).await,
            }
        }
    }
    let looked_at = looked(&fixture).await;
    assert_eq!(states(&looked_at), [State::Weak; 2]);
    assert!(looked_at.backups.iter().all(|locks| locks.weakest.as_ref() == Some(&bundle)), "{looked_at:#?}");
    renew(&fixture.repository, &looked_at, None).await;
    assert_eq!(states(&looked(&fixture).await), [State::Locked; 2]);
    assert!(until(&fixture, 1, &bundle).await.is_some());
}

/// What was promised a lock that is over by now is stored without one: no store takes a lock of the past.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_brings_back_what_is_older_than_the_lock() {
    let fixture = locked().await;
    let id = fixture.next_backup(&files(1)).await.commit.id;
    fixture.clock.advance(40 * DAY);
    let manifest = format!("manifests/ledger/{id}/");
    let lost =
        fixture.stores[1].contents().await.into_iter().map(|(key, _)| key).find(|key| key.starts_with(&manifest));
    let lost = lost.unwrap();
    fixture.stores[1].lose(&lost).await;
    let phase = Progress::new(fixture.writer.clock.clone()).begin("mend", None);
    let mended = mend(&fixture.repository, &Scope::default(), &phase).await.unwrap();
    assert!(mended.iter().all(|region| region.still_missing.is_empty()), "{mended:#?}");
    assert_eq!(until(&fixture, 1, &lost).await, None);
}

/// A put that goes around [`Region::put`](crate::repository::regions::Region::put) would be locked nowhere, and nothing would say so.
#[test]
fn nothing_in_the_vault_puts_around_the_lock() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.join("repository"), root.join("jobs")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let text: String = std::fs::read_to_string(&path).unwrap().split_whitespace().collect();
                    let code = text.split("#[cfg(test)]modtests{").next().unwrap_or_default();
                    found.extend(code.matches("store.put(").map(|_| path.clone()));
                }
            }
        }
    }
    found.retain(|path| !path.ends_with("tests.rs"));
    let door = root.join("repository/regions/mod.rs");
    assert!(found.iter().all(|path| *path == door), "{found:?}");
    assert!(!found.is_empty(), "it looks past the code");
}
