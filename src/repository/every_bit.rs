//! Every bit of every kind of object, every length it may be cut to, and every object that may stand in for another:
//! never believed, taken from another region where there is one, and told.
//!
//! One object of each class is damaged in every bit. Opening it again through the reader that restore uses is enough to
//! judge, since that is where bytes are checked; a sample of each class goes through a whole restore as well.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::model::commit::Commit;
use crate::model::{BackupId, Error, Lsn, Result, Timeline};
use crate::observe::SystemClock;
use crate::observe::progress::{Phase, Progress};
use crate::repository::catalog;
use crate::repository::handle::{self, Repository};
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::mend::{Scope, mend};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::restore::{CONTROL_FILE, Destination, KeptParts, ManifestParts, check_files, restore_files};
use crate::repository::survey::beside;
use crate::repository::testing::{Fixture, HISTORY, Made, log, need, regions_of, send};
use crate::repository::trust::Trust;
use crate::repository::wal::frame::FramePlace;
use crate::repository::wal::frames::fetch_frame;
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{branch_of, read_history, store_history};
use crate::store::Digest;

/// A prefix of every class whose bytes somebody relies on.
const CLASSES: [&str; 12] = [
    layout::REPOSITORY,
    layout::REGIONS,
    layout::SIGNERS,
    "keysets/",
    layout::HISTORY,
    layout::WAL,
    layout::GAPS,
    "packs/",
    "manifests/",
    "inventories/",
    layout::COMMITS,
    layout::INTENTS,
];

/// The head of a pack names the object for people; no reader asks for these bytes, the inventory's digest covers them.
const PACK_HEAD: usize = 8;

fn branch() -> BranchId {
    let log = log();
    BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
}

fn phase() -> Arc<Phase> {
    Arc::new(Progress::new(Arc::new(SystemClock::new())).begin("look", None))
}

/// A repository with objects of every class, and what each of its objects says.
struct Vault {
    fixture: Fixture,
    backups: BTreeMap<BackupId, (Commit, Vec<InventoryLine>)>,
    objects: BTreeMap<String, Bytes>,
    good: BTreeMap<String, String>,
}

impl Vault {
    /// A history, a gap, an epoch of two data frames with END, and two backups of one target.
    async fn new(regions: usize) -> Self {
        let fixture = Fixture::memory(regions, 1).await;
        fill(&fixture, &fixture.writer).await;
        Self::of(fixture).await
    }

    async fn of(fixture: Fixture) -> Self {
        let (backups, objects, good) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut vault = Self { fixture, backups, objects, good };
        let repository = vault.fixture.repository.clone();
        repository.trust.refresh(&repository.regions).await.unwrap();
        for backup in catalog::backups(&repository, None).await.unwrap().0 {
            let inventory = catalog::inventory(&repository, &backup.commit).await.unwrap();
            vault.backups.insert(backup.commit.id.clone(), (backup.commit, inventory));
        }
        let contents = vault.fixture.stores[0].contents().await;
        vault.objects = contents.into_iter().filter(|(key, _)| !key.starts_with(layout::ESCAPE)).collect();
        for key in vault.objects.keys().cloned().collect::<Vec<_>>() {
            let read = vault.read(&repository, &key).await.unwrap_or_else(|error| panic!("{key}: {error}"));
            vault.good.insert(key, read);
        }
        assert!(repository.regions.incidents().is_empty());
        vault
    }

    /// The repository as a process sees it that has met no trouble yet, in the first `count` regions.
    fn fresh(&self, count: usize) -> Repository {
        Repository { regions: regions_of(&self.fixture.stores[..count], 1), ..self.fixture.repository.clone() }
    }

    fn of_class<'a>(&'a self, class: &'a str) -> impl Iterator<Item = (&'a String, &'a Bytes)> {
        self.objects.iter().filter(move |(key, _)| key.starts_with(class))
    }

    /// What one object says, through the reader that restore, verify or a writer has for its class.
    async fn read(&self, repository: &Repository, key: &str) -> Result<String> {
        let parts: Vec<_> = key.split('/').collect();
        let missing = || Error::not_found(format!("{key} is not there"));
        let regions = &repository.regions;
        let backup = |id: &str| &self.backups[&id.parse::<BackupId>().unwrap()];
        Ok(match parts.as_slice() {
            [layout::REPOSITORY] => Repository::open(regions.clone(), Default::default()).await?.id.to_string(),
            ["regions", ..] => {
                let known = handle::siblings(regions).await?;
                known.first().map(|record| format!("{record:?}")).ok_or_else(missing)?
            }
            ["signers", id] => {
                let trust = Trust::load(regions, Default::default()).await?;
                trust.knows(&id.parse().unwrap()).then(String::new).ok_or_else(missing)?
            }
            ["keysets", target, id, _] => {
                let ring = self.fixture.ring.within(regions.clone());
                let keyset = ring.open(&target.parse().unwrap(), &id.parse().unwrap()).await?;
                hex::encode(&*keyset.to_secret())
            }
            ["history", ..] => {
                format!("{:?}", read_history(repository, log().system_id, Timeline(2), &branch_of(HISTORY)).await?)
            }
            ["wal", .., epoch, seq] => self.frame(repository, epoch, seq).await?,
            ["gaps", ..] => match gaps::read(repository, &branch()).await? {
                (_, errors) if !errors.is_empty() => return Err(errors[0].clone()),
                (gaps, _) => format!("{gaps:?}"),
            },
            ["packs", _, id, _] => {
                let (commit, inventory) = backup(id);
                check_files(repository, &self.fixture.ring, (commit, inventory), &phase()).await?.to_string()
            }
            ["manifests", _, id, _] => {
                let (commit, inventory) = backup(id);
                let mut parts = ManifestParts::new(repository, &self.fixture.ring, commit, inventory).await?;
                let mut lines = Vec::new();
                while let Some(part) = parts.next().await? {
                    lines.extend(part);
                }
                format!("{lines:?}")
            }
            ["inventories", _, id, _] => format!("{:?}", catalog::inventory(repository, &backup(id).0).await?),
            ["commits", target, id] => {
                let (backups, errors) = catalog::backups(repository, Some(&target.parse().unwrap())).await?;
                let found = backups.iter().find(|backup| backup.commit.id.as_str() == *id);
                let error = || errors.into_iter().next().unwrap_or_else(missing);
                format!("{:?}", found.ok_or_else(error)?.commit)
            }
            ["intents", id] => {
                let intent = beside::read_intent(repository, &id.parse().unwrap()).await;
                format!("{:?}", intent.ok_or_else(missing)?)
            }
            _ => panic!("nobody reads {key}"),
        })
    }

    async fn frame(&self, repository: &Repository, epoch: &str, seq: &str) -> Result<String> {
        let BranchId { system_id, timeline, branch } = branch();
        let (epoch, seq) = (epoch.parse().unwrap(), layout::parse_seq(seq).unwrap());
        let place = FramePlace { system_id, timeline, branch, epoch, seq };
        let keyset = self.keyset_of(&self.objects[&place.key()]).await;
        let frame = fetch_frame(repository, &place).await?;
        let wal = frame.open(keyset.data().unwrap())?;
        Ok(format!("{:?} {wal:?}", frame.header))
    }

    /// The keyset that an intact frame names.
    async fn keyset_of(&self, frame: &[u8]) -> Arc<crate::keys::keyset::Keyset> {
        let text = String::from_utf8_lossy(frame);
        let id = text.split("\"keyset\":\"").nth(1).unwrap().split('"').next().unwrap();
        self.fixture.ring.open(&log().target, &id.parse().unwrap()).await.unwrap()
    }

    async fn put(&self, key: &str, bytes: &[u8]) {
        self.fixture.stores[0].damage(key, bytes.to_vec()).await;
    }

    async fn heal(&self, key: &str) {
        self.put(key, &self.objects[key]).await;
    }

    /// With the wrong bytes in the first region: the second region's are read, and the first is told.
    async fn assert_taken_elsewhere(&self, key: &str, wrong: &[u8], what: &str) {
        self.put(key, wrong).await;
        let repository = self.fresh(2);
        let read = self.read(&repository, key).await.unwrap_or_else(|error| panic!("{key}, {what}: {error}"));
        assert!(read == self.good[key], "{key}, {what}: believed");
        let incidents = repository.regions.incidents();
        let told = incidents.iter().any(|incident| incident.region.as_str() == "a" && incident.key == key);
        assert!(told, "{key}, {what}: not told: {incidents:?}");
    }

    /// With the wrong bytes in the only region: an error that names the object.
    async fn assert_stops(&self, key: &str, wrong: &[u8], what: &str) {
        self.put(key, wrong).await;
        let error = match self.read(&self.fresh(1), key).await {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{key}, {what}: believed"),
        };
        // A keyset may have several wraps: the error names the keyset.
        let name = if key.starts_with("keysets/") { key.split('/').nth(2).unwrap() } else { key };
        assert!(error.contains(name), "{key}, {what}: {error}");
    }

    /// A restore by a process that knows nothing yet, from the first region alone.
    async fn restore(&self, directory: &std::path::Path) -> Result<BTreeMap<String, Vec<u8>>> {
        let repository = Repository::open(self.fresh(1).regions, Default::default()).await?;
        let ring = self.fixture.ring.within(repository.regions.clone());
        let (backups, unreadable) = catalog::backups(&repository, None).await?;
        if let Some(error) = unreadable.into_iter().next() {
            return Err(error);
        }
        let mut files = BTreeMap::new();
        for backup in &backups {
            let place = directory.join(backup.commit.id.as_str());
            std::fs::create_dir(&place).unwrap();
            files.extend(restore_one(&repository, &ring, &backup.commit, place).await?);
        }
        Ok(files)
    }
}

async fn restore_one(
    repository: &Repository,
    ring: &KeyRing,
    commit: &Commit,
    directory: std::path::PathBuf,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let inventory = catalog::inventory(repository, commit).await?;
    let destination = Destination::empty(directory.clone(), BTreeMap::new());
    let mut names = Vec::new();
    let mut tell = |file: crate::repository::restore::WrittenFile| {
        names.push(file.path);
        Ok(())
    };
    restore_files(repository, ring, (commit, &inventory, KeptParts::default()), &destination, (&phase(), &mut tell))
        .await?;
    let read = |name: String| {
        let path = if name == CONTROL_FILE { format!("{name}.drctl-pending") } else { name.clone() };
        (format!("{} {name}", commit.id), std::fs::read(directory.join(path)).unwrap())
    };
    Ok(names.into_iter().map(read).collect())
}

/// Objects of every class, by `writer`, which may serve other repositories too.
async fn fill(fixture: &Fixture, writer: &handle::Writer) {
    let repository = &fixture.repository;
    let out = FanOut::new(&repository.regions, Patience::BACKUP);
    store_history(repository, (log().system_id, Timeline(2)), HISTORY, &out).await.unwrap();
    let gap = Gap::new(&log().target, &branch(), (Lsn(500), Lsn(1000)), "gone", writer.clock.now());
    gaps::record(repository, writer, &gap, &out).await.unwrap();
    out.drain().await;
    fixture.epoch_by(writer, 1000, &[40, 50], true).await;
    for round in 0..2_u8 {
        let control = Made::new(CONTROL_FILE, vec![round; 100]);
        let files = [Made::new("base/1", format!("tiny {round}").into_bytes()), control];
        let options = crate::repository::testing::options();
        let basis = crate::repository::backup::parent::Basis::nothing("a test");
        let begun = crate::repository::backup::writer::BackupWriter::begin(repository, writer, options, basis).await;
        let mut backup = begun.unwrap();
        send(&mut backup, &files).await;
        backup.flush().await.unwrap();
        backup.commit(Some(need(1000, 1090))).await.unwrap();
        fixture.clock.advance(60);
    }
}

/// The object of each class that is damaged in every bit: the first, for WAL a frame with a body.
fn samples(vault: &Vault) -> Vec<(String, Bytes)> {
    let first = |class: &&str| {
        let found = vault.of_class(class).next().unwrap_or_else(|| panic!("nothing of class {class}"));
        (found.0.clone(), found.1.clone())
    };
    CLASSES.iter().map(first).collect()
}

fn flipped(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut wrong = bytes.to_vec();
    wrong[bit / 8] ^= 1 << (bit % 8);
    wrong
}

/// The bytes that a reader of this class looks at.
fn read_from(key: &str) -> usize {
    if key.starts_with("packs/") { PACK_HEAD } else { 0 }
}

#[tokio::test]
async fn every_flipped_bit_is_told_and_taken_from_the_other_region() {
    let vault = Vault::new(2).await;
    for (key, bytes) in samples(&vault) {
        for bit in read_from(&key) * 8..bytes.len() * 8 {
            vault.assert_taken_elsewhere(&key, &flipped(&bytes, bit), &format!("bit {bit}")).await;
        }
        vault.heal(&key).await;
    }
}

#[tokio::test]
async fn every_cut_is_told_and_taken_from_the_other_region() {
    let vault = Vault::new(2).await;
    for (key, bytes) in samples(&vault) {
        for length in 0..bytes.len() {
            vault.assert_taken_elsewhere(&key, &bytes[..length], &format!("cut to {length}")).await;
        }
        vault.heal(&key).await;
    }
}

#[tokio::test]
async fn without_a_good_copy_the_reader_stops_and_nothing_can_be_started() {
    let vault = Vault::new(1).await;
    let whole = tempfile::tempdir().unwrap();
    let good = vault.restore(whole.path()).await.unwrap();
    for (key, bytes) in samples(&vault) {
        let bits = read_from(&key) * 8..bytes.len() * 8;
        for (round, bit) in bits.step_by(bytes.len() * 8 / 24 + 1).enumerate() {
            let wrong = if round % 4 == 3 { bytes[..bit / 8].to_vec() } else { flipped(&bytes, bit) };
            vault.assert_stops(&key, &wrong, &format!("bit {bit}")).await;
            let directory = tempfile::tempdir().unwrap();
            match vault.restore(directory.path()).await {
                Ok(read) => assert!(read == good, "{key}, bit {bit}: believed"),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
            for id in vault.backups.keys() {
                assert!(!directory.path().join(id.as_str()).join(CONTROL_FILE).exists(), "{key}, bit {bit}");
            }
        }
        vault.heal(&key).await;
    }
}

/// Another object never stands in: not the neighbour, not that of an older or a newer backup, not that of another
/// repository, even if the same signer wrote it for the same key holders.
#[tokio::test]
async fn no_object_stands_in_for_another() {
    let vault = Vault::new(2).await;
    let cousin = Fixture::memory(1, 1).await;
    fill(&cousin, &vault.fixture.writer).await;
    let stranger = Vault::new(1).await;
    let mut others = cousin.stores[0].contents().await;
    others.extend(stranger.objects.iter().map(|(key, bytes)| (key.clone(), bytes.clone())));
    others.extend(vault.objects.iter().map(|(key, bytes)| (key.clone(), bytes.clone())));
    let mut swaps = 0;
    // A whole repository in place of a region is no damage but a mistake, and stops everything.
    for class in &CLASSES[1..] {
        for (key, right) in vault.of_class(class) {
            let of_class = others.iter().filter(|(other, body)| other.starts_with(class) && body != right);
            for (other, body) in of_class {
                vault.assert_taken_elsewhere(key, body, &format!("replaced with {other}")).await;
                vault.assert_stops(key, body, &format!("replaced with {other}")).await;
                swaps += 1;
            }
            vault.heal(key).await;
        }
    }
    assert!(swaps > 100, "{swaps}");
    vault.put(layout::REPOSITORY, &stranger.objects[layout::REPOSITORY]).await;
    let mixed = Repository::open(vault.fresh(2).regions, Default::default()).await.unwrap_err();
    assert!(mixed.to_string().contains("regions a and b hold different repositories"), "{mixed}");
    let turned = Repository::open(vault.fresh(1).regions, Default::default()).await.unwrap();
    let (backups, errors) = catalog::backups(&turned, None).await.unwrap();
    assert_eq!((backups.len(), errors.len()), (0, 2), "{errors:?}");
}

/// Old bytes under a name that is free: a reader that lists meets them, and does not believe them.
#[tokio::test]
async fn no_old_object_is_replayed_under_a_new_name() {
    let vault = Vault::new(1).await;
    let (last, body) = vault.of_class(layout::COMMITS).last().unwrap();
    let newer = BackupId::new(
        &log().target,
        vault.fixture.writer.clock.now() + chrono::TimeDelta::days(1),
        vault.fixture.writer.rng.as_ref(),
    )
    .unwrap();
    assert!(newer.as_str() > last.rsplit('/').next().unwrap());
    let replayed = layout::commit(&log().target, &newer);
    vault.put(&replayed, body).await;
    let (backups, errors) = catalog::backups(&vault.fresh(1), None).await.unwrap();
    assert_eq!((backups.len(), errors.len()), (2, 1));
    assert!(errors[0].to_string().contains(newer.as_str()), "{}", errors[0]);
    vault.fixture.stores[0].lose(&replayed).await;

    let frames: Vec<_> = vault.of_class(layout::WAL).collect();
    let (end, _) = frames.last().unwrap();
    let (epoch, seq) = end.rsplit_once('/').unwrap();
    let next = layout::wal_frame(&format!("{epoch}/"), layout::parse_seq(seq).unwrap() + 1);
    vault.put(&next, frames[0].1).await;
    let repository = vault.fresh(1);
    let loaded = crate::repository::wal::reader::BranchLog::load(&repository, branch()).await;
    assert!(loaded.damaged.iter().any(|error| error.to_string().contains(&next)), "{:?}", loaded.damaged);
}

/// With three regions every class is mended without a key, and then nothing is left to do.
#[tokio::test]
async fn repair_mends_every_class() {
    let vault = Vault::new(3).await;
    let good = vault.fixture.stores[0].contents().await;
    let scope = Scope::default();
    for (key, bytes) in good.iter().filter(|(key, _)| !key.starts_with(layout::INTENTS)) {
        for wrong in [flipped(bytes, bytes.len() * 4), bytes[..bytes.len() - 1].to_vec()] {
            vault.put(key, &wrong).await;
            let mended = mend(&vault.fresh(3), &scope, &phase()).await.unwrap();
            assert_eq!(mended[0].replaced, std::slice::from_ref(key), "{mended:?}");
            assert!(mended.iter().all(|region| region.still_missing.is_empty()), "{mended:?}");
            let there = crate::store::ObjectStore::get(vault.fixture.stores[0].as_ref(), key, None).await.unwrap();
            assert!(there == *bytes, "{key}");
        }
    }
    assert!(vault.fixture.stores[0].contents().await == good);
}

/// Where two regions disagree, what proves itself is mended too.
#[tokio::test]
async fn repair_mends_what_proves_itself_with_one_other_region() {
    let vault = Vault::new(2).await;
    for (key, bytes) in samples(&vault).iter().filter(|(key, _)| !key.starts_with(layout::INTENTS)) {
        // A wrap of a WAL epoch is proven by its holder alone.
        if key.starts_with("keysets/") {
            continue;
        }
        for bit in (0..bytes.len() * 8).step_by(bytes.len() / 2 + 1) {
            vault.put(key, &flipped(bytes, bit)).await;
            let mended = mend(&vault.fresh(2), &Scope::default(), &phase()).await.unwrap();
            assert_eq!(mended[0].replaced, std::slice::from_ref(key), "bit {bit} of {key}: {mended:?}");
            assert_eq!(
                Digest::of(&vault.fixture.stores[0].contents().await.iter().find(|(k, _)| k == key).unwrap().1),
                Digest::of(bytes)
            );
        }
    }
}
