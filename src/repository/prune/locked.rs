//! Backups that the rules let go, and a lock or a hold keeps.
//!
//! A COMMIT is asked before anything is removed: one that goes in one region and stays in another would be a backup that no
//! longer exists, whose locked half nobody could use. So a hold that is to keep a backup lies on its COMMIT.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt, stream};

use crate::model::{BackupId, Error, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::facts::{Copy, Facts};
use crate::store::StoreError;

/// Questions in flight. There are two for each copy of a COMMIT that is to go, and none for what stays.
const QUESTIONS: usize = 16;

/// A backup whose COMMIT is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locked {
    /// Where it is kept longest.
    pub region: RegionName,
    /// Until when; `None` until somebody lifts a hold.
    pub until: Option<DateTime<Utc>>,
    /// Copies of its COMMIT that are locked.
    pub copies: u64,
}

/// What keeps a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lock {
    Until(DateTime<Utc>),
    Held,
}

impl Lock {
    const fn until(self) -> Option<DateTime<Utc>> {
        match self {
            Self::Until(until) => Some(until),
            Self::Held => None,
        }
    }
}

/// Which of the backups `ids` have a COMMIT that is locked or held in some region.
///
/// # Errors
/// A region does not say. That is no doubt to be swept over: a lock that is not seen is found out half way.
pub async fn commits(
    repository: &Repository,
    facts: &Facts,
    ids: &BTreeSet<BackupId>,
) -> Result<BTreeMap<BackupId, Locked>> {
    let doomed = facts.backups.iter().map(|backup| &backup.commit).filter(|commit| ids.contains(&commit.id));
    let copies = doomed.flat_map(|commit| {
        let key = layout::commit(&commit.target, &commit.id);
        let copies = facts.objects.get(&key).into_iter().flatten();
        copies.map(move |copy| (commit.id.clone(), key.clone(), copy.clone()))
    });
    let questions = stream::iter(copies.collect::<Vec<_>>()).map(|(id, key, copy)| async move {
        let lock = lock_of(repository, (&key, &copy), facts.now).await?;
        Ok::<_, Error>((id, copy.region, lock))
    });
    let answers: Vec<_> = questions.buffered(QUESTIONS).try_collect().await?;
    let mut locked: BTreeMap<BackupId, (Lock, Locked)> = BTreeMap::new();
    for (id, region, lock) in answers {
        let Some(lock) = lock else { continue };
        let until = lock.until();
        let first = || (lock, Locked { region: region.clone(), until, copies: 0 });
        let (longest, known) = locked.entry(id).or_insert_with(first);
        known.copies += 1;
        if lock > *longest {
            (*longest, known.region, known.until) = (lock, region, until);
        }
    }
    Ok(locked.into_iter().map(|(id, (_, locked))| (id, locked)).collect())
}

/// What keeps a copy of an object, if anything does.
///
/// # Errors
/// Its region does not say.
pub(super) async fn lock_of(
    repository: &Repository,
    (key, copy): (&str, &Copy),
    now: DateTime<Utc>,
) -> Result<Option<Lock>> {
    let store = &repository.regions.named(&copy.region)?.store;
    // What a store can do it tells from memory, after the first time.
    if !store.probe().await?.retention {
        return Ok(None);
    }
    let told = |error: StoreError, right: &str| {
        let error = Error::from(error).during(format!("ask region {} whether {key} is locked", copy.region));
        Err(error.hint(format!("give the prune role {right}; see deploy/iam/prune.json")))
    };
    match store.locked_until(key, Some(&copy.version)).await {
        Ok(Some(until)) if until > now => return Ok(Some(Lock::Until(until))),
        Ok(_) => {}
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return told(error, "s3:GetObjectRetention"),
    }
    match store.is_held(key, &copy.version).await {
        Ok(held) => Ok(held.then_some(Lock::Held)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => told(error, "s3:GetObjectLegalHold"),
    }
}
