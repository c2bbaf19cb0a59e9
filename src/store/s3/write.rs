//! The conditional put and what its refusals mean.

use aws_runtime::auth::PayloadSigningOverride;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::{BoxError, SdkError};
use aws_sdk_s3::operation::put_object::PutObjectError;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ObjectLockMode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;

use super::error::reply;
use super::lock::stamp;
use super::{S3Checksum, S3Store};
use crate::store::{Digest, Put, PutOptions, StoreError};

impl S3Store {
    /// One `PutObject` that the server refuses if the name exists.
    ///
    /// The signature covers the body's SHA-256, also on servers that know no checksum headers.
    pub(super) async fn put_if_absent(
        &self,
        key: &str,
        body: Bytes,
        digest: Digest,
        options: &PutOptions,
    ) -> Result<Put, StoreError> {
        let mut request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .if_none_match("*")
            .body(ByteStream::from(body.clone()));
        // S3 refuses a locked object without a checksum.
        if self.options.checksum == S3Checksum::WhenSupported || options.retain_until.is_some() {
            request = request.checksum_sha256(BASE64.encode(digest.0));
        }
        if let Some(until) = options.retain_until {
            request = request
                .object_lock_mode(ObjectLockMode::from(self.options.lock_mode))
                .object_lock_retain_until_date(stamp(until));
        }
        match request.customize().interceptor(BodyDigest(hex::encode(digest.0))).send().await {
            Ok(_) => Ok(Put::Created),
            Err(error) if is_taken(&error) => self.settle(key, digest, &body, options).await,
            Err(error) => Err(self.call("put", key).failed(&error)),
        }
    }

    /// For a server that does not honour the condition: the outcome of a put if the name exists, `None` if it is free.
    pub(super) async fn look_before_put(
        &self,
        key: &str,
        digest: Digest,
        body: &Bytes,
        options: &PutOptions,
    ) -> Result<Option<Put>, StoreError> {
        match self.head_object(key).await {
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
            Ok(_) => self.settle(key, digest, body, options).await.map(Some),
        }
    }

    /// The name exists: are they our bytes? The digest that the server kept decides, or else the bytes themselves.
    /// They may have been put without a lock, or with a shorter one.
    async fn settle(&self, key: &str, digest: Digest, body: &Bytes, options: &PutOptions) -> Result<Put, StoreError> {
        let call = self.call("put", key);
        let vanished = |error: StoreError| {
            if error.is_not_found() {
                call.unavailable("the name was taken and is free again".to_owned())
            } else {
                error
            }
        };
        let info = self.head_object(key).await.map_err(vanished)?;
        let same = if info.size != body.len() as u64 {
            false
        } else if let Some(stored) = info.digest {
            stored == digest
        } else {
            let stored = self.in_time(call, self.get_object(key, None)).await.map_err(vanished)?;
            Digest::of(&stored) == digest
        };
        if same {
            if let Some(until) = options.retain_until {
                self.lock_at_least(key, until).await.map_err(vanished)?;
            }
            return Ok(Put::AlreadyThere);
        }
        Err(StoreError::Conflict { key: key.to_owned(), address: self.address.clone() })
    }
}

/// The SHA-256 that is signed for a body, so that the SDK does not hash it once more in every region.
#[derive(Debug)]
struct BodyDigest(String);

impl Intercept for BodyDigest {
    fn name(&self) -> &'static str {
        "BodyDigest"
    }

    fn modify_before_signing(
        &self,
        _context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        config.interceptor_state().store_put(PayloadSigningOverride::Precomputed(self.0.clone()));
        Ok(())
    }
}

/// Whether the server refused the precondition, the only refusal that says something of the name.
fn is_taken(error: &SdkError<PutObjectError>) -> bool {
    reply(error).is_some_and(|reply| reply.status == 412)
}
