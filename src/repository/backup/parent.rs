//! Which backup the next one shares pages with: the one of its target whose pages this writer remembers, if the regions
//! still hold them, and everyone who is to open the next backup can open them. Anything else means a full backup, with the
//! reason said.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::model::commit::Commit;
use crate::model::{Error, KeysetId, Kind, RegionName, Result, SystemId, TargetName};
use crate::repository::backup::state::{KnownPages, StateHead};
use crate::repository::catalog::{self, Backup, Held, held_everywhere};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::Holders;
use crate::repository::layout;

/// What a backup is compared with.
#[derive(Debug)]
pub enum Basis {
    /// Nothing: it stores every page.
    Nothing {
        /// Why.
        because: String,
    },
    /// The pages of this backup.
    Parent(Box<Parent>),
}

/// A backup whose pages the next one may refer to.
#[derive(Debug)]
pub struct Parent {
    /// Its COMMIT, from the regions.
    pub commit: Commit,
    /// Its pages, as this writer remembers them.
    pub pages: Arc<KnownPages>,
    /// Objects of it that a region does not hold, though enough others do.
    lacking: BTreeMap<RegionName, BTreeSet<String>>,
}

/// More would not be numbered in a manifest.
const SOURCES_LIMIT: usize = u16::MAX as usize - 1;

/// Finds the parent of the next backup of `target`, whose cluster is `system_id`.
///
/// # Errors
/// No region answers.
pub async fn choose(
    repository: &Repository,
    holders: &Holders,
    (target, system_id): (&TargetName, SystemId),
    state: PathBuf,
) -> Result<Basis> {
    let (mut backups, unreadable) = catalog::backups(repository, Some(target)).await?;
    for error in unreadable {
        tracing::warn!(%error, "a COMMIT is not readable");
    }
    // The one whose pages are remembered, and not the newest by its time: a clock that was ahead once would make its backup
    // the newest for ever.
    let kept = StateHead::read(&state).map(|head| head.backup);
    let remembered = backups.iter().position(|backup| Some(&backup.commit.id) == kept.as_ref());
    let chosen = remembered.or(backups.len().checked_sub(1)).map(|index| backups.swap_remove(index));
    let Some(Backup { commit, .. }) = chosen else {
        return Ok(Basis::nothing(format!("there is no earlier backup of {target}")));
    };
    let parent = match of_commit(repository, holders, commit, (system_id, state)).await {
        Ok(parent) => parent,
        Err(error) => return Ok(Basis::nothing(error.to_string())),
    };
    Ok(Basis::Parent(Box::new(parent)))
}

async fn of_commit(
    repository: &Repository,
    holders: &Holders,
    commit: Commit,
    (system_id, state): (SystemId, PathBuf),
) -> Result<Parent> {
    let id = &commit.id;
    if commit.wal.as_ref().is_none_or(|wal| wal.system_id != system_id) {
        return Err(Error::refused(format!("{id} is of a cluster with another system identifier")));
    }
    let pages = Arc::new(remembered(repository, &commit, state).await?);
    if pages.sources().len() > SOURCES_LIMIT {
        return Err(Error::refused(format!("the pages of {id} come from too many backups")));
    }
    let held = held_everywhere(repository, &commit.target).await;
    for keyset in catalog::keysets(&commit, pages.objects()) {
        wrapped_by_all(holders, &commit, &keyset, &held)?;
    }
    let lacking = lacking(repository, &commit, (pages.objects(), held))?;
    Ok(Parent { commit, pages, lacking })
}

async fn remembered(repository: &Repository, commit: &Commit, state: PathBuf) -> Result<KnownPages> {
    let none = || Error::not_found(format!("no page map was kept of {}", commit.id));
    let digest = commit.page_map.ok_or_else(none)?;
    let (repository, id) = (repository.id.clone(), commit.id.clone());
    let open = move || KnownPages::open(&state, (&repository, &id), &digest);
    tokio::task::spawn_blocking(open).await.map_err(|error| Error::failed("read the page map").because(error))?
}

/// A key holder that was added later, or could not be reached then, would open the new backup and not the pages that it
/// shares.
fn wrapped_by_all(holders: &Holders, commit: &Commit, keyset: &KeysetId, held: &[(RegionName, Held)]) -> Result<()> {
    for holder in &holders.list {
        let key = layout::wrap(&commit.target, keyset, holder.id());
        if !held.iter().any(|(_, held)| held.has(&key)) {
            let text = format!("{} cannot open all pages of {}", holder.describe(), commit.id);
            return Err(Error::new(Kind::NoKey, text));
        }
    }
    Ok(())
}

/// A backup is safe only where all that it refers to is: each object of the parent must be in as many regions as an
/// object that is written now.
fn lacking(
    repository: &Repository,
    commit: &Commit,
    (objects, held): (&[InventoryLine], Vec<(RegionName, Held)>),
) -> Result<BTreeMap<RegionName, BTreeSet<String>>> {
    let mut lacking: BTreeMap<RegionName, BTreeSet<String>> = BTreeMap::new();
    let mut copies: BTreeMap<&str, usize> = BTreeMap::new();
    for (region, held) in held {
        let missing: BTreeSet<_> = match held.lacks(objects) {
            Some(missing) => missing.into_iter().collect(),
            None => objects.iter().map(|line| line.key.clone()).collect(),
        };
        for line in objects.iter().filter(|line| !missing.contains(&line.key)) {
            *copies.entry(&line.key).or_default() += 1;
        }
        lacking.insert(region, missing);
    }
    let quorum = repository.regions.quorum();
    let scarce = objects.iter().filter(|line| copies.get(line.key.as_str()).copied().unwrap_or(0) < quorum).count();
    if scarce == 0 {
        return Ok(lacking);
    }
    Err(Error::damaged(format!("{scarce} objects of {} are in fewer than {quorum} regions", commit.id)))
}

impl Basis {
    /// A full backup.
    pub fn nothing(because: impl Into<String>) -> Self {
        Self::Nothing { because: because.into() }
    }

    /// The reason for a full backup.
    pub fn full_because(&self) -> Option<&str> {
        match self {
            Self::Nothing { because } => Some(because),
            Self::Parent(_) => None,
        }
    }

    /// The parent.
    pub fn parent(&self) -> Option<&Parent> {
        match self {
            Self::Nothing { .. } => None,
            Self::Parent(parent) => Some(parent),
        }
    }
}

impl Parent {
    /// When the last backup began that stored every page which this one holds.
    pub fn generation(&self) -> DateTime<Utc> {
        self.pages.head().generation.unwrap_or(self.commit.started_at)
    }

    /// How many of these objects a region lacks.
    pub fn missing_in(&self, region: &RegionName, lines: &[InventoryLine]) -> u64 {
        let lacking = self.lacking.get(region);
        lacking.map_or(0, |lacking| lines.iter().filter(|line| lacking.contains(&line.key)).count() as u64)
    }
}

/// Where the page-map state of a target is.
pub fn state_path(state_dir: &Path, target: &TargetName) -> PathBuf {
    state_dir.join(format!("{target}.pages"))
}
