//! The orders of [`model`](super::model), played by the real code: what the model lets arrive, a gate in front of
//! each region lets pass.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::StreamExt as _;
use futures::stream::FuturesOrdered;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use crate::model::{Kind, Lsn};
use crate::observe::progress::Progress;
use crate::observe::task;
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::mend::{Scope, mend};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::regions::{Region, Regions};
use crate::repository::testing::{Fixture, log};
use crate::repository::wal::adopt::{Era, TakeOver, take_over};
use crate::repository::wal::claim::Known;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Marks};
use crate::repository::wal::model::{Action, Rules, walk};
use crate::repository::wal::reader::BranchLog;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

const START: u64 = 1000;
const FRAME: u64 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Old,
    New,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    List,
    Put { epoch: String, number: u64 },
}

/// Calls that wait to be let through.
type Queue = Arc<Mutex<Vec<(Who, usize, Call, oneshot::Sender<()>)>>>;

/// A region as one owner sees it: of the WAL, puts and lists wait at a gate.
#[derive(Debug)]
struct Gate {
    who: Who,
    region: usize,
    inner: Arc<dyn ObjectStore>,
    queue: Queue,
}

impl Gate {
    async fn wait(&self, key: &str, list: bool) {
        let Some(rest) = key.strip_prefix(layout::WAL) else { return };
        let mut parts = rest.split('/').skip(2);
        let call = match (list, parts.next(), parts.next().and_then(layout::parse_seq)) {
            (true, ..) => Call::List,
            (false, Some(epoch), Some(number)) => Call::Put { epoch: epoch.to_owned(), number },
            _ => return,
        };
        let (go, gone) = oneshot::channel();
        self.queue.lock().unwrap().push((self.who, self.region, call, go));
        let _ = gone.await;
    }
}

#[async_trait]
impl ObjectStore for Gate {
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
        self.wait(key, false).await;
        self.inner.put(key, body, digest, options).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.inner.head(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.inner.get(key, range).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        self.wait(prefix, true).await;
        self.inner.list(prefix, depth, after).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.inner.server_time().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.inner.list_versions(prefix, after).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.inner.extend(key, until).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.inner.locked_until(key, version).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.inner.is_held(key, version).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.inner.delete_version(key, version).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
}

fn repository(fixture: &Fixture, who: Who, queue: &Queue) -> Repository {
    let region = |(region, known): (usize, &Region)| {
        let (inner, queue) = (Arc::clone(&known.store), Arc::clone(queue));
        Region { name: known.name.clone(), store: Arc::new(Gate { who, region, inner, queue }), lock: None }
    };
    let list = fixture.repository.regions.all().iter().enumerate().map(region).collect();
    let quorum = fixture.repository.regions.quorum();
    Repository { regions: Regions::new(list, quorum, quorum).unwrap(), ..fixture.repository.clone() }
}

fn branch() -> BranchId {
    let log = log();
    BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
}

/// Begins an epoch and sends a frame at each word, two at once at most; tells how far it acknowledged.
async fn old_owner(repository: Repository, writer: Writer, mut words: mpsc::Receiver<()>, told: Arc<AtomicU64>) {
    let out = Arc::new(FanOut::new(&repository.regions, Patience::WAL));
    let opening = (log(), EpochKind::Stream, Lsn(START));
    let mut epoch = Epoch::open(&repository, &writer, opening, 1, out).await.unwrap();
    if epoch.claim(&Known::default()).await.is_err() {
        return;
    }
    let mut flying = FuturesOrdered::new();
    let mut more = true;
    while more || !flying.is_empty() {
        tokio::select! {
            word = words.recv(), if more && flying.len() < 2 => match word {
                Some(()) => {
                    let (start, end) = (epoch.position(), Lsn(epoch.position().0 + FRAME));
                    let marks = Marks { first_record: Some(start), last_record: Some((start, end)), commits: None };
                    let wal = (start.0..end.0).map(|at| at as u8).collect();
                    flying.push_back(epoch.send(start, wal, marks).unwrap());
                }
                None => more = false,
            },
            Some(landed) = flying.next() => match landed {
                Ok(end) => told.store(end.0, Ordering::SeqCst),
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
                    return;
                }
            },
        }
    }
}

/// Takes over until it is the only one, and tells from where it would stream.
async fn new_owner(repository: Repository, writer: Writer) -> (Lsn, Epoch) {
    let lineage = [Era { branch: branch(), end: None }];
    loop {
        let known = Known::default();
        let owner = TakeOver { repository: &repository, writer: &writer, own: None, known: &known };
        let Ok(tail) = take_over(&owner, (&lineage, None)).await else { continue };
        let end = tail.map_or(Lsn(START), |tail| tail.end);
        let out = Arc::new(FanOut::new(&repository.regions, Patience::WAL));
        let opening = (log(), EpochKind::Stream, end);
        let mut epoch = Epoch::open(&repository, &writer, opening, 1, out).await.unwrap();
        if epoch.claim(&known).await.is_ok() {
            return (end, epoch);
        }
    }
}

/// Lets one waiting call through.
fn release(queue: &Queue, is_meant: impl Fn(Who, usize, &Call) -> bool) -> bool {
    let mut queue = queue.lock().unwrap();
    let at = queue.iter().position(|(who, region, call, _)| is_meant(*who, *region, call));
    at.is_some_and(|at| queue.remove(at).3.send(()).is_ok())
}

/// Waits until everybody waits.
async fn settle(queue: &Queue) {
    let (mut seen, mut calm) = (usize::MAX, 0);
    while calm < 3 {
        sleep(Duration::from_micros(400)).await;
        let now = queue.lock().unwrap().len();
        calm = if now == seen { calm + 1 } else { 0 };
        seen = now;
    }
}

fn pass(queue: &Queue, action: Action) -> bool {
    let to_old = |call: &Call, of_old: bool, wanted: Option<usize>| match call {
        Call::Put { number, .. } => of_old && wanted.is_none_or(|wanted| *number == wanted as u64),
        Call::List => false,
    };
    let old = queue.lock().unwrap().iter().find_map(|(who, _, call, _)| match (who, call) {
        (Who::Old, Call::Put { epoch, .. }) => Some(epoch.clone()),
        _ => None,
    });
    let is_old = |call: &Call| matches!(call, Call::Put { epoch, .. } if old.as_ref() == Some(epoch));
    release(queue, |who, region, call| match action {
        Action::Arrive(number, at) => who == Who::Old && region == at && to_old(call, true, Some(number)),
        Action::OldLooks(at) => who == Who::Old && region == at && *call == Call::List,
        Action::Read(at) | Action::NewLooks(at) => who == Who::New && region == at && *call == Call::List,
        Action::Seal(at) => who == Who::New && region == at && matches!(call, Call::Put { .. }),
        Action::Copy(number, at) => who == Who::New && region == at && to_old(call, is_old(call), Some(number)),
        Action::Begin(at) => who == Who::New && region == at && matches!(call, Call::Put { number: 0, .. }),
        Action::Send | Action::Acknowledge | Action::Judge | Action::Again | Action::Mend(..) => false,
    })
}

/// Plays one order; says how many of its steps the real code had to take as well.
async fn replay(rules: &Rules, seed: u64) -> usize {
    let fixture = Fixture::memory(rules.regions, rules.quorum).await;
    let (queue, told, mut played) = (Queue::default(), Arc::new(AtomicU64::new(0)), 0);
    let (words, heard) = mpsc::channel(rules.frames);
    let of = |who| (repository(&fixture, who, &queue), fixture.writer.clone());
    let ((first, writer), (second, successor)) = (of(Who::Old), of(Who::New));
    let old = task::spawn("old owner", old_owner(first, writer, heard, Arc::clone(&told)));
    let mut new = task::spawn("new owner", new_owner(second, successor));
    for action in walk(rules, seed).0 {
        settle(&queue).await;
        if action == Action::Send {
            let _full = words.try_send(());
        }
        if let Action::Mend(_, region) = action {
            let region = fixture.repository.regions.all().get(region).map(|region| region.name.clone());
            let scope = Scope { region, ..Scope::default() };
            mend(&fixture.repository, &scope, &Progress::new(Arc::clone(&fixture.writer.clock)).begin("mend", None))
                .await
                .unwrap();
        }
        played += usize::from(pass(&queue, action));
    }
    for _ in 0..rules.frames {
        let _full = words.try_send(());
    }
    drop(words);
    // The rest in the order of its arrival.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !(new.is_finished() && old.is_finished()) {
        assert!(Instant::now() < deadline, "seed {seed}: nobody gets any further");
        release(&queue, |_, _, _| true);
        sleep(Duration::from_micros(300)).await;
    }
    let (end, _epoch) = (&mut new).await.unwrap();
    let told = told.load(Ordering::SeqCst);
    assert!(told <= end.0, "seed {seed}: {told} was acknowledged, and the successor goes on at {end}");
    let stored = BranchLog::load(&fixture.repository, branch()).await;
    let (mut read, upto) = (Vec::new(), (Lsn(START), end));
    let mut sink = |_, wal: &[u8]| {
        read.extend_from_slice(wal);
        Ok(std::ops::ControlFlow::Continue(()))
    };
    stored.read(&fixture.repository, &fixture.ring, upto, &mut sink).await.unwrap();
    assert_eq!(read, (START..end.0).map(|at| at as u8).collect::<Vec<_>>(), "seed {seed}");
    played
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_code_loses_nothing_in_the_orders_of_the_model() {
    let (mut played, mut total) = (0, 0);
    for seed in 0..40 {
        let rules = if seed % 2 == 0 { Rules::of(3, 2, 2, 4).mended() } else { Rules::of(2, 2, 2, 4) };
        let inside = |action: &&Action| {
            let own = matches!(action, Action::Send | Action::Acknowledge | Action::Judge | Action::Again);
            own || matches!(action, Action::Mend(..))
        };
        total += walk(&rules, seed).0.iter().filter(|action| !inside(action)).count();
        played += replay(&rules, seed).await;
    }
    // The model begins again wherever it likes; the real code only when it must.
    assert!(played * 5 > total, "{played} of {total} steps were played");
}
