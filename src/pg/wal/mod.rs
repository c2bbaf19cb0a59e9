//! The write-ahead log as bytes: page headers, records, segment files.
//!
//! Nothing here knows redo. A record is read for what recovery targets and a receiver need: where it begins and ends,
//! whether it is whole, for commits, aborts and restore points their time, and, where asked for, which pages it changes.

mod blocks;
mod body;
mod changed;
mod page;
mod walker;

use chrono::{DateTime, Utc};

pub use blocks::{Locator, MAIN_FORK, Touch};
pub use changed::ChangedBlocks;
pub use page::{PageHeader, SegmentHeader, WAL_PAGE_SIZE, check_segment, check_segment_head, magic_of};
pub use walker::{Expect, Pushed, RecordWalker, WalkState};

use crate::model::{Error, Kind, Lsn, SystemId, Timeline};

/// One complete record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its first byte.
    pub start: Lsn,
    /// The byte after its alignment padding, as PostgreSQL reports the end of a record: the next record begins here, or
    /// behind the page header if this is the start of a page. For [`RecordKind::Switch`] the end of the segment.
    pub end: Lsn,
    /// The transaction that wrote it, 0 for none. COMMIT PREPARED is written by another transaction than it commits.
    pub xid: u32,
    /// The resource manager.
    pub rmgr: u8,
    /// `xl_info`; the upper four bits belong to the resource manager.
    pub info: u8,
    /// The record before it, as it says itself.
    pub previous: Lsn,
    /// What it means for recovery.
    pub kind: RecordKind,
    /// What it changes, if the walk reads that; see [`RecordWalker::reading_blocks`].
    pub touched: Vec<Touch>,
}

/// What a record means to somebody who looks for a recovery target or for the end of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordKind {
    /// A transaction committed.
    Commit {
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A transaction was rolled back.
    Abort {
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A prepared transaction committed.
    CommitPrepared {
        /// The prepared transaction.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// A prepared transaction was rolled back.
    AbortPrepared {
        /// The prepared transaction.
        xid: u32,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// Its name.
        name: String,
        /// When, by the server's clock.
        time: DateTime<Utc>,
    },
    /// The first record after a promotion.
    EndOfRecovery,
    /// The rest of the segment is void.
    Switch,
    /// A clean shutdown.
    CheckpointShutdown,
    /// A checkpoint of a running server.
    CheckpointOnline,
    /// Written by an idle server every 15 seconds for standbys.
    RunningXacts,
    /// Settings that a standby must match.
    ParameterChange,
    /// Takes the place of the rest of a record that a crash cut off.
    OverwriteContrecord,
    /// Everything else.
    Other,
}

impl RecordKind {
    /// The commit time of a transaction, prepared or not.
    pub fn commit_time(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Commit { time } | Self::CommitPrepared { time, .. } => Some(*time),
            _ => None,
        }
    }
}

/// Why bytes are not the WAL they claim to be. None of them passes by waiting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// Bytes were pushed that do not follow those before.
    #[error("WAL is not contiguous: expected {expected}, got {got}")]
    NotContiguous {
        /// The next byte.
        expected: Lsn,
        /// What came.
        got: Lsn,
    },
    /// A walk cannot begin here.
    #[error("WAL cannot be read from {at}: it is neither the start of a page nor a possible record")]
    BadStart {
        /// The position asked for.
        at: Lsn,
    },
    /// A page header is wrong.
    #[error("WAL page {at} is damaged: {what}")]
    Page {
        /// The page's position.
        at: Lsn,
        /// Which field.
        what: &'static str,
    },
    /// The page belongs to another cluster.
    #[error("WAL page {at} belongs to system {got}, not {expected}")]
    OtherSystem {
        /// The page's position.
        at: Lsn,
        /// The cluster expected.
        expected: SystemId,
        /// The cluster that wrote it.
        got: SystemId,
    },
    /// The page was written on a timeline that the expected history does not have there.
    #[error("WAL page {at} is on timeline {got}, not {expected}")]
    OtherTimeline {
        /// The page's position.
        at: Lsn,
        /// The timeline expected.
        expected: Timeline,
        /// The timeline that wrote it.
        got: Timeline,
    },
    /// The page was written by another major version.
    #[error("WAL page {at} has magic {got:04X}, not that of the expected PostgreSQL version")]
    OtherVersion {
        /// The page's position.
        at: Lsn,
        /// The magic number found.
        got: u16,
    },
    /// A record is wrong.
    #[error("WAL record {at} is damaged: {what}")]
    Record {
        /// Its start.
        at: Lsn,
        /// What is wrong.
        what: &'static str,
    },
    /// The first record does not follow the one before which the walk was told of: another server wrote it.
    #[error("WAL record {at} follows a record at {got}, not the one at {expected}")]
    OtherPast {
        /// Its start.
        at: Lsn,
        /// Where the record before it begins.
        expected: Lsn,
        /// Where it says that this begins.
        got: Lsn,
    },
    /// Zeros where a record must be. In a file that is the end of WAL; a server never streams it.
    #[error("WAL has zeros at {at} instead of a record")]
    Zeros {
        /// Where.
        at: Lsn,
    },
    /// The file is not the segment that its name says.
    #[error("WAL segment `{name}` is damaged: {what}")]
    Segment {
        /// The file name.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
}

impl From<WalError> for Error {
    fn from(error: WalError) -> Self {
        let kind = match &error {
            WalError::NotContiguous { .. } | WalError::BadStart { .. } => Kind::Failed,
            WalError::OtherSystem { .. }
            | WalError::OtherTimeline { .. }
            | WalError::OtherVersion { .. }
            | WalError::OtherPast { .. } => Kind::Refused,
            _ => Kind::Damaged,
        };
        Self::new(kind, error.to_string())
    }
}

/// Microseconds between the Unix epoch and PostgreSQL's, 2000-01-01.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A `TimestampTz`: microseconds since 2000-01-01 UTC; `None` beyond the calendar.
pub fn timestamp(micros: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros.checked_add(POSTGRES_EPOCH_MICROS)?)
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
