//! A region that does not answer is not waited for again and again.
//!
//! A machine that is off refuses a connection at once. One behind a dead route, or with a dead disk, takes it and says
//! nothing, and each request lasts until its time is out: thirty seconds, for every list and every object of a restore. So
//! whoever found a region silent spares the others that wait, and asks in the background whether it is back.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::observe::task;
use crate::repository::layout;
use crate::store::{ObjectStore, StoreError};

/// A request that failed sooner cost little.
const LONG: Duration = Duration::from_secs(10);
/// Between two questions whether it is back.
const PAUSE: Duration = Duration::from_secs(1);
/// The record is small: whoever takes longer would be no help yet.
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// Whether a region is silent at present.
#[derive(Debug, Default)]
pub(super) struct Silence(Mutex<Option<Quiet>>);

#[derive(Debug)]
struct Quiet {
    since: Instant,
    reason: String,
    _asking: AbortOnDropHandle<()>,
}

/// A request on its way. Dropped without an answer after a long time, it was in vain.
#[derive(Debug)]
pub(super) struct Waiting<'s> {
    silence: &'s Arc<Silence>,
    store: &'s Arc<dyn ObjectStore>,
    began: Instant,
    over: bool,
}

impl Silence {
    /// # Errors
    /// The region is silent.
    pub(super) fn check(&self, operation: &'static str, key: &str, store: &dyn ObjectStore) -> Result<(), StoreError> {
        let quiet = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Quiet { since, reason, .. }) = quiet.as_ref() else { return Ok(()) };
        let reason = format!("silent for {} s: {reason}", since.elapsed().as_secs());
        Err(StoreError::Unavailable { operation, key: key.to_owned(), address: store.address(), reason })
    }

    /// It is asked something.
    pub(super) fn wait<'s>(self: &'s Arc<Self>, store: &'s Arc<dyn ObjectStore>) -> Waiting<'s> {
        Waiting { silence: self, store, began: Instant::now(), over: false }
    }

    /// It answered.
    pub(super) fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// From now on it is silent, until it answers.
    pub(super) fn begin(self: &Arc<Self>, store: &Arc<dyn ObjectStore>, reason: String) {
        let mut quiet = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if quiet.is_none() {
            tracing::debug!(region = store.address(), reason, "nobody waits for this region until it answers");
            let asking = task::spawn("silent-region", ask(Arc::downgrade(self), Arc::clone(store)));
            *quiet = Some(Quiet { since: Instant::now(), reason, _asking: AbortOnDropHandle::new(asking) });
        }
    }
}

impl Waiting<'_> {
    /// This came of it.
    pub(super) fn ended<T>(mut self, outcome: &Result<T, StoreError>) {
        self.over = true;
        if let Err(error @ StoreError::Unavailable { .. }) = outcome
            && self.began.elapsed() >= LONG
        {
            self.silence.begin(self.store, error.to_string());
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waited = self.began.elapsed();
        if !self.over && waited >= LONG {
            self.silence.begin(self.store, format!("no answer within {} s", waited.as_secs()));
        }
    }
}

/// Any answer will do, also one that says no.
async fn ask(silence: Weak<Silence>, store: Arc<dyn ObjectStore>) {
    while silence.strong_count() > 0 {
        sleep(PAUSE).await;
        match timeout(ANSWER_TIME, store.get(layout::REPOSITORY, None)).await {
            Err(_) | Ok(Err(StoreError::Unavailable { .. })) => {}
            Ok(_) => break,
        }
    }
    if let Some(silence) = silence.upgrade() {
        silence.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::{Fault, Fixture};

    async fn answering(regions: &crate::repository::regions::Regions) -> Vec<bool> {
        regions.list_each(layout::COMMITS).await.iter().map(|(_, list)| list.is_ok()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_region_costs_its_time_once_and_is_there_again_when_it_answers() {
        let fixture = Fixture::memory(3, 2).await;
        let seconds = |began: Instant| began.elapsed().as_secs();
        // Silent from the beginning.
        fixture.stores[0].set(Fault::Hang);
        let began = Instant::now();
        let regions = fixture.reopen().await.unwrap().regions;
        for _ in 0..20 {
            assert_eq!(answering(&regions).await, [false, true, true]);
        }
        assert!((5..7).contains(&seconds(began)), "{} s", seconds(began));
        let silent = regions.silent().await.into_values().next().unwrap().to_string();
        assert!(silent.contains("silent for") && silent.contains("while others answered"), "{silent}");
        fixture.stores[0].set(Fault::None);
        sleep(PAUSE + ANSWER_TIME + PAUSE).await;
        assert_eq!(answering(&regions).await, [true, true, true]);

        // Silent later: whoever waits is told so, and whoever comes then does not wait.
        fixture.stores[0].set(Fault::Hang);
        let began = Instant::now();
        assert!(timeout(LONG, answering(&regions)).await.is_err());
        assert_eq!(answering(&regions).await, [false, true, true]);
        assert_eq!(seconds(began), LONG.as_secs());
        fixture.stores[0].set(Fault::None);
        sleep(PAUSE + ANSWER_TIME + PAUSE).await;
        assert_eq!(answering(&regions).await, [true, true, true]);

        // A hurry is no silence.
        fixture.stores[0].set(Fault::Hang);
        assert!(timeout(LONG / 2, answering(&regions)).await.is_err());
        fixture.stores[0].set(Fault::None);
        assert_eq!(answering(&regions).await, [true, true, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_region_that_fails_at_once_is_asked_each_time() {
        let fixture = Fixture::memory(2, 1).await;
        let regions = fixture.reopen().await.unwrap().regions;
        fixture.stores[0].set(Fault::Fail);
        assert_eq!(answering(&regions).await, [false, true]);
        fixture.stores[0].set(Fault::None);
        assert_eq!(answering(&regions).await, [true, true]);
    }
}
