//! A region in a directory: a mounted disk, an NFS export, a test.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::name;
use super::{
    Capabilities, Depth, Digest, ListPage, ListToken, ListedObject, ListedVersion, ObjectInfo, ObjectStore, Put,
    PutOptions, StoreError, VersionId, VersionPage,
};
use tree::Tree;

mod body;
mod error;
mod place;
mod tree;
mod walk;

/// Objects as files of mode 0600 below one root, which is held open: if another file system is mounted over the path
/// or the mount goes away, writes never land beside the region.
///
/// Symbolic links below the root are refused aloud, never followed and never skipped: following could leave the root,
/// skipping would report stored objects as absent. Retention is not enforced ([`Capabilities::retention`] is false).
pub struct DirStore {
    tree: Arc<Tree>,
}

impl fmt::Debug for DirStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DirStore").field(&self.tree.address).finish()
    }
}

impl DirStore {
    /// Opens a root that exists.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it does not.
    pub async fn open(root: &Path) -> Result<Self, StoreError> {
        Self::prepare(root, Tree::open).await
    }

    /// Makes the root and its missing parents, durable and of mode 0700, and opens it. Does nothing to a root that
    /// exists.
    ///
    /// # Errors
    /// Anything that stops it.
    pub async fn create(root: &Path) -> Result<Self, StoreError> {
        Self::prepare(root, Tree::create).await
    }

    async fn prepare(root: &Path, make: fn(&Path) -> Result<Tree, StoreError>) -> Result<Self, StoreError> {
        let path = root.to_owned();
        let address = format!("dir:{}", root.display());
        let tree = blocking("open", "", address, move || make(&path)).await?;
        Ok(Self { tree: Arc::new(tree) })
    }

    async fn on_tree<T, F>(&self, operation: &'static str, key: &str, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Tree, &str) -> Result<T, StoreError> + Send + 'static,
    {
        let (tree, owned) = (Arc::clone(&self.tree), key.to_owned());
        blocking(operation, key, self.address(), move || work(&tree, &owned)).await
    }
}

async fn blocking<T, F>(operation: &'static str, key: &str, address: String, work: F) -> Result<T, StoreError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, StoreError> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|stopped| {
        Err(StoreError::Unavailable { operation, key: key.to_owned(), address, reason: stopped.to_string() })
    })
}

impl DirStore {
    fn cannot_lock(&self, key: &str) -> StoreError {
        let reason = format!("{key} cannot be locked: whoever may write to a directory may delete in it");
        StoreError::Invalid { address: self.tree.address.clone(), reason }
    }
}

#[async_trait]
impl ObjectStore for DirStore {
    fn address(&self) -> String {
        self.tree.address.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { create_only: true, versions: false, retention: false }
    }

    async fn probe(&self) -> Result<Capabilities, StoreError> {
        Ok(self.capabilities())
    }

    async fn put(&self, key: &str, body: Bytes, digest: Digest, options: &PutOptions) -> Result<Put, StoreError> {
        name::check(&self.tree.address, key)?;
        if options.retain_until.is_some() {
            return Err(self.cannot_lock(key));
        }
        self.on_tree("put", key, move |tree, key| tree.put(key, &body, digest)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        name::check(&self.tree.address, key)?;
        self.on_tree("head", key, Tree::head).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        name::check(&self.tree.address, key)?;
        name::check_range(&self.tree.address, range.as_ref())?;
        self.on_tree("get", key, move |tree, key| tree.get(key, range)).await
    }

    async fn list(&self, prefix: &str, depth: Depth, after: Option<&ListToken>) -> Result<ListPage, StoreError> {
        name::check_prefix(&self.tree.address, prefix)?;
        let after = after.map(|token| token.0.clone()).unwrap_or_default();
        self.on_tree("list", prefix, move |tree, prefix| tree.list(prefix, depth, after)).await
    }

    async fn server_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        Ok(None)
    }

    async fn list_versions(&self, prefix: &str, after: Option<&ListToken>) -> Result<VersionPage, StoreError> {
        let page = self.list(prefix, Depth::All, after).await?;
        let version = |ListedObject { key, size, modified }| ListedVersion {
            key,
            version: tree::version(size, modified),
            size,
            modified,
        };
        Ok(VersionPage { versions: page.objects.into_iter().map(version).collect(), next: page.next })
    }

    async fn extend(&self, key: &str, _until: DateTime<Utc>) -> Result<(), StoreError> {
        self.head(key).await?;
        Err(self.cannot_lock(key))
    }

    async fn locked_until(&self, key: &str, _: Option<&VersionId>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.head(key).await.map(|_| None)
    }

    async fn is_held(&self, key: &str, _: &VersionId) -> Result<bool, StoreError> {
        self.head(key).await.map(|_| false)
    }

    async fn delete_version(&self, key: &str, version: &VersionId) -> Result<(), StoreError> {
        name::check(&self.tree.address, key)?;
        let version = version.clone();
        self.on_tree("delete", key, move |tree, key| tree.delete_version(key, &version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        name::check(&self.tree.address, key)?;
        self.on_tree("delete", key, Tree::delete).await
    }
}

#[cfg(test)]
mod tests;
