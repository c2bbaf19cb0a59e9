//! Reading objects and their names.

use std::ops::Range;

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::DateTime as S3Time;
use aws_sdk_s3::types::ChecksumMode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};

use super::S3Store;
use super::error::{Call, reply};
use crate::store::{Depth, Digest, ListPage, ListToken, ListedObject, ObjectInfo, StoreError, name};

/// What one reply reserves before its bytes are here; objects are at most this large.
const LARGEST_RESERVE: u64 = 16 << 20;

impl S3Store {
    pub(super) async fn head_object(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        let call = self.call("head", key);
        let request = self.client.head_object().bucket(&self.bucket).key(self.full(key));
        let output = match request.checksum_mode(ChecksumMode::Enabled).send().await {
            Ok(output) => output,
            Err(error) => {
                // HEAD has no body and so no code: a wrong clock and a wrong key look alike until GET tells.
                let wordless = reply(&error).filter(|reply| matches!(reply.status, 400 | 403));
                return Err(match wordless {
                    Some(_) => self.reason_of_refusal(call).await.unwrap_or_else(|| call.failed(&error)),
                    None => call.failed(&error),
                });
            }
        };
        let size = output.content_length().and_then(|length| u64::try_from(length).ok());
        Ok(ObjectInfo {
            size: size.ok_or_else(|| call.unavailable("the answer has no length".to_owned()))?,
            modified: output.last_modified().and_then(time),
            digest: output.checksum_sha256().and_then(digest),
        })
    }

    /// Asks for the first byte of what HEAD refused; `None` if GET is not refused the same way.
    async fn reason_of_refusal(&self, call: Call<'_>) -> Option<StoreError> {
        let request = self.client.get_object().bucket(&self.bucket).key(self.full(call.key)).range("bytes=0-0");
        let error = request.send().await.err()?;
        let reply = reply(&error)?;
        match reply.status {
            // Between the two calls the client learned the server's clock: the same HEAD will now be answered.
            404 | 416 => Some(call.unavailable("refused, then not refused".to_owned())),
            _ => Some(call.refused(reply)),
        }
    }

    /// An empty range: S3 cannot ask for one, but the object must exist and reach that far.
    pub(super) async fn get_nothing(&self, key: &str, at: u64) -> Result<Bytes, StoreError> {
        let info = self.head_object(key).await?;
        if at > info.size { Err(self.truncated(key, 0, 0)) } else { Ok(Bytes::new()) }
    }

    pub(super) async fn get_object(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let call = self.call("get", key);
        let mut request = self.client.get_object().bucket(&self.bucket).key(self.full(key));
        if let Some(range) = &range {
            // S3 counts the last byte in.
            request = request.range(format!("bytes={}-{}", range.start, range.end - 1));
        }
        let output = request.send().await.map_err(|error| match (reply(&error), &range) {
            (Some(reply), Some(range)) if reply.status == 416 => self.truncated(key, 0, range.end - range.start),
            _ => call.failed(&error),
        })?;
        let expected = self.expected_length(call, &output, range.as_ref())?;
        self.collect(call, output, expected).await
    }

    /// Bytes that the body must have, after checking that the reply answers the question.
    fn expected_length(
        &self,
        call: Call<'_>,
        output: &GetObjectOutput,
        range: Option<&Range<u64>>,
    ) -> Result<u64, StoreError> {
        let length = output.content_length().and_then(|length| u64::try_from(length).ok());
        let length = length.ok_or_else(|| call.unavailable("the answer has no length".to_owned()))?;
        let Some(range) = range else { return Ok(length) };
        let start = format!("bytes {}-", range.start);
        if !output.content_range().is_some_and(|answered| answered.starts_with(&start)) {
            return Err(call.unavailable("the answer is of another range".to_owned()));
        }
        let expected = range.end - range.start;
        if length == expected { Ok(length) } else { Err(self.truncated(call.key, length.min(expected), expected)) }
    }

    async fn collect(&self, call: Call<'_>, output: GetObjectOutput, expected: u64) -> Result<Bytes, StoreError> {
        let reserve = usize::try_from(expected.min(LARGEST_RESERVE)).unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(reserve);
        let mut body = output.body;
        // A connection that breaks in the middle is an error of the body on some servers and its end on others.
        while let Some(Ok(chunk)) = body.next().await {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > expected {
                return Err(call.unavailable("more bytes came than the answer promised".to_owned()));
            }
        }
        let got = bytes.len() as u64;
        if got == expected { Ok(bytes.freeze()) } else { Err(self.truncated(call.key, got, expected)) }
    }

    pub(super) async fn list_objects(
        &self,
        prefix: &str,
        depth: Depth,
        after: Option<&ListToken>,
    ) -> Result<ListPage, StoreError> {
        let beginning = format!("{prefix}*");
        let call = self.call("list", &beginning);
        let output = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(self.full(prefix))
            .set_delimiter((depth == Depth::Level).then(|| "/".to_owned()))
            .set_continuation_token(after.map(|token| token.0.clone()))
            .send()
            .await
            .map_err(|error| call.failed(&error))?;
        let next = output.next_continuation_token().map(|token| ListToken(token.to_owned()));
        if output.is_truncated() == Some(true) && next.is_none() {
            return Err(call.unavailable("the answer is cut and does not say where it goes on".to_owned()));
        }
        let mut page = ListPage { next, ..ListPage::default() };
        for object in output.contents() {
            let Some(key) = object.key().and_then(|key| self.own_name(key)) else { continue };
            let size = object.size().and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| call.unavailable(format!("{key} is listed without its size")))?;
            page.objects.push(ListedObject { key, size, modified: object.last_modified().and_then(time) });
        }
        let folded = output.common_prefixes().iter().filter_map(|common| common.prefix()?.strip_suffix('/'));
        page.prefixes.extend(folded.filter_map(|full| Some(format!("{}/", self.own_name(full)?))));
        Ok(page)
    }

    /// A listed name without our prefix; `None` for what cannot be ours.
    pub(super) fn own_name(&self, full: &str) -> Option<String> {
        full.strip_prefix(&self.root).filter(|key| name::is_name(key)).map(str::to_owned)
    }

    fn truncated(&self, key: &str, got: u64, expected: u64) -> StoreError {
        StoreError::Truncated { key: key.to_owned(), address: self.address.clone(), got, expected }
    }
}

pub(super) fn time(stamp: &S3Time) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(stamp.secs(), stamp.subsec_nanos())
}

/// The SHA-256 of a whole object. A composite one (`…-3`) is of parts, says nothing of the bytes, and is no Base64.
fn digest(text: &str) -> Option<Digest> {
    BASE64.decode(text).ok()?.try_into().ok().map(Digest)
}
