//! A small repository in memory, with regions that can be made to fail, for the tests of this floor and of the jobs.

mod clock;
mod epochs;
mod faults;
mod made;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;

use chrono::TimeDelta;

pub use clock::TestClock;
pub use faults::{Fault, FaultyStore};
pub use made::{HISTORY, Made, log, need, options, send};

use crate::codec::SystemRng;
use crate::codec::sign::Signer;
use crate::keys::{AgeHolder, AgeOpener, generate_identity};
use crate::model::commit::WalNeed;
use crate::model::{Clock, Result, SystemId, Timeline};
use crate::repository::backup::parent::{Basis, choose, state_path};
use crate::repository::backup::writer::{BackupOptions, BackupWriter, Written};
use crate::repository::handle::{RegionRecord, Repository, Writer};
use crate::repository::keysets::{Holders, KeyRing};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::regions::lock_rule::Rule;
use crate::repository::regions::{Region, Regions};
use crate::repository::wal::log::store_history;
use crate::store::ObjectStore;
use crate::store::dir::DirStore;
use crate::store::memory::MemoryStore;

/// A repository with one age holder.
#[derive(Debug)]
pub struct Fixture {
    /// Its regions' stores, in order: `a`, `b`, …
    pub stores: Vec<Arc<FaultyStore>>,
    /// The repository.
    pub repository: Repository,
    /// Its writer.
    pub writer: Writer,
    /// Opens what the writer sealed.
    pub ring: Arc<KeyRing>,
    /// How long its regions lock, if they do.
    pub lock: Option<TimeDelta>,
    /// The writer's clock.
    pub clock: Arc<TestClock>,
    /// The holder's identity, and directories.
    pub files: tempfile::TempDir,
}

impl Fixture {
    /// `count` regions in memory.
    pub async fn memory(count: usize, quorum: usize) -> Self {
        let clock = TestClock::new();
        let inner = (0..count).map(|at| {
            Arc::new(MemoryStore::new(&at.to_string(), Arc::clone(&clock) as Arc<dyn Clock>)) as Arc<dyn ObjectStore>
        });
        Self::over(inner.collect(), quorum, clock, tempfile::tempdir().unwrap()).await
    }

    /// `count` regions in directories.
    pub async fn directories(count: usize, quorum: usize) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut inner: Vec<Arc<dyn ObjectStore>> = Vec::new();
        for at in 0..count {
            inner.push(Arc::new(DirStore::create(&files.path().join(at.to_string())).await.unwrap()));
        }
        Self::over(inner, quorum, TestClock::new(), files).await
    }

    async fn over(
        inner: Vec<Arc<dyn ObjectStore>>,
        quorum: usize,
        clock: Arc<TestClock>,
        files: tempfile::TempDir,
    ) -> Self {
        let stores: Vec<_> = inner.into_iter().map(|inner| Arc::new(FaultyStore::over(inner))).collect();
        let (identity, recipient) = generate_identity(clock.now());
        let path = files.path().join("age.txt");
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(identity.as_bytes()).unwrap();
        let writer = Writer {
            signer: Arc::new(Signer::generate(&SystemRng).unwrap()),
            holders: Holders { list: vec![Arc::new(AgeHolder::new(&recipient).unwrap())], min_wraps: 1 },
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            rng: Arc::new(SystemRng),
            host: "here".to_owned(),
        };
        let regions = regions_of(&stores, quorum);
        let sibling = RegionRecord {
            name: "a".parse().unwrap(),
            url: "memory:a".to_owned(),
            endpoint: None,
            aws_region: None,
            path_style: false,
        };
        Repository::init(&regions, &writer, &[sibling], &[("readme.md", b"how to")]).await.unwrap();
        let repository = Repository::open(regions, BTreeSet::new()).await.unwrap();
        let opener = Arc::new(AgeOpener::from_files(&[path]).unwrap());
        let ring = KeyRing::new(repository.id.clone(), repository.regions.clone(), vec![opener]);
        Self { stores, repository, writer, ring: Arc::new(ring), lock: None, clock, files }
    }

    /// The same regions opened anew, by a process that remembers nothing.
    pub async fn reopen(&self) -> Result<Repository> {
        let rule = self.lock.map(|keep| Rule { keep, clock: Arc::clone(&self.writer.clock) });
        let regions = regions_of(&self.stores, 1);
        let regions = regions.all().iter().map(|region| Region { lock: rule.clone(), ..region.clone() });
        let quorum = self.repository.regions.quorum();
        Repository::open(Regions::new(regions.collect(), quorum, quorum)?, BTreeSet::new()).await
    }

    /// From now on its regions lock what is written, for so long.
    pub async fn lock_for(&mut self, keep: TimeDelta) {
        self.lock = Some(keep);
        self.repository = self.reopen().await.unwrap();
    }

    /// Writes a backup of made-up files.
    pub async fn backup(&self, files: &[Made], wal: Option<WalNeed>) -> Written {
        let basis = Basis::nothing("a test");
        let mut writer = BackupWriter::begin(&self.repository, &self.writer, options(), basis).await.unwrap();
        send(&mut writer, files).await;
        writer.flush().await.unwrap();
        writer.commit(wal).await.unwrap()
    }

    /// The next backup as the job takes it: compared with the newest one, and remembered.
    pub async fn next_backup(&self, files: &[Made]) -> Written {
        let target = options().target;
        let state = state_path(self.files.path(), &target);
        let basis =
            choose(&self.repository, &self.writer.holders, (&target, SystemId(7)), state.clone()).await.unwrap();
        let options = BackupOptions { state: Some(state), ..options() };
        let mut writer = BackupWriter::begin(&self.repository, &self.writer, options, basis).await.unwrap();
        send(&mut writer, files).await;
        writer.flush().await.unwrap();
        writer.commit(Some(need(1000, 1090))).await.unwrap()
    }

    /// Mutes part of the names in every region.
    pub fn mute(&self, part: Option<&str>) {
        self.stores.iter().for_each(|store| store.mute(part.map(str::to_owned)));
    }
}

/// Regions over these stores, named `a`, `b`, …
pub fn regions_of(stores: &[Arc<FaultyStore>], quorum: usize) -> Regions {
    let region = |(at, store): (usize, &Arc<FaultyStore>)| {
        let name = char::from(b'a' + at as u8).to_string().parse().unwrap();
        Region { name, store: Arc::clone(store) as Arc<dyn ObjectStore>, lock: None }
    };
    Regions::new(stores.iter().enumerate().map(region).collect(), quorum, quorum).unwrap()
}

/// A repository with one object of each class at least: history, an epoch of two frames with END, and a backup of two
/// files that needs them.
pub async fn tiny(regions: usize, quorum: usize) -> Fixture {
    let fixture = Fixture::memory(regions, quorum).await;
    let out = FanOut::new(&fixture.repository.regions, Patience::BACKUP);
    store_history(&fixture.repository, (log().system_id, Timeline(2)), HISTORY, &out).await.unwrap();
    out.drain().await;
    fixture.epoch(1000, &[40, 50], true).await;
    let files = [Made::new("base/1", b"tiny".to_vec()), Made::new("base/2", Vec::new())];
    fixture.backup(&files, Some(need(1000, 1090))).await;
    fixture
}
