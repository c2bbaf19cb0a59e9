//! Object locks: reading them, and making them longer.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime as S3Time;
use aws_sdk_s3::types::{ObjectLockLegalHoldStatus, ObjectLockMode, ObjectLockRetention, ObjectLockRetentionMode};
use chrono::{DateTime, Utc};

use super::error::reply;
use super::read::time;
use super::{S3LockMode, S3Store};
use crate::store::StoreError;

/// Why a lock is refused before anything is asked.
pub(super) const NO_LOCKS: &str =
    "a lock is asked for, and the bucket has no object lock or these credentials may not see it";

impl From<S3LockMode> for ObjectLockMode {
    fn from(mode: S3LockMode) -> Self {
        match mode {
            S3LockMode::Compliance => Self::Compliance,
            S3LockMode::Governance => Self::Governance,
        }
    }
}

impl From<S3LockMode> for ObjectLockRetentionMode {
    fn from(mode: S3LockMode) -> Self {
        match mode {
            S3LockMode::Compliance => Self::Compliance,
            S3LockMode::Governance => Self::Governance,
        }
    }
}

/// S3 keeps whole seconds, and a part of one would be cut off: a lock must not end before it was promised to.
pub(super) fn stamp(until: DateTime<Utc>) -> S3Time {
    S3Time::from_secs(until.timestamp() + i64::from(until.timestamp_subsec_nanos() > 0))
}

impl S3Store {
    /// Sets the lock, and looks at the one that is there only if that is refused: the server itself never shortens one
    /// without being asked to bypass it, so most calls need no question first.
    pub(super) async fn lock_at_least(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        let refused = match self.set_lock(key, self.options.lock_mode.into(), until).await {
            Err(refused @ StoreError::Denied { .. }) => refused,
            done => return done,
        };
        match self.lock_of(key, None).await {
            Ok(Some((_, held))) if held >= until => Ok(()),
            // A governance lock in place of a compliance lock would be a weaker one: the stricter mode stays.
            Ok(Some((mode, _))) if mode != self.options.lock_mode.into() => self.set_lock(key, mode, until).await,
            _ => Err(refused),
        }
    }

    async fn set_lock(&self, key: &str, mode: ObjectLockRetentionMode, until: DateTime<Utc>) -> Result<(), StoreError> {
        let lock = ObjectLockRetention::builder().mode(mode).retain_until_date(stamp(until)).build();
        let request = self.client.put_object_retention().bucket(&self.bucket).key(self.full(key)).retention(lock);
        request.send().await.map(drop).map_err(|error| self.call("lock", key).failed(&error))
    }

    /// The lock of a name, or of one of its versions: how strict it is, and until when.
    pub(super) async fn lock_of(
        &self,
        key: &str,
        version: Option<&str>,
    ) -> Result<Option<(ObjectLockRetentionMode, DateTime<Utc>)>, StoreError> {
        let request = self.client.get_object_retention().bucket(&self.bucket).key(self.full(key));
        match request.set_version_id(version.map(str::to_owned)).send().await {
            Ok(reply) => {
                Ok(reply.retention().and_then(|lock| Some((lock.mode()?.clone(), time(lock.retain_until_date()?)?))))
            }
            Err(error) if is_unlocked(&error) => Ok(None),
            Err(error) => Err(self.call("read the lock", key).failed(&error)),
        }
    }

    /// Whether somebody put a legal hold on it, which has no end.
    pub(super) async fn has_hold(&self, key: &str, version: &str) -> Result<bool, StoreError> {
        let request = self.client.get_object_legal_hold().bucket(&self.bucket).key(self.full(key)).version_id(version);
        match request.send().await {
            Ok(reply) => Ok(reply.legal_hold().and_then(|hold| hold.status()) == Some(&ObjectLockLegalHoldStatus::On)),
            Err(error) if is_unlocked(&error) || is_unknown(&error) => Ok(false),
            Err(error) => Err(self.call("read the legal hold", key).failed(&error)),
        }
    }
}

/// A server that knows no legal holds keeps none.
fn is_unknown<E: ProvideErrorMetadata>(error: &SdkError<E, aws_sdk_s3::config::http::HttpResponse>) -> bool {
    reply(error).is_some_and(|reply| reply.code == Some("NotImplemented"))
}

/// No lock on the object, no locks in the bucket, or a delete marker, which cannot be locked.
fn is_unlocked<E: ProvideErrorMetadata>(error: &SdkError<E, aws_sdk_s3::config::http::HttpResponse>) -> bool {
    let code = reply(error).and_then(|reply| reply.code);
    matches!(
        code,
        Some(
            "NoSuchObjectLockConfiguration"
                | "ObjectLockConfigurationNotFoundError"
                | "InvalidRequest"
                | "MethodNotAllowed"
        )
    )
}
