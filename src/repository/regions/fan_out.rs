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
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::model::{Error, Kind, RegionName, Result};
use crate::repository::regions::Regions;
use crate::repository::regions::fan_out::due::Due;
use crate::repository::regions::fan_out::lane::{Delivery, Lane, Object};
use crate::store::Digest;

mod due;
mod lane;

pub use lane::LaneOutcome;

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
    /// Writes that were acknowledged below the full quorum.
    lowered: AtomicU64,
    patience: Patience,
    tasks: TaskTracker,
    cancelled: watch::Sender<bool>,
    /// Whether it was told that this waits.
    told: AtomicBool,
    /// From when on its objects are locked; `None` = each from its own put.
    since: Option<DateTime<Utc>>,
}

impl FanOut {
    /// Lanes to all `regions`. What the configuration says of laggards goes before the job's own patience.
    pub fn new(regions: &Regions, patience: Patience) -> Self {
        let lanes = regions.all().iter().map(|region| Arc::new(Lane::to(region))).collect();
        let patience = Patience { laggard: regions.detach_after().unwrap_or(patience.laggard), ..patience };
        let (cancelled, _) = watch::channel(false);
        Self {
            lanes,
            quorum: regions.quorum(),
            lowest: regions.lowest_quorum(),
            degrade_after: regions.degrade_after(),
            degraded: watch::channel(false).0,
            lowered: AtomicU64::new(0),
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
            let slot = due.lane.enter(enter_by, self.patience).await;
            self.send((due, slot), &object, &at_quorum, &report);
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

    /// Brings an object to one region, in the background, and reports what became of it.
    fn send(
        &self,
        (due, slot): (Due, Option<OwnedSemaphorePermit>),
        object: &Arc<Object>,
        at_quorum: &watch::Receiver<bool>,
        report: &mpsc::Sender<(RegionName, Delivery)>,
    ) {
        let (lane, object, report) = (Arc::clone(&due.lane), Arc::clone(object), report.clone());
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

    /// In how many regions a write must be to be acknowledged now.
    pub fn quorum(&self) -> usize {
        if self.is_degraded() { self.lowest } else { self.quorum }
    }

    /// Whether writes are acknowledged at a lower quorum than the configuration wants.
    pub fn is_degraded(&self) -> bool {
        *self.degraded.borrow()
    }

    /// How many writes were acknowledged so far by fewer regions than the configuration wants. What none of them is part of
    /// outlives the loss of any region.
    pub fn lowered(&self) -> u64 {
        self.lowered.load(Ordering::SeqCst)
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
        if stored.len() < self.quorum {
            self.lowered.fetch_add(1, Ordering::SeqCst);
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
