//! Making locks longer: of what a backup shares with earlier ones, before it is committed.

use chrono::{DateTime, Utc};
use futures::future::join_all;
use futures::{StreamExt, stream};
use serde::Serialize;

use super::IN_FLIGHT;
use super::closure::roots;
use crate::model::{RegionName, SystemId, TargetName};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::regions::Region;
use crate::repository::regions::lock_rule::Rule;
use crate::store::StoreError;

/// What a region's locks came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Extended {
    /// The region.
    pub region: RegionName,
    /// Until when everything was to be locked.
    pub until: Option<DateTime<Utc>>,
    /// Objects that are locked at least that long now.
    pub objects: u64,
    /// Objects that are not, and whose locks this region owes.
    pub owed: u64,
    /// The first thing that went wrong.
    pub error: Option<String>,
}

impl Extended {
    pub(super) const fn nothing(region: RegionName, until: Option<DateTime<Utc>>) -> Self {
        Self { region, until, objects: 0, owed: 0, error: None }
    }
}

/// Locks what a backup of `target` that began at `since` needs of what is there already, in every region that locks.
pub async fn extend(
    repository: &Repository,
    (target, system): (&TargetName, Option<SystemId>),
    (shared, since): (&[InventoryLine], DateTime<Utc>),
) -> Vec<Extended> {
    let each = repository.regions.all().iter().filter_map(|region| Some((region, region.lock.as_ref()?)));
    join_all(each.map(|(region, rule)| async move {
        let mut keys: Vec<_> = shared.iter().map(|line| line.key.clone()).collect();
        match roots(region, (target, system)).await {
            Ok(roots) => {
                keys.extend(roots);
                in_region((region, rule), keys, since).await
            }
            // It would answer none of the other questions either.
            Err(error) => Extended {
                owed: keys.len() as u64 + 1,
                error: Some(error.to_string()),
                ..Extended::nothing(region.name.clone(), Some(rule.promised(since)))
            },
        }
    }))
    .await
}

/// Locks these names in one region. The first failure to answer ends it: a region that is away would cost a timeout for
/// each of thousands of names.
pub(super) async fn in_region((region, rule): (&Region, &Rule), keys: Vec<String>, since: DateTime<Utc>) -> Extended {
    let mut done = Extended::nothing(region.name.clone(), Some(rule.promised(since)));
    if rule.promised(since) <= rule.clock.now() {
        return done;
    }
    let all = keys.len() as u64;
    let locks = keys.into_iter().filter_map(|key| Some((rule.until(&key, Some(since))?, key)));
    let locks = stream::iter(locks).map(|(until, key)| async move { region.store.extend(&key, until).await });
    let mut locks = std::pin::pin!(locks.buffer_unordered(IN_FLIGHT));
    let mut absent = 0;
    while let Some(locked) = locks.next().await {
        match locked {
            Ok(()) => done.objects += 1,
            // A debt of its own: repair brings it, locked.
            Err(StoreError::NotFound { .. }) => absent += 1,
            Err(error) => {
                let is_over =
                    error.is_transient() || matches!(error, StoreError::Absent { .. } | StoreError::Unproven { .. });
                done.error.get_or_insert_with(|| error.to_string());
                if is_over {
                    break;
                }
            }
        }
    }
    done.owed = all - done.objects - absent;
    done
}
