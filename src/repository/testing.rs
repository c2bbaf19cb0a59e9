//! A small repository in memory, with regions that can be made to fail, for the tests of this floor and of the jobs.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};

use crate::codec::SystemRng;
use crate::codec::sign::Signer;
use crate::keys::{AgeHolder, AgeOpener, generate_identity};
use crate::model::commit::WalNeed;
use crate::model::pages::{BATCH_PAGES, Batch, FileId, PAGE_SIZE, Piece};
use crate::model::{Branch, Clock, Lsn, Result, SystemId, Timeline, WalSegmentSize};
use crate::repository::backup::parent::{Basis, choose, state_path};
use crate::repository::backup::writer::{BackupOptions, BackupWriter, Written};
use crate::repository::handle::{RegionRecord, Repository, Writer};
use crate::repository::keysets::{Holders, KeyRing};
use crate::repository::pages::manifest::Line;
use crate::repository::pages::pack::OBJECT_LIMIT;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::regions::lock_rule::Rule;
use crate::repository::regions::{Region, Regions};
use crate::repository::wal::adopt::{Era, Tail, TakeOver, take_over};
use crate::repository::wal::claim::Known;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Log, Marks, store_history};
use crate::store::dir::DirStore;
use crate::store::memory::MemoryStore;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

const FIRST_SECOND: i64 = 1_795_000_000;

/// Time that stands still unless it is moved.
#[derive(Debug)]
pub struct TestClock(AtomicI64);

impl TestClock {
    /// A clock that shows a fixed day.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(FIRST_SECOND)))
    }

    /// Moves it.
    pub fn advance(&self, seconds: i64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn now(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(self.0.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(u64::try_from(self.0.load(Ordering::Relaxed) - FIRST_SECOND).unwrap_or_default())
    }
}

/// What a region does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Answers that it is not available.
    Fail,
    /// Refuses for good.
    Deny,
    /// Never answers.
    Hang,
    /// Takes its time.
    Slow(Duration),
}

/// A store with a fault that can be switched.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    fault: Mutex<Fault>,
    /// Whether locks may be made longer.
    locks: AtomicBool,
    /// Whether locks may not be known.
    hidden: AtomicBool,
    /// Versions that may still be deleted before the process dies.
    deletes: AtomicI64,
    held: Mutex<BTreeSet<String>>,
    /// What is locked, and until when, once a name with this prefix is put.
    trap: Mutex<Option<(String, String, DateTime<Utc>)>>,
    /// Names that are listed and not given.
    mute: Mutex<Option<String>>,
}

impl FaultyStore {
    /// Switches the fault.
    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// From now on objects whose names contain this are listed and not given; `None` ends it.
    pub fn mute(&self, part: Option<String>) {
        *self.mute.lock().unwrap() = part;
    }

    /// Allows or forbids to make locks longer.
    pub fn allow_locks(&self, allowed: bool) {
        self.locks.store(allowed, Ordering::Relaxed);
    }

    /// Hides locks from whoever asks, or shows them.
    pub fn hide_locks(&self, hidden: bool) {
        self.hidden.store(hidden, Ordering::Relaxed);
    }

    /// Lets so many versions be deleted, and refuses all that follow, as if the pruner had been killed then.
    pub fn break_after_deletes(&self, count: i64) {
        self.deletes.store(count, Ordering::Relaxed);
    }

    /// Replaces the bytes of an object, as a rotten disk does.
    pub async fn damage(&self, key: &str, bytes: Vec<u8>) {
        let _gone = self.inner.delete(key).await;
        let digest = Digest::of(&bytes);
        self.inner.put(key, bytes.into(), digest, &PutOptions::default()).await.unwrap();
    }

    /// Loses an object.
    pub async fn lose(&self, key: &str) {
        self.inner.delete(key).await.unwrap();
    }

    /// Locks an object as a bucket's own rule does.
    pub async fn lock(&self, key: &str, until: DateTime<Utc>) {
        let bytes = self.inner.get(key, None).await.unwrap();
        self.inner.delete(key).await.unwrap();
        let options = PutOptions { retain_until: Some(until) };
        self.inner.put(key, bytes.clone(), Digest::of(&bytes), &options).await.unwrap();
    }

    /// Holds an object without an end, of which nothing is known before it is to be deleted: a legal hold.
    pub fn hold(&self, key: &str) {
        self.held.lock().unwrap().insert(key.to_owned());
    }

    /// Locks an object as soon as a name that begins with `prefix` is put.
    pub fn lock_when_put(&self, prefix: &str, key: &str, until: DateTime<Utc>) {
        *self.trap.lock().unwrap() = Some((prefix.to_owned(), key.to_owned(), until));
    }

    /// All names, with their bytes.
    pub async fn contents(&self) -> Vec<(String, Bytes)> {
        let mut contents = Vec::new();
        for object in crate::repository::regions::list_all(self.inner.as_ref(), "").await.unwrap() {
            contents.push((object.key.clone(), self.inner.get(&object.key, None).await.unwrap()));
        }
        contents
    }

    async fn pass(&self, operation: &'static str, key: &str) -> Result<(), StoreError> {
        let fault = *self.fault.lock().unwrap();
        let (key, address, reason) = (key.to_owned(), self.address(), "switched off".to_owned());
        match fault {
            Fault::None => Ok(()),
            Fault::Fail => Err(StoreError::Unavailable { operation, key, address, reason }),
            Fault::Deny => Err(StoreError::Denied { operation, key, address, reason }),
            Fault::Hang => std::future::pending().await,
            Fault::Slow(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
        }
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.inner.probe().await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        self.pass("put", key).await?;
        let sprung = self.trap.lock().unwrap().take_if(|(prefix, ..)| key.starts_with(prefix.as_str()));
        if let Some((_, locked, until)) = sprung {
            self.inner.extend(&locked, until).await?;
        }
        self.inner.put(key, body, digest, options).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.pass("head", key).await?;
        self.inner.head(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.pass("get", key).await?;
        if self.mute.lock().unwrap().as_ref().is_some_and(|part| key.contains(part)) {
            let (key, address, reason) = (key.to_owned(), self.address(), "switched off".to_owned());
            return Err(StoreError::Unavailable { operation: "get", key, address, reason });
        }
        self.inner.get(key, range).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        self.pass("list", prefix).await?;
        self.inner.list(prefix, depth, after).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.inner.server_time().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.pass("list", prefix).await?;
        self.inner.list_versions(prefix, after).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.pass("lock", key).await?;
        if !self.locks.load(Ordering::Relaxed) {
            let (key, address, reason) = (key.to_owned(), self.address(), "no permission".to_owned());
            return Err(StoreError::Denied { operation: "lock", key, address, reason });
        }
        self.inner.extend(key, until).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.pass("lock", key).await?;
        if self.hidden.load(Ordering::Relaxed) {
            let (key, address, reason) = (key.to_owned(), self.address(), "no permission".to_owned());
            return Err(StoreError::Denied { operation: "read the lock", key, address, reason });
        }
        self.inner.locked_until(key, version).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.pass("delete", key).await?;
        if self.held.lock().unwrap().contains(key) {
            return Err(StoreError::Retained { key: key.to_owned(), address: self.address(), until: None });
        }
        if self.deletes.fetch_sub(1, Ordering::Relaxed) <= 0 {
            let (key, address, reason) = (key.to_owned(), self.address(), "killed".to_owned());
            return Err(StoreError::Denied { operation: "delete", key, address, reason });
        }
        self.inner.delete_version(key, version).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.pass("delete", key).await?;
        self.inner.delete(key).await
    }
}

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

/// A file of a made-up source.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its path.
    pub path: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Made {
    /// A file of these bytes.
    pub fn new(path: &str, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), bytes }
    }
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
        let wrap = |inner| {
            let (fault, deletes) = (Mutex::new(Fault::None), AtomicI64::new(i64::MAX));
            let (locks, hidden) = (AtomicBool::new(true), AtomicBool::new(false));
            Arc::new(FaultyStore {
                inner,
                fault,
                locks,
                hidden,
                deletes,
                held: Mutex::default(),
                trap: Mutex::default(),
                mute: Mutex::default(),
            })
        };
        let stores: Vec<_> = inner.into_iter().map(wrap).collect();
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

    /// Takes over from every earlier writer.
    pub async fn take_over(&self, lineage: &[Era], back_to: Option<&BranchId>) -> Result<Option<Tail>> {
        let (known, repository, writer) = (Known::default(), &self.repository, &self.writer);
        let owner = TakeOver { repository, writer, own: None, known: &known };
        take_over(&owner, (lineage, back_to)).await
    }

    /// Writes an epoch whose frames hold `lengths` bytes each; END too if `close`.
    pub async fn epoch(&self, start: u64, lengths: &[usize], close: bool) {
        self.epoch_by(&self.writer, start, lengths, close).await;
    }

    /// The same, by a writer of choice.
    pub async fn epoch_by(&self, writer: &Writer, start: u64, lengths: &[usize], close: bool) {
        self.epoch_of(writer, (EpochKind::Stream, start), lengths, close).await;
    }

    /// The same, of a kind of choice.
    pub async fn epoch_of(&self, writer: &Writer, (kind, start): (EpochKind, u64), lengths: &[usize], close: bool) {
        self.epoch_holding(writer, (kind, start), (lengths, close), |at| at as u8).await;
    }

    /// The same, with bytes of choice by position.
    pub async fn epoch_holding(
        &self,
        writer: &Writer,
        (kind, start): (EpochKind, u64),
        (lengths, close): (&[usize], bool),
        byte: impl Fn(u64) -> u8,
    ) {
        let out = Arc::new(FanOut::new(&self.repository.regions, Patience::WAL));
        let opening = (log(), kind, Lsn(start));
        let mut epoch = Epoch::open(&self.repository, writer, opening, 1, Arc::clone(&out)).await.unwrap();
        let mut at = start;
        for length in lengths {
            let end = at + *length as u64;
            let time = self.clock.now();
            let marks = Marks {
                first_record: Some(Lsn(at)),
                last_record: Some((Lsn(at), Lsn(end))),
                commits: Some((time, time)),
            };
            epoch.append(Lsn(at), (at..end).map(&byte).collect(), marks).await.unwrap();
            at = end;
        }
        if close {
            epoch.close().await.unwrap();
        } else {
            drop(epoch);
        }
        Arc::into_inner(out).unwrap().drain().await;
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

/// Some history file.
pub const HISTORY: &[u8] = b"1\t0/3000000\tno recovery target specified\n";

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

/// How the fixture's backups are written.
pub fn options() -> BackupOptions {
    BackupOptions {
        start_lsn: None,
        detection: None,
        proof: None,
        target: "ledger".parse().unwrap(),
        source: "postgres",
        method: "local".to_owned(),
        kind: None,
        level: 1,
        workers: 2,
        page_checksums: true,
        pack_size: OBJECT_LIMIT,
        state: None,
    }
}

/// The log of the fixture's epochs.
pub fn log() -> Log {
    Log {
        target: "ledger".parse().unwrap(),
        system_id: SystemId(7),
        timeline: Timeline::FIRST,
        branch: Branch::root(),
        wal_segment_size: WalSegmentSize::DEFAULT,
    }
}

/// A need for `[start, stop)` of the fixture's log.
pub fn need(start: u64, stop: u64) -> WalNeed {
    WalNeed {
        system_id: SystemId(7),
        timeline: Timeline::FIRST,
        branch: Branch::root(),
        start_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        wal_segment_size: WalSegmentSize::DEFAULT,
        server_version: 170_000,
    }
}

/// Hands made-up files to a backup as a source does: small files share batches, large ones send their own.
pub async fn send(writer: &mut BackupWriter, files: &[Made]) {
    let parents: BTreeSet<_> =
        files.iter().filter_map(|file| file.path.split_once('/')).map(|(first, _)| first).collect();
    for path in parents.into_iter().map(str::to_owned) {
        writer.line(&Line::Directory { path, mode: 0o700 }).await.unwrap();
    }
    let mut shared = Batch::default();
    for (number, file) in files.iter().enumerate() {
        let id = FileId(number as u32);
        writer.file(id, file.path.clone(), 0o600).unwrap();
        let mut data = file.bytes.clone();
        data.resize(data.len().next_multiple_of(PAGE_SIZE), 0);
        if data.len() >= 64 * PAGE_SIZE {
            for (at, pages) in data.chunks(BATCH_PAGES * PAGE_SIZE).enumerate() {
                let first_page = (at * BATCH_PAGES) as u32;
                let piece = Piece { file: id, first_page, pages: (pages.len() / PAGE_SIZE) as u32 };
                writer.batch(Batch { pieces: vec![piece], data: pages.to_vec(), ..Batch::default() }).await.unwrap();
            }
        } else if !data.is_empty() {
            if (shared.data.len() + data.len()) / PAGE_SIZE > BATCH_PAGES {
                let full = std::mem::take(&mut shared);
                writer.batch(full).await.unwrap();
            }
            shared.pieces.push(Piece { file: id, first_page: 0, pages: (data.len() / PAGE_SIZE) as u32 });
            shared.data.extend_from_slice(&data);
        }
        writer.file_done(id, file.bytes.len() as u64, Vec::new()).await.unwrap();
    }
    if !shared.data.is_empty() {
        writer.batch(shared).await.unwrap();
    }
}
