//! The server's clock, from the `Date` of a reply.

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use chrono::{DateTime, Utc};

use super::S3Store;
use super::error::reply;
use crate::store::StoreError;

/// Keeps the `Date` header, which the SDK's outputs leave out.
#[derive(Debug, Default, Clone)]
struct KeepDate(Arc<Mutex<Option<String>>>);

impl Intercept for KeepDate {
    fn name(&self) -> &'static str {
        "KeepDate"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date").map(str::to_owned);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = date;
        Ok(())
    }
}

impl S3Store {
    pub(super) async fn date_of_reply(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        let kept = KeepDate::default();
        let sent = self.client.head_bucket().bucket(&self.bucket).customize().interceptor(kept.clone()).send().await;
        if let Err(error) = sent {
            // A refusal is dated too, and a clock that is off is the very reason to be refused.
            let refused = reply(&error).filter(|reply| reply.status == 403);
            refused.ok_or_else(|| self.call("head", "the bucket").failed(&error))?;
        }
        let date = kept.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(date.and_then(|date| Some(DateTime::parse_from_rfc2822(&date).ok()?.to_utc())))
    }
}
