//! Floor 1b, one copy of the repository: a bucket or a directory that keeps objects.
//!
//! This room knows nothing of what the objects mean. It maps each server's errors to [`StoreError`] once, here at the
//! edge. Retries, limits and metrics are wrappers, stacked in `app`, never code in an adapter.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::model::{Error, Kind};

pub mod absent;
pub mod dir;
pub mod memory;
pub mod s3;
pub mod wrap;

mod name;

/// SHA-256 of an object's stored bytes.
///
/// Computed once per object and used as S3 checksum, as settlement of lost replies and as inventory digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Hashes stored bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A place that keeps objects under create-only names.
///
/// # Contract
/// - **Names** are `/`-separated, relative, made of `[a-z0-9._/-]`, never empty, without `.` or `..` parts, at most 512
///   bytes and 255 per part. The store prepends its own prefix and never shows it, and lists no name that breaks these
///   rules. No name is also the directory of another: a file system cannot hold both.
/// - **Create-only.** [`put`](Self::put) never replaces bytes. If the name exists with the same digest the outcome is
///   [`Put::AlreadyThere`] (a reply was lost, or another writer wrote the same bytes); with another digest it is
///   [`StoreError::Conflict`], and the stored bytes are untouched. Of several concurrent puts of different bytes exactly
///   one succeeds.
/// - **Durable and whole.** When `put` returns, the object survives a crash of this host and (S3) of the server. A put
///   that failed or was dropped leaves the whole object or nothing, never a part.
/// - **Read your writes.** After `put` returns, `head`, `get` and `list` see the object.
/// - **No trust in the reply.** Lengths are checked by the adapter; contents are checked by the caller.
/// - **Cancel.** Dropping any future leaves the store consistent; a dropped `put` may or may not have happened.
/// - Implementations do not retry and set no deadline of their own beyond their client's attempt timeouts.
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// The address for people, without credentials: `s3://bucket/prefix` or `dir:/path`.
    fn address(&self) -> String;

    /// What this store can do beyond the required methods.
    fn capabilities(&self) -> Capabilities;

    /// Proves what this store can do, once; later calls answer from memory. It may leave an object below `.probe/`.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if a second put of a name would replace the first; whatever stopped the proof.
    async fn probe(&self) -> Result<Capabilities, StoreError>;

    /// Stores `body`, whose SHA-256 is `digest`, under a name that does not exist yet. Where a lock is asked for, it holds
    /// when this returns, also on bytes that were there already ([`extend`](Self::extend)).
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the name exists with other bytes; any other error leaves the outcome unknown.
    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError>;

    /// Size of an object, and its digest if the server kept one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such object.
    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError>;

    /// The whole object, or exactly the bytes of `range`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Truncated`] if fewer bytes came than the object or the range holds.
    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError>;

    /// One page of names that begin with `prefix`, in ascending byte order. With `Depth::Level`, names that contain a
    /// further `/` after the prefix are folded into [`ListPage::prefixes`]. Follow [`ListPage::next`] to the end: a page
    /// may hold fewer entries than exist, even none.
    ///
    /// # Errors
    /// Only failures to answer; an unknown prefix is an empty page.
    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError>;

    /// The server's own clock, if it tells it.
    ///
    /// # Errors
    /// Failures to answer.
    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError>;

    /// One page of everything that stands under names that begin with `prefix`, in ascending byte order of the names:
    /// where versions are kept ([`Capabilities::versions`]) every version and every delete marker, elsewhere one version of
    /// each name. Follow [`VersionPage::next`] to the end.
    ///
    /// # Errors
    /// Only failures to answer, and servers that cannot tell.
    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError>;

    /// Locks what a name holds, at least until then. A lock that is longer or stricter stays as it is, so that two writers
    /// at once never shorten what the other promised.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such object; [`StoreError::Invalid`] where nothing can be locked.
    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError>;

    /// Until when a lock was put on a name, or on one version of it, whether that time has come or not; `None` without a
    /// lock, also where nothing can be locked.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such object or version; [`StoreError::Denied`] if these credentials may not
    /// know, which must never be taken for no lock.
    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError>;

    /// Whether somebody holds a version without an end (a legal hold), beside its lock or without one; false where nothing can be
    /// held. drctl puts no holds and lifts none.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such version; [`StoreError::Denied`] if these credentials may not know, which
    /// must never be taken for no hold.
    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError>;

    /// Removes exactly this version for good and leaves no delete marker. If it is gone, or the name holds another one by
    /// now, nothing happens: what the caller wanted gone is gone. Only the two-phase prune calls this.
    ///
    /// # Errors
    /// [`StoreError::Retained`] while an object lock or a hold is on it.
    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError>;

    /// Removes a name for good, with every version of it. Only repair calls this, of a copy that is provably wrong, and
    /// tests that damage a region.
    ///
    /// # Errors
    /// [`StoreError::Retained`] while an object lock holds; [`StoreError::NotFound`] if it is gone already.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;
}

/// What tells one version of a name from another, in the words of its store. It is never made up and never compared with
/// one of another name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionId(pub String);

/// One page of versions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VersionPage {
    /// In ascending order of their names.
    pub versions: Vec<ListedVersion>,
    /// The next page, `None` at the end.
    pub next: Option<ListToken>,
}

/// One version of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedVersion {
    /// The name, without the store's own prefix.
    pub key: String,
    /// Which version.
    pub version: VersionId,
    /// Stored bytes; 0 for a delete marker.
    pub size: u64,
    /// When the server says it was stored.
    pub modified: Option<DateTime<Utc>>,
}

/// What a store can do beyond the required methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// A second put of a name is refused by the server itself, proven by a probe or by construction.
    pub create_only: bool,
    /// Old versions of a name can be listed and read.
    pub versions: bool,
    /// Objects can be locked until a time.
    pub retention: bool,
}

/// How an object is to be kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// Lock the object until then, where the store can.
    pub retain_until: Option<DateTime<Utc>>,
}

/// What a successful put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The object is new.
    Created,
    /// The same bytes were there already.
    AlreadyThere,
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Stored bytes.
    pub size: u64,
    /// When the server says it was stored.
    pub modified: Option<DateTime<Utc>>,
    /// The SHA-256 that the server kept, if it keeps one; it is the uploader's claim, checked by the server then.
    pub digest: Option<Digest>,
}

/// How deep a listing goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Every name below the prefix.
    All,
    /// This level only; deeper names are folded into prefixes.
    Level,
}

/// Where the next page begins; opaque, valid for the same prefix and depth only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListToken(pub String);

/// One page of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    /// Objects in ascending order of their names.
    pub objects: Vec<ListedObject>,
    /// Folded names, each ending in `/`, ascending; only with `Depth::Level`.
    pub prefixes: Vec<String>,
    /// The next page, `None` at the end.
    pub next: Option<ListToken>,
}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Its name, without the store's own prefix.
    pub key: String,
    /// Stored bytes.
    pub size: u64,
    /// When the server says it was stored.
    pub modified: Option<DateTime<Utc>>,
}

/// What went wrong, by meaning.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object (or bucket, or directory).
    #[error("{key} is not in {address}")]
    NotFound {
        /// The name.
        key: String,
        /// The store.
        address: String,
    },
    /// The name holds other bytes.
    #[error("{key} exists in {address} with other bytes")]
    Conflict {
        /// The name.
        key: String,
        /// The store.
        address: String,
    },
    /// Credentials are missing, wrong or not allowed to do this.
    #[error("{address} refuses {operation} of {key}: {reason}")]
    Denied {
        /// What was tried.
        operation: &'static str,
        /// The name.
        key: String,
        /// The store.
        address: String,
        /// The server's words.
        reason: String,
    },
    /// An object lock holds.
    #[error("{key} in {address} is locked{}", until.map_or_else(String::new, |until| format!(" until {until}")))]
    Retained {
        /// The name.
        key: String,
        /// The store.
        address: String,
        /// Until when; `None` for a hold without an end, or where the store does not tell.
        until: Option<DateTime<Utc>>,
    },
    /// Fewer bytes came than the object or the range holds.
    #[error("{key} from {address} ends after {got} of {expected} bytes")]
    Truncated {
        /// The name.
        key: String,
        /// The store.
        address: String,
        /// Bytes received.
        got: u64,
        /// Bytes promised.
        expected: u64,
    },
    /// Full disk or exhausted quota.
    #[error("{address} has no room for {key}: No space left")]
    Full {
        /// The name.
        key: String,
        /// The store.
        address: String,
    },
    /// No answer, a broken answer, or an answer that asks to come again.
    #[error("{operation} of {key} in {address}: {reason}")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// The name.
        key: String,
        /// The store.
        address: String,
        /// What happened.
        reason: String,
    },
    /// It could not be opened, and is not tried again for as long as this process has it.
    #[error("{operation} of {key} in {address}: {reason}")]
    Absent {
        /// What was tried.
        operation: &'static str,
        /// The name.
        key: String,
        /// The store.
        address: String,
        /// Why it could not be opened.
        reason: String,
    },
    /// It answers, and does not show that it is a region of the repository; nothing is read there or written.
    #[error("{address} is not a region of this repository: {reason}")]
    Unproven {
        /// The store.
        address: String,
        /// What it shows instead.
        reason: String,
    },
    /// The name or the request breaks this contract; never retried.
    #[error("{address}: {reason}")]
    Invalid {
        /// The store.
        address: String,
        /// What is wrong.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Truncated { .. } | Self::Full { .. })
    }

    /// Whether somebody must make room first.
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Whether the store answered that there is no such object.
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let kind = match &error {
            StoreError::NotFound { .. } => Kind::NotFound,
            StoreError::Conflict { .. } | StoreError::Truncated { .. } => Kind::Damaged,
            StoreError::Unavailable { .. }
            | StoreError::Full { .. }
            | StoreError::Absent { .. }
            | StoreError::Unproven { .. } => Kind::Unavailable,
            StoreError::Denied { .. } | StoreError::Retained { .. } | StoreError::Invalid { .. } => Kind::Failed,
        };
        Self::new(kind, error.to_string()).transient(error.is_transient())
    }
}
