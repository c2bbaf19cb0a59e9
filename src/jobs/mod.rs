//! Floor 3, the stories: what drctl does, one folder per job, each told on one page.
//!
//! A job knows the repository, the sources and PostgreSQL; it sees no bucket and no key. It prints nothing: progress is
//! events, results are values.

pub mod backup;
pub mod check;
pub mod compact;
pub mod context;
pub mod drill;
pub mod feed;
pub mod init;
pub mod keys;
pub mod lineage;
pub mod list;
pub mod metrics;
pub mod pin;
pub mod problems;
pub mod prune;
pub mod reach;
pub mod repair;
pub mod reports;
pub mod restore;
pub mod restore_streams;
pub mod runs;
pub mod show;
pub mod socket;
pub mod standby;
pub mod status;
pub mod verdict;
pub mod verify;
pub mod wal;
pub mod work;

#[cfg(test)]
mod tests;

pub use context::{
    Assertion, Context, Detection, Levels, Objectives, OnPressure, ScratchPlace, Streamed, Target, What,
};
