//! The way to one region: its queue, its retries, and what it owes when it is left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::Patience;
use crate::model::{Error, RegionName};
use crate::repository::layout;
use crate::repository::regions::Region;
use crate::store::{Digest, Put, StoreError};

/// Objects in flight per region. With packs of 16 MiB this bounds what a slow region can hold in memory.
const IN_FLIGHT: usize = 4;

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) region: Region,
    slots: Arc<Semaphore>,
    /// One object at a time finds out whether a lane that is behind works again.
    probe: Arc<Semaphore>,
    pub(super) behind: AtomicBool,
    /// Whether the region has shown the repository's record since the lane began, or was left behind; asked by one at a time.
    asked: AtomicBool,
    asking: Semaphore,
    /// When, on tokio's clock in milliseconds since `born`, a lane that is behind may be tried again.
    retry_at: AtomicU64,
    born: tokio::time::Instant,
    pub(super) missing: AtomicU64,
    /// WAL in objects that the region was given, or should have been, and does not hold.
    pub(super) unheld: AtomicU64,
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

pub(super) struct Object {
    pub(super) key: String,
    pub(super) body: Bytes,
    pub(super) digest: Digest,
    /// When what it belongs to began; `None` = now.
    pub(super) since: Option<DateTime<Utc>>,
}

pub(super) enum Delivery {
    Stored,
    LeftBehind,
    /// Nobody waits for the object any more.
    GivenUp,
    Fatal(Error),
}

impl Lane {
    pub(super) fn to(region: &Region) -> Self {
        Self {
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
        }
    }

    /// Takes a place in the lane's queue. A queue that stays full while others keep up is left behind. A lane without
    /// a place is a reserve: it is used only as long as the object lacks its quorum.
    pub(super) async fn enter(&self, by: tokio::time::Instant, patience: Patience) -> Option<OwnedSemaphorePermit> {
        if self.behind.load(Ordering::Relaxed) {
            let due = patience.retry_after.is_some() && tokio::time::Instant::now() >= self.retry_at();
            return due.then(|| Arc::clone(&self.probe).try_acquire_owned().ok()).flatten();
        }
        let slot = Arc::clone(&self.slots).acquire_owned();
        match tokio::time::timeout_at(by, slot).await {
            Ok(Ok(permit)) => Some(permit),
            _ => {
                self.leave_behind("its queue stayed full", patience);
                None
            }
        }
    }

    pub(super) async fn deliver(
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

    pub(super) fn leave_behind(&self, reason: &str, patience: Patience) {
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

    pub(super) fn outcome(&self) -> LaneOutcome {
        LaneOutcome {
            region: self.region.name.clone(),
            missing_objects: self.missing.load(Ordering::Relaxed),
            last_error: self.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        }
    }
}
