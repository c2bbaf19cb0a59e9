//! How a KMS endpoint is reached and as whom.

use std::fmt;
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::timeout::TimeoutConfig;
use aws_sdk_kms::config::{Builder, Credentials, Region};

/// How to reach the KMS of one AWS region.
#[derive(Debug, Clone)]
pub struct KmsAccess {
    /// The service's URL; none for AWS itself.
    pub endpoint: Option<String>,
    /// Who we are.
    pub credentials: AwsCredentials,
    /// Longest time for one call, connecting included.
    pub timeout: Duration,
}

impl Default for KmsAccess {
    fn default() -> Self {
        Self { endpoint: None, credentials: AwsCredentials::Chain, timeout: Duration::from_secs(10) }
    }
}

/// Where credentials come from.
#[derive(Clone, Default)]
pub enum AwsCredentials {
    /// The SDK's chain: environment, profile, web identity, container, instance.
    #[default]
    Chain,
    /// One profile of the AWS configuration files, whatever the environment says.
    Profile(String),
    /// Fixed keys.
    Static {
        /// The public half.
        access_key_id: String,
        /// The secret half.
        secret_access_key: String,
        /// For temporary keys.
        session_token: Option<String>,
    },
}

impl fmt::Debug for AwsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain => f.write_str("Chain"),
            Self::Profile(name) => write!(f, "Profile({name})"),
            Self::Static { access_key_id, .. } => write!(f, "Static({access_key_id})"),
        }
    }
}

/// A client that tries once: retries are a wrapper's decision, and a wrap that fails is a debt, not a disaster. The SDK
/// itself sets no read timeout.
pub(super) async fn client(aws_region: &str, access: &KmsAccess) -> Client {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(access.timeout.min(Duration::from_secs(5)))
        .read_timeout(access.timeout)
        .operation_timeout(access.timeout)
        .build();
    let region = Region::new(aws_region.to_owned());
    let builder = match &access.credentials {
        AwsCredentials::Static { access_key_id, secret_access_key, session_token } => {
            let session_token = session_token.clone();
            let keys = Credentials::new(access_key_id, secret_access_key, session_token, None, "configuration");
            Builder::new().behavior_version_latest().credentials_provider(keys)
        }
        AwsCredentials::Profile(name) => {
            // The chain would prefer keys of the environment to the profile that was asked for.
            let profile = ProfileFileCredentialsProvider::builder().profile_name(name).build();
            let chain = aws_config::defaults(BehaviorVersion::latest()).region(region.clone()).profile_name(name);
            Builder::from(&chain.credentials_provider(profile).load().await)
        }
        AwsCredentials::Chain => {
            Builder::from(&aws_config::defaults(BehaviorVersion::latest()).region(region.clone()).load().await)
        }
    };
    let mut builder = builder.region(region).retry_config(RetryConfig::disabled()).timeout_config(timeouts);
    if let Some(endpoint) = &access.endpoint {
        builder = builder.endpoint_url(endpoint);
    }
    Client::from_conf(builder.build())
}
