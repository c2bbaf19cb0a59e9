//! Regions that fail, hang, forget, rot and refuse when they are told to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

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
    /// Whether holds may not be known.
    hidden_holds: AtomicBool,
    /// Versions that may still be deleted before the process dies.
    deletes: AtomicI64,
    /// Names that are held, and whether one who asks is told.
    held: Mutex<BTreeMap<String, bool>>,
    /// What is locked, and until when, once a name with this prefix is put.
    trap: Mutex<Option<(String, String, DateTime<Utc>)>>,
    /// Names that may be neither listed nor read, by what they begin with.
    closed: Mutex<Option<String>>,
    /// Names that are listed and not given.
    mute: Mutex<Option<String>>,
}

impl FaultyStore {
    /// One that does its work.
    pub(super) fn over(inner: Arc<dyn ObjectStore>) -> Self {
        Self {
            inner,
            fault: Mutex::new(Fault::None),
            locks: AtomicBool::new(true),
            hidden: AtomicBool::new(false),
            hidden_holds: AtomicBool::new(false),
            deletes: AtomicI64::new(i64::MAX),
            held: Mutex::default(),
            trap: Mutex::default(),
            closed: Mutex::default(),
            mute: Mutex::default(),
        }
    }

    /// Switches the fault.
    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// From now on objects whose names contain this are listed and not given; `None` ends it.
    pub fn mute(&self, part: Option<String>) {
        *self.mute.lock().unwrap() = part;
    }

    /// From now on these credentials may not know what begins with this; `None` ends it.
    pub fn close(&self, prefix: Option<&str>) {
        *self.closed.lock().unwrap() = prefix.map(str::to_owned);
    }

    /// Allows or forbids to make locks longer.
    pub fn allow_locks(&self, allowed: bool) {
        self.locks.store(allowed, Ordering::Relaxed);
    }

    /// Hides locks from whoever asks, or shows them.
    pub fn hide_locks(&self, hidden: bool) {
        self.hidden.store(hidden, Ordering::Relaxed);
    }

    /// Hides holds from whoever asks, or shows them.
    pub fn hide_holds(&self, hidden: bool) {
        self.hidden_holds.store(hidden, Ordering::Relaxed);
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

    /// Holds an object without an end: a legal hold.
    pub fn hold(&self, key: &str) {
        self.held.lock().unwrap().insert(key.to_owned(), true);
    }

    /// The same, by somebody who comes between the question and the delete.
    pub fn hold_late(&self, key: &str) {
        self.held.lock().unwrap().insert(key.to_owned(), false);
    }

    /// Ends a hold.
    pub fn release(&self, key: &str) {
        self.held.lock().unwrap().remove(key);
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
        let is_closed = self.closed.lock().unwrap().as_ref().is_some_and(|prefix| key.starts_with(prefix.as_str()));
        let fault = if is_closed { Fault::Deny } else { fault };
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

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.pass("lock", key).await?;
        if self.hidden_holds.load(Ordering::Relaxed) {
            let (key, address, reason) = (key.to_owned(), self.address(), "no permission".to_owned());
            return Err(StoreError::Denied { operation: "read the hold", key, address, reason });
        }
        let seen = self.held.lock().unwrap().get(key).copied().unwrap_or_default();
        Ok(seen || self.inner.is_held(key, version).await?)
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.pass("delete", key).await?;
        if let Some(seen) = self.held.lock().unwrap().get_mut(key) {
            *seen = true;
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
