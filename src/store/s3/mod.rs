//! A region in an S3 bucket.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::OnceCell;

use super::name;
use super::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};
use crate::model::{Clock, Rng};
use error::Call;

mod client;
mod error;
mod lock;
mod probe;
mod read;
mod remove;
mod time;
mod write;

pub use client::{S3Checksum, S3Credentials, S3LockMode, S3Options};

/// A bucket, or the part of one below a prefix.
///
/// The first put proves that the server refuses a second put of one name, unless [`probe`](Self::probe) did already;
/// until then [`Capabilities::create_only`] is false and nothing but the probe is written. Reading needs no proof.
pub struct S3Store {
    client: Client,
    bucket: String,
    /// Empty, or with a `/` at its end.
    root: String,
    address: String,
    options: S3Options,
    clock: Arc<dyn Clock>,
    rng: Arc<dyn Rng>,
    proven: OnceCell<Capabilities>,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("address", &self.address).field("proven", &self.proven).finish_non_exhaustive()
    }
}

impl S3Store {
    /// Prepares a client; the store itself is not called, so that a region that is down stops nobody from starting.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for options that cannot work; [`StoreError::Denied`] without credentials.
    pub async fn connect(options: S3Options, clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> Result<Self, StoreError> {
        let trimmed = options.prefix.trim_matches('/');
        let (root, address) = if trimmed.is_empty() {
            (String::new(), format!("s3://{}", options.bucket))
        } else {
            (format!("{trimmed}/"), format!("s3://{}/{trimmed}", options.bucket))
        };
        if trimmed.len() > name::MAX_NAME - 1 || trimmed.split('/').any(|part| matches!(part, "." | "..")) {
            return Err(StoreError::Invalid { address, reason: "the prefix is too long or has a dot part".to_owned() });
        }
        let client = client::connect(&options, &address, Arc::clone(&clock)).await?;
        let bucket = options.bucket.clone();
        Ok(Self { client, bucket, root, address, options, clock, rng, proven: OnceCell::new() })
    }

    fn call<'a>(&'a self, operation: &'static str, key: &'a str) -> Call<'a> {
        Call { operation, key, address: &self.address }
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.root)
    }

    /// Bounds a call with its body: the SDK's own timeouts end with the headers of a streamed reply.
    async fn in_time<T>(
        &self,
        call: Call<'_>,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let limit: Duration = self.options.attempt_timeout;
        let late = |_elapsed| Err(call.unavailable(format!("no complete answer within {limit:?}")));
        tokio::time::timeout(limit, work).await.unwrap_or_else(late)
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.proven.get().copied().unwrap_or_default()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.proven.get_or_try_init(|| self.prove()).await.copied()
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        name::check(&self.address, key)?;
        let proven = self.probe().await?;
        if options.retain_until.is_some() && !proven.retention {
            // Some servers take the lock's headers, answer 200 and lock nothing.
            return Err(self.call("put", key).invalid(lock::NO_LOCKS));
        }
        if !proven.create_only
            && let Some(put) = self.look_before_put(key, digest, &body, options).await?
        {
            return Ok(put);
        }
        self.put_if_absent(key, body, digest, options).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        name::check(&self.address, key)?;
        self.head_object(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        name::check(&self.address, key)?;
        name::check_range(&self.address, range.as_ref())?;
        match range {
            Some(range) if range.is_empty() => self.get_nothing(key, range.start).await,
            range => self.in_time(self.call("get", key), self.get_object(key, range)).await,
        }
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        name::check_prefix(&self.address, prefix)?;
        self.list_objects(prefix, depth, after).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.date_of_reply().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        name::check_prefix(&self.address, prefix)?;
        self.list_object_versions(prefix, after).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        if !self.probe().await?.retention {
            return Err(self.call("lock", key).invalid(lock::NO_LOCKS));
        }
        self.lock_at_least(key, until).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        name::check(&self.address, key)?;
        let version = version.map(|version| version.0.as_str());
        Ok(self.lock_of(key, version).await?.map(|(_, until)| until))
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        name::check(&self.address, key)?;
        self.has_hold(key, &version.0).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        self.delete_one_version(key, &version.0).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        self.delete_versions(key).await
    }
}
