//! What lies beside the backups: objects of runs that ended before COMMIT, or are still under way.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::{BackupId, Error, RegionName, Result, TargetName};
use crate::repository::backup::intent::{Intent, intent_context};
use crate::repository::catalog::{self, Backup, Held};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::trust::Trust;

/// Objects of a backup that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Orphan {
    /// The backup that was never committed.
    pub id: BackupId,
    /// Its target.
    pub target: TargetName,
    /// When its intent says that it began; `None` without one.
    pub started_at: Option<DateTime<Utc>>,
    /// Regions that hold objects of it.
    pub regions: Vec<RegionName>,
    /// Objects, in the region that holds most.
    pub objects: u64,
}

/// What was found beside the backups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Beside {
    /// Left over from runs that ended before COMMIT.
    pub orphans: Vec<Orphan>,
    /// Perhaps still being written.
    pub in_progress: Vec<Orphan>,
}

/// Objects of one target that belong to no backup. Those of one whose COMMIT is gone are needed all the same where a
/// later one shares its pages. A backup may be in progress as long as its intent has not expired and
/// no newer backup of the target has begun.
///
/// # Errors
/// No region answers.
pub async fn beside(
    repository: &Repository,
    target: &TargetName,
    held: &BTreeMap<RegionName, Held>,
    (backups, now): (&[Backup], DateTime<Utc>),
) -> Result<Beside> {
    let commits: BTreeSet<_> = backups.iter().map(|backup| backup.commit.id.clone()).collect();
    let needed = needed(repository, backups).await;
    let found = unlisted(target, held, |id, key| !commits.contains(id) && !needed.contains(key));
    let announced = announced(repository).await?;
    let own = announced.iter().filter(|id| id.target().ok().as_ref() == Some(target));
    let newest = found.keys().chain(&commits).chain(own).max();
    let newest = newest.cloned();
    let mut beside = Beside::default();
    for (id, regions) in found {
        let intent = if announced.contains(&id) { read_intent(repository, &id).await } else { None };
        let alive = intent.as_ref().is_some_and(|intent| intent.expires_at > now) && newest.as_ref() == Some(&id);
        let objects = regions.values().copied().max().unwrap_or(0);
        let started_at = intent.map(|intent| intent.created_at);
        let regions = regions.into_keys().collect();
        let orphan = Orphan { id, target: target.clone(), started_at, regions, objects };
        if alive { beside.in_progress.push(orphan) } else { beside.orphans.push(orphan) }
    }
    Ok(beside)
}

/// What later backups share of earlier ones.
async fn needed(repository: &Repository, backups: &[Backup]) -> BTreeSet<String> {
    let mut needed = BTreeSet::new();
    for Backup { commit, .. } in backups.iter().filter(|backup| backup.commit.parent.is_some()) {
        match catalog::inventory(repository, commit).await {
            Ok(lines) => needed.extend(lines.into_iter().map(|line| line.key)),
            Err(error) => tracing::warn!(%error, backup = %commit.id, "what it needs may be shown as orphaned"),
        }
    }
    needed
}

/// How many objects that are `left` each region holds of each backup.
fn unlisted(
    target: &TargetName,
    held: &BTreeMap<RegionName, Held>,
    left: impl Fn(&BackupId, &str) -> bool,
) -> BTreeMap<BackupId, BTreeMap<RegionName, u64>> {
    let mut found: BTreeMap<BackupId, BTreeMap<RegionName, u64>> = BTreeMap::new();
    for (region, held) in held {
        for kind in ["packs", "manifests", "inventories"] {
            let prefix = format!("{kind}/{target}/");
            let id = |key: &str| key.strip_prefix(&prefix)?.split('/').next()?.parse::<BackupId>().ok();
            let named = held.below(&prefix).filter_map(|key| Some((id(key)?, key)));
            for (id, _) in named.filter(|(id, key)| left(id, key)) {
                *found.entry(id).or_default().entry(region.clone()).or_default() += 1;
            }
        }
    }
    found
}

/// The backups that some region holds an intent of.
async fn announced(repository: &Repository) -> Result<BTreeSet<BackupId>> {
    let keys = repository.regions.list_union(layout::INTENTS).await?;
    Ok(keys.iter().filter_map(|key| key.strip_prefix(layout::INTENTS)?.parse().ok()).collect())
}

/// The intent of a backup that may be in progress. An intent ends with its COMMIT and is not repaired, so nobody asks for
/// those of backups that exist.
pub(in crate::repository) async fn read_intent(repository: &Repository, id: &BackupId) -> Option<Intent> {
    let parse = |bytes: Bytes| parse_intent(repository, &repository.trust, id, &bytes);
    match repository.regions.read(&layout::intent(id), None, parse).await {
        Ok((intent, _)) => Some(intent),
        Err(error) => {
            tracing::warn!(%error, "intent is not readable");
            None
        }
    }
}

fn parse_intent(repository: &Repository, trust: &Trust, id: &BackupId, bytes: &[u8]) -> Result<Intent> {
    let body = trust.verify_text(&intent_context(&repository.id, id), bytes)?;
    serde_json::from_slice(body).map_err(|error| Error::damaged(layout::intent(id)).because(error))
}
