//! A region that could not be opened. It stands in its place, so that the others serve and its own error is told
//! wherever it is asked.

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// Answers every call with the reason for which the store could not be opened.
#[derive(Debug)]
pub struct AbsentStore {
    address: String,
    reason: String,
}

impl AbsentStore {
    /// For a store at `address` that failed with `error`.
    pub fn new(address: String, error: &StoreError) -> Self {
        Self { address, reason: error.to_string() }
    }

    fn unavailable(&self, operation: &'static str, key: &str) -> StoreError {
        let (address, reason) = (self.address.clone(), self.reason.clone());
        StoreError::Absent { operation, key: key.to_owned(), address, reason }
    }
}

#[async_trait]
impl ObjectStore for AbsentStore {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        Err(self.unavailable("probe", ""))
    }

    async fn put(&self, key: &str, _: Bytes, _: Digest, _: &PutOptions) -> Result<Put, StoreError> {
        Err(self.unavailable("put", key))
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        Err(self.unavailable("head", key))
    }

    async fn get(&self, key: &str, _: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        Err(self.unavailable("get", key))
    }

    async fn list(&self, prefix: &str, _: Depth, _: Option<&ListToken>) -> Result<ListPage, StoreError> {
        Err(self.unavailable("list", prefix))
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        Err(self.unavailable("ask the time", ""))
    }

    async fn list_versions(&self, prefix: &str, _: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        Err(self.unavailable("list", prefix))
    }

    async fn extend(&self, key: &str, _: DateTime<Utc>) -> Result<(), StoreError> {
        Err(self.unavailable("lock", key))
    }

    async fn locked_until(&self, key: &str, _: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        Err(self.unavailable("lock", key))
    }

    async fn is_held(&self, key: &str, _: &VersionId) -> Result<bool, StoreError> {
        Err(self.unavailable("lock", key))
    }

    async fn delete_version(&self, key: &str, _: &VersionId) -> Result<(), StoreError> {
        Err(self.unavailable("delete", key))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Err(self.unavailable("delete", key))
    }
}
