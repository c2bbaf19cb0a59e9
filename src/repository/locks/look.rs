//! Until when each backup's closure is locked: one question per object and region, each object once for all backups.
//!
//! No listing of a store tells locks, so thousands of objects are thousands of small requests. They are asked only of
//! backups that are promised a lock still: what is over by its age is known without asking.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use serde::Serialize;

use super::IN_FLIGHT;
use super::closure::{self, frames, roots};
use super::extend::{Extended, in_region};
use crate::model::{BackupId, RegionName, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::catalog::{self, Backup};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::regions::Region;
use crate::repository::regions::lock_rule::Rule;
use crate::repository::wal::index::{BranchId, WalIndex};

/// Objects between two words of progress.
const TOLD_EVERY: u64 = 100;

/// How a backup's locks stand in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Everything is locked as long as was promised, or longer.
    Locked,
    /// Something is not.
    Weak,
    /// It is older than the lock: nothing is promised, and nothing was asked.
    Over,
    /// It could not be learned.
    Unknown,
}

/// The locks of one backup in one region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackupLocks {
    /// The backup.
    pub backup: BackupId,
    /// Of what.
    pub target: TargetName,
    /// The region.
    pub region: RegionName,
    /// How it stands.
    pub state: State,
    /// Until when all of it should be locked.
    pub promised_until: DateTime<Utc>,
    /// Until when its weakest object is; `null` if one is not locked at all, or nothing was asked.
    pub weakest_until: Option<DateTime<Utc>>,
    /// That object.
    pub weakest: Option<String>,
    /// Objects that were looked at.
    pub objects: u64,
    /// Those whose lock ends too early.
    pub weak: u64,
    /// Why it could not be learned.
    pub error: Option<String>,
}

/// What was found, and what is to be locked anew.
#[derive(Debug, Default)]
pub struct Looked {
    /// Every backup in every region that locks, oldest first.
    pub backups: Vec<BackupLocks>,
    /// Questions that were asked.
    pub asked: u64,
    /// By region: what is weak, and since when it should have been locked.
    weak: BTreeMap<RegionName, BTreeMap<String, DateTime<Utc>>>,
}

/// What one backup needs in one region.
struct Needs<'a> {
    backup: &'a Backup,
    promised: DateTime<Utc>,
    keys: Result<BTreeSet<String>>,
}

/// Looks at `backups` in every region that locks.
///
/// # Errors
/// None of its own: what cannot be learned of a backup is told with it.
pub async fn look(repository: &Repository, backups: &[Backup], now: DateTime<Utc>, progress: &Phase) -> Looked {
    let mut looked = Looked::default();
    let locking: Vec<_> =
        repository.regions.all().iter().filter_map(|region| Some((region, region.lock.as_ref()?))).collect();
    let Some(longest) = locking.iter().map(|(_, rule)| rule.keep).max() else { return looked };
    let (mut inventories, mut indexes) = (BTreeMap::new(), BTreeMap::new());
    for Backup { commit, .. } in backups.iter().filter(|backup| backup.commit.started_at + longest > now) {
        inventories.insert(commit.id.clone(), catalog::inventory(repository, commit).await);
        if let Some(branch) = commit.wal.as_ref().map(closure::branch)
            && !indexes.contains_key(&branch)
        {
            let index = WalIndex::load(&repository.regions, branch.clone()).await;
            indexes.insert(branch, index);
        }
    }
    for (region, rule) in locking {
        let known = Known { repository, inventories: &inventories, indexes: &indexes };
        known.region((region, rule), (backups, now), (&mut looked, progress)).await;
    }
    looked
}

/// Locks anew what is weak, for as long as the youngest backup that needs it was promised.
pub async fn renew(repository: &Repository, looked: &Looked, only: Option<&RegionName>) -> Vec<Extended> {
    let mut done = Vec::new();
    for region in repository.regions.all().iter().filter(|region| only.is_none_or(|only| *only == region.name)) {
        let (Some(rule), weak) = (&region.lock, looked.weak.get(&region.name)) else { continue };
        let mut sum = Extended::nothing(region.name.clone(), None);
        let mut by_time: BTreeMap<DateTime<Utc>, Vec<String>> = BTreeMap::new();
        for (key, since) in weak.into_iter().flatten() {
            by_time.entry(*since).or_default().push(key.clone());
        }
        for (since, keys) in by_time {
            let Extended { objects, owed, error, until, .. } = in_region((region, rule), keys, since).await;
            sum.objects += objects;
            sum.owed += owed;
            sum.until = sum.until.max(until);
            sum.error = sum.error.or(error);
        }
        done.push(sum);
    }
    done
}

impl Looked {
    /// What would be locked anew, without doing it.
    pub fn owed(&self, only: Option<&RegionName>) -> Vec<Extended> {
        let regions = self.weak.iter().filter(|(region, _)| only.is_none_or(|only| only == *region));
        let owed = |(region, weak): (&RegionName, &BTreeMap<String, _>)| Extended {
            owed: weak.len() as u64,
            ..Extended::nothing(region.clone(), None)
        };
        regions.map(owed).collect()
    }
}

struct Known<'a> {
    repository: &'a Repository,
    inventories: &'a BTreeMap<BackupId, Result<Vec<InventoryLine>>>,
    indexes: &'a BTreeMap<BranchId, WalIndex>,
}

impl Known<'_> {
    async fn region(
        &self,
        (region, rule): (&Region, &Rule),
        (backups, now): (&[Backup], DateTime<Utc>),
        (looked, progress): (&mut Looked, &Phase),
    ) {
        let mut all = Vec::new();
        for backup in backups {
            let promised = rule.promised(backup.commit.started_at);
            let keys = if promised > now { self.keys(region, backup).await } else { Ok(BTreeSet::new()) };
            all.push(Needs { backup, promised, keys });
        }
        let wanted: BTreeSet<&String> = all.iter().filter_map(|needs| needs.keys.as_ref().ok()).flatten().collect();
        let held = ask(region, &wanted, progress).await;
        looked.asked += wanted.len() as u64;
        let weak = looked.weak.entry(region.name.clone()).or_default();
        for needs in &all {
            for key in needs.keys.iter().flatten() {
                if matches!(held.get(key.as_str()), Some(Ok(until)) if *until < Some(needs.promised)) {
                    let since = weak.entry(key.clone()).or_insert(needs.backup.commit.started_at);
                    *since = needs.backup.commit.started_at.max(*since);
                }
            }
            looked.backups.push(judged(needs, (&region.name, now), &held));
        }
    }

    /// Everything of a backup in one region: what its inventory names, its own records, its WAL, and the roots.
    async fn keys(&self, region: &Region, Backup { commit, .. }: &Backup) -> Result<BTreeSet<String>> {
        let lines = match self.inventories.get(&commit.id) {
            Some(Ok(lines)) => lines.as_slice(),
            Some(Err(error)) => return Err(error.clone()),
            None => &[],
        };
        let mut keys: BTreeSet<String> = lines.iter().map(|line| line.key.clone()).collect();
        keys.extend(catalog::own_records(commit));
        keys.extend(roots(region, (&commit.target, commit.wal.as_ref().map(|need| need.system_id))).await?);
        if let Some(need) = &commit.wal
            && let Some(index) = self.indexes.get(&closure::branch(need))
        {
            keys.extend(frames(self.repository, (region, index), need).await?);
        }
        Ok(keys)
    }
}

/// What the region says of each name; nothing of those that it does not hold, which are a debt of another kind.
async fn ask<'k>(
    region: &Region,
    keys: &BTreeSet<&'k String>,
    progress: &Phase,
) -> BTreeMap<&'k str, std::result::Result<Option<DateTime<Utc>>, String>> {
    let questions = stream::iter(keys.iter().copied())
        .map(|key| async move { (key.as_str(), region.store.locked_until(key, None).await) });
    let mut answers = std::pin::pin!(questions.buffer_unordered(IN_FLIGHT));
    let (mut held, mut count) = (BTreeMap::new(), 0u64);
    while let Some((key, answer)) = answers.next().await {
        count += 1;
        if count.is_multiple_of(TOLD_EVERY) {
            progress.note(format!("{count} of {} objects in {}", keys.len(), region.name));
        }
        match answer {
            Ok(until) => held.insert(key, Ok(until)),
            Err(error) if error.is_not_found() => None,
            Err(error) => {
                let is_down = error.is_transient();
                let known = held.insert(key, Err(error.to_string()));
                if is_down {
                    // A region that is away would cost a timeout for each of thousands of names.
                    break;
                }
                known
            }
        };
    }
    if count < keys.len() as u64 {
        let unasked = keys.iter().filter(|key| !held.contains_key(key.as_str())).map(|key| key.as_str());
        let why = "the region stopped to answer".to_owned();
        let unasked: Vec<_> = unasked.collect();
        held.extend(unasked.into_iter().map(|key| (key, Err(why.clone()))));
    }
    held
}

fn judged(
    needs: &Needs<'_>,
    (region, now): (&RegionName, DateTime<Utc>),
    held: &BTreeMap<&str, std::result::Result<Option<DateTime<Utc>>, String>>,
) -> BackupLocks {
    let commit = &needs.backup.commit;
    let mut locks = BackupLocks {
        backup: commit.id.clone(),
        target: commit.target.clone(),
        region: region.clone(),
        state: State::Locked,
        promised_until: needs.promised,
        weakest_until: None,
        weakest: None,
        objects: 0,
        weak: 0,
        error: None,
    };
    if needs.promised <= now {
        return BackupLocks { state: State::Over, ..locks };
    }
    let keys = match &needs.keys {
        Ok(keys) => keys,
        Err(error) => return BackupLocks { state: State::Unknown, error: Some(error.to_string()), ..locks },
    };
    for (key, until) in keys.iter().filter_map(|key| Some((key, held.get(key.as_str())?))) {
        match until {
            Ok(until) => {
                locks.objects += 1;
                locks.weak += u64::from(*until < Some(needs.promised));
                // No lock at all is the weakest.
                if locks.weakest.is_none() || *until < locks.weakest_until {
                    (locks.weakest, locks.weakest_until) = (Some(key.clone()), *until);
                }
            }
            Err(error) => {
                locks.error.get_or_insert_with(|| error.clone());
            }
        }
    }
    locks.state = match () {
        () if locks.error.is_some() => State::Unknown,
        () if locks.weak > 0 => State::Weak,
        () => State::Locked,
    };
    locks
}
