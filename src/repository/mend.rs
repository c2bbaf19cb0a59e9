//! Bringing regions back to equal, without any key.
//!
//! For every name that some region holds there is one set of bytes that is right, and bytes prove themselves: by the
//! digest in a signed inventory, by their own signature, by the hash in their name. What a region lacks is copied verbatim
//! from one that has it, in the order of [`layout::REPAIR_ORDER`], and a COMMIT only where all of its backup arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use bytes::Bytes;
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::model::{RegionName, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::mend::closure::{Closure, closure};
use crate::repository::mend::compare::Found;
use crate::repository::mend::items::Item;
use crate::repository::records::tombs::Pruned;
use crate::repository::regions::Region;
use crate::store::Digest;

mod closure;
mod compare;
mod displaced;
mod items;
mod judge;

/// Objects in hand; each holds two copies at most.
const OBJECTS: usize = 8;

/// What is to be mended.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// Backups of this target alone, with what every backup shares.
    pub target: Option<TargetName>,
    /// This region alone.
    pub region: Option<RegionName>,
    /// Look at names and sizes alone, not at every byte.
    pub quick: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Nobody looks: a place that does not show that it is a region may not be mounted, and is left alone.
    pub unattended: bool,
}

/// What was done to one region.
#[derive(Debug, Clone, Serialize)]
pub struct Mended {
    /// The region.
    pub region: RegionName,
    /// Objects that it lacked.
    pub copied: u64,
    /// Objects whose wrong bytes were replaced.
    pub replaced: Vec<String>,
    /// Bytes written.
    pub bytes: u64,
    /// What it lacks still.
    pub still_missing: Vec<StillMissing>,
}

/// An object that could not be mended.
#[derive(Debug, Clone, Serialize)]
pub struct StillMissing {
    /// Its name.
    pub key: String,
    /// Why.
    pub why: String,
}

/// Mends the regions of `scope`.
///
/// # Errors
/// No region answers at all. What goes wrong with one object or one region is told in the result.
pub async fn mend(repository: &Repository, scope: &Scope, progress: &Phase) -> Result<Vec<Mended>> {
    if let Some(region) = &scope.region {
        repository.regions.named(region)?;
    }
    let regions = if scope.unattended { repository.regions.clone() } else { repository.regions.bare() };
    let repository = &Repository { regions, ..repository.clone() };
    let (backups, unreadable) = catalog::backups(repository, scope.target.as_ref()).await?;
    for error in &unreadable {
        tracing::warn!(%error, "no region holds this COMMIT intact");
    }
    let closure = closure(repository, &backups).await;
    let pruned = Pruned::load(repository).await?;
    let done = Mutex::new(start(repository, scope));
    let mender = Mender { repository, scope, closure, pruned, done, beaten: Mutex::default(), progress };
    for class in layout::REPAIR_ORDER {
        let items = mender.items(class).await?;
        stream::iter(items).for_each_concurrent(OBJECTS, |item| mender.settle(item)).await;
    }
    mender.put_beside().await;
    let done = mender.done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(done.into_values().collect())
}

fn start(repository: &Repository, scope: &Scope) -> BTreeMap<RegionName, Mended> {
    let wanted = repository.regions.all().iter().map(|region| region.name.clone());
    let wanted = wanted.filter(|name| scope.region.as_ref().is_none_or(|only| only == name));
    let begin = |region: RegionName| {
        let mended =
            Mended { region: region.clone(), copied: 0, replaced: Vec::new(), bytes: 0, still_missing: Vec::new() };
        (region, mended)
    };
    wanted.map(begin).collect()
}

struct Mender<'a> {
    repository: &'a Repository,
    scope: &'a Scope,
    closure: Closure,
    pruned: Pruned,
    done: Mutex<BTreeMap<RegionName, Mended>>,
    /// Frames whose name a SEAL has in some region.
    beaten: Mutex<BTreeSet<String>>,
    progress: &'a Phase,
}

impl Mender<'_> {
    /// Looks at one object everywhere and brings it where it is not.
    async fn settle(&self, item: Item) {
        let names: Vec<_> = lock(&self.done).keys().cloned().collect();
        let (good, found) = self.compare(&item, &names).await;
        let Some(good) = good else {
            for (region, found) in found {
                let why = match found {
                    Found::Good => continue,
                    Found::Unknown(why) => why,
                    Found::Nothing | Found::Wrong => "no region holds it intact".to_owned(),
                };
                self.still(&region.name, &item.key, why);
            }
            return;
        };
        for (region, found) in found {
            let wrong = match found {
                Found::Good => continue,
                Found::Unknown(why) => {
                    self.still(&region.name, &item.key, why);
                    continue;
                }
                Found::Wrong => true,
                Found::Nothing => false,
            };
            if let Some(lacking) = self.lacking(&region.name, &item.key) {
                self.still(&region.name, &item.key, format!("{lacking} of its backup is not there"));
                continue;
            }
            match self.bring(region, &item.key, &good, wrong).await {
                Ok(()) => self.note_done(&region.name, &item.key, good.len() as u64, wrong),
                Err(error) => self.still(&region.name, &item.key, error.to_string()),
            }
        }
        self.progress.advance(good.len() as u64);
    }

    /// An object of the backup that this COMMIT makes exist, and that the region lacks still.
    fn lacking(&self, region: &RegionName, key: &str) -> Option<String> {
        let needs: BTreeSet<&str> = self.closure.needs.get(key)?.iter().map(String::as_str).collect();
        let done = lock(&self.done);
        let missing = done.get(region)?.still_missing.iter();
        missing.map(|missing| &missing.key).find(|key| needs.contains(key.as_str())).cloned()
    }

    async fn bring(&self, region: &Region, key: &str, good: &Bytes, wrong: bool) -> Result<()> {
        if self.scope.dry_run {
            return Ok(());
        }
        if wrong {
            remove_wrong_copy(region, key, Digest::of(good)).await?;
        }
        region.put(key, (good.clone(), Digest::of(good)), self.closure.since.get(key).copied()).await?;
        Ok(())
    }

    fn note_done(&self, region: &RegionName, key: &str, bytes: u64, wrong: bool) {
        if let Some(mended) = lock(&self.done).get_mut(region) {
            mended.bytes += bytes;
            if wrong { mended.replaced.push(key.to_owned()) } else { mended.copied += 1 }
        }
    }

    fn still(&self, region: &RegionName, key: &str, why: String) {
        if let Some(mended) = lock(&self.done).get_mut(region) {
            mended.still_missing.push(StillMissing { key: key.to_owned(), why });
        }
    }
}

/// Removes an object whose bytes are provably not the right ones, so that the right ones can take its name.
///
/// Names are create-only and nothing else in drctl deletes outside of prune. This is the one exception, because the name
/// of a damaged object is the only place where readers look for the right one. The copy is read once more immediately
/// before, and stays if it is right after all; the right bytes are in hand, from another region, so that what is lost if
/// this process dies now is a copy that no reader would accept.
async fn remove_wrong_copy(region: &Region, key: &str, right: Digest) -> Result<()> {
    match region.store.get(key, None).await {
        Ok(bytes) if Digest::of(&bytes) == right => return Ok(()),
        Err(error) if error.is_not_found() => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(region.store.delete(key).await?)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
