//! Taking away what retention no longer wants: the only code that deletes what was acknowledged.
//!
//! It never acts on what it sees once. A first run writes down exactly which versions of which objects nobody needs
//! ([`plan`]); a later run, when the grace period is over, finds them anew and takes only what both found ([`sweep`]). What
//! is needed is told by the inventories of the backups that stay ([`garbage`]), never by names or by absence. Anything that
//! is not understood, not readable or not whole refuses the whole run ([`facts`]).
//!
//! Never taken, whatever the plan: the identity of the repository, the escape hatch, addresses, signers, histories (a
//! promotion must not choose the number of a timeline that is known elsewhere), gaps, reports, runs, pins, and the records of
//! what was pruned. They are small, and each of them is evidence.

pub mod bundled;
pub mod facts;
pub mod garbage;
pub mod kept;
pub mod locked;
pub mod plan;
pub mod proofs;
pub mod replaced;
pub mod spare;
pub mod sweep;
pub mod wal;

use chrono::TimeDelta;

use crate::model::{Error, Result};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::records;
use crate::repository::records::tombs::{self, Spared, Tomb, WalCut};
use crate::repository::sweeps::{self, Begun, Ended};

/// What bounds a prune.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long what nobody needs stays nevertheless.
    pub grace: TimeDelta,
    /// Objects of all regions together that one run takes.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of the backups of a target, the share in percent that one run takes without being told so by a person.
    pub percent: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { grace: TimeDelta::days(1), objects: 200_000, bytes: 4 << 40, percent: 34 }
    }
}

/// Whether these bytes are the record of this name, below `pruned/` or `sweeps/`; for repair.
///
/// # Errors
/// They are not.
pub fn check_record(repository: &Repository, key: &str, bytes: &[u8]) -> Result<()> {
    let right = match () {
        () if key.starts_with(&layout::tombs(None)) => {
            let tomb: Tomb = records::decode(repository, (tombs::TOMB, key), bytes)?;
            tomb.belongs_to(key)
        }
        () if key.starts_with(&layout::all_spared(None)) => {
            let spared: Spared = records::decode(repository, (tombs::SPARED, key), bytes)?;
            spared.key() == key
        }
        () if key.starts_with(layout::PRUNED) => {
            let cut: WalCut = records::decode(repository, (tombs::CUT, key), bytes)?;
            cut.key() == key
        }
        () if key.ends_with("/begun") => {
            let begun: Begun = records::decode(repository, (sweeps::BEGUN, key), bytes)?;
            layout::sweep(&begun.id) == key
        }
        () => {
            let ended: Ended = records::decode(repository, (sweeps::ENDED, key), bytes)?;
            layout::sweep_end(&ended.id) == key
        }
    };
    if right { Ok(()) } else { Err(Error::damaged(format!("{key} belongs elsewhere"))) }
}
