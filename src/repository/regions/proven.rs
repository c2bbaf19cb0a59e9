//! A region proves that it is one before anything is read from it or written to it.
//!
//! A file system that is not mounted leaves an empty directory behind, and a bucket can be made anew: both answer, and hold
//! nothing. What is written there is in no region, and what is not found there may well exist.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use crate::model::{Kind, RepositoryId};
use crate::repository::layout;
use crate::repository::regions::identity::RepositoryRecord;
use crate::repository::regions::silence::Silence;
use crate::store::{
    Capabilities, Depth, Digest, ListPage, ListToken, ObjectInfo, ObjectStore, Put, PutOptions, StoreError, VersionId,
    VersionPage,
};

/// A store that gives and takes nothing before it has shown the repository's record. Reading the record itself asks anew.
#[derive(Debug)]
pub(in crate::repository) struct Proven {
    inner: Arc<dyn ObjectStore>,
    repository: RepositoryId,
    proven: AtomicBool,
    silence: Arc<Silence>,
}

/// What a region did when it was asked for its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::repository) enum Shown {
    /// It showed it.
    Yes,
    /// It did not answer while others did.
    Silent,
    /// It showed none.
    No,
}

impl Proven {
    pub(in crate::repository) fn new(inner: Arc<dyn ObjectStore>, repository: RepositoryId, shown: &Shown) -> Self {
        let silence = Arc::new(Silence::default());
        if *shown == Shown::Silent {
            silence.begin(&inner, "no answer while others answered".to_owned());
        }
        Self { inner, repository, proven: AtomicBool::new(*shown == Shown::Yes), silence }
    }

    /// Asks the region, unless it is silent or no region.
    async fn ask<T>(
        &self,
        (operation, key): (&'static str, &str),
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        self.silence.check(operation, key, self.inner.as_ref())?;
        let waiting = self.silence.wait(&self.inner);
        let outcome = match self.prove().await {
            Ok(()) => call.await,
            Err(error) => Err(error),
        };
        waiting.ended(&outcome);
        outcome
    }

    async fn prove(&self) -> Result<(), StoreError> {
        if self.proven.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.record().await {
            Ok(_) => Ok(()),
            Err(StoreError::NotFound { .. }) => {
                let why = format!("it holds no {}; mount it, or rebuild it: drctl repair", layout::REPOSITORY);
                Err(self.unproven(why))
            }
            Err(error) => Err(error),
        }
    }

    /// A damaged record proves as much as a good one: it is there, and repair mends it.
    async fn record(&self) -> Result<Bytes, StoreError> {
        let found = self.inner.get(layout::REPOSITORY, None).await;
        if !matches!(found, Err(StoreError::Unavailable { .. })) {
            self.silence.end();
        }
        let foreign = match &found {
            Ok(bytes) => match RepositoryRecord::parse(bytes) {
                Ok(record) if record.repository != self.repository => {
                    Some(format!("it is one of {}, and not of {}", record.repository, self.repository))
                }
                Err(error) if error.kind() != Kind::Damaged => Some(error.to_string()),
                Ok(_) | Err(_) => None,
            },
            Err(_) => None,
        };
        match &found {
            Ok(_) => self.proven.store(foreign.is_none(), Ordering::Relaxed),
            Err(error) if error.is_not_found() => self.proven.store(false, Ordering::Relaxed),
            // It is what it was.
            Err(_) => {}
        }
        match foreign {
            Some(why) => Err(self.unproven(why)),
            None => found,
        }
    }

    fn unproven(&self, reason: String) -> StoreError {
        StoreError::Unproven { address: self.inner.address(), reason }
    }
}

#[async_trait]
impl ObjectStore for Proven {
    fn address(&self) -> String {
        self.inner.address()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        self.ask(("probe", ""), self.inner.probe()).await
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        self.ask(("put", key), self.inner.put(key, body, digest, options)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        self.ask(("head", key), self.inner.head(key)).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        if key == layout::REPOSITORY && range.is_none() {
            return self.record().await;
        }
        self.ask(("get", key), self.inner.get(key, range)).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        self.ask(("list", prefix), self.inner.list(prefix, depth, after)).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.silence.check("time", "", self.inner.as_ref())?;
        self.inner.server_time().await
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        self.ask(("list", prefix), self.inner.list_versions(prefix, after)).await
    }

    async fn extend(&self, key: &str, until: DateTime<Utc>) -> Result<(), StoreError> {
        self.ask(("lock", key), self.inner.extend(key, until)).await
    }

    async fn locked_until(&self, key: &str, version: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.ask(("lock", key), self.inner.locked_until(key, version)).await
    }

    async fn is_held(&self, key: &str, version: &VersionId) -> Result<bool, StoreError> {
        self.ask(("lock", key), self.inner.is_held(key, version)).await
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        self.ask(("delete", key), self.inner.delete_version(key, version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.ask(("delete", key), self.inner.delete(key)).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::observe::progress::Progress;
    use crate::repository::layout;
    use crate::repository::mend::{Scope, mend};
    use crate::repository::testing::{Fixture, Made};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_empty_place_is_no_region_until_it_is_rebuilt() {
        let mut fixture = Fixture::memory(3, 2).await;
        let files = [Made::new("base/1", vec![7; 9000])];
        fixture.backup(&files, None).await;
        for (key, _) in fixture.stores[0].contents().await {
            fixture.stores[0].lose(&key).await;
        }
        // By a process that opened it before, and by one that opens it now.
        for repository in [fixture.repository.clone(), fixture.reopen().await.unwrap()] {
            fixture.repository = repository;
            fixture.clock.advance(60);
            let written = fixture.backup(&files, None).await;
            assert!(written.regions[0].missing_objects > 0, "{:?}", written.regions);
            assert!(fixture.stores[0].contents().await.is_empty());
        }
        let repository = fixture.reopen().await.unwrap();
        let listed = repository.regions.list_each(layout::COMMITS).await;
        assert_eq!(listed.iter().map(|(_, list)| list.is_ok()).collect::<Vec<_>>(), [false, true, true]);

        let phase = Progress::new(Arc::clone(&fixture.writer.clock)).begin("mend", None);
        let unattended = Scope { unattended: true, ..Scope::default() };
        let left = mend(&repository, &unattended, &phase).await.unwrap();
        assert!(left.iter().any(|region| !region.still_missing.is_empty()));
        assert!(fixture.stores[0].contents().await.is_empty());
        mend(&repository, &Scope::default(), &phase).await.unwrap();
        let listed = fixture.reopen().await.unwrap().regions.list_each(layout::COMMITS).await;
        assert!(listed.iter().all(|(_, list)| list.as_ref().is_ok_and(|list| list.len() == 3)), "{listed:?}");
    }
}
