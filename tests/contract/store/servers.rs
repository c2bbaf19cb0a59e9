//! Real S3 servers, which `scripts/test` starts, and fresh buckets in them.

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use chrono::{DateTime, TimeDelta, Utc};
use drctl::model::{Clock, Rng};
use drctl::store::s3::{S3Credentials, S3Options, S3Store};

pub(super) const SECRET: &str = "SKTESTSECRET";

/// The machine's clock, or one that is off.
#[derive(Debug, Default)]
pub(super) struct Wall {
    pub(super) off: TimeDelta,
}

impl Clock for Wall {
    fn now(&self) -> DateTime<Utc> {
        Utc::now() + self.off
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

#[derive(Debug)]
pub(super) struct Chance;

impl Rng for Chance {
    fn fill(&self, buffer: &mut [u8]) -> drctl::model::Result<()> {
        rand::fill(buffer);
        Ok(())
    }
}

/// An endpoint and the name of a bucket that nobody else uses.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) endpoint: String,
    pub(super) bucket: String,
}

impl Server {
    pub(super) fn localstack() -> Self {
        Self::at("DRCTL_TEST_S3_A")
    }

    pub(super) fn rgw() -> Self {
        Self::at("DRCTL_TEST_RGW_A")
    }

    fn at(variable: &str) -> Self {
        let endpoint = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: run scripts/test"));
        Self { endpoint, bucket: format!("t{:016x}", rand::random::<u64>()) }
    }

    /// The bucket and its store, below a prefix.
    pub(super) async fn store(&self) -> S3Store {
        self.make_bucket(false).await;
        connect(self.options()).await
    }

    /// A bucket that locks, and its store.
    pub(super) async fn locked_store(&self) -> S3Store {
        self.make_bucket(true).await;
        // RGW 16 does not honour the condition in a bucket with versions, and a lock needs versions.
        let single_writer = self.endpoint == Self::rgw().endpoint;
        connect(S3Options { single_writer, ..self.options() }).await
    }

    pub(super) fn options(&self) -> S3Options {
        S3Options {
            prefix: "some/prefix".to_owned(),
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".to_owned()),
            path_style: true,
            credentials: Some(keys("AKTEST", SECRET)),
            attempt_timeout: Duration::from_secs(30),
            ..S3Options::new(&self.bucket)
        }
    }

    pub(super) async fn make_bucket(&self, with_locks: bool) {
        let request = self.client().create_bucket().bucket(&self.bucket).object_lock_enabled_for_bucket(with_locks);
        request.send().await.unwrap();
    }

    /// A client that is not ours, to look behind the store.
    pub(super) fn client(&self) -> Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&self.endpoint)
            .region(Region::from_static("us-east-1"))
            .force_path_style(true)
            .credentials_provider(Credentials::new("AKTEST", SECRET, None, None, "test"));
        Client::from_conf(config.build())
    }
}

pub(super) fn keys(id: &str, secret: &str) -> S3Credentials {
    let (access_key_id, secret_access_key) = (id.to_owned(), secret.to_owned());
    S3Credentials::Static { access_key_id, secret_access_key, session_token: None }
}

pub(super) async fn connect(options: S3Options) -> S3Store {
    S3Store::connect(options, Arc::new(Wall::default()), Arc::new(Chance)).await.unwrap()
}
