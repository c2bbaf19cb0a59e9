//! Writing a backup: what changed since the parent, into packs, into every region.

pub mod compare;
pub mod intent;
pub mod packer;
pub mod parent;
pub mod repack;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod share_tests;
pub mod state;
pub mod stream;
#[cfg(test)]
mod stream_tests;
pub mod tree;
pub mod uploads;
pub mod writer;
