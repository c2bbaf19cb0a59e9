//! How the SDK's client is set up: one attempt, own timeouts, signatures over the whole body.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_config::BehaviorVersion;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Builder, Credentials, ProvideCredentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider, StalledStreamProtectionConfig,
};

use super::error::causes;
use crate::model::Clock;
use crate::store::StoreError;

/// One bucket and how to reach it.
#[derive(Debug, Clone)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// Put before every name, with a `/` between; empty for the whole bucket.
    pub prefix: String,
    /// The server's URL; none for AWS itself.
    pub endpoint: Option<String>,
    /// The region's name; none takes it from the environment, or `us-east-1` at an own endpoint.
    pub region: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`.
    pub path_style: bool,
    /// Who we are; none asks the SDK's chain (environment, profile, web identity, instance).
    pub credentials: Option<S3Credentials>,
    /// Whether uploads carry `x-amz-checksum-sha256`.
    pub checksum: S3Checksum,
    /// Longest time for one call, from its first byte sent to its last byte received.
    pub attempt_timeout: Duration,
    /// Longest time to connect.
    pub connect_timeout: Duration,
    /// Accept a server that does not honour `If-None-Match`. Names are then checked before a put, which protects one
    /// writer from itself and no writer from another.
    pub single_writer: bool,
    /// How strictly objects are locked, where a lock is asked for.
    pub lock_mode: S3LockMode,
}

impl S3Options {
    /// A bucket of AWS with everything else at its default.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: false,
            credentials: None,
            checksum: S3Checksum::default(),
            attempt_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            single_writer: false,
            lock_mode: S3LockMode::default(),
        }
    }
}

/// Who signs the calls.
#[derive(Clone)]
pub enum S3Credentials {
    /// A fixed key.
    Static {
        /// The public half.
        access_key_id: String,
        /// The secret half.
        secret_access_key: String,
        /// For temporary keys.
        session_token: Option<String>,
    },
    /// A profile of the shared AWS configuration.
    Profile(String),
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static { access_key_id, .. } => {
                f.debug_struct("Static").field("access_key_id", access_key_id).finish_non_exhaustive()
            }
            Self::Profile(name) => f.debug_tuple("Profile").field(name).finish(),
        }
    }
}

/// Whether uploads carry a checksum of their own beside the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum S3Checksum {
    /// Always. The server keeps it, and a lost reply is settled without reading the object.
    #[default]
    WhenSupported,
    /// Only where S3 demands one (locked objects), for servers that reject the header.
    WhenRequired,
}

/// Who may take a lock away before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum S3LockMode {
    /// Nobody, the account's owner included.
    #[default]
    Compliance,
    /// Whoever is allowed `s3:BypassGovernanceRetention`.
    Governance,
}

/// The SDK signs by our clock.
#[derive(Debug)]
struct SigningClock(Arc<dyn Clock>);

impl aws_smithy_async::time::TimeSource for SigningClock {
    fn now(&self) -> SystemTime {
        self.0.now().into()
    }
}

/// Builds the client and proves that there are credentials.
pub(super) async fn connect(options: &S3Options, address: &str, clock: Arc<dyn Clock>) -> Result<Client, StoreError> {
    let base = Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .force_path_style(options.path_style)
        .time_source(SigningClock(clock))
        // An SDK that repeats a conditional put whose reply was lost reports 412 for its own success.
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts(options))
        // It mistakes a slow link for a dead one; the attempt timeout bounds both.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(match options.checksum {
            S3Checksum::WhenSupported => RequestChecksumCalculation::WhenSupported,
            S3Checksum::WhenRequired => RequestChecksumCalculation::WhenRequired,
        })
        // Readers check contents by their own digests; the SDK would hash everything once more.
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    let (region, provider) = identity(options).await;
    let denied =
        |reason| StoreError::Denied { operation: "sign", key: "calls".to_owned(), address: address.to_owned(), reason };
    let provider = provider.ok_or_else(|| denied("no source of credentials".to_owned()))?;
    // Found out here, a missing key is one; found out later, it looks like a service that is down.
    provider.provide_credentials().await.map_err(|error| denied(causes(&error)))?;
    let region = region.or_else(|| options.endpoint.as_ref().map(|_| Region::from_static("us-east-1")));
    let region = region.ok_or_else(|| StoreError::Invalid {
        address: address.to_owned(),
        reason: "no AWS region is configured".to_owned(),
    })?;
    let mut base = base.region(region);
    base.set_endpoint_url(options.endpoint.clone());
    Ok(Client::from_conf(base.credentials_provider(provider).build()))
}

fn timeouts(options: &S3Options) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(options.connect_timeout)
        .read_timeout(options.attempt_timeout)
        .operation_attempt_timeout(options.attempt_timeout)
        // The operation also renews credentials, which is not the store's time.
        .operation_timeout(options.attempt_timeout.saturating_mul(2))
        .build()
}

/// Region and credentials: as configured, the rest from the SDK's own chain.
async fn identity(options: &S3Options) -> (Option<Region>, Option<SharedCredentialsProvider>) {
    let region = options.region.clone().map(Region::new);
    let profile = match &options.credentials {
        Some(S3Credentials::Static { access_key_id, secret_access_key, session_token }) => {
            let keys = Credentials::new(access_key_id, secret_access_key, session_token.clone(), None, "configuration");
            if region.is_some() || options.endpoint.is_some() {
                return (region, Some(SharedCredentialsProvider::new(keys)));
            }
            let chain = aws_config::defaults(BehaviorVersion::latest()).credentials_provider(keys).load().await;
            return (chain.region().cloned(), chain.credentials_provider());
        }
        Some(S3Credentials::Profile(name)) => Some(name),
        None => None,
    };
    let mut chain = aws_config::defaults(BehaviorVersion::latest());
    if let Some(name) = profile {
        chain = chain
            .profile_name(name)
            // The default chain would prefer keys of the environment to the profile that was asked for.
            .credentials_provider(ProfileFileCredentialsProvider::builder().profile_name(name).build());
    }
    if let Some(region) = region {
        chain = chain.region(region);
    }
    let chain = chain.load().await;
    (chain.region().cloned(), chain.credentials_provider())
}
