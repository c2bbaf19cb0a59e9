//! Floor 2, the vault: what is stored, where, and how it is read back.
//!
//! Writer and reader of the same bytes live in the same file. Nothing here knows what a PostgreSQL server is beyond the
//! positions in its WAL, and nothing decides when to run: jobs do.

pub mod backup;
pub mod bundle;
pub mod catalog;
pub mod compact;
pub mod escape;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod every_bit;
pub mod format;
pub mod handle;
pub mod health;
pub mod inventory;
pub mod keysets;
pub mod layout;
pub mod locks;
pub mod mend;
pub mod pages;
pub mod prune;
pub mod records;
pub mod regions;
pub mod restore;
pub mod survey;
pub mod sweeps;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
pub mod testing;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod tests;
pub mod trust;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod unread_tests;
pub mod wal;
pub mod wrap_debts;

/// The version of the repository format that this program writes and reads.
pub const FORMAT: u32 = 1;
