//! Sweeps under way: what writers must not lean on.
//!
//! A sweep announces in every region which backups it is about to take, and only then looks once more at who needs them.
//! A writer announces what it needs (an intent, a pin) and only then looks at what is announced here. Whoever comes second
//! sees the first, so never do both go on.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{BackupId, Error, PruneId, Result};
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::records;

/// What the signature of the first record is bound to, beside its name.
pub const BEGUN: &str = "sweep";
/// The same of the last one.
pub const ENDED: &str = "sweep end";

/// A sweep works no longer than this. One that is silent for longer is dead.
pub const LONGEST: TimeDelta = TimeDelta::hours(6);
/// The most that the clocks of a sweep and of a writer may differ; prune refuses more.
pub const SKEW: TimeDelta = TimeDelta::minutes(5);

/// A sweep that begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begun {
    /// Version of the repository format.
    pub format: u32,
    /// Which.
    pub id: PruneId,
    /// The plan whose grace period is over.
    pub plan: PruneId,
    /// The backups that it takes.
    pub backups: Vec<BackupId>,
    /// Objects of all regions together.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When.
    pub at: DateTime<Utc>,
    /// Who.
    pub host: String,
    /// Which lock its process holds, until it ends in whatever way; absent where nobody could tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
}

impl Begun {
    /// Whether its process is gone, because we hold the lock that it held. No name says that: two hosts may have the same.
    pub fn held(&self, ours: Option<&str>) -> bool {
        ours.is_some() && self.lock.as_deref() == ours
    }
}

/// How a sweep ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// Version of the repository format.
    pub format: u32,
    /// Which.
    pub id: PruneId,
    /// Versions of objects that were removed.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that a lock holds.
    pub retained: u64,
    /// Why it did not remove all that it began with.
    pub stopped: Option<String>,
    /// When.
    pub at: DateTime<Utc>,
}

/// The sweeps that have begun, may still be at work at `now`, and have not said that they ended.
///
/// # Errors
/// No region answers, or one of them is not readable.
pub async fn running(repository: &Repository, now: DateTime<Utc>) -> Result<Vec<Begun>> {
    let names = repository.regions.list_union(layout::SWEEPS).await?;
    let ids = names.iter().filter_map(|key| key.strip_prefix(layout::SWEEPS)?.strip_suffix("/begun")?.parse().ok());
    let alive = |id: &PruneId| id.began() + LONGEST + SKEW > now && !names.contains(&layout::sweep_end(id));
    let mut running = Vec::new();
    for id in ids.filter(alive) {
        running.push(records::read::<Begun>(repository, (BEGUN, &layout::sweep(&id))).await?);
    }
    Ok(running)
}

/// Refuses a backup that is pruned, or may be before its user is done. To be asked after the use was announced.
///
/// # Errors
/// It is; or whether it is cannot be learned.
pub async fn refuse_if_condemned(repository: &Repository, backup: &BackupId, now: DateTime<Utc>) -> Result<()> {
    let gone = catalog::is_pruned(repository, backup).await?;
    let sweep = running(repository, now).await?.into_iter().find(|sweep| sweep.backups.contains(backup));
    let error = match (gone, sweep) {
        (true, _) => Error::refused(format!("backup {backup} was pruned")),
        (_, Some(Begun { id, at, host, .. })) => Error::refused(format!("backup {backup} is being pruned"))
            .because(format!("sweep {id} on {host} took it up at {at}")),
        (false, None) => return Ok(()),
    };
    Err(error.hint("drctl prune show tells of sweeps; drctl list shows what there is"))
}
