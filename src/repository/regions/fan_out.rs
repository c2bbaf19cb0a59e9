//! Writing one object to every region at once, acknowledged at the write quorum.
//!
//! All regions share one buffer. A region that fails or hangs keeps trying for as long as the object needs it to reach
//! the quorum; once the quorum holds without it, it has [`Patience::laggard`] left and then owes the object: a debt that
//! `repair` derives from inventories and pays later. Nothing here acknowledges below the quorum in force. That is the lower
//! one only where the configuration allows it, after the full one was out of reach for as long as it says, until enough
//! regions answer again; both are told.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::FutureExt as _;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::model::{Error, Kind, RegionName, Result};
use crate::repository::layout;
use crate::repository::regions::{Region, Regions};
use crate::store::{Digest, Put, StoreError};

/// How long the parties wait for each other.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long a region may lag behind the quorum (its queue full, or an object still missing) before it is left behind.
    pub laggard: Duration,
    /// How long a write waits for its quorum before the job fails; `None` = for ever, as WAL does: the server keeps it.
    pub quorum: Option<Duration>,
    /// Whether a region left behind is tried again, after this pause, for later objects.
    pub retry_after: Option<Duration>,
}

impl Patience {
    /// A backup leaves a region behind for its whole run, and gives up when the quorum is away for ten minutes.
    pub const BACKUP: Self =
        Self { laggard: Duration::from_secs(30), quorum: Some(Duration::from_secs(600)), retry_after: None };
    /// A segment that is handed over is handed over again: better soon told than long waited for.
    pub const PUSH: Self = Self {
        laggard: Duration::from_secs(10),
        quorum: Some(Duration::from_secs(60)),
        retry_after: Some(Duration::from_secs(5)),
    };
    /// WAL waits for ever and tries lost regions again.
    pub const WAL: Self =
        Self { laggard: Duration::from_secs(10), quorum: None, retry_after: Some(Duration::from_secs(5)) };
}

/// Objects in flight per region. With packs of 16 MiB this bounds what a slow region can hold in memory.
const IN_FLIGHT: usize = 4;

/// How long a job waits for its quorum without a word.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// Writes objects to all regions.
#[derive(Debug)]
pub struct FanOut {
    lanes: Vec<Arc<Lane>>,
    quorum: usize,
    lowest: usize,
    degrade_after: Option<Duration>,
    degraded: watch::Sender<bool>,
    patience: Patience,
    tasks: TaskTracker,
    cancelled: watch::Sender<bool>,
    /// Whether it was told that this waits.
    told: AtomicBool,
    /// From when on its objects are locked; `None` = each from its own put.
    since: Option<DateTime<Utc>>,
}

#[derive(Debug)]
struct Lane {
    region: Region,
    slots: Arc<Semaphore>,
    /// One object at a time finds out whether a lane that is behind works again.
    probe: Arc<Semaphore>,
    behind: AtomicBool,
    /// Whether the region has shown the repository's record since the lane began, or was left behind; asked by one at a time.
    asked: AtomicBool,
    asking: Semaphore,
    /// When, on tokio's clock in milliseconds since `born`, a lane that is behind may be tried again.
    retry_at: AtomicU64,
    born: tokio::time::Instant,
    missing: AtomicU64,
    /// WAL in objects that the region was given, or should have been, and does not hold.
    unheld: AtomicU64,
    last_error: std::sync::Mutex<Option<String>>,
}

/// What became of a region during a job.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LaneOutcome {
    /// The region.
    pub region: RegionName,
    /// Objects that it does not hold.
    pub missing_objects: u64,
    /// The last thing that went wrong there.
    pub last_error: Option<String>,
}

struct Object {
    key: String,
    body: Bytes,
    digest: Digest,
    /// When what it belongs to began; `None` = now.
    since: Option<DateTime<Utc>>,
}

enum Delivery {
    Stored,
    LeftBehind,
    /// Nobody waits for the object any more.
    GivenUp,
    Fatal(Error),
}

/// What one region is to hold of an object. It ends as held or as owed; if neither, the put was given up before: then the region
/// lacks an object that nobody was told of, and the WAL in it is received again under another name.
struct Due {
    lane: Arc<Lane>,
    wal: u64,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Held,
    Owed,
    GivenUp,
}

impl Due {
    fn new(lane: &Arc<Lane>, wal: u64) -> Self {
        lane.unheld.fetch_add(wal, Ordering::Relaxed);
        Self { lane: Arc::clone(lane), wal, end: End::GivenUp }
    }

    fn ends(mut self, delivery: &Delivery, at_quorum: bool) {
        self.end = match delivery {
            Delivery::Stored => End::Held,
            Delivery::LeftBehind => End::Owed,
            Delivery::Fatal(_) if at_quorum => End::Owed,
            Delivery::Fatal(_) | Delivery::GivenUp => End::GivenUp,
        };
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        if self.end != End::Held {
            self.lane.missing.fetch_add(1, Ordering::Relaxed);
        }
        if self.end != End::Owed {
            self.lane.unheld.fetch_sub(self.wal, Ordering::Relaxed);
        }
    }
}

impl FanOut {
    /// Lanes to all `regions`. What the configuration says of laggards goes before the job's own patience.
    pub fn new(regions: &Regions, patience: Patience) -> Self {
        let lane = |region: &Region| {
            Arc::new(Lane {
                region: region.clone(),
                slots: Arc::new(Semaphore::new(IN_FLIGHT)),
                probe: Arc::new(Semaphore::new(1)),
                behind: AtomicBool::new(false),
                asked: AtomicBool::new(false),
                asking: Semaphore::new(1),
                retry_at: AtomicU64::new(0),
                born: tokio::time::Instant::now(),
                missing: AtomicU64::new(0),
                unheld: AtomicU64::new(0),
                last_error: std::sync::Mutex::default(),
            })
        };
        let lanes = regions.all().iter().map(lane).collect();
        let patience = Patience { laggard: regions.detach_after().unwrap_or(patience.laggard), ..patience };
        let (cancelled, _) = watch::channel(false);
        Self {
            lanes,
            quorum: regions.quorum(),
            lowest: regions.lowest_quorum(),
            degrade_after: regions.degrade_after(),
            degraded: watch::channel(false).0,
            patience,
            tasks: TaskTracker::new(),
            cancelled,
            told: AtomicBool::new(false),
            since: None,
        }
    }

    /// The same, of objects that are one thing which began at `since`: all of them are locked until the same moment.
    pub fn locked_since(mut self, since: DateTime<Utc>) -> Self {
        self.since = Some(since);
        self
    }

    /// Stores `body` under `key`; returns once the write quorum holds it. The other regions go on in the background.
    ///
    /// # Errors
    /// A region holds other bytes under this name (never retried: two writers, or damage); the quorum was not reached in
    /// time; or too many regions refuse for good.
    pub async fn put(&self, key: String, body: Bytes, digest: Digest) -> Result<()> {
        self.put_wal(key, (body, digest), 0).await
    }

    /// The same for an object with so many bytes of WAL, of which [`unheld`](Self::unheld) keeps account.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_wal(&self, key: String, (body, digest): (Bytes, Digest), wal: u64) -> Result<()> {
        if self.is_degraded() {
            self.restore_quorum();
        }
        let object = Arc::new(Object { key, body, digest, since: self.since });
        let dues: Vec<_> = self.lanes.iter().map(|lane| Due::new(lane, wal)).collect();
        let (reached, at_quorum) = watch::channel(false);
        let (report, mut deliveries) = mpsc::channel(self.lanes.len());
        let enter_by = tokio::time::Instant::now() + self.patience.laggard;
        for due in dues {
            let slot = self.enter(&due.lane, enter_by).await;
            let (lane, object, report) = (Arc::clone(&due.lane), Arc::clone(&object), report.clone());
            let (at_quorum, cancelled) = (at_quorum.clone(), self.cancelled.subscribe());
            let patience = self.patience;
            self.tasks.spawn(async move {
                let extra = if slot.is_some() { patience.laggard } else { Duration::ZERO };
                let seen = at_quorum.clone();
                let delivery = lane.deliver(&object, at_quorum, cancelled, (patience, extra)).await;
                drop(slot);
                let is_late = *seen.borrow();
                if let (Delivery::Fatal(error), true) = (&delivery, is_late) {
                    tracing::error!(region = %lane.region.name, %error, "a region holds other bytes than the write quorum");
                }
                due.ends(&delivery, is_late);
                // The receiver is gone once the quorum is reached.
                let _ = report.send((lane.region.name.clone(), delivery)).await;
            });
        }
        drop(report);
        let waiting = self.wait_for_quorum(&object.key, &mut deliveries);
        let outcome = match self.patience.quorum {
            Some(limit) => self.wait_aloud(&object.key, waiting, limit).await,
            None => waiting.await,
        };
        if outcome.is_ok() {
            reached.send_replace(true);
        }
        outcome
    }

    /// In how many regions a write must be to be acknowledged now.
    pub fn quorum(&self) -> usize {
        if self.is_degraded() { self.lowest } else { self.quorum }
    }

    /// Whether writes are acknowledged at a lower quorum than the configuration wants.
    pub fn is_degraded(&self) -> bool {
        *self.degraded.borrow()
    }

    /// The full quorum was out of reach for too long.
    fn degrade(&self, key: &str, stored: &BTreeSet<RegionName>) {
        let (full, lowest) = (self.quorum, self.lowest);
        // Only a region that takes a write again counts as one that keeps up.
        for lane in self.lanes.iter().filter(|lane| !stored.contains(&lane.region.name)) {
            lane.leave_behind("it did not answer while the write quorum was out of reach", self.patience);
        }
        if !self.degraded.send_replace(true) {
            let reasons = self.no_quorum(key);
            tracing::error!(quorum = lowest, instead_of = full, %reasons, "the write quorum is lowered: acknowledged writes may be in fewer regions");
        }
    }

    /// As many regions keep up as the configuration wants.
    fn restore_quorum(&self) {
        let keep_up = self.lanes.iter().filter(|lane| !lane.behind.load(Ordering::Relaxed)).count();
        if keep_up >= self.quorum && self.degraded.send_replace(false) {
            tracing::warn!(
                quorum = self.quorum,
                "the write quorum is the full one again; `drctl repair` brings what was left out"
            );
        }
    }

    /// Waits until every region has what it was given or is left behind, and says which owe what.
    pub async fn drain(self) -> Vec<LaneOutcome> {
        self.tasks.close();
        let limit = self.patience.laggard * 2;
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_err() {
            self.cancelled.send_replace(true);
            self.tasks.wait().await;
        }
        self.outcomes()
    }

    /// What each region owes so far.
    pub fn outcomes(&self) -> Vec<LaneOutcome> {
        self.lanes.iter().map(|lane| lane.outcome()).collect()
    }

    /// WAL that each region does not hold of what it was to hold, in the order of [`outcomes`](Self::outcomes).
    pub fn unheld(&self) -> Vec<u64> {
        self.lanes.iter().map(|lane| lane.unheld.load(Ordering::Relaxed)).collect()
    }

    /// Takes a place in the lane's queue. A queue that stays full while others keep up is left behind. A lane without
    /// a place is a reserve: it is used only as long as the object lacks its quorum.
    async fn enter(&self, lane: &Lane, by: tokio::time::Instant) -> Option<tokio::sync::OwnedSemaphorePermit> {
        if lane.behind.load(Ordering::Relaxed) {
            let due = self.patience.retry_after.is_some() && tokio::time::Instant::now() >= lane.retry_at();
            return due.then(|| Arc::clone(&lane.probe).try_acquire_owned().ok()).flatten();
        }
        let slot = Arc::clone(&lane.slots).acquire_owned();
        match tokio::time::timeout_at(by, slot).await {
            Ok(Ok(permit)) => Some(permit),
            _ => {
                lane.leave_behind("its queue stayed full", self.patience);
                None
            }
        }
    }

    /// Whoever watches a job that stands still is told what it waits for.
    async fn wait_aloud(&self, key: &str, waiting: impl Future<Output = Result<()>>, limit: Duration) -> Result<()> {
        let mut waiting = std::pin::pin!(waiting);
        if let Ok(outcome) = tokio::time::timeout(TELL_AFTER.min(limit), &mut waiting).await {
            return outcome;
        }
        let (error, seconds) = (self.no_quorum(key), limit.as_secs());
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "waiting for regions, at most {seconds} s for one object");
        }
        match tokio::time::timeout(limit.saturating_sub(TELL_AFTER), waiting).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.no_quorum(key)),
        }
    }

    async fn wait_for_quorum(&self, key: &str, deliveries: &mut mpsc::Receiver<(RegionName, Delivery)>) -> Result<()> {
        let mut stored = BTreeSet::new();
        let mut degraded = self.degraded.subscribe();
        let mut late = std::pin::pin!(self.too_long().fuse());
        // Another write may find out first that the quorum is to be lowered.
        while stored.len() < self.quorum() {
            tokio::select! {
                delivery = deliveries.recv() => match delivery {
                    Some((region, Delivery::Stored)) => drop(stored.insert(region)),
                    Some((_, Delivery::LeftBehind | Delivery::GivenUp)) => {}
                    Some((region, Delivery::Fatal(error))) => {
                        return Err(error.during(format!("write {key} to {region}")));
                    }
                    None => return Err(self.no_quorum(key)),
                },
                () = &mut late, if stored.len() >= self.lowest && !self.is_degraded() => self.degrade(key, &stored),
                _ = degraded.changed() => {}
            }
        }
        Ok(())
    }

    /// Ends when the full quorum has been out of reach for as long as the configuration bears.
    async fn too_long(&self) {
        match self.degrade_after {
            Some(after) if self.lowest < self.quorum => tokio::time::sleep(after).await,
            _ => std::future::pending().await,
        }
    }

    fn no_quorum(&self, key: &str) -> Error {
        let (quorum, count) = (self.quorum, self.lanes.len());
        let error = Error::new(Kind::Unavailable, format!("{key} did not reach {quorum} of {count} regions"));
        let outcomes = self.outcomes().into_iter().filter_map(|lane| Some((lane.region, lane.last_error?)));
        outcomes.fold(error.transient(true), |error, (region, reason)| error.because(format!("{region}: {reason}")))
    }
}

impl Drop for FanOut {
    fn drop(&mut self) {
        self.cancelled.send_replace(true);
    }
}

impl Lane {
    async fn deliver(
        &self,
        object: &Object,
        mut at_quorum: watch::Receiver<bool>,
        mut cancelled: watch::Receiver<bool>,
        (patience, extra): (Patience, Duration),
    ) -> Delivery {
        let seen = at_quorum.clone();
        let work = self.until_stored(object, &seen, patience);
        // Left behind: the quorum holds the object, and this region has had its extra time. When the put itself is given
        // up, its sender is dropped: nobody waits for the object any more, and no region is to blame.
        let laggard = async {
            let held = at_quorum.wait_for(|reached| *reached).await.is_ok();
            if held {
                tokio::time::sleep(extra).await;
            }
            held
        };
        tokio::select! {
            delivery = work => delivery,
            held = laggard => if held { self.owe("it lags behind the others", patience) } else { Delivery::GivenUp },
            _ = cancelled.wait_for(|cancelled| *cancelled) => self.owe("the job ended first", patience),
        }
    }

    async fn until_stored(&self, object: &Object, at_quorum: &watch::Receiver<bool>, patience: Patience) -> Delivery {
        let mut pause = Duration::from_millis(100);
        loop {
            self.wait_out_the_pause().await;
            let error = match self.put(object).await {
                Ok(_) => {
                    self.behind.store(false, Ordering::Relaxed);
                    return Delivery::Stored;
                }
                Err(error) => error,
            };
            self.note(&error);
            match error {
                StoreError::Conflict { .. } => return Delivery::Fatal(error.into()),
                // A job that ends does not wait until somebody frees space.
                ref error if (!error.is_transient() || error.is_full()) && patience.quorum.is_some() => {
                    return self.owe(&error.to_string(), patience);
                }
                ref error if *at_quorum.borrow() && self.behind.load(Ordering::Relaxed) => {
                    return self.owe(&error.to_string(), patience);
                }
                _ => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// A region that was replaced by an empty place meanwhile is found out here: reading the record makes it prove itself anew.
    async fn put(&self, object: &Object) -> Result<Put, StoreError> {
        let turn = self.asking.acquire().await;
        if !self.asked.load(Ordering::Relaxed) {
            match self.region.store.get(layout::REPOSITORY, None).await {
                Err(error) if error.is_transient() => return Err(error),
                _ => self.asked.store(true, Ordering::Relaxed),
            }
        }
        drop(turn);
        self.region.put(&object.key, (object.body.clone(), object.digest), object.since).await
    }

    /// A lane that is behind is not tried before its pause is over.
    async fn wait_out_the_pause(&self) {
        if self.behind.load(Ordering::Relaxed) {
            tokio::time::sleep_until(self.retry_at()).await;
        }
    }

    fn retry_at(&self) -> tokio::time::Instant {
        self.born + Duration::from_millis(self.retry_at.load(Ordering::Relaxed))
    }

    fn owe(&self, reason: &str, patience: Patience) -> Delivery {
        self.leave_behind(reason, patience);
        Delivery::LeftBehind
    }

    fn leave_behind(&self, reason: &str, patience: Patience) {
        // Without a retry the lane still serves an object that cannot reach its quorum otherwise, at a slow pace.
        let pause = patience.retry_after.unwrap_or(Duration::from_secs(15));
        let now = self.born.elapsed();
        // Objects that pass the lane by while it waits must not prolong its pause: at one frame a second it would last
        // for ever.
        let waits = self.behind.load(Ordering::Relaxed) && tokio::time::Instant::now() < self.retry_at();
        if !waits {
            let at = (now + pause).as_millis();
            self.retry_at.store(u64::try_from(at).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        let mut last = self.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        last.get_or_insert_with(|| reason.to_owned());
        self.asked.store(false, Ordering::Relaxed);
        if !self.behind.swap(true, Ordering::Relaxed) {
            tracing::warn!(region = %self.region.name, reason, "region is left behind; repair brings it back");
        }
    }

    fn note(&self, error: &StoreError) {
        tracing::debug!(region = %self.region.name, %error, "put did not succeed");
        *self.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error.to_string());
    }

    fn outcome(&self) -> LaneOutcome {
        LaneOutcome {
            region: self.region.name.clone(),
            missing_objects: self.missing.load(Ordering::Relaxed),
            last_error: self.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        }
    }
}
