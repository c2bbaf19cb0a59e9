//! Reading from whichever region has good bytes, and remembering which had not.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use super::{Region, Regions};
use crate::model::{Error, Kind, RegionName, Result};
use crate::repository::{format, layout};
use crate::store::{Digest, StoreError};

/// After this many failures to answer, a region is asked last for the rest of the job: a hanging region costs a full
/// timeout at each request.
const SUSPECT_AFTER: u32 = 2;

/// An object that is older than this and not in a region will not come by itself: longer than the patience of writers.
const ON_ITS_WAY: Duration = Duration::from_secs(30);

/// Objects that had to be taken from another region than the preferred one, and how often each region failed.
#[derive(Debug, Default)]
pub(super) struct Trouble {
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

impl Regions {
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
                    Err(error) => reasons.push(Failure::refused(region, key, &error)),
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

    /// The bytes are there, and not accepted.
    fn refused(region: &Region, key: &str, error: &Error) -> Self {
        let newer = error.kind() == Kind::Newer;
        let (region, key, reason) = (region.name.clone(), key.to_owned(), error.to_string());
        let kind = if newer { Kind::Newer } else { Kind::Damaged };
        Self { incident: Incident { region, key, reason, damaged: !newer }, kind }
    }
}

fn unreadable(key: &str, failures: &[Failure]) -> Error {
    let is_answer = |failure: &Failure| matches!(failure.kind, Kind::Damaged | Kind::NotFound);
    let all = |kind| failures.iter().all(|failure| failure.kind == kind);
    let any = |kind| failures.iter().any(|failure| failure.kind == kind);
    let (kind, what) = match () {
        () if all(Kind::NotFound) => (Kind::NotFound, "is in no region"),
        () if any(Kind::Newer) => (Kind::Newer, "was written by a newer drctl"),
        // A region that does not answer may have it whole.
        () if any(Kind::Damaged) && failures.iter().all(is_answer) => {
            (Kind::Damaged, "is damaged in every region that has it")
        }
        () => (Kind::Unavailable, "cannot be read from any region"),
    };
    let error = Error::new(kind, format!("{key} {what}"));
    let error = if kind == Kind::Newer { error.hint(format::HINT) } else { error };
    failures.iter().fold(error, |error, Failure { incident, .. }| {
        error.because(format!("{}: {}", incident.region, incident.reason))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Clock;
    use crate::repository::testing::TestClock;
    use crate::store::memory::MemoryStore;
    use crate::store::{ObjectStore, PutOptions};

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
