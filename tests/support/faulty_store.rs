//! A store that misbehaves on command: fails, hangs, forgets to answer, damages. Faults are planned by call and count,
//! so that a test says "lose the reply of the third put" and can repeat it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use drctl::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// The methods that can be hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    Put,
    Head,
    Get,
    List,
    Time,
    Lock,
    Delete,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `Unavailable`, and nothing was done.
    Fail,
    /// It is done, and the answer is `Unavailable`.
    LoseReply,
    /// Nothing is done and no answer ever comes.
    Hang,
    /// It is done after this long.
    Slow(Duration),
    /// This bit of the body is flipped: of the stored one (put) or of the returned one (get).
    FlipBit(usize),
    /// The body ends after this many bytes, in storage (put) or in the answer (get), and nobody says so.
    Truncate(usize),
}

/// When a fault happens; counts begin at 1.
#[derive(Debug, Clone, Copy)]
enum When {
    Nth(u64),
    From(u64),
}

/// Another store with faults in front.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    plan: Mutex<Vec<(Call, When, Fault)>>,
    counts: Mutex<HashMap<Call, u64>>,
}

impl FaultyStore {
    /// Faultless until told otherwise.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, plan: Mutex::default(), counts: Mutex::default() }
    }

    /// Hits the `nth` call from now on (1 is the next one).
    pub fn on(&self, call: Call, nth: u64, fault: Fault) -> &Self {
        self.plan(call, When::Nth(self.calls(call) + nth), fault)
    }

    /// Hits every call from now on.
    pub fn always(&self, call: Call, fault: Fault) -> &Self {
        self.plan(call, When::From(self.calls(call) + 1), fault)
    }

    /// Hits every call of every kind from now on: a region that is gone (`Fail`) or dead (`Hang`).
    pub fn everywhere(&self, fault: Fault) -> &Self {
        for call in [Call::Put, Call::Head, Call::Get, Call::List, Call::Time, Call::Lock, Call::Delete] {
            self.always(call, fault);
        }
        self
    }

    /// Forgets every planned fault; hung calls stay hung.
    pub fn heal(&self) {
        self.plan.lock().unwrap().clear();
    }

    /// How many calls of this kind came so far.
    pub fn calls(&self, call: Call) -> u64 {
        self.counts.lock().unwrap().get(&call).copied().unwrap_or(0)
    }

    fn plan(&self, call: Call, when: When, fault: Fault) -> &Self {
        self.plan.lock().unwrap().push((call, when, fault));
        self
    }

    fn next_fault(&self, call: Call) -> Option<Fault> {
        let count = {
            let mut counts = self.counts.lock().unwrap();
            let count = counts.entry(call).or_default();
            *count += 1;
            *count
        };
        let plan = self.plan.lock().unwrap();
        let hit = |when: &When| match when {
            When::Nth(nth) => count == *nth,
            When::From(first) => count >= *first,
        };
        plan.iter().find(|(planned, when, _)| *planned == call && hit(when)).map(|(_, _, fault)| *fault)
    }

    fn unavailable(&self, operation: &'static str, key: &str) -> StoreError {
        let (key, address) = (key.to_owned(), self.inner.address());
        StoreError::Unavailable { operation, key, address, reason: "injected fault".to_owned() }
    }

    /// Runs `work` around the next fault of this kind.
    async fn around<T>(
        &self,
        (operation, key): (&'static str, &str),
        fault: Option<Fault>,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        match fault {
            Some(Fault::Fail) => Err(self.unavailable(operation, key)),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::LoseReply) => {
                let _lost = work.await;
                Err(self.unavailable(operation, key))
            }
            Some(Fault::Slow(delay)) => {
                tokio::time::sleep(delay).await;
                work.await
            }
            Some(Fault::FlipBit(_) | Fault::Truncate(_)) | None => work.await,
        }
    }
}

fn damage(body: Bytes, fault: Option<Fault>) -> Bytes {
    match fault {
        Some(Fault::FlipBit(bit)) if bit / 8 < body.len() => {
            let mut body = body.to_vec();
            body[bit / 8] ^= 1 << (bit % 8);
            body.into()
        }
        Some(Fault::Truncate(length)) => body.slice(..length.min(body.len())),
        _ => body,
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
        let fault = self.next_fault(Call::Put);
        let stored = damage(body.clone(), fault);
        // A server that damages bytes does not notice, so the store inside is given a digest that fits them.
        let digest = if stored == body { digest } else { Digest::of(&stored) };
        self.around(("put", key), fault, self.inner.put(key, stored, digest, options)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        let fault = self.next_fault(Call::Head);
        self.around(("head", key), fault, self.inner.head(key)).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let fault = self.next_fault(Call::Get);
        let body = self.around(("get", key), fault, self.inner.get(key, range)).await?;
        Ok(damage(body, fault))
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        let fault = self.next_fault(Call::List);
        self.around(("list", prefix), fault, self.inner.list(prefix, depth, after)).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        let fault = self.next_fault(Call::Time);
        self.around(("time", ""), fault, self.inner.server_time()).await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        let fault = self.next_fault(Call::List);
        self.around(("list", prefix), fault, self.inner.list_versions(prefix, after)).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        let fault = self.next_fault(Call::Lock);
        self.around(("lock", key), fault, self.inner.extend(key, until)).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        let fault = self.next_fault(Call::Lock);
        self.around(("lock", key), fault, self.inner.locked_until(key, version)).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        let fault = self.next_fault(Call::Lock);
        self.around(("lock", key), fault, self.inner.is_held(key, version)).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        let fault = self.next_fault(Call::Delete);
        self.around(("delete", key), fault, self.inner.delete_version(key, version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let fault = self.next_fault(Call::Delete);
        self.around(("delete", key), fault, self.inner.delete(key)).await
    }
}
