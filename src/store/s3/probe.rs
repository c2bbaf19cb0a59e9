//! Proof that the server refuses a second put of one name: some ignore the condition and answer 200.

use aws_sdk_s3::types::{BucketVersioningStatus, ObjectLockEnabled};
use bytes::Bytes;

use super::S3Store;
use crate::store::{Capabilities, Digest, PutOptions, StoreError};

impl S3Store {
    /// Two puts of different bytes under `.probe/`, then the bucket's settings. The probe's object stays: a writer may
    /// not delete.
    pub(super) async fn prove(&self) -> Result<Capabilities, StoreError> {
        let (create_only, versions, retention) =
            tokio::join!(self.refuses_second_put(), self.has_versions(), self.has_locks());
        let create_only = create_only?;
        if !create_only && !self.options.single_writer {
            let reason = "a second put of one name succeeds here: the server ignores `If-None-Match`, so two writers \
                          would overwrite each other; use another server or configure this region for a single writer";
            return Err(StoreError::Invalid { address: self.address.clone(), reason: reason.to_owned() });
        }
        Ok(Capabilities { create_only, versions: versions?, retention: retention? })
    }

    async fn refuses_second_put(&self) -> Result<bool, StoreError> {
        let mut random = [0; 16];
        self.rng.fill(&mut random).map_err(|error| self.call("probe", ".probe").unavailable(error.to_string()))?;
        let key = format!(".probe/{}", hex::encode(random));
        for body in ["first", "second"] {
            let body = Bytes::from_static(body.as_bytes());
            let digest = Digest::of(&body);
            match self.put_if_absent(&key, body, digest, &PutOptions::default()).await {
                Ok(_) => {}
                Err(StoreError::Conflict { .. }) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn has_versions(&self) -> Result<bool, StoreError> {
        let reply = self.client.get_bucket_versioning().bucket(&self.bucket).send().await;
        let enabled = reply.map(|reply| reply.status() == Some(&BucketVersioningStatus::Enabled));
        settled(enabled.map_err(|error| self.call("probe", "the bucket's versioning").failed(&error)))
    }

    async fn has_locks(&self) -> Result<bool, StoreError> {
        let reply = self.client.get_object_lock_configuration().bucket(&self.bucket).send().await;
        let enabled = reply.map(|reply| {
            let lock = reply.object_lock_configuration();
            lock.and_then(|lock| lock.object_lock_enabled()) == Some(&ObjectLockEnabled::Enabled)
        });
        settled(enabled.map_err(|error| {
            let call = self.call("probe", "the bucket's object lock");
            match super::error::reply(&error).and_then(|reply| reply.code) {
                Some("ObjectLockConfigurationNotFoundError") => {
                    StoreError::NotFound { key: call.key.to_owned(), address: call.address.to_owned() }
                }
                _ => call.failed(&error),
            }
        }))
    }
}

/// Not allowed to know, or no such setting on this server: the capability is not there to be used.
fn settled(answer: Result<bool, StoreError>) -> Result<bool, StoreError> {
    match answer {
        Err(error) if !error.is_transient() => Ok(false),
        answer => answer,
    }
}
