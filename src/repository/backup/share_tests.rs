//! Backups that share pages: each is whole, whatever the ones before it come to; what the writer remembers is believed only
//! if it is what COMMIT names.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use crate::disk::place::place;
use crate::keys::{AgeHolder, generate_identity};
use crate::model::commit::BackupKind;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Clock, SystemId};
use crate::repository::backup::parent::{Basis, choose, state_path};
use crate::repository::backup::writer::{BackupOptions, BackupWriter, Written};
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::pages::pack::SMALLEST_PACK;
use crate::repository::testing::{Fixture, Made, need, options, send};
use crate::repository::tests::{awkward_files, expected, noise, read_back};

/// The next backup, a moment later; it is read back from every region alone.
async fn next(fixture: &Fixture, files: &[Made]) -> Written {
    fixture.clock.advance(60);
    let written = fixture.next_backup(files).await;
    assert_restores(fixture, &written, files).await;
    written
}

async fn assert_restores(fixture: &Fixture, written: &Written, files: &[Made]) {
    let repository = fixture.reopen().await.unwrap();
    for region in repository.regions.all() {
        let alone = Repository { regions: repository.regions.only(&region.name).unwrap(), ..repository.clone() };
        let ring = fixture.ring.within(alone.regions.clone());
        let back = read_back(&alone, &ring, &written.commit).await.unwrap();
        assert!(back == expected(files), "{} in {}", written.commit.id, region.name);
    }
}

fn change(file: &mut Made, page: usize, seed: u64) {
    let at = page * PAGE_SIZE;
    let end = (at + PAGE_SIZE).min(file.bytes.len());
    file.bytes[at..end].copy_from_slice(&noise(seed, end - at));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_restores_link_by_link_and_stores_what_changed() {
    let fixture = Fixture::memory(2, 2).await;
    let mut files = awkward_files();
    let full = next(&fixture, &files).await;
    assert_eq!((full.commit.kind, full.commit.parent.clone()), (BackupKind::Full, None));
    assert_eq!(full.full_because.as_deref(), Some("there is no earlier backup of ledger"));
    assert_eq!(full.pages.changed, full.pages.read);

    let before = files.clone();
    let same = next(&fixture, &files).await;
    assert_eq!((same.commit.kind, same.commit.parent.as_ref()), (BackupKind::Incremental, Some(&full.commit.id)));
    assert_eq!((same.pages.read, same.pages.changed), (full.pages.read, 0));
    assert!(same.commit.stored_bytes * 50 < full.commit.stored_bytes, "{:?}", same.commit);

    // A page here and there; one file grows, one shrinks, one becomes zeros, one is new, one is dropped, others swap.
    change(&mut files[0], 1030, 90);
    change(&mut files[0], 2999, 91);
    files[1].bytes.truncate(18 * PAGE_SIZE);
    files[2].bytes.resize(80 * PAGE_SIZE + 5, 7);
    files[5].bytes.fill(0);
    files.push(Made::new("base/new", noise(92, 70 * PAGE_SIZE)));
    files.remove(10);
    files.reverse();
    let third = next(&fixture, &files).await;
    assert_eq!(third.commit.parent.as_ref(), Some(&same.commit.id));
    assert!(third.pages.changed < 2000 && third.commit.stored_bytes * 5 < full.commit.stored_bytes, "{third:?}");

    // The closure names two keysets at least, and none of what only the others need.
    let lines = catalog::inventory(&fixture.repository, &third.commit).await.unwrap();
    assert!(catalog::keysets(&third.commit, &lines).contains(&full.commit.keyset));
    let keys: BTreeSet<_> = lines.iter().map(|line| line.key.as_str()).collect();
    assert_eq!(keys.len(), lines.len(), "an object is listed twice");
    assert!(!keys.iter().any(|key| key.starts_with("manifests/") && !key.contains(third.commit.id.as_str())));

    assert_restores(&fixture, &full, &before).await;

    // Whatever becomes of the other backups as backups, this one stays whole.
    for other in [&full, &same] {
        for store in &fixture.stores {
            store.lose(&layout::commit(&other.commit.target, &other.commit.id)).await;
            store.lose(&layout::manifest(&other.commit.target, &other.commit.id, 0)).await;
        }
    }
    assert_restores(&fixture, &third, &files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_is_mostly_dead_is_left_by_moving_what_lives() {
    let fixture = Fixture::memory(2, 2).await;
    let mut files = vec![Made::new("base/large", noise(1, 600 * PAGE_SIZE)), Made::new("base/small", noise(2, 9000))];
    let full = next(&fixture, &files).await;
    (0..400).for_each(|page| change(&mut files[0], page, 100 + page as u64));
    let second = next(&fixture, &files).await;
    // The first that knows from its parent's map how empty the pack is.
    let third = next(&fixture, &files).await;
    assert_eq!((full.moved.packs, second.moved.packs), (0, 0));
    assert!(third.moved.packs >= 1, "{:?}", third.moved);
    let live = 200 * PAGE_SIZE as u64;
    assert!((live..live + (1 << 20)).contains(&third.moved.bytes), "{:?}", third.moved);
    let packs_of_full = async |written: &Written| {
        let lines = catalog::inventory(&fixture.repository, &written.commit).await.unwrap();
        let keys = lines.into_iter().map(|line| line.key).filter(|key| key.starts_with("packs/"));
        keys.filter(|key| key.contains(full.commit.id.as_str())).collect::<BTreeSet<_>>()
    };
    let (needed, left) = (packs_of_full(&third).await, packs_of_full(&second).await);
    let left: Vec<_> = left.difference(&needed).collect();
    assert!(!left.is_empty());
    // What was moved is not moved again, and nobody needs the old pack any more.
    let fourth = next(&fixture, &files).await;
    assert_eq!(fourth.moved.packs, 0);
    for store in &fixture.stores {
        for pack in &left {
            store.lose(pack).await;
        }
    }
    for written in [&third, &fourth] {
        assert_restores(&fixture, written, &files).await;
    }
}

/// What happens to a file between two backups.
#[derive(Debug, Clone)]
enum Step {
    Change { file: usize, page: usize },
    Resize { file: usize, bytes: usize },
    Zero { file: usize },
    Drop { file: usize },
    Create { bytes: usize },
    Swap { one: usize, other: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![0usize..70_000, 400_000usize..800_000, 8_300_000usize..8_600_000];
    prop_oneof![
        4 => (0usize..99, 0usize..1200).prop_map(|(file, page)| Step::Change { file, page }),
        2 => (0usize..99, size.clone()).prop_map(|(file, bytes)| Step::Resize { file, bytes }),
        1 => (0usize..99).prop_map(|file| Step::Zero { file }),
        1 => (0usize..99).prop_map(|file| Step::Drop { file }),
        2 => size.prop_map(|bytes| Step::Create { bytes }),
        1 => (0usize..99, 0usize..99).prop_map(|(one, other)| Step::Swap { one, other }),
    ]
}

fn take(files: &mut Vec<Made>, step: &Step, seed: u64) {
    let (count, at) = (files.len(), |file: usize| file % files.len().max(1));
    match *step {
        Step::Create { bytes } => files.push(Made::new(&format!("base/made-{seed}"), noise(seed, bytes))),
        _ if count == 0 => {}
        Step::Change { file, page } => {
            let file = at(file);
            let pages = files[file].bytes.len().div_ceil(PAGE_SIZE).max(1);
            change(&mut files[file], page % pages, seed);
        }
        Step::Resize { file, bytes } => {
            let file = at(file);
            files[file].bytes.resize(bytes, seed as u8);
        }
        Step::Zero { file } => {
            let file = at(file);
            files[file].bytes.fill(0);
        }
        Step::Drop { file } => drop(files.remove(at(file))),
        // The same bytes under another name are not the same pages.
        Step::Swap { one, other } => {
            let (one, other) = (at(one), at(other));
            let kept = files[one].bytes.clone();
            files[one].bytes = std::mem::replace(&mut files[other].bytes, kept);
        }
    }
}

#[test]
fn any_history_restores_at_every_point() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let histories = proptest::collection::vec(proptest::collection::vec(step(), 0..6), 2..5);
    proptest!(ProptestConfig::with_cases(8), |(histories in histories)| {
        runtime.block_on(async {
            let fixture = Fixture::memory(1, 1).await;
            let mut files = vec![Made::new("base/1", noise(1, 1300 * PAGE_SIZE)), Made::new("base/2", noise(2, 5000))];
            let mut points = Vec::new();
            for (link, steps) in histories.iter().enumerate() {
                for (number, step) in steps.iter().enumerate() {
                    take(&mut files, step, (link * 100 + number + 10) as u64);
                }
                points.push((next(&fixture, &files).await, files.clone()));
            }
            for (link, (written, files)) in points.iter().enumerate() {
                assert_eq!(written.full_because.is_some(), link == 0, "{:?}", written.full_because);
                assert_restores(&fixture, written, files).await;
            }
        });
    });
}

/// Why the next backup would be a full one.
async fn reason(fixture: &Fixture, system_id: u64) -> Option<String> {
    let target = options().target;
    let state = state_path(fixture.files.path(), &target);
    let basis =
        choose(&fixture.repository, &fixture.writer.holders, (&target, SystemId(system_id)), state).await.unwrap();
    basis.full_because().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_a_commit_names_is_believed() {
    let (fixture, other) = (Fixture::memory(2, 2).await, Fixture::memory(2, 2).await);
    let files = [Made::new("base/1", noise(5, 90 * PAGE_SIZE)), Made::new("base/2", noise(6, 100))];
    next(&fixture, &files).await;
    next(&other, &files).await;
    let path = state_path(fixture.files.path(), &options().target);
    let good = std::fs::read(&path).unwrap();
    let keep = |bytes: &[u8]| place(&path, bytes, 0o600).unwrap();
    assert_eq!(reason(&fixture, 7).await, None);

    let told = reason(&fixture, 8).await.unwrap();
    assert!(told.contains("another system identifier"), "{told}");
    for at in (0..good.len()).step_by(61) {
        let mut wrong = good.clone();
        wrong[at] ^= 4;
        keep(&wrong);
        let told = reason(&fixture, 7).await.unwrap_or_else(|| panic!("byte {at} was believed"));
        assert!(told.contains("is not the page map"), "{told}");
    }
    keep(&good[..good.len() - 1]);
    assert!(reason(&fixture, 7).await.unwrap().contains("is not the page map"));
    keep(&std::fs::read(state_path(other.files.path(), &options().target)).unwrap());
    assert!(reason(&fixture, 7).await.unwrap().contains("is not the page map"));

    // Another machine took a backup meanwhile, perhaps under a clock that is ahead: what is remembered here is of the one
    // before, and as good as it was.
    keep(&good);
    fixture.clock.advance(60);
    fixture.backup(&files, Some(need(1000, 1090))).await;
    assert_eq!(reason(&fixture, 7).await, None);
    std::fs::remove_file(&path).unwrap();
    assert!(reason(&fixture, 7).await.unwrap().contains("no page map was kept"));
    let full = next(&fixture, &files).await;
    assert_eq!(full.commit.kind, BackupKind::Full);
    std::fs::remove_file(&path).unwrap();
    assert!(reason(&fixture, 7).await.unwrap().contains("is not in"));
    let full = next(&fixture, &files).await;
    assert!(full.full_because.unwrap().contains("is not in"));
    assert_eq!(next(&fixture, &files).await.commit.kind, BackupKind::Incremental);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_rot_in_the_state_during_a_backup_are_stored_anew() {
    use std::os::unix::fs::FileExt;
    let fixture = Fixture::memory(1, 1).await;
    let files = [Made::new("base/1", noise(5, 1500 * PAGE_SIZE))];
    let full = next(&fixture, &files).await;
    let target = options().target;
    let path = state_path(fixture.files.path(), &target);
    let basis =
        choose(&fixture.repository, &fixture.writer.holders, (&target, SystemId(7)), path.clone()).await.unwrap();
    assert!(matches!(basis, Basis::Parent(_)));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 64], 6000).unwrap();
    fixture.clock.advance(60);
    let options = BackupOptions { state: Some(path), ..options() };
    let begun = BackupWriter::begin;
    let mut writer = begun(&fixture.repository, &fixture.writer, options, basis).await.unwrap();
    send(&mut writer, &files).await;
    writer.flush().await.unwrap();
    let written = writer.commit(None).await.unwrap();
    // Either of its two chunks.
    assert!([1024, 476].contains(&written.pages.changed), "{:?}", written.pages);
    assert!(written.commit.stored_bytes < full.commit.stored_bytes);
    assert_restores(&fixture, &written, &files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_shared_that_too_few_regions_hold() {
    let fixture = Fixture::memory(3, 2).await;
    let mut files = [Made::new("base/1", noise(5, 90 * PAGE_SIZE)), Made::new("base/2", noise(6, 100))];
    let full = next(&fixture, &files).await;
    let lose_packs = async |region: usize| {
        for (key, _) in fixture.stores[region].contents().await {
            if key.starts_with("packs/") {
                fixture.stores[region].lose(&key).await;
            }
        }
    };
    // One region lost them: two still hold what is shared, and the third owes it.
    lose_packs(2).await;
    change(&mut files[0], 3, 1);
    fixture.clock.advance(60);
    let written = fixture.next_backup(&files).await;
    assert_eq!(written.commit.parent.as_ref(), Some(&full.commit.id));
    let owes: Vec<_> = written.regions.iter().map(|region| region.missing_objects > 0).collect();
    assert_eq!(owes, [false, false, true]);

    lose_packs(1).await;
    let told = reason(&fixture, 7).await.unwrap();
    assert!(told.contains("in fewer than 2 regions"), "{told}");
    fixture.clock.advance(60);
    let written = fixture.next_backup(&files).await;
    assert_eq!(written.commit.kind, BackupKind::Full);
    assert_restores(&fixture, &written, &files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_shared_that_a_new_key_holder_could_not_open() {
    let mut fixture = Fixture::memory(1, 1).await;
    let files = [Made::new("base/1", noise(5, 90 * PAGE_SIZE))];
    next(&fixture, &files).await;
    assert_eq!(reason(&fixture, 7).await, None);
    let (_, recipient) = generate_identity(fixture.clock.now());
    fixture.writer.holders.list.push(Arc::new(AgeHolder::new(&recipient).unwrap()));
    let told = reason(&fixture, 7).await.unwrap();
    assert!(told.contains(&recipient[..12]) && told.contains("cannot open all pages"), "{told}");
    assert_eq!(next(&fixture, &files).await.commit.kind, BackupKind::Full);
    assert_eq!(next(&fixture, &files).await.commit.kind, BackupKind::Incremental);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_packs_hold_every_frame() {
    let fixture = Fixture::memory(1, 1).await;
    let files = awkward_files();
    fixture.clock.advance(60);
    let limits = [SMALLEST_PACK, 1 << 20];
    for limit in limits {
        let options = BackupOptions { pack_size: limit, ..options() };
        let begun = BackupWriter::begin;
        let basis = Basis::nothing("a test");
        let mut writer = begun(&fixture.repository, &fixture.writer, options, basis).await.unwrap();
        send(&mut writer, &files).await;
        writer.flush().await.unwrap();
        let written = writer.commit(None).await.unwrap();
        let lines = catalog::inventory(&fixture.repository, &written.commit).await.unwrap();
        let packs: Vec<_> = lines.iter().filter(|line| line.key.starts_with("packs/")).collect();
        assert!(packs.len() > 30 && packs.iter().all(|pack| pack.size <= limit as u64), "{limit}");
        assert_restores(&fixture, &written, &files).await;
        fixture.clock.advance(60);
    }
}
