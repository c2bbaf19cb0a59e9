//! The regions of a repository: which there are, how many must hold a write, and asking all of them at once.

pub mod fan_out;
pub mod identity;
mod listing;
pub mod lock_rule;
pub mod nearest;
mod proven;
mod reading;
mod silence;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;

use crate::model::{Clock, Error, RegionName, RepositoryId, Result};
use crate::repository::bundle::view::Bundled;
use crate::repository::layout;
use crate::repository::regions::lock_rule::Rule;
use crate::repository::regions::proven::Proven;
use crate::repository::regions::reading::Trouble;
use crate::store::{Digest, ObjectStore, Put, PutOptions, StoreError};

pub use listing::{list_all, list_prefixes};
pub(in crate::repository) use proven::Shown;
pub use reading::Incident;

/// One independent copy of the repository.
#[derive(Debug, Clone)]
pub struct Region {
    /// Its name in the configuration.
    pub name: RegionName,
    /// Its bytes.
    pub store: Arc<dyn ObjectStore>,
    /// How long it locks what is written; `None` if it locks nothing.
    pub lock: Option<Rule>,
}

impl Region {
    /// Stores an object, locked as the region locks. `since` is when what it belongs to began, if not now.
    ///
    /// # Errors
    /// As [`ObjectStore::put`].
    pub async fn put(
        &self,
        key: &str,
        (body, digest): (Bytes, Digest),
        since: Option<DateTime<Utc>>,
    ) -> std::result::Result<Put, StoreError> {
        // What began long ago may have been promised nothing any more, and a store refuses a lock that is over.
        let until = |rule: &Rule| rule.until(key, since).filter(|until| *until > rule.clock.now());
        let retain_until = self.lock.as_ref().and_then(until);
        self.store.put(key, body, digest, &PutOptions { retain_until }).await
    }
}

/// All regions, in the order of the configuration: restores prefer the first, drills the last.
#[derive(Debug, Clone)]
pub struct Regions {
    list: Vec<Region>,
    /// The same without the proof that each is a region.
    bare: Vec<Region>,
    quorum: usize,
    lowest: usize,
    /// Whether a list counts only where every region gave it.
    unanimous: bool,
    detach_after: Option<Duration>,
    degrade_after: Option<Duration>,
    clock: Option<Arc<dyn Clock>>,
    trouble: Arc<Trouble>,
}

impl Regions {
    /// `quorum` of `list` must hold a write before it is acknowledged; `lowest` is what the configuration may degrade to.
    ///
    /// # Errors
    /// No region, a name twice, or a quorum out of range.
    pub fn new(list: Vec<Region>, quorum: usize, lowest: usize) -> Result<Self> {
        let names: BTreeSet<_> = list.iter().map(|region| &region.name).collect();
        if names.len() != list.len() {
            return Err(Error::usage("two regions have the same name"));
        }
        if quorum == 0 || quorum > list.len() || lowest == 0 || lowest > quorum {
            let count = list.len();
            return Err(Error::usage(format!(
                "a write quorum of {quorum} (lowest {lowest}) does not fit {count} regions"
            )));
        }
        let bare = list.clone();
        let unbundled = |region: Region| Region { store: Arc::new(Bundled::new(region.store)), ..region };
        let list = list.into_iter().map(unbundled).collect();
        let (detach_after, degrade_after, clock) = (None, None, None);
        Ok(Self {
            list,
            bare,
            quorum,
            lowest,
            unanimous: false,
            detach_after,
            degrade_after,
            clock,
            trouble: Arc::default(),
        })
    }

    /// The same regions, with the time after which writes go on without one that lags behind the quorum.
    pub fn detached_after(self, detach_after: Option<Duration>) -> Self {
        Self { detach_after, ..self }
    }

    /// The same regions, with the time after which writes are acknowledged at the lowest quorum while more is out of reach.
    pub fn degraded_after(self, degrade_after: Option<Duration>) -> Self {
        Self { degrade_after, ..self }
    }

    /// How long the full quorum must have been out of reach before a lower one is enough; never without a word.
    pub const fn degrade_after(&self) -> Option<Duration> {
        self.degrade_after
    }

    /// The same regions for whoever takes away what nobody needs: what one of them does not list may be the reason to leave it, so a
    /// list of all of them is an error where one gives none, also where it gives others.
    #[must_use]
    pub fn unanimous(&self) -> Self {
        Self { unanimous: true, ..self.clone() }
    }

    /// The same regions, with a clock that tells what is missing from what is still on its way.
    pub fn timed_by(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// The same regions, none of which gives or takes anything before it has shown the record of `repository`.
    pub(in crate::repository) fn proven(
        mut self,
        repository: &RepositoryId,
        shown: &BTreeMap<RegionName, Shown>,
    ) -> Self {
        for region in &mut self.list {
            let shown = shown.get(&region.name).unwrap_or(&Shown::No);
            region.store = Arc::new(Proven::new(Arc::clone(&region.store), repository.clone(), shown));
        }
        self
    }

    /// The same regions as places alone, for whoever makes regions of them.
    pub(in crate::repository) fn bare(&self) -> Self {
        let place = |region: &Region| self.bare.iter().find(|bare| bare.name == region.name).unwrap_or(region).clone();
        Self { list: self.list.iter().map(place).collect(), ..self.clone() }
    }

    /// How long a region may lag behind the quorum, if the configuration says.
    pub const fn detach_after(&self) -> Option<Duration> {
        self.detach_after
    }

    /// All of them, in order.
    pub fn all(&self) -> &[Region] {
        &self.list
    }

    /// How many must hold a write.
    pub const fn quorum(&self) -> usize {
        self.quorum
    }

    /// The lowest quorum that the configuration allows.
    pub const fn lowest_quorum(&self) -> usize {
        self.lowest
    }

    /// How many regions must be read so that at least one of them holds any write that was ever acknowledged.
    pub const fn read_quorum(&self) -> usize {
        self.list.len() + 1 - self.lowest
    }

    /// One region by name.
    ///
    /// # Errors
    /// There is none of that name; the error lists those that exist.
    pub fn named(&self, name: &RegionName) -> Result<&Region> {
        let known = || self.list.iter().map(|region| region.name.as_str()).collect::<Vec<_>>().join(", ");
        let missing = || Error::usage(format!("there is no region `{name}`")).hint(format!("regions: {}", known()));
        self.list.iter().find(|region| region.name == *name).ok_or_else(missing)
    }

    /// The same regions with `name` asked first.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn preferring(&self, name: &RegionName) -> Result<Self> {
        self.named(name)?;
        let mut preferred = self.clone();
        preferred.list.sort_by_key(|region| region.name != *name);
        Ok(preferred)
    }

    /// Only these regions; reads go nowhere else.
    pub fn only(&self, name: &RegionName) -> Result<Self> {
        let region = self.named(name)?.clone();
        Ok(Self { list: vec![region], quorum: 1, lowest: 1, ..self.clone() })
    }

    /// Puts an object into every region, at the same time: for records that hold only if no region can miss them.
    ///
    /// # Errors
    /// A region does not take it. Others may have.
    pub async fn put_everywhere(&self, key: &str, body: Bytes) -> Result<()> {
        let digest = Digest::of(&body);
        let puts = self.list.iter().map(|region| {
            let body = body.clone();
            async move {
                let put = region.put(key, (body, digest), None).await;
                put.map(drop).map_err(|error| Error::from(error).during(format!("write {key} to {}", region.name)))
            }
        });
        join_all(puts).await.into_iter().collect()
    }

    /// Makes connections to every region, for whoever is about to ask for much at the same time: over a long way each new one
    /// costs two or three requests' time.
    pub async fn connect(&self, connections: usize) {
        let heads = |region: &Region| {
            let store = Arc::clone(&region.store);
            (0..connections).map(move |_| {
                let store = Arc::clone(&store);
                async move { store.head(layout::REPOSITORY).await.is_ok() }
            })
        };
        let answered = join_all(self.list.iter().flat_map(heads)).await;
        tracing::debug!(answered = answered.into_iter().filter(|answered| *answered).count(), "connected");
    }

    /// Asks every region what it can, so that the first put does not wait for it. One that does not answer is asked again then.
    pub async fn probe(&self) {
        let probes = self.list.iter().map(|region| region.store.probe());
        for error in join_all(probes).await.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "a region was not probed");
        }
    }
}
