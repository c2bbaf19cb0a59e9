//! What S3's answers mean. This is the only place that knows codes and statuses.

use std::error::Error as StdError;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::store::StoreError;

/// One call, for the text of its error.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) operation: &'static str,
    pub(super) key: &'a str,
    pub(super) address: &'a str,
}

/// A refusal as the server put it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply<'a> {
    pub(super) status: u16,
    /// Absent in answers without a body (HEAD) and in those of a proxy.
    pub(super) code: Option<&'a str>,
    pub(super) message: Option<&'a str>,
}

impl Reply<'_> {
    /// What the server said, and nothing else of the exchange: headers carry credentials.
    pub(super) fn words(&self) -> String {
        match (self.code, self.message.filter(|message| !message.is_empty())) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => format!("{code} (HTTP {})", self.status),
            (None, Some(message)) => format!("HTTP {}: {message}", self.status),
            (None, None) => format!("HTTP {}", self.status),
        }
    }
}

/// The server's refusal, if it was the server that refused.
pub(super) fn reply<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<Reply<'_>> {
    let SdkError::ServiceError(service) = error else { return None };
    let metadata = service.err();
    let status = service.raw().status().as_u16();
    Some(Reply { status, code: metadata.code(), message: metadata.message() })
}

impl<'a> Call<'a> {
    /// The meaning of a failed call.
    pub(super) fn failed<E>(self, error: &SdkError<E, HttpResponse>) -> StoreError
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        match (reply(error), error) {
            (Some(reply), _) => self.refused(reply),
            (None, SdkError::ConstructionFailure(_)) => self.invalid(&causes(error)),
            (None, _) => self.unavailable(causes(error)),
        }
    }

    /// The meaning of a refusal.
    pub(super) fn refused(self, reply: Reply<'_>) -> StoreError {
        let (operation, key, address) = (self.operation, self.key.to_owned(), self.address.to_owned());
        match (reply.status, reply.code.unwrap_or_default()) {
            (_, "NoSuchBucket") => StoreError::NotFound { key: "the bucket".to_owned(), address },
            (404, "NoSuchKey" | "NoSuchVersion" | "NotFound") => StoreError::NotFound { key, address },
            (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded") => {
                StoreError::Full { key, address }
            }
            // The client learns the server's clock from this reply and signs the next call with it.
            (_, "RequestTimeTooSkewed") => self.unavailable(reply.words()),
            // These come with status 400 and ask to come again, or tell of bytes damaged on the way.
            (400, "RequestTimeout" | "IncompleteBody" | "BadDigest" | "XAmzContentSHA256Mismatch" | "SlowDown") => {
                self.unavailable(reply.words())
            }
            (401 | 403, _) | (400, "ExpiredToken" | "InvalidToken") => {
                StoreError::Denied { operation, key, address, reason: reply.words() }
            }
            (501 | 505, _) => self.invalid(&reply.words()),
            // 404 without an S3 code is some proxy's: whether the object exists is not known.
            (404 | 408 | 409 | 429 | 500.., _) => self.unavailable(reply.words()),
            _ => self.invalid(&reply.words()),
        }
    }

    pub(super) fn unavailable(self, reason: String) -> StoreError {
        StoreError::Unavailable {
            operation: self.operation,
            key: self.key.to_owned(),
            address: self.address.to_owned(),
            reason,
        }
    }

    pub(super) fn invalid(self, reason: &str) -> StoreError {
        let reason = format!("{} of {}: {reason}", self.operation, self.key);
        StoreError::Invalid { address: self.address.to_owned(), reason }
    }
}

/// The chain of causes by their `Display`; the `Debug` of these types prints requests with their headers.
pub(super) fn causes(error: &(dyn StdError + 'static)) -> String {
    let links = std::iter::successors(Some(error), |link| (*link).source());
    let mut words: Vec<String> = Vec::new();
    for text in links.map(ToString::to_string) {
        if !words.last().is_some_and(|last| last.contains(&text)) {
            words.push(text);
        }
    }
    words.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call<'static> = Call { operation: "put", key: "a/b", address: "s3://bucket/p" };

    fn refused(status: u16, code: &str) -> StoreError {
        CALL.refused(Reply { status, code: (!code.is_empty()).then_some(code), message: Some("words") })
    }

    #[test]
    fn what_may_pass_is_transient_and_nothing_else_is() {
        let transient = [
            (500, "InternalError"),
            (503, "SlowDown"),
            (503, ""),
            (429, "TooManyRequests"),
            (408, "RequestTimeout"),
            (400, "RequestTimeout"),
            (400, "BadDigest"),
            (403, "RequestTimeTooSkewed"),
            (409, "ConditionalRequestConflict"),
            (409, "OperationAborted"),
            (404, ""),
            (507, "XMinioStorageFull"),
            (403, "QuotaExceeded"),
        ];
        let lasting = [
            (403, "AccessDenied"),
            (403, "SignatureDoesNotMatch"),
            (403, ""),
            (401, "Unauthorized"),
            (400, "ExpiredToken"),
            (404, "NoSuchKey"),
            (404, "NoSuchBucket"),
            (404, "NotFound"),
            (400, "InvalidRequest"),
            (501, "NotImplemented"),
            (301, "PermanentRedirect"),
        ];
        for (status, code) in transient {
            assert!(refused(status, code).is_transient(), "{status} {code}");
        }
        for (status, code) in lasting {
            assert!(!refused(status, code).is_transient(), "{status} {code}");
        }
    }

    #[test]
    fn a_404_without_an_s3_code_does_not_say_that_the_object_is_absent() {
        assert!(!refused(404, "").is_not_found());
        assert!(refused(404, "NoSuchKey").is_not_found());
    }

    #[test]
    fn errors_name_the_bucket_the_key_and_the_servers_words() {
        assert_eq!(refused(403, "AccessDenied").to_string(), "s3://bucket/p refuses put of a/b: AccessDenied: words");
        assert_eq!(refused(503, "SlowDown").to_string(), "put of a/b in s3://bucket/p: SlowDown: words");
    }
}
