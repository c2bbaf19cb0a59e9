//! Floor 0, the words: ids, positions, records and errors that every other floor speaks.
//!
//! Nothing here does I/O, reads a clock or draws a random number; the seams for those ([`Clock`], [`Rng`]) are traits
//! so that tests and simulations own time and chance.

pub mod clock;
pub mod commit;
pub mod error;
pub mod id;
pub mod pages;
pub mod pattern;
pub mod position;
pub mod retention;
pub mod run;
pub mod schedule;

pub use clock::{Clock, Rng};
pub use error::{Error, Kind, Result, ResultExt};
pub use id::{
    BackupId, EpochId, HolderId, KeysetId, PinId, PruneId, RegionName, ReportId, RepositoryId, ScheduleName, SignerId,
    SystemId, TargetName,
};
pub use position::{Branch, Lsn, SegmentName, Timeline, WalSegmentSize};
