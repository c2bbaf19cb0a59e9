//! Floor 2, the vault: what is stored, where, and how it is read back.
//!
//! Writer and reader of the same bytes live in the same file. Nothing here knows what a PostgreSQL server is beyond the
//! positions in its WAL, and nothing decides when to run: jobs do.

pub mod backup_writer;
#[cfg(test)]
mod beside_tests;
#[cfg(test)]
mod bundle_tests;
mod bundled;
pub mod catalog;
pub mod compact;
pub mod compare;
pub mod escape;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod every_bit;
pub mod fan_out;
pub mod gaps;
pub mod handle;
pub mod health;
pub mod identity;
pub mod inventory;
pub mod keysets;
pub mod layout;
pub mod lock_rule;
pub mod locks;
pub mod manifest;
pub mod mend;
pub mod nearest;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod overlap_tests;
pub mod pack;
pub mod packer;
pub mod page_map;
pub mod page_state;
pub mod parent;
pub mod pins;
mod proven;
pub mod prune;
pub mod records;
pub mod regions;
pub mod relocation;
pub mod repack;
pub mod reports;
pub mod restore;
pub mod runs;
pub mod scrub;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod share_tests;
pub mod shares;
#[cfg(test)]
mod stream_tests;
pub mod stream_writer;
pub mod survey;
pub mod sweeps;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
pub mod testing;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod tests;
pub mod tombs;
pub mod tree;
pub mod trust;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod unread_tests;
pub mod uploads;
pub mod wal_adopt;
pub mod wal_bundle;
pub mod wal_bundling;
pub mod wal_claim;
pub mod wal_closing;
pub mod wal_frame;
mod wal_frames;
pub mod wal_index;
pub mod wal_left;
pub mod wal_log;
#[cfg(test)]
mod wal_model;
mod wal_overlap;
pub mod wal_reader;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod wal_replay;
pub mod wal_seal;
pub mod wrap_debts;

/// The version of the repository format that this program writes and reads.
pub const FORMAT: u32 = 1;
