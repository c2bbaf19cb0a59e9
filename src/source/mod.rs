//! Floor 1b, what is protected: readers of targets.
//!
//! A source yields typed items and its own recovery point. It never seals, uploads or decides what a backup is; and it
//! never writes to what it reads.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::model::{Lsn, Result, SystemId, Timeline, WalSegmentSize};

pub mod dump;
pub mod files;
pub mod postgres;

pub use crate::model::pages::{BATCH_PAGES, Batch, Claims, FileId, PAGE_SIZE, Piece};

/// A physical backup of one cluster in progress: `begin`, then `copy`, then `finish`, each once.
///
/// # Contract
/// - `begin` returns once the server is in backup mode; nothing is read from its data directory before.
/// - `copy` sends every directory before the files in it, every page of every file exactly once, and then
///   [`Item::FileDone`]; it ends when the receiver is gone.
/// - `finish` ends backup mode. Dropping the source at any point ends it too, without a backup.
#[async_trait]
pub trait PhysicalSource: Send {
    /// Puts the server in backup mode.
    async fn begin(&mut self) -> Result<Begun>;
    /// Reads everything.
    async fn copy(&mut self, items: mpsc::Sender<Item>) -> Result<()>;
    /// Called between `begin` and `copy`: not every page need be read. `false` = this source reads everything all the same.
    fn leave_out(&mut self, _unread: Arc<dyn Unread>, _proof: bool) -> bool {
        false
    }
    /// How the cluster is read, for the record: `local`, `stream`.
    fn method(&self) -> &'static str;
    /// Ends backup mode.
    async fn finish(&mut self) -> Result<Finished>;
}

/// Knows pages that need not be read, because the backup that is compared with has them as they were at the start of this
/// one or changed less than matters: see [`Claims`].
pub trait Unread: Debug + Send + Sync {
    /// Those among `range` of a file that has this many whole pages now; ascending and apart. Nothing, where anything is
    /// in doubt.
    fn unchanged(&self, path: &str, whole_pages: u32, range: Range<u32>) -> Vec<Range<u32>>;
}

/// The start of a backup as the server knows it.
#[derive(Debug, Clone)]
pub struct Begun {
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// The timeline at the start.
    pub timeline: Timeline,
    /// The cluster.
    pub cluster: Cluster,
    /// Bytes that will be read, as far as known: for progress only.
    pub estimated_bytes: u64,
}

/// Fixed properties of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// The system identifier.
    pub system_id: SystemId,
    /// `server_version_num`, as in 150018.
    pub version: u32,
    /// Bytes per WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// Whether pages carry checksums.
    pub checksums: bool,
}

/// The end of a backup as the server knows it.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The backup is consistent once replay has reached this position.
    pub stop_lsn: Lsn,
    /// The timeline at the stop; another one than at the start is an error of `finish`.
    pub timeline: Timeline,
    /// `backup_label` (always) and `tablespace_map` (if the server gave one), to be restored into the data directory
    /// and never written into the live one.
    pub files: Vec<SmallFile>,
    /// The server's clock at the stop.
    pub finished_at: DateTime<Utc>,
}

/// A whole small file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallFile {
    /// Relative to the data directory.
    pub path: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// What a physical source yields.
#[derive(Debug)]
pub enum Item {
    /// A directory below the data directory (`base/5`) or a tablespace (`pg_tblspc/16384`), also if empty.
    Directory {
        /// Relative, `/`-separated.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// A tablespace outside the data directory; `pg_tblspc/<oid>` is a link to `location` there.
    Tablespace {
        /// Its oid.
        oid: u32,
        /// The absolute path on the source.
        location: String,
    },
    /// A file begins; its pages follow in batches, in ascending order but interleaved with those of other files.
    File {
        /// Its number.
        id: FileId,
        /// Relative, `/`-separated; files of tablespaces begin with `pg_tblspc/<oid>/`.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Pages of one large or several small files.
    Batch(Batch),
    /// A file is complete. `size` is what was read; pages sent beyond it do not exist.
    FileDone {
        /// Its number.
        id: FileId,
        /// Bytes.
        size: u64,
        /// Block numbers whose page checksum was wrong on both reads. The bytes are stored all the same.
        damaged_blocks: Vec<u32>,
    },
    /// A file listed in the directory was gone when it was opened: PostgreSQL dropped it, and WAL replay does the same.
    FileVanished {
        /// Its number, if it had been announced.
        id: FileId,
    },
}

/// A target that is read as one or several streams of bytes, one after the other.
///
/// # Contract
/// - `copy` sends for each stream [`StreamItem::Begin`], its bytes in order, and [`StreamItem::End`] once it knows that the
///   stream is whole; an error at any time means that there is nothing to keep.
/// - It ends when the receiver is gone. Dropping it at any point ends whatever it started.
#[async_trait]
pub trait StreamSource: Send {
    /// Reads everything.
    async fn copy(&mut self, items: mpsc::Sender<StreamItem>) -> Result<Copied>;
    /// How the target is read, for the record: `tar`, `pg_dump`.
    fn method(&self) -> &'static str;
}

/// What a stream source yields.
#[derive(Debug)]
pub enum StreamItem {
    /// A stream begins.
    Begin {
        /// Its name, which serves as a file name as it is.
        name: String,
    },
    /// Its next bytes.
    Bytes(Vec<u8>),
    /// It is whole.
    End,
}

/// What a stream source says in the end.
#[derive(Debug, Clone, Default)]
pub struct Copied {
    /// What a restore must know, for the manifest.
    pub document: serde_json::Value,
    /// What the reader should know.
    pub notes: Vec<String>,
    /// What should be in the streams and is not.
    pub left_out: Vec<String>,
    /// The moment whose state the streams hold, where that lies before the reading began.
    pub as_of: Option<DateTime<Utc>>,
}
