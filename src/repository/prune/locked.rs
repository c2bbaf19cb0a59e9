//! Backups that the rules let go and a lock keeps.
//!
//! A COMMIT is asked before anything is removed: one that goes in one region and stays in another would be a backup that no
//! longer exists, whose locked half nobody could use.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};

use crate::model::{BackupId, Error, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::facts::{Copy, Facts};

/// A backup whose COMMIT is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locked {
    /// Where its lock ends last.
    pub region: RegionName,
    /// When.
    pub until: DateTime<Utc>,
    /// Copies of its COMMIT that are locked.
    pub copies: u64,
}

/// Which of the backups `ids` have a COMMIT that is locked in some region.
///
/// # Errors
/// A region does not say. That is no doubt to be swept over: a lock that is not seen is found out half way.
pub async fn commits(
    repository: &Repository,
    facts: &Facts,
    ids: &BTreeSet<BackupId>,
) -> Result<BTreeMap<BackupId, Locked>> {
    let mut locked = BTreeMap::new();
    let mut locking = BTreeMap::new();
    for commit in facts.backups.iter().map(|backup| &backup.commit).filter(|commit| ids.contains(&commit.id)) {
        let key = layout::commit(&commit.target, &commit.id);
        for copy in facts.objects.get(&key).into_iter().flatten() {
            let region = repository.regions.named(&copy.region)?;
            if !locking.contains_key(&copy.region) {
                locking.insert(copy.region.clone(), region.store.probe().await?.retention);
            }
            let until = match locking.get(&copy.region) {
                Some(true) => ask(repository, &key, copy).await?,
                _ => None,
            };
            if let Some(until) = until.filter(|until| *until > facts.now) {
                let known = locked.entry(commit.id.clone());
                let known = known.or_insert_with(|| Locked { region: copy.region.clone(), until, copies: 0 });
                known.copies += 1;
                if until > known.until {
                    (known.region, known.until) = (copy.region.clone(), until);
                }
            }
        }
    }
    Ok(locked)
}

async fn ask(repository: &Repository, key: &str, copy: &Copy) -> Result<Option<DateTime<Utc>>> {
    let store = &repository.regions.named(&copy.region)?.store;
    match store.locked_until(key, Some(&copy.version)).await {
        Ok(until) => Ok(until),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => {
            let error = Error::from(error).during(format!("ask region {} whether {key} is locked", copy.region));
            Err(error.hint("give the prune role s3:GetObjectRetention; see deploy/iam/prune.json"))
        }
    }
}
