//! How long each request to a region takes, and whether it was answered. Stacked inside the retry: every attempt counts.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::model::Clock;
use crate::observe::metrics::Meters;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// Measures the store inside.
#[derive(Debug)]
pub struct Meter {
    inner: Arc<dyn ObjectStore>,
    region: String,
    meters: Arc<Meters>,
    clock: Arc<dyn Clock>,
}

impl Meter {
    /// Measures `inner` under the name of its region.
    pub fn new(inner: Arc<dyn ObjectStore>, region: String, meters: Arc<Meters>, clock: Arc<dyn Clock>) -> Self {
        Self { inner, region, meters, clock }
    }

    async fn timed<T>(
        &self,
        op: &'static str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let began = self.clock.monotonic();
        let done = call.await;
        // That there is no such object, another one, or one that is locked, is an answer.
        let answered = matches!(
            &done,
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::Conflict { .. } | StoreError::Retained { .. })
        );
        self.meters.request(&self.region, op, self.clock.monotonic().saturating_sub(began), !answered);
        done
    }
}

#[async_trait]
impl ObjectStore for Meter {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.timed("probe", self.inner.probe()).await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        self.timed("put", self.inner.put(key, body, digest, options)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.timed("head", self.inner.head(key)).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.timed("get", self.inner.get(key, range)).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        self.timed("list", self.inner.list(prefix, depth, after)).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.timed("time", self.inner.server_time()).await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.timed("list", self.inner.list_versions(prefix, after)).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.timed("lock", self.inner.extend(key, until)).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.timed("lock", self.inner.locked_until(key, version)).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.timed("lock", self.inner.is_held(key, version)).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.timed("delete", self.inner.delete_version(key, version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.timed("delete", self.inner.delete(key)).await
    }
}
