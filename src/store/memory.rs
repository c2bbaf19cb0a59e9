//! Objects in memory, for tests and simulation only; the same conformance suite holds it to the contract.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::name;
use super::{
    Capabilities, Depth, Digest, ListPage, ListToken, ListedObject, ListedVersion, ObjectInfo, ObjectStore, Put,
    PutOptions, StoreError, VersionId, VersionPage,
};
use crate::model::Clock;

const PAGE: usize = 1000;

/// A region that is gone with the process.
#[derive(Debug)]
pub struct MemoryStore {
    address: String,
    clock: Arc<dyn Clock>,
    objects: Mutex<BTreeMap<String, Stored>>,
    serial: AtomicU64,
}

#[derive(Debug)]
struct Stored {
    body: Bytes,
    digest: Digest,
    modified: DateTime<Utc>,
    retain_until: Option<DateTime<Utc>>,
    /// Puts before this one: a name that is put again is another version.
    serial: u64,
}

impl Stored {
    fn version(&self) -> VersionId {
        VersionId(self.serial.to_string())
    }
}

impl MemoryStore {
    /// An empty store whose address is `memory:name`.
    pub fn new(name: &str, clock: Arc<dyn Clock>) -> Self {
        Self { address: format!("memory:{name}"), clock, objects: Mutex::default(), serial: AtomicU64::new(0) }
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Stored>> {
        // Every change is one map operation: a panic elsewhere cannot leave half of one behind.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_found(&self, key: &str) -> StoreError {
        StoreError::NotFound { key: key.to_owned(), address: self.address.clone() }
    }

    fn invalid(&self, reason: String) -> StoreError {
        StoreError::Invalid { address: self.address.clone(), reason }
    }

    fn truncated(&self, key: &str, got: u64, expected: u64) -> StoreError {
        StoreError::Truncated { key: key.to_owned(), address: self.address.clone(), got, expected }
    }
}

#[async_trait]
impl ObjectStore for MemoryStore {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_only: true, versions: false, retention: true }
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        Ok(self.capabilities())
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        name::check(&self.address, key)?;
        if Digest::of(&body) != digest {
            return Err(self.invalid(format!("{key} was given a digest of other bytes")));
        }
        if options.retain_until.is_some_and(|until| until <= self.clock.now()) {
            return Err(self.invalid(format!("{key} cannot be locked until a time that is over")));
        }
        let mut objects = self.objects();
        if let Some(stored) = objects.get_mut(key) {
            return if stored.digest == digest {
                stored.retain_until = stored.retain_until.max(options.retain_until);
                Ok(Put::AlreadyThere)
            } else {
                Err(StoreError::Conflict { key: key.to_owned(), address: self.address.clone() })
            };
        }
        if is_or_has_a_directory(&objects, key) {
            return Err(self.invalid(format!("{key} cannot be both an object and a directory")));
        }
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let stored = Stored { body, digest, modified: self.clock.now(), retain_until: options.retain_until, serial };
        objects.insert(key.to_owned(), stored);
        Ok(Put::Created)
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        name::check(&self.address, key)?;
        let objects = self.objects();
        let stored = objects.get(key).ok_or_else(|| self.not_found(key))?;
        Ok(ObjectInfo { size: stored.body.len() as u64, modified: Some(stored.modified), digest: Some(stored.digest) })
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        name::check(&self.address, key)?;
        name::check_range(&self.address, range.as_ref())?;
        let body = self.objects().get(key).ok_or_else(|| self.not_found(key))?.body.clone();
        let Some(range) = range else { return Ok(body) };
        let size = body.len() as u64;
        let inside = range.start.min(size)..range.end.min(size);
        if inside != range {
            return Err(self.truncated(key, inside.end - inside.start, range.end - range.start));
        }
        let bound = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        Ok(body.slice(bound(range.start)..bound(range.end)))
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        name::check_prefix(&self.address, prefix)?;
        let objects = self.objects();
        let mut page = ListPage::default();
        let mut last = after.map_or_else(String::new, |token| token.0.clone());
        let first = if last.is_empty() { Bound::Included(prefix) } else { Bound::Excluded(last.as_str()) };
        let names = objects.range::<str, _>((first, Bound::Unbounded));
        for (key, stored) in names.take_while(|(key, _)| key.starts_with(prefix)) {
            let folded = fold(key, prefix, depth);
            // The token of a folded name ends in `/`, so every name that it stands for comes after it.
            if folded.is_some_and(|folded| folded == last) {
                continue;
            }
            if page.objects.len() + page.prefixes.len() == PAGE {
                page.next = Some(ListToken(last));
                break;
            }
            match folded {
                Some(folded) => page.prefixes.push(folded.to_owned()),
                None => page.objects.push(ListedObject {
                    key: key.clone(),
                    size: stored.body.len() as u64,
                    modified: Some(stored.modified),
                }),
            }
            last = folded.unwrap_or(key).to_owned();
        }
        Ok(page)
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        Ok(Some(self.clock.now()))
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        let page = self.list(prefix, Depth::All, after).await?;
        let objects = self.objects();
        let version = |listed: ListedObject| {
            let version = objects.get(&listed.key)?.version();
            Some(ListedVersion { key: listed.key, version, size: listed.size, modified: listed.modified })
        };
        Ok(VersionPage { versions: page.objects.into_iter().filter_map(version).collect(), next: page.next })
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        let mut objects = self.objects();
        let stored = objects.get_mut(key).ok_or_else(|| self.not_found(key))?;
        stored.retain_until = stored.retain_until.max(Some(until));
        Ok(())
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        name::check(&self.address, key)?;
        let objects = self.objects();
        let stored = objects.get(key).filter(|stored| version.is_none_or(|version| stored.version() == *version));
        Ok(stored.ok_or_else(|| self.not_found(key))?.retain_until)
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.locked_until(key, Some(version)).await.map(|_| false)
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        let same = self.objects().get(key).is_some_and(|stored| stored.version() == *version);
        match if same { self.delete(key).await } else { Ok(()) } {
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        name::check(&self.address, key)?;
        let mut objects = self.objects();
        let stored = objects.get(key).ok_or_else(|| self.not_found(key))?;
        if let Some(until) = stored.retain_until.filter(|until| *until > self.clock.now()) {
            return Err(StoreError::Retained {
                key: key.to_owned(),
                address: self.address.clone(),
                until: Some(until),
            });
        }
        objects.remove(key);
        Ok(())
    }
}

/// The part of `key` up to the first `/` after the prefix, if this listing folds it.
fn fold<'a>(key: &'a str, prefix: &str, depth: Depth) -> Option<&'a str> {
    let slash = key.get(prefix.len()..)?.find('/')?;
    (depth == Depth::Level).then(|| key.get(..prefix.len() + slash + 1)).flatten()
}

fn is_or_has_a_directory(objects: &BTreeMap<String, Stored>, key: &str) -> bool {
    let below = format!("{key}/");
    let is_directory = objects
        .range::<str, _>((Bound::Included(below.as_str()), Bound::Unbounded))
        .next()
        .is_some_and(|(name, _)| name.starts_with(&below));
    let under_object =
        key.match_indices('/').any(|(at, _)| key.get(..at).is_some_and(|part| objects.contains_key(part)));
    is_directory || under_object
}
