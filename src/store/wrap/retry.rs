//! Bounded repetition of calls that may succeed later.
//!
//! The adapters do not retry, because only this layer may: it knows that a repeated put answers
//! [`Put::AlreadyThere`] where a client's built-in retry would report a refused precondition.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep, timeout_at};

use crate::model::Rng;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// How often and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts of one call, the first included; 0 counts as 1.
    pub attempts: u32,
    /// Longest pause before the second attempt; it doubles with every further one.
    pub first_pause: Duration,
    /// Longest pause before any attempt.
    pub longest_pause: Duration,
    /// Time for the whole call: every attempt and every pause. An attempt that is still running then is dropped.
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 8,
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(10),
            deadline: Duration::from_secs(120),
        }
    }
}

/// Repeats transient failures of the store inside.
#[derive(Debug)]
pub struct Retry {
    inner: Arc<dyn ObjectStore>,
    policy: RetryPolicy,
    rng: Arc<dyn Rng>,
}

/// What is tried, for the error when time runs out.
#[derive(Clone, Copy)]
struct Call<'a> {
    operation: &'static str,
    key: &'a str,
}

impl Retry {
    /// Wraps `inner`; `rng` spreads the pauses.
    pub fn new(inner: Arc<dyn ObjectStore>, policy: RetryPolicy, rng: Arc<dyn Rng>) -> Self {
        Self { inner, policy, rng }
    }

    /// Runs `attempt` with the number of attempts before it, until it succeeds, fails for good or time runs out.
    async fn run<T, F>(&self, call: Call<'_>, mut attempt: impl FnMut(u32) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let end = Instant::now() + self.policy.deadline;
        let mut failed = 0;
        loop {
            let error = match timeout_at(end, attempt(failed)).await {
                Err(_elapsed) => return Err(self.out_of_time(call)),
                // A disk does not empty itself within these seconds.
                Ok(Err(error)) if error.is_transient() && !error.is_full() => error,
                Ok(done) => return done,
            };
            failed += 1;
            let pause = self.pause(failed);
            if failed >= self.policy.attempts.max(1) || Instant::now() + pause >= end {
                return Err(error);
            }
            tracing::debug!(%error, failed, ?pause, "store call is repeated");
            sleep(pause).await;
        }
    }

    /// Between half and the whole of the exponential pause, so that the writers of one region spread out.
    fn pause(&self, failed: u32) -> Duration {
        let doubled = 2u32.saturating_pow(failed.saturating_sub(1));
        let whole = self.policy.first_pause.saturating_mul(doubled).min(self.policy.longest_pause);
        let mut chance = [0; 2];
        // Without randomness the pause is merely not spread.
        let share = self.rng.fill(&mut chance).map_or(u16::MAX, |()| u16::from_le_bytes(chance));
        whole / 2 + (whole / 2).mul_f64(f64::from(share) / f64::from(u16::MAX))
    }

    fn out_of_time(&self, call: Call<'_>) -> StoreError {
        StoreError::Unavailable {
            operation: call.operation,
            key: call.key.to_owned(),
            address: self.inner.address(),
            reason: format!("no answer within {:?}", self.policy.deadline),
        }
    }
}

#[async_trait]
impl ObjectStore for Retry {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.run(Call { operation: "probe", key: "" }, |_| self.inner.probe()).await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        self.run(Call { operation: "put", key }, |_| self.inner.put(key, body.clone(), digest, options)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.run(Call { operation: "head", key }, |_| self.inner.head(key)).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.run(Call { operation: "get", key }, |_| self.inner.get(key, range.clone())).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        self.run(Call { operation: "list", key: prefix }, |_| self.inner.list(prefix, depth, after)).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.run(Call { operation: "time", key: "" }, |_| self.inner.server_time()).await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.run(Call { operation: "list", key: prefix }, |_| self.inner.list_versions(prefix, after)).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.run(Call { operation: "lock", key }, |_| self.inner.extend(key, until)).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.run(Call { operation: "lock", key }, |_| self.inner.locked_until(key, version)).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.run(Call { operation: "lock", key }, |_| self.inner.is_held(key, version)).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.run(Call { operation: "delete", key }, |_| self.inner.delete_version(key, version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let attempt = |failed| async move {
            match self.inner.delete(key).await {
                // An earlier attempt did it and its reply was lost.
                Err(StoreError::NotFound { .. }) if failed > 0 => Ok(()),
                done => done,
            }
        };
        self.run(Call { operation: "delete", key }, attempt).await
    }
}
