//! A bound on concurrent calls to one region.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// Lets at most so many calls run at a time; the others wait in the order of their arrival.
#[derive(Debug)]
pub struct Limit {
    inner: Arc<dyn ObjectStore>,
    permits: Semaphore,
}

impl Limit {
    /// At most `calls` at a time, and at least one.
    pub fn new(inner: Arc<dyn ObjectStore>, calls: usize) -> Self {
        Self { inner, permits: Semaphore::new(calls.clamp(1, Semaphore::MAX_PERMITS)) }
    }

    async fn turn(&self, operation: &'static str, key: &str) -> Result<SemaphorePermit<'_>, StoreError> {
        self.permits.acquire().await.map_err(|closed| StoreError::Unavailable {
            operation,
            key: key.to_owned(),
            address: self.inner.address(),
            reason: closed.to_string(),
        })
    }
}

#[async_trait]
impl ObjectStore for Limit {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        let _turn = self.turn("probe", "").await?;
        self.inner.probe().await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        let _turn = self.turn("put", key).await?;
        self.inner.put(key, body, digest, options).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        let _turn = self.turn("head", key).await?;
        self.inner.head(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let _turn = self.turn("get", key).await?;
        self.inner.get(key, range).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        let _turn = self.turn("list", prefix).await?;
        self.inner.list(prefix, depth, after).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        let _turn = self.turn("time", "").await?;
        self.inner.server_time().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        let _turn = self.turn("list", prefix).await?;
        self.inner.list_versions(prefix, after).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        let _turn = self.turn("lock", key).await?;
        self.inner.extend(key, until).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        let _turn = self.turn("lock", key).await?;
        self.inner.locked_until(key, version).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        let _turn = self.turn("lock", key).await?;
        self.inner.is_held(key, version).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        let _turn = self.turn("delete", key).await?;
        self.inner.delete_version(key, version).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let _turn = self.turn("delete", key).await?;
        self.inner.delete(key).await
    }
}
