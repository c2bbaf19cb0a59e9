//! Regions, and the keys that open what is in them.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::config::place::{BucketPath, Place};
use crate::config::secret::Secret;
use crate::config::show;
use crate::model::RegionName;

impl show::Named for Region {
    fn name(&self) -> &str {
        self.name.as_str()
    }
}

impl show::Named for OfflineKey {
    fn name(&self) -> &str {
        &self.name
    }
}

/// `[regions.NAME]`: one independent copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Its name.
    #[serde(skip)]
    pub name: RegionName,
    /// Its objects.
    #[serde(flatten)]
    pub store: Store,
    /// The key holder that is lost together with this region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kms: Option<KmsKey>,
}

impl Region {
    /// Where its objects are, for people and for comparison.
    pub fn place(&self) -> Place {
        match &self.store {
            Store::S3(s3) => Place::Bucket(s3.bucket.clone()),
            Store::Directory { path } => Place::Directory(path.clone()),
        }
    }
}

/// How a region's objects are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Store {
    /// A bucket.
    S3(Box<S3Settings>),
    /// A directory.
    Directory {
        /// Absolute.
        #[serde(rename = "url", serialize_with = "show::directory_url")]
        path: PathBuf,
    },
}

/// A bucket and how to speak to its server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct S3Settings {
    /// The bucket and the prefix in it.
    #[serde(rename = "url", serialize_with = "show::displayed")]
    pub bucket: BucketPath,
    /// Another server than AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The AWS region; `None` leaves it to the AWS chain (environment, profile).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aws_region: Option<String>,
    /// Whether the bucket stands in the path instead of the host name.
    pub path_style: bool,
    /// Accept a server that ignores `If-None-Match`, because nobody else writes there.
    pub single_writer: bool,
    /// When request checksums are sent.
    pub checksum: Checksum,
    /// The longest that one request may take, its body included.
    #[serde(serialize_with = "show::duration")]
    pub timeout: Duration,
    /// How objects are locked; `None` if they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock: Option<ObjectLock>,
    /// Who we are, per role.
    #[serde(skip_serializing_if = "Credentials::is_chain")]
    pub credentials: Credentials,
}

/// How a bucket locks what is written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ObjectLock {
    /// Who may take a lock away before its time.
    pub mode: LockMode,
    /// How long a backup stays locked, from when it began.
    #[serde(rename = "for", serialize_with = "show::duration")]
    pub keep: Duration,
}

/// Who may take a lock away before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockMode {
    /// Nobody.
    Compliance,
    /// Whoever is given `s3:BypassGovernanceRetention`.
    Governance,
}

/// When request checksums are sent to an S3 server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checksum {
    /// With every request that can carry one.
    WhenSupported,
    /// Only where the protocol demands one, for servers that do not know them.
    WhenRequired,
}

/// Credentials by role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Credentials {
    /// Backup, WAL, reports, repair.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub write: AwsAccess,
    /// Restore, verify, drill.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub restore: AwsAccess,
    /// Prune.
    #[serde(skip_serializing_if = "AwsAccess::is_chain")]
    pub prune: AwsAccess,
}

impl Credentials {
    fn is_chain(&self) -> bool {
        [&self.write, &self.restore, &self.prune].into_iter().all(AwsAccess::is_chain)
    }
}

/// Where AWS credentials come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum AwsAccess {
    /// The AWS chain: environment, default profile, instance or container role.
    Chain,
    /// A named profile.
    Profile {
        /// Its name.
        profile: String,
    },
    /// A key pair by reference.
    Keys {
        /// The id.
        access_key_id: Secret,
        /// The secret.
        secret_access_key: Secret,
        /// For temporary credentials.
        #[serde(skip_serializing_if = "Option::is_none")]
        session_token: Option<Secret>,
    },
}

impl AwsAccess {
    fn is_chain(&self) -> bool {
        *self == Self::Chain
    }

    pub(super) fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let keys = match self {
            Self::Chain | Self::Profile { .. } => [None, None, None],
            Self::Keys { access_key_id, secret_access_key, session_token } => {
                [Some(access_key_id), Some(secret_access_key), session_token.as_ref()]
            }
        };
        keys.into_iter().flatten()
    }
}

/// A KMS key that wraps keysets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KmsKey {
    /// Alias, id or ARN.
    pub key: String,
    /// The AWS region of the key.
    pub aws_region: String,
    /// Another server than AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// `[keys.NAME]`: an age recipient whose identity is kept away from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OfflineKey {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// The recipient, `age1…`.
    #[serde(rename = "age")]
    pub recipient: String,
    /// The identity, on a machine that restores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Secret>,
}

/// What only the command line says about opening what is sealed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Openers {
    /// Age identity files.
    pub age_identities: Vec<Secret>,
    /// Servers for KMS keys of an AWS region.
    pub kms_endpoints: Vec<KmsEndpoint>,
}

/// Another server for the KMS keys of one AWS region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KmsEndpoint {
    /// The AWS region.
    pub aws_region: String,
    /// The server.
    pub endpoint: String,
}
