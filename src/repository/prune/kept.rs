//! Backups of which a sweep took one COMMIT and could not take another: a lock or a hold that came between the question and the
//! delete. Killed in that moment, or stopped by something else, it left a backup that does not exist any more and was to be kept.
//!
//! COMMITs go everywhere before anything else goes. As long as nothing but COMMITs is gone, such a backup is brought back.

use std::collections::BTreeSet;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;

use crate::model::commit::Commit;
use crate::model::{BackupId, Error, PruneId, Result, ResultExt, TargetName};
use crate::repository::FORMAT;
use crate::repository::catalog::{self, Debt, Held};
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::prune::facts::list_everywhere;
use crate::repository::prune::locked;
use crate::repository::prune::plan::enroll;
use crate::repository::records;
use crate::repository::records::tombs::{self, Spared, Tomb};
use crate::store::Digest;

/// Brings back what a lock or a hold keeps, of the backups with these tombs, which no sweep works on any more; tells which.
///
/// # Errors
/// A region does not say what is locked, or does not take a record.
pub async fn bring_back(repository: &Repository, writer: &Writer, tombs: &[Tomb]) -> Result<BTreeSet<BackupId>> {
    let (commits, answered) = tombs::holders(repository, layout::COMMITS).await?;
    let mut kept = BTreeSet::new();
    for tomb in tombs {
        let key = layout::commit(&tomb.target, &tomb.backup);
        let is_torn = commits.get(&key).is_some_and(|held| *held != answered);
        if !is_torn || !is_locked(repository, &key, writer.clock.now()).await? {
            continue;
        }
        let check = |bytes: Bytes| Ok((catalog::parse_commit(repository, &key, &bytes)?, bytes));
        let ((commit, bytes), _) = repository.regions.read(&key, None, check).await?;
        if !is_whole_but_for(repository, &commit, &key).await {
            tracing::error!(backup = %commit.id, "its COMMIT is locked, and more than copies of it is gone: it stays pruned");
            continue;
        }
        enroll(repository, writer).await?;
        // That it stays is told first: from then on it is a backup that a region lacks a part of.
        let of = (&tomb.target, &tomb.backup, &tomb.prune);
        record(repository, writer, of, "its COMMIT is locked").await?;
        put_back(repository, (&key, &bytes), commit.started_at).await?;
        kept.insert(commit.id);
    }
    Ok(kept)
}

/// Writes into every region that a sweep takes nothing more of a backup.
///
/// # Errors
/// A region does not take it. Where one has it, it counts.
pub(super) async fn record(
    repository: &Repository,
    writer: &Writer,
    (target, backup, prune): (&TargetName, &BackupId, &PruneId),
    why: &str,
) -> Result<()> {
    let (target, backup, prune) = (target.clone(), backup.clone(), prune.clone());
    let (at, why, host) = (writer.clock.now(), why.to_owned(), writer.host.clone());
    let spared = Spared { format: FORMAT, backup, target, prune, at, why, host };
    let key = spared.key();
    records::put_everywhere(repository, writer, (tombs::SPARED, &key), &spared)
        .await
        .during(|| format!("record that {} was spared", spared.backup))
}

/// Puts a COMMIT into every region again.
///
/// # Errors
/// A region does not take it. From the others repair brings it.
pub(super) async fn put_back(
    repository: &Repository,
    (key, bytes): (&str, &Bytes),
    since: DateTime<Utc>,
) -> Result<()> {
    let puts = repository.regions.all().iter().map(|region| async move {
        let put = region.put(key, (bytes.clone(), Digest::of(bytes)), Some(since)).await;
        put.map(drop).map_err(|error| {
            let error = Error::from(error).during(format!("put {key} back into region {}", region.name));
            error.hint("it is locked in another region and stays: drctl repair")
        })
    });
    join_all(puts).await.into_iter().collect()
}

async fn is_locked(repository: &Repository, key: &str, now: DateTime<Utc>) -> Result<bool> {
    for (name, copies) in list_everywhere(&repository.regions, key).await? {
        for copy in copies.iter().filter(|_| name == key) {
            if locked::lock_of(repository, (key, copy), now).await?.is_some() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Whether every region has everything of it but, perhaps, its COMMIT.
async fn is_whole_but_for(repository: &Repository, commit: &Commit, key: &str) -> bool {
    let Ok(lines) = catalog::inventory(repository, commit).await else { return false };
    let is_whole = |held: &Held| {
        let Debt { missing, damaged, unreadable } = held.debt(commit, &lines);
        missing.iter().all(|name| name == key) && damaged.is_empty() && unreadable.is_none()
    };
    catalog::held_everywhere(repository, &commit.target).await.iter().all(|(_, held)| is_whole(held))
}
