//! The regions of a repository, and reading from whichever of them has good bytes.

pub mod fan_out;
pub mod identity;
pub mod lock_rule;
pub mod nearest;
mod proven;
mod silence;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use serde::Serialize;

use crate::model::{Clock, Error, Kind, RegionName, RepositoryId, Result};
use crate::repository::bundle::view::Bundled;
use crate::repository::layout;
use crate::repository::regions::lock_rule::Rule;
use crate::repository::regions::proven::Proven;
pub(in crate::repository) use crate::repository::regions::proven::Shown;
use crate::store::{Depth, Digest, ListedObject, ObjectStore, Put, PutOptions, StoreError};

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
    detach_after: Option<Duration>,
    degrade_after: Option<Duration>,
    clock: Option<Arc<dyn Clock>>,
    trouble: Arc<Trouble>,
}

/// Objects that had to be taken from another region than the preferred one, and how often each region failed.
#[derive(Debug, Default)]
struct Trouble {
    incidents: Mutex<Vec<Incident>>,
    failures: Mutex<BTreeMap<RegionName, Arc<AtomicU32>>>,
}

/// One object that a region could not give.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Incident {
    /// The region that failed.
    pub region: RegionName,
    /// The object.
    pub key: String,
    /// Why.
    pub reason: String,
    /// Whether the region holds wrong bytes or none (repair mends it), as opposed to not answering.
    pub damaged: bool,
}

/// After this many failures to answer, a region is asked last for the rest of the job: a hanging region costs a full
/// timeout at each request.
const SUSPECT_AFTER: u32 = 2;

/// An object that is older than this and not in a region will not come by itself: longer than the patience of writers.
const ON_ITS_WAY: Duration = Duration::from_secs(30);

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
        Ok(Self { list, bare, quorum, lowest, detach_after, degrade_after, clock, trouble: Arc::default() })
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

    /// What went wrong so far, each object of a region once.
    pub fn incidents(&self) -> Vec<Incident> {
        self.trouble.incidents.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes an object that was found damaged by other means than [`read`](Self::read), and was taken elsewhere.
    pub(in crate::repository) fn tell_damaged(&self, region: &RegionName, key: &str, reason: String) {
        let (region, key) = (region.clone(), key.to_owned());
        let incident = Incident { region, key, reason, damaged: true };
        self.record(vec![Failure { incident, kind: Kind::Damaged }]);
    }

    /// Reads an object, or a range of it, from the first region whose bytes `check` accepts.
    ///
    /// # Errors
    /// No region gave acceptable bytes; the error names each region and its reason. It is `NotFound` only if every region
    /// answered that the object does not exist.
    pub async fn read<T>(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        check: impl Fn(Bytes) -> Result<T>,
    ) -> Result<(T, RegionName)> {
        let mut reasons = Vec::new();
        for region in self.by_health() {
            match region.store.get(key, range.clone()).await {
                Ok(bytes) => match check(bytes) {
                    Ok(value) => {
                        self.note(region, key, reasons).await;
                        return Ok((value, region.name.clone()));
                    }
                    Err(error) => reasons.push(Failure::damaged(region, key, error.to_string())),
                },
                Err(error) => {
                    if error.is_transient() {
                        self.failures(&region.name).fetch_add(1, Ordering::Relaxed);
                    }
                    reasons.push(Failure::of(region, key, &error));
                }
            }
        }
        Err(unreadable(key, &reasons))
    }

    /// Reads a whole object and checks its size and digest.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn read_exact(&self, key: &str, size: u64, digest: Digest) -> Result<(Bytes, RegionName)> {
        let check = |bytes: Bytes| {
            if bytes.len() as u64 != size {
                return Err(Error::damaged(format!("{} of {size} bytes are stored", bytes.len())));
            }
            if Digest::of(&bytes) != digest {
                return Err(Error::damaged("the object's digest is not the one in its inventory"));
            }
            Ok(bytes)
        };
        self.read(key, None, check).await
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

    /// Everything below `prefix` in each region; a region that does not answer is an error in its place.
    pub async fn list_each(&self, prefix: &str) -> Vec<(RegionName, Result<Vec<ListedObject>>)> {
        let lists = self.list.iter().map(|region| async {
            let listed = list_all(region.store.as_ref(), prefix).await;
            (region.name.clone(), listed)
        });
        join_all(lists).await
    }

    /// The regions that cannot be listed at present, and why.
    pub async fn silent(&self) -> BTreeMap<RegionName, Error> {
        let asked = self.list.iter().map(|region| async {
            let listed = region.store.list(layout::WAL, Depth::Level, None).await;
            listed.err().map(|error| (region.name.clone(), Error::from(error)))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// The names below `prefix` in any region that answers, sorted.
    ///
    /// # Errors
    /// No region answers.
    pub async fn list_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self.list_each(prefix).await.into_iter().map(|(_, list)| list);
        first_error_if_none(lists, |list, union: &mut BTreeSet<String>| {
            union.extend(list.into_iter().map(|object| object.key));
        })
    }

    /// The names folded one level below `prefix` (each ends in `/`) in any region that answers.
    ///
    /// # Errors
    /// No region answers.
    pub async fn prefixes_union(&self, prefix: &str) -> Result<BTreeSet<String>> {
        let lists = self.list.iter().map(|region| list_prefixes(region.store.as_ref(), prefix));
        first_error_if_none(join_all(lists).await, |list, union: &mut BTreeSet<String>| union.extend(list))
    }

    /// Notes which regions failed before `giver` gave the object. An object that is listed in one region may be on its way to
    /// another for as long as its writer has patience with that one: then it is missing nowhere.
    async fn note(&self, giver: &Region, key: &str, failures: Vec<Failure>) {
        let (absent, failed): (Vec<_>, Vec<_>) =
            failures.into_iter().partition(|failure| failure.kind == Kind::NotFound);
        self.record(failed);
        if absent.is_empty() {
            return;
        }
        match layout::may_be_read_on_its_way(key) && self.is_young(giver, key).await {
            true => tracing::debug!(key, "taken from another region: it is on its way to the first"),
            false => self.record(absent),
        }
    }

    async fn is_young(&self, giver: &Region, key: &str) -> bool {
        let Some(clock) = &self.clock else { return false };
        let stored = giver.store.head(key).await.ok().and_then(|info| info.modified);
        stored.is_some_and(|stored| (clock.now() - stored).abs().to_std().is_ok_and(|age| age < ON_ITS_WAY))
    }

    fn by_health(&self) -> Vec<&Region> {
        let mut order: Vec<_> = self.list.iter().collect();
        order.sort_by_key(|region| self.failures(&region.name).load(Ordering::Relaxed) >= SUSPECT_AFTER);
        order
    }

    fn failures(&self, name: &RegionName) -> Arc<AtomicU32> {
        let mut failures = self.trouble.failures.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(failures.entry(name.clone()).or_default())
    }

    fn record(&self, failures: Vec<Failure>) {
        let mut incidents = self.trouble.incidents.lock().unwrap_or_else(PoisonError::into_inner);
        for Failure { incident, .. } in failures {
            tracing::warn!(region = %incident.region, key = incident.key, reason = incident.reason, "taken from another region");
            let known = incidents.iter().any(|known| known.region == incident.region && known.key == incident.key);
            if !known {
                incidents.push(incident);
            }
        }
    }
}

#[derive(Debug)]
struct Failure {
    incident: Incident,
    kind: Kind,
}

impl Failure {
    fn of(region: &Region, key: &str, error: &StoreError) -> Self {
        let damaged = error.is_not_found();
        let kind = if damaged { Kind::NotFound } else { Kind::Unavailable };
        let (region, key, reason) = (region.name.clone(), key.to_owned(), error.to_string());
        Self { incident: Incident { region, key, reason, damaged }, kind }
    }

    fn damaged(region: &Region, key: &str, reason: String) -> Self {
        let (region, key) = (region.name.clone(), key.to_owned());
        Self { incident: Incident { region, key, reason, damaged: true }, kind: Kind::Damaged }
    }
}

fn unreadable(key: &str, failures: &[Failure]) -> Error {
    let is_answer = |failure: &Failure| matches!(failure.kind, Kind::Damaged | Kind::NotFound);
    let all = |kind| failures.iter().all(|failure| failure.kind == kind);
    let any = |kind| failures.iter().any(|failure| failure.kind == kind);
    let (kind, what) = match () {
        () if all(Kind::NotFound) => (Kind::NotFound, "is in no region"),
        // A region that does not answer may have it whole.
        () if any(Kind::Damaged) && failures.iter().all(is_answer) => {
            (Kind::Damaged, "is damaged in every region that has it")
        }
        () => (Kind::Unavailable, "cannot be read from any region"),
    };
    let error = Error::new(kind, format!("{key} {what}"));
    failures.iter().fold(error, |error, Failure { incident, .. }| {
        error.because(format!("{}: {}", incident.region, incident.reason))
    })
}

fn first_error_if_none<L, U: Default>(
    lists: impl IntoIterator<Item = Result<L>>,
    mut add: impl FnMut(L, &mut U),
) -> Result<U> {
    let mut union = U::default();
    let (mut answered, mut first_error) = (false, None);
    for list in lists {
        match list {
            Ok(list) => {
                answered = true;
                add(list, &mut union);
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    match first_error {
        Some(error) if !answered => Err(error),
        _ => Ok(union),
    }
}

/// Every object below `prefix`, all pages.
///
/// # Errors
/// The store does not answer.
pub async fn list_all(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<ListedObject>> {
    let (mut objects, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(prefix, Depth::All, after.as_ref()).await?;
        objects.extend(page.objects);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(objects),
        }
    }
}

/// The names folded one level below `prefix`, all pages; each ends in `/`.
///
/// # Errors
/// The store does not answer.
pub async fn list_prefixes(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<String>> {
    let (mut prefixes, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(prefix, Depth::Level, after.as_ref()).await?;
        prefixes.extend(page.prefixes);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(prefixes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::TestClock;
    use crate::store::PutOptions;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn what_is_on_its_way_is_no_incident_and_what_is_missing_or_damaged_is() {
        let clock = TestClock::new();
        let stores = ["a", "b"].map(|name| Arc::new(MemoryStore::new(name, Arc::clone(&clock) as Arc<dyn Clock>)));
        let named = |(name, store): (&str, &Arc<MemoryStore>)| Region {
            name: name.parse().unwrap(),
            store: Arc::clone(store) as Arc<dyn ObjectStore>,
            lock: None,
        };
        let regions = Regions::new(["a", "b"].into_iter().zip(&stores).map(named).collect(), 1, 1).unwrap();
        let regions = regions.timed_by(Arc::clone(&clock) as Arc<dyn Clock>);
        let put = async |store: &MemoryStore, key: &str, body: &'static [u8]| {
            store.put(key, Bytes::from_static(body), Digest::of(body), &PutOptions::default()).await.unwrap();
        };
        let read = async |key: &str| {
            let wrong = || Error::damaged("not as it was");
            let check = |bytes: Bytes| if bytes == b"good".as_slice() { Ok(()) } else { Err(wrong()) };
            let from = regions.read(key, None, check).await.unwrap().1;
            assert_eq!(from.as_str(), "b");
            regions.incidents().len()
        };
        put(&stores[1], "wal/1/frame", b"good").await;
        put(&stores[1], "packs/1/000000", b"good").await;
        assert_eq!(read("wal/1/frame").await, 0);
        // A pack is read by its COMMIT, which comes after it.
        assert_eq!(read("packs/1/000000").await, 1);
        put(&stores[0], "wal/1/other", b"flip").await;
        put(&stores[1], "wal/1/other", b"good").await;
        assert_eq!(read("wal/1/other").await, 2);
        clock.advance(31);
        assert_eq!(read("wal/1/frame").await, 3);
    }
}
