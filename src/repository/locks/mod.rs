//! Object locks: what a region that has them keeps, whoever asks for its removal.
//!
//! - Everything is locked when it is put, for as long as the region's [`lock_rule`](crate::repository::regions::lock_rule) says,
//!   except what is no evidence: intents, plans of prune, probes. Nothing is asked of the store for it: the lock travels with
//!   the put.
//! - All of a backup is locked until the same moment, which counts from when it began; WAL and keysets a little longer,
//!   because they are older than what needs them.
//! - What a backup shares with earlier ones, and what opens and proves it, is locked anew *before* its COMMIT is written
//!   ([`extend`]): a backup that exists is never locked longer than what it needs. A region that refuses owes the locks; the
//!   backup exists nevertheless, since a weaker lock loses nothing by itself. Repair asks again.
//! - Nothing stored says what is locked until when: the stores are asked ([`look`]).

mod closure;
pub mod extend;
pub mod look;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod tests;

/// Requests about locks in flight, per region.
const IN_FLIGHT: usize = 24;
