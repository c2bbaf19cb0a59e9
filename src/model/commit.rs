//! What a backup says of itself: the words of COMMIT.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{BackupId, Branch, KeysetId, Lsn, RepositoryId, SystemId, TargetName, Timeline, WalSegmentSize};

/// How a backup came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// Every page was stored by this backup.
    Full,
    /// Unchanged pages are shared with its parent.
    Incremental,
    /// A logical dump.
    Dump,
    /// Files.
    Files,
}

impl BackupKind {
    /// As people and JSON read it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Dump => "dump",
            Self::Files => "files",
        }
    }
}

/// The small signed record that makes a backup exist: put last, at most 4 KiB, in clear text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// Version of the repository format.
    pub format: u32,
    /// The repository that it belongs to.
    pub repository: RepositoryId,
    /// The backup.
    pub id: BackupId,
    /// What was backed up.
    pub target: TargetName,
    /// The kind of the target.
    pub source: String,
    /// Full, incremental, dump, files.
    pub kind: BackupKind,
    /// The backup whose pages it shares, if any.
    pub parent: Option<BackupId>,
    /// The writer's clock at the start.
    pub started_at: DateTime<Utc>,
    /// The writer's clock at the end.
    pub finished_at: DateTime<Utc>,
    /// Bytes that a restore writes, without WAL.
    pub size_bytes: u64,
    /// Bytes that this backup added to each region.
    pub stored_bytes: u64,
    /// Page checksum failures found on the source; their bytes are stored as they were.
    pub damaged_pages: u64,
    /// The keyset that seals the manifest and every frame born in this backup.
    pub keyset: KeysetId,
    /// The WAL that makes it consistent; `None` for sources without WAL.
    pub wal: Option<WalNeed>,
    /// The manifest's parts.
    pub manifest: Parts,
    /// The inventory's parts.
    pub inventory: Parts,
    /// The writer's page-map state of this backup, which never leaves its machine; `None` if it kept none. The next
    /// backup shares pages with this one only if the state that the writer finds is the one named here.
    pub page_map: Option<StateDigest>,
    /// How many regions had to hold every object before this record was written.
    pub quorum: u8,
    /// Who wrote it: host and drctl version.
    pub provenance: Provenance,
    /// Of a backup that was made of another one, without its source: that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyOf>,
}

/// Which backup a copy holds the pages of, frame by frame, in other packs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyOf {
    /// The backup that was read from the source; for a copy of a copy as well.
    pub backup: BackupId,
    /// When the copy was made.
    pub at: DateTime<Utc>,
}

impl Commit {
    /// The backup that was read from the source: itself, or the one that it is a copy of.
    pub fn origin(&self) -> &BackupId {
        self.copy.as_ref().map_or(&self.id, |copy| &copy.backup)
    }

    /// Whether it is a copy of the same moment as `other`, made after it; an original comes before its copies.
    pub fn is_copied_after(&self, other: &Self) -> bool {
        let at = |commit: &Self| commit.copy.as_ref().map(|copy| copy.at);
        self.origin() == other.origin() && (at(other), &other.id) < (at(self), &self.id)
    }

    /// Whether what it says of the cluster and of its moment is what `other` says.
    pub fn is_of_the_moment_of(&self, other: &Self) -> bool {
        let said = |commit: &Self| {
            let Self { target, source, started_at, finished_at, size_bytes, wal, .. } = commit.clone();
            (target, source, started_at, finished_at, size_bytes, wal)
        };
        said(self) == said(other)
    }
}

/// The WAL range without which a physical backup is not consistent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalNeed {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline at start and stop.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// Where the backup is consistent.
    pub stop_lsn: Lsn,
    /// Bytes per WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// `server_version_num`.
    pub server_version: u32,
}

/// Objects of one logical stream, numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// How many.
    pub count: u32,
    /// Stored bytes of all together.
    pub bytes: u64,
    /// SHA-256 over the parts' SHA-256 digests (32 raw bytes each), in order.
    #[serde(with = "crate::model::commit::hex32")]
    pub sha256: [u8; 32],
}

/// What proves a file of the writer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateDigest {
    /// Its bytes.
    pub bytes: u64,
    /// SHA-256 of them.
    #[serde(with = "crate::model::commit::hex32")]
    pub sha256: [u8; 32],
}

/// Who wrote a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Host name.
    pub host: String,
    /// drctl's version.
    pub drctl: String,
    /// How the source was read: `local`, `stream`, …
    pub method: String,
    /// How the pages were found that changed since the parent: `read`, `wal`, `summaries`; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detection: Option<String>,
}

/// 32 bytes as 64 hex digits.
pub mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes lower-case hex.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    /// Reads exactly 64 lower-case hex digits: upper case would be a second spelling of the same record.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        let canonical = hex::decode_to_slice(&text, &mut bytes).is_ok() && hex::encode(bytes) == text;
        if canonical { Ok(bytes) } else { Err(serde::de::Error::custom("expected 64 lower-case hex digits")) }
    }
}
