//! Deleting for good: where versions are kept, a plain delete only hides an object.

use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::delete_object::DeleteObjectError;

use super::S3Store;
use super::error::reply;
use super::read::time;
use crate::store::{ListToken, ListedVersion, StoreError, VersionId, VersionPage};

/// Between the two markers of a page; it stands in no name and no version id.
const AND: char = '\n';

impl S3Store {
    pub(super) async fn delete_versions(&self, key: &str) -> Result<(), StoreError> {
        let versions = self.versions_of(key).await?;
        if versions.is_empty() {
            return Err(StoreError::NotFound { key: key.to_owned(), address: self.address.clone() });
        }
        for version in versions {
            self.delete_one_version(key, &version).await?;
        }
        Ok(())
    }

    /// With its id a version is removed for good, and a marker that hid others as well; S3 answers the same if it was gone.
    pub(super) async fn delete_one_version(&self, key: &str, version: &str) -> Result<(), StoreError> {
        let request = self.client.delete_object().bucket(&self.bucket).key(self.full(key)).version_id(version);
        match request.send().await {
            Ok(_) => Ok(()),
            Err(error) => match self.refused_delete(key, version, &error).await {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }

    /// One page of versions and delete markers. S3 gives the two in lists of their own; together they are in order again.
    pub(super) async fn list_object_versions(
        &self,
        prefix: &str,
        after: Option<&ListToken>,
    ) -> Result<VersionPage, StoreError> {
        let beginning = format!("{prefix}*");
        let call = self.call("list the versions", &beginning);
        let (key_marker, version_marker) = after.and_then(|token| token.0.split_once(AND)).unzip();
        let version_marker = version_marker.filter(|marker| !marker.is_empty()).map(str::to_owned);
        let request = self.client.list_object_versions().bucket(&self.bucket).prefix(self.full(prefix)).max_keys(1000);
        let request = request.set_key_marker(key_marker.map(str::to_owned)).set_version_id_marker(version_marker);
        let reply = request.send().await.map_err(|error| call.failed(&error))?;
        let mut page = VersionPage::default();
        for version in reply.versions() {
            let Some(key) = version.key().and_then(|key| self.own_name(key)) else { continue };
            let size = version.size().and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| call.unavailable(format!("{key} is listed without its size")))?;
            let id = VersionId(version.version_id().unwrap_or("null").to_owned());
            page.versions.push(ListedVersion {
                key,
                version: id,
                size,
                modified: version.last_modified().and_then(time),
            });
        }
        for marker in reply.delete_markers() {
            let Some(key) = marker.key().and_then(|key| self.own_name(key)) else { continue };
            let id = VersionId(marker.version_id().unwrap_or("null").to_owned());
            page.versions.push(ListedVersion {
                key,
                version: id,
                size: 0,
                modified: marker.last_modified().and_then(time),
            });
        }
        page.versions.sort_by(|a, b| a.key.cmp(&b.key));
        if reply.is_truncated() == Some(true) {
            let cut = || call.unavailable("the answer is cut and does not say where it goes on".to_owned());
            let key = reply.next_key_marker().ok_or_else(cut)?;
            let version = reply.next_version_id_marker().unwrap_or_default();
            page.next = Some(ListToken(format!("{key}{AND}{version}")));
        }
        Ok(page)
    }

    /// Ids of everything under this one name, delete markers too; `null` in a bucket without versions.
    async fn versions_of(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let (full, call) = (self.full(key), self.call("delete", key));
        let mut ids = Vec::new();
        let (mut key_marker, mut version_marker) = (None, None);
        loop {
            let request = self.client.list_object_versions().bucket(&self.bucket).prefix(&full);
            let request = request.set_key_marker(key_marker).set_version_id_marker(version_marker);
            let page = request.send().await.map_err(|error| call.failed(&error))?;
            let versions = page.versions().iter().map(|version| (version.key(), version.version_id()));
            let markers = page.delete_markers().iter().map(|marker| (marker.key(), marker.version_id()));
            let ours = versions.chain(markers).filter(|(name, _)| *name == Some(full.as_str()));
            ids.extend(ours.map(|(_, id)| id.unwrap_or("null").to_owned()));
            // Of the names with this prefix ours is the first, so a page that ends behind it holds all of it.
            key_marker = page.next_key_marker().map(str::to_owned);
            version_marker = page.next_version_id_marker().map(str::to_owned);
            if page.is_truncated() != Some(true) || key_marker.as_deref() != Some(full.as_str()) {
                return Ok(ids);
            }
        }
    }

    /// A lock and a missing permission are both `AccessDenied`; the words or the lock itself tell which.
    async fn refused_delete(&self, key: &str, version: &str, error: &SdkError<DeleteObjectError>) -> StoreError {
        let refused = self.call("delete", key).failed(error);
        if !matches!(refused, StoreError::Denied { .. }) {
            return refused;
        }
        let words = reply(error).map(|reply| reply.words().to_lowercase()).unwrap_or_default();
        let says_so = words.contains("object lock") || words.contains("worm");
        let locked = match self.lock_of(key, Some(version)).await {
            Ok(lock) => lock.map(|(_, until)| until).filter(|until| *until > self.clock.now()),
            Err(error) if says_so => {
                tracing::debug!(%error, "the server says that it is locked, and not until when");
                None
            }
            Err(StoreError::Denied { .. }) => return self.unexplained(key, &refused),
            Err(_) => None,
        };
        if says_so || locked.is_some() || self.has_hold(key, version).await.unwrap_or(false) {
            return StoreError::Retained { key: key.to_owned(), address: self.address.clone(), until: locked };
        }
        refused
    }

    /// Neither removed nor told why: with the other permission a lock could be told from a missing one.
    fn unexplained(&self, key: &str, refused: &StoreError) -> StoreError {
        let reason =
            format!("{refused}; and s3:GetObjectRetention is not allowed, which would tell whether it is locked");
        StoreError::Denied { operation: "delete", key: key.to_owned(), address: self.address.clone(), reason }
    }
}
