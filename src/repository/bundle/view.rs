//! A region whose old WAL frames lie in bundles gives each of them under its own name nevertheless, so that whoever reads
//! WAL reads both and knows of neither.
//!
//! Which bundles there are is learned from the lists that pass by: nobody reads a frame that was not listed. A frame that
//! was there when it was listed and is gone now is looked for once more.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::OnceCell;

use crate::repository::bundle::form::{Contents, head_bytes};
use crate::repository::layout;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ListedObject, ObjectInfo, ObjectStore, Put, PutOptions,
    StoreError, VersionId, VersionPage,
};

/// Bundles at hand, 16 MiB each: whoever reads ahead reads from two neighbours.
const WHOLE: usize = 2;
/// Heads at hand.
const HEADS: usize = 16;
/// Of so many frames that are missing in an epoch, one is looked for by a list.
const MISSES: u32 = 64;

/// Looking for the bundles of one epoch: how many frames were missed. Whoever holds it looks, and the others wait: a reader that
/// fetches ahead misses several frames at once, and each of them is where the list says.
type Search = Arc<tokio::sync::Mutex<u32>>;

/// A store that finds frames in bundles.
#[derive(Debug)]
pub(in crate::repository) struct Bundled {
    inner: Arc<dyn ObjectStore>,
    known: Mutex<Known>,
}

/// First and last frame → when it was stored.
type Bundles = BTreeMap<(u64, u64), Option<DateTime<Utc>>>;

#[derive(Debug, Default)]
struct Known {
    /// What the names of an epoch's frames begin with → the bundles in it.
    bundles: BTreeMap<String, Bundles>,
    searches: BTreeMap<String, Search>,
    heads: VecDeque<(String, Contents)>,
    whole: VecDeque<(String, Whole)>,
}

/// A bundle and what is in it, if it is one.
type Whole = Arc<OnceCell<(Bytes, Option<Contents>)>>;

impl Known {
    fn learn(&mut self, object: &ListedObject) {
        let Some((prefix, numbers)) = split(&object.key) else { return };
        if let Some(numbers) = layout::parse_bundle(numbers) {
            self.bundles.entry(prefix.to_owned()).or_default().insert(numbers, object.modified);
        }
    }

    /// The bundles that hold a frame, the oldest first. Those that nobody forged do not overlap; and prune takes a frame only
    /// while one bundle alone has it, so of several the oldest is the one with which the frame was compared.
    fn find(&self, prefix: &str, seq: u64) -> Vec<(u64, u64)> {
        let before = self.bundles.get(prefix).into_iter().flat_map(|of| of.range(..=(seq, u64::MAX)));
        let holding = before.filter(|((_, last), _)| *last >= seq);
        let mut found: Vec<_> = holding.map(|(numbers, stored)| (stored.is_none(), *stored, *numbers)).collect();
        found.sort_unstable();
        found.into_iter().map(|(.., numbers)| numbers).collect()
    }

    fn whole(&mut self, name: &str) -> Whole {
        if let Some((_, cell)) = self.whole.iter().find(|(known, _)| known == name) {
            return Arc::clone(cell);
        }
        let cell = Arc::new(OnceCell::new());
        self.whole.push_back((name.to_owned(), Arc::clone(&cell)));
        if self.whole.len() > WHOLE {
            self.whole.pop_front();
        }
        cell
    }
}

/// The prefix of an epoch, and what follows.
fn split(key: &str) -> Option<(&str, &str)> {
    key.starts_with(layout::WAL).then_some(())?;
    key.split_at_checked(key.rfind('/')? + 1)
}

impl Bundled {
    pub(in crate::repository) fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundles that hold a frame, as far as lists tell.
    async fn bundles_of(&self, prefix: &str, seq: u64) -> Result<Vec<(u64, u64)>, StoreError> {
        let search = {
            let mut known = self.known();
            let found = known.find(prefix, seq);
            if !found.is_empty() {
                return Ok(found);
            }
            Arc::clone(known.searches.entry(prefix.to_owned()).or_default())
        };
        let mut misses = search.lock().await;
        let found = self.known().find(prefix, seq);
        if found.is_empty() && misses.is_multiple_of(MISSES) {
            // One that fails does not count: the next miss looks again.
            self.look_for(prefix).await?;
        }
        *misses = misses.wrapping_add(u32::from(found.is_empty()));
        drop(misses);
        Ok(self.known().find(prefix, seq))
    }

    async fn look_for(&self, prefix: &str) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let page = self.list(prefix, Depth::All, after.as_ref()).await?;
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// The frame's bytes; `None` if no bundle holds it. Of a bundle that is none an empty frame comes, which whoever asked
    /// finds damaged, unless another bundle has it.
    async fn unbundled(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, StoreError> {
        let Some((prefix, number)) = split(key) else { return Ok(None) };
        let Some(seq) = layout::parse_seq(number) else { return Ok(None) };
        let mut best = None;
        for numbers in self.bundles_of(prefix, seq).await? {
            let name = layout::wal_bundle(prefix, numbers.0, numbers.1);
            let found = match range.clone() {
                None => self.read_whole(&name, seq, numbers).await,
                Some(range) => self.read_part(&name, (seq, numbers), range).await,
            };
            match found {
                Err(StoreError::NotFound { .. }) => {}
                Ok(bytes) if bytes.is_empty() => best = Some(bytes),
                other => return other.map(Some),
            }
        }
        Ok(best)
    }

    /// Whoever wants a frame wants the next one, too.
    async fn read_whole(&self, name: &str, seq: u64, numbers: (u64, u64)) -> Result<Bytes, StoreError> {
        let cell = self.known().whole(name);
        let fetch = || async {
            let bytes = self.inner.get(name, None).await?;
            let contents = Contents::parse(&bytes, numbers).ok();
            Ok::<_, StoreError>((bytes, contents))
        };
        let (bytes, contents) = cell.get_or_try_init(fetch).await?;
        let range = contents.as_ref().and_then(|contents| contents.range(seq)).unwrap_or_default();
        let usize = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        Ok(bytes.slice(usize(range.start)..usize(range.end)))
    }

    async fn read_part(
        &self,
        name: &str,
        (seq, numbers): (u64, (u64, u64)),
        wanted: Range<u64>,
    ) -> Result<Bytes, StoreError> {
        let known = self.known().heads.iter().find(|(known, _)| known == name).map(|(_, contents)| contents.clone());
        let contents = match known {
            Some(contents) => contents,
            None => {
                let head = self.inner.get(name, Some(0..head_bytes(numbers))).await?;
                let Ok(contents) = Contents::parse(&head, numbers) else { return Ok(Bytes::new()) };
                let mut known = self.known();
                known.heads.push_back((name.to_owned(), contents.clone()));
                if known.heads.len() > HEADS {
                    known.heads.pop_front();
                }
                contents
            }
        };
        let Some(frame) = contents.range(seq) else { return Ok(Bytes::new()) };
        // How long a frame is that only a bundle holds, no list says.
        let (from, to) = (frame.start + wanted.start, frame.end.min(frame.start + wanted.end));
        if from < to { self.inner.get(name, Some(from..to)).await } else { Ok(Bytes::new()) }
    }
}

#[async_trait]
impl ObjectStore for Bundled {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.inner.probe().await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        self.inner.put(key, body, digest, options).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.inner.head(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        match self.inner.get(key, range.clone()).await {
            Err(missing @ StoreError::NotFound { .. }) => self.unbundled(key, range).await?.ok_or(missing),
            other => other,
        }
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        let page = self.inner.list(prefix, depth, after).await?;
        let mut known = self.known();
        page.objects.iter().for_each(|object| known.learn(object));
        drop(known);
        Ok(page)
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.inner.server_time().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.inner.list_versions(prefix, after).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.inner.delete_version(key, version).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.inner.extend(key, until).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.inner.locked_until(key, version).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.inner.is_held(key, version).await
    }
}
