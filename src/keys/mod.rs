//! Floor 1b, the key holders: parties that wrap a keyset's secrets and can open them again.
//!
//! A writer needs only [`KeyHolder::wrap`]; it can do its whole job with the right to encrypt. Opening is a separate
//! seam, [`KeyOpener`], held by restore and drill.

pub mod age;
pub mod all;
pub mod keyset;
pub mod kms;
mod metered;
mod wrap;

pub use age::{AgeHolder, AgeOpener, generate_identity};
pub use all::{NotOpened, Opened, Refusal, open_any, wrap_everywhere};
pub use keyset::{Keyset, KeysetError};
pub use kms::{AwsCredentials, KmsAccess, KmsHolder, KmsOpener};
pub use metered::Metered;

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::model::{Error, HolderId, KeysetId, Kind, RegionName, RepositoryId, TargetName};

/// What a wrap is bound to. KMS holders pass it as encryption context; age has no such thing, so the wrapped plaintext
/// itself begins with it, and the opener compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrapContext {
    /// The repository.
    pub repository: RepositoryId,
    /// The target whose data the keyset seals.
    pub target: TargetName,
    /// The keyset.
    pub keyset: KeysetId,
}

/// A wrapped keyset as it is stored, one object per holder, create-only; rotation adds another object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wrap {
    /// The version of this record.
    pub format: u32,
    /// Which kind of holder made it: `kms` or `age`.
    pub kind: String,
    /// The holder.
    pub holder: HolderId,
    /// The holder's own name of its key: a KMS key ARN or an age recipient.
    pub key: String,
    /// The AWS region of a KMS key, so that a machine without configuration can find it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub aws_region: Option<String>,
    /// What it is bound to.
    pub context: WrapContext,
    /// The wrapped secrets, base64.
    pub ciphertext: String,
}

/// A party that wraps secrets for later.
#[async_trait]
pub trait KeyHolder: Send + Sync + fmt::Debug {
    /// The stable id in the name of its wraps.
    fn id(&self) -> &HolderId;

    /// For people: `KMS us-east-1 alias/drctl` or `age1q7… (offline)`.
    fn describe(&self) -> String;

    /// The region that is lost together with this holder; `None` for an offline holder.
    fn region(&self) -> Option<&RegionName>;

    /// Wraps `secret` (at most 4,096 bytes) bound to `context`.
    ///
    /// # Errors
    /// The holder cannot be reached or refuses; nothing was stored.
    async fn wrap(&self, context: &WrapContext, secret: &[u8]) -> Result<Wrap, KeyError>;
}

/// A party that can open wraps.
#[async_trait]
pub trait KeyOpener: Send + Sync + fmt::Debug {
    /// For people, as in [`KeyHolder::describe`].
    fn describe(&self) -> String;

    /// Whether this opener is worth asking for `wrap` (kind and key fit).
    fn fits(&self, wrap: &Wrap) -> bool;

    /// Opens a wrap and checks that it is bound to `context`.
    ///
    /// # Errors
    /// [`KeyError::Wrong`] if it does not authenticate or is bound to something else.
    async fn open(&self, context: &WrapContext, wrap: &Wrap) -> Result<Zeroizing<Vec<u8>>, KeyError>;
}

/// What went wrong, by meaning.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The holder cannot be reached or is throttling.
    #[error("{holder} does not answer: {reason}")]
    Unavailable {
        /// Which holder.
        holder: String,
        /// What happened.
        reason: String,
    },
    /// The holder refuses: rights, disabled or deleted key.
    #[error("{holder} refuses: {reason}")]
    Denied {
        /// Which holder.
        holder: String,
        /// Its words.
        reason: String,
    },
    /// The wrap does not authenticate, or is bound to another repository, target or keyset.
    #[error("the wrap of {holder} does not open: {reason}")]
    Wrong {
        /// Which holder.
        holder: String,
        /// What did not fit.
        reason: String,
    },
    /// The holder's own configuration is wrong.
    #[error("{reason}")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
}

impl KeyError {
    /// Whether the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

impl From<KeyError> for Error {
    fn from(error: KeyError) -> Self {
        let kind = match &error {
            KeyError::Unavailable { .. } => Kind::Unavailable,
            KeyError::Denied { .. } | KeyError::Wrong { .. } => Kind::NoKey,
            KeyError::Invalid { .. } => Kind::Usage,
        };
        Self::new(kind, error.to_string()).transient(error.is_transient())
    }
}
