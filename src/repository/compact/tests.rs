//! Compaction over made-up backups: whatever is pruned before and after, every moment that is left reads back from every
//! region alone, and nothing that a copy took the place of is needed any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::TimeDelta;
use proptest::prelude::*;

use crate::codec::sign::sign_text;
use crate::model::commit::Commit;
use crate::model::pages::PAGE_SIZE;
use crate::model::{BackupId, Kind};
use crate::observe::progress::Progress;
use crate::repository::catalog::{self, commit_context};
use crate::repository::compact::{Copied, Hands, Survey, alike, run, survey};
use crate::repository::handle::Repository;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::layout;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::pages::pack::SMALLEST_PACK;
use crate::repository::testing::{Fault, Fixture, Made, options};
use crate::repository::tests::{expected, noise, read_back};
use crate::store::{Digest, ObjectStore as _};

const SMALL: usize = 6;

/// Backups, and what each of them holds.
struct Scene {
    fixture: Fixture,
    files: Vec<Made>,
    held: BTreeMap<BackupId, Vec<Made>>,
    seed: u64,
}

impl Scene {
    async fn new(pages: usize) -> Self {
        let mut files = vec![Made::new("base/large", noise(1, pages * PAGE_SIZE))];
        // Small files share a chunk; when one of them changes, the others use a part of it.
        files.extend((0..SMALL).map(|number| Made::new(&format!("base/small-{number}"), noise(2, 20 * PAGE_SIZE))));
        Self { fixture: Fixture::memory(2, 2).await, files, held: BTreeMap::new(), seed: 100 }
    }

    fn change(&mut self, pages: impl IntoIterator<Item = usize>) {
        for page in pages {
            self.seed += 1;
            let at = page * PAGE_SIZE;
            self.files[0].bytes[at..at + PAGE_SIZE].copy_from_slice(&noise(self.seed, PAGE_SIZE));
        }
    }

    fn change_small(&mut self, number: usize) {
        self.seed += 1;
        self.files[1 + number].bytes = noise(self.seed, 20 * PAGE_SIZE);
    }

    async fn backup(&mut self) -> BackupId {
        self.fixture.clock.advance(60);
        let id = self.fixture.next_backup(&self.files).await.commit.id;
        self.held.insert(id.clone(), self.files.clone());
        id
    }

    /// As prune does it: its records go, and what no other backup lists.
    async fn prune(&mut self, id: &BackupId) {
        self.held.remove(id);
        for store in &self.fixture.stores {
            store.lose(&layout::commit(&options().target, id)).await;
        }
        let needed = self.needed().await;
        for store in &self.fixture.stores {
            for (key, _) in store.contents().await {
                let of_backup = ["packs/", "manifests/", "inventories/", "keysets/"].iter().any(|c| key.starts_with(c));
                if of_backup && !needed.contains(&key) {
                    store.lose(&key).await;
                }
            }
        }
    }

    async fn commits(&self) -> Vec<Commit> {
        let repository = self.fixture.reopen().await.unwrap();
        let (backups, unreadable) = catalog::backups(&repository, None).await.unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        backups.into_iter().map(|backup| backup.commit).collect()
    }

    async fn needed(&self) -> BTreeSet<String> {
        let mut needed = BTreeSet::new();
        for commit in self.commits().await {
            let lines = catalog::inventory(&self.fixture.repository, &commit).await.unwrap();
            needed.extend(lines.into_iter().map(|line| line.key));
            needed.extend(catalog::own_records(&commit));
        }
        needed
    }

    async fn look(&self, progress: &Progress) -> Survey {
        survey(self.hands(progress), &options().target, &BTreeSet::new()).await.unwrap()
    }

    fn hands<'a>(&'a self, progress: &'a Progress) -> Hands<'a> {
        let Fixture { repository, writer, ring, .. } = &self.fixture;
        Hands { repository, writer, ring, pack_size: SMALLEST_PACK, progress }
    }

    /// Looks and copies.
    async fn compact(&mut self) -> (Survey, Vec<Copied>) {
        let progress = Progress::new(self.fixture.writer.clock.clone());
        let found = self.look(&progress).await;
        let mut copies = Vec::new();
        run(self.hands(&progress), &found, &mut copies).await.unwrap();
        for copied in &copies {
            self.held.insert(copied.copy.clone(), self.held[&copied.original].clone());
        }
        (found, copies)
    }

    /// Every backup there is holds what it held, in each region alone.
    async fn is_whole(&self) {
        let repository = self.fixture.reopen().await.unwrap();
        let commits = self.commits().await;
        assert_eq!(commits.iter().map(|commit| &commit.id).collect::<BTreeSet<_>>(), self.held.keys().collect());
        for commit in &commits {
            for region in repository.regions.all() {
                let regions = repository.regions.only(&region.name).unwrap();
                let ring = self.fixture.ring.within(regions.clone());
                let alone = Repository { regions, ..repository.clone() };
                let back = read_back(&alone, &ring, commit).await.unwrap();
                assert!(back == expected(&self.held[&commit.id]), "{} in {}", commit.id, region.name);
            }
        }
    }

    async fn stored(&self) -> BTreeSet<String> {
        self.fixture.stores[0].contents().await.into_iter().map(|(key, _)| key).collect()
    }
}

/// A backup that needs a little of packs that others filled, which are gone.
async fn fragmented() -> (Scene, BackupId) {
    let mut scene = Scene::new(600).await;
    let full = scene.backup().await;
    // Whole frames of the first one are dead for the second, and all of them for those after it.
    scene.change(0..480);
    let kept = scene.backup().await;
    scene.change(480..600);
    scene.backup().await;
    scene.backup().await;
    scene.prune(&full).await;
    (scene, kept)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_takes_over_and_the_packs_that_it_left_go() {
    let (mut scene, kept) = fragmented().await;
    scene.is_whole().await;
    let before = scene.stored().await;
    let (found, copies) = scene.compact().await;
    assert!(
        !found.plan.packs.is_empty() && found.plan.moved_bytes > 0 && found.plan.renewed_bytes > 0,
        "{:?}",
        found.plan
    );
    assert_eq!(copies.iter().map(|copied| &copied.original).collect::<Vec<_>>(), [&kept]);
    assert!(before.is_subset(&scene.stored().await), "compaction removed something");
    scene.is_whole().await;
    let commits = scene.commits().await;
    let copy = commits.iter().find(|commit| commit.id == copies[0].copy).unwrap();
    let original = commits.iter().find(|commit| commit.id == kept).unwrap();
    assert!(copy.is_of_the_moment_of(original) && copy.origin() == &kept && copy.keyset != original.keyset);

    // One that has a copy already is not copied again; nor is what nobody else touches.
    assert_eq!(scene.compact().await.1, []);
    scene.prune(&kept).await;
    scene.is_whole().await;
    let after = scene.stored().await;
    let left: Vec<_> = found.plan.packs.iter().filter(|pack| after.contains(&pack.key)).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(scene.compact().await.1, []);
    // The next backup goes on from the newest, whose writer remembers it.
    scene.change([3]);
    scene.backup().await;
    scene.is_whole().await;
}

/// What a copy does not list goes with its original, so a COMMIT that leaves out anything is no copy; nor is one of other pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_the_same_and_stands_alone_is_alike() {
    let (mut scene, kept) = fragmented().await;
    let (_, copies) = scene.compact().await;
    let (id, target) = (&copies[0].copy, options().target);
    let progress = Progress::new(scene.fixture.writer.clock.clone());
    let alike = async || {
        let mut compared = alike(scene.hands(&progress), &target, id).await.unwrap();
        assert_eq!((compared.len(), &compared[0].0), (1, &kept));
        compared.remove(0).1
    };
    alike().await.unwrap();
    let commit = scene.commits().await.into_iter().find(|commit| commit.id == *id).unwrap();
    let lines = catalog::inventory(&scene.fixture.repository, &commit).await.unwrap();
    assert!(lines.len() > 5, "{lines:?}");
    let claim = async |lines: &[InventoryLine], commit: &Commit| {
        let (repository, signer) = (&scene.fixture.repository.id, &scene.fixture.writer.signer);
        let part = inventory::encode(lines, repository, id, signer).unwrap().remove(0);
        let mut summary = PartsSummary::default();
        summary.add(part.len() as u64, Digest::of(&part));
        let commit = Commit { inventory: summary.finish(), ..commit.clone() };
        let body = format!("{}\n", serde_json::to_string(&commit).unwrap());
        let bytes = sign_text(signer, &commit_context(repository, id), body.as_bytes()).unwrap();
        for store in &scene.fixture.stores {
            store.damage(&layout::inventory(&target, id, 0), part.clone()).await;
            store.damage(&layout::commit(&target, id), bytes.clone()).await;
        }
    };
    for left_out in 0..lines.len() {
        let mut fewer = lines.clone();
        let line = fewer.remove(left_out);
        claim(&fewer, &commit).await;
        assert_eq!(alike().await.unwrap_err().kind(), Kind::Damaged, "{line:?}");
    }
    let original = scene.commits().await.into_iter().find(|commit| commit.id == kept).unwrap();
    let known = catalog::inventory(&scene.fixture.repository, &original).await.unwrap();
    let known: BTreeSet<_> = known.into_iter().map(|line| line.key).collect();
    let shared = lines.iter().position(|line| known.contains(&line.key)).unwrap();
    let mut other = lines.clone();
    other[shared].sha256[0] ^= 1;
    claim(&other, &commit).await;
    assert_eq!(alike().await.unwrap_err().kind(), Kind::Damaged);

    // The newest backup holds other pages, and says that it is of that moment.
    let newest = scene.commits().await.pop().unwrap();
    let lines_of_newest = catalog::inventory(&scene.fixture.repository, &newest).await.unwrap();
    let Commit { keyset, manifest, .. } = newest;
    claim(&lines_of_newest, &Commit { keyset, manifest, ..commit.clone() }).await;
    assert_eq!(alike().await.unwrap_err().kind(), Kind::Damaged);
    claim(&lines, &commit).await;
    alike().await.unwrap();
}

/// What is moved belongs to several copies, and is locked as long as the youngest; what they share with others as long as each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_copies_need_is_locked_as_long_as_the_youngest_is_promised() {
    const KEEP: TimeDelta = TimeDelta::days(30);
    let mut scene = Scene::new(600).await;
    let mut gone = vec![scene.backup().await];
    scene.change(0..480);
    let older = scene.backup().await;
    scene.fixture.clock.advance(3 * 24 * 3600);
    scene.change(0..480);
    gone.push(scene.backup().await);
    scene.change(0..400);
    let younger = scene.backup().await;
    scene.change(0..600);
    scene.backup().await;
    for id in &gone {
        scene.prune(id).await;
    }
    scene.fixture.lock_for(KEEP).await;
    scene.fixture.clock.advance(5 * 24 * 3600);
    let (_, copies) = scene.compact().await;
    assert_eq!(copies.iter().map(|copied| &copied.original).collect::<Vec<_>>(), [&older, &younger]);
    let commits = scene.commits().await;
    let promised = |id: &BackupId| commits.iter().find(|commit| commit.id == *id).unwrap().started_at + KEEP;
    assert!(promised(&older) < promised(&younger));
    for copied in &copies {
        let commit = commits.iter().find(|commit| commit.id == copied.copy).unwrap();
        let lines = catalog::inventory(&scene.fixture.repository, commit).await.unwrap();
        let keys = lines.into_iter().map(|line| line.key).chain(catalog::own_records(commit));
        let mut shared = 0;
        for key in keys {
            let own = copies.iter().any(|copied| key.contains(copied.copy.as_str()));
            shared += usize::from(!own);
            for store in &scene.fixture.stores {
                let until = store.locked_until(&key, None).await.unwrap();
                match own {
                    true => assert_eq!(until, Some(promised(&younger)), "{key}"),
                    false => assert!(until >= Some(promised(&copied.original)), "{key}"),
                }
            }
        }
        assert!(shared > 0);
    }
}

/// Killed again and again, later each time: nothing that existed is touched, and what was begun is no backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_anywhere_it_leaves_what_was_there() {
    let (mut scene, _) = fragmented().await;
    let progress = Progress::new(scene.fixture.writer.clock.clone());
    let existed: BTreeSet<_> = scene.held.keys().cloned().collect();
    let mut kills = 0;
    loop {
        let found = scene.look(&progress).await;
        scene.fixture.stores.iter().for_each(|store| store.set(Fault::Slow(Duration::from_millis(4))));
        let mut copies = Vec::new();
        let work = run(scene.hands(&progress), &found, &mut copies);
        let done = tokio::time::timeout(Duration::from_millis(20 + 40 * kills), work).await;
        scene.fixture.stores.iter().for_each(|store| store.set(Fault::None));
        // What was on its way arrives or not.
        tokio::time::sleep(Duration::from_millis(30)).await;
        let now: BTreeSet<_> = scene.commits().await.into_iter().map(|commit| commit.id).collect();
        let new: Vec<_> = now.difference(&existed).cloned().collect();
        for copy in new {
            let original = found.plan.backups[0].clone();
            scene.held.insert(copy, scene.held[&original].clone());
        }
        scene.is_whole().await;
        if done.is_ok() || now.len() > existed.len() {
            break;
        }
        kills += 1;
        assert!(kills < 60);
    }
    assert!(kills > 2, "{kills}");
}

/// Whoever may write could say of any backup that it is a copy; what contradicts its original takes nobody's place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_of_the_moment_of_its_original_or_of_its_own() {
    let (mut scene, kept) = fragmented().await;
    scene.compact().await;
    let commits = scene.commits().await;
    let all: Vec<_> = commits.iter().collect();
    let copy = commits.iter().find(|commit| commit.copy.is_some()).unwrap();
    assert_eq!(catalog::copy_among(copy, &all).map(|copy| copy.backup), Some(kept));
    let forged = Commit { size_bytes: copy.size_bytes + 1, ..copy.clone() };
    assert_eq!(catalog::copy_among(&forged, &all), None);
}

/// A pack that no region holds as it was is not copied: what would be copied could be anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rotten_is_not_copied() {
    let (scene, _) = fragmented().await;
    let progress = Progress::new(scene.fixture.writer.clock.clone());
    let found = scene.look(&progress).await;
    let key = &found.plan.packs[0].key;
    let rot = async |regions: std::ops::Range<usize>| {
        for store in &scene.fixture.stores[regions] {
            let mut bytes = store.contents().await.into_iter().find(|(name, _)| name == key).unwrap().1.to_vec();
            bytes[100] ^= 1;
            store.damage(key, bytes).await;
        }
    };
    let good = scene.fixture.stores[1].contents().await.into_iter().find(|(name, _)| name == key).unwrap().1;
    rot(0..2).await;
    let error = run(scene.hands(&progress), &found, &mut Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains(key.as_str()), "{error}");
    assert_eq!(scene.commits().await.len(), scene.held.len());
    // The region that holds it as it was is enough.
    scene.fixture.stores[1].damage(key, good.to_vec()).await;
    run(scene.hands(&progress), &found, &mut Vec::new()).await.unwrap();
}

/// A sweep that has condemned the original, or a plan that lets everything go, is met before anything is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_expires_anyway_is_not_copied() {
    let (scene, kept) = fragmented().await;
    let progress = Progress::new(scene.fixture.writer.clock.clone());
    let expiring = BTreeSet::from([kept]);
    let found = survey(scene.hands(&progress), &options().target, &expiring).await.unwrap();
    assert!(found.plan.packs.is_empty() && found.plan.backups.is_empty(), "{:?}", found.plan);
}

#[test]
fn no_frame_is_lost_whatever_was_changed_and_pruned() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let small = proptest::collection::vec(0..SMALL, 0..5);
    let link = (proptest::collection::vec((0usize..16, 0usize..16), 0..4), small, any::<bool>());
    let links = proptest::collection::vec(link, 3..7);
    let copied = std::cell::Cell::new(0);
    proptest!(ProptestConfig::with_cases(16), |(links in links)| {
        runtime.block_on(async {
            let mut scene = Scene::new(256).await;
            let mut ids = vec![(scene.backup().await, true)];
            for (changes, small, goes) in &links {
                for (start, length) in changes {
                    scene.change(start * 16..(start + length).min(16) * 16);
                }
                small.iter().for_each(|number| scene.change_small(*number));
                ids.push((scene.backup().await, *goes));
            }
            let last = ids.pop().map(|(id, _)| id);
            for (id, _) in ids.iter().filter(|(_, goes)| *goes) {
                scene.prune(id).await;
            }
            let (found, copies) = scene.compact().await;
            copied.set(copied.get() + copies.len());
            scene.is_whole().await;
            for one in &copies {
                assert!(Some(&one.original) != last.as_ref());
                scene.prune(&one.original).await;
            }
            scene.is_whole().await;
            let stored = scene.stored().await;
            assert!(!found.plan.packs.iter().any(|pack| stored.contains(&pack.key)), "{:?}", found.plan);
        });
    });
    assert!(copied.get() > 3, "too few histories had anything to compact: {}", copied.get());
}
