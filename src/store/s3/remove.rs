//! Deleting for good: where versions are kept, a plain delete only hides an object.

use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::delete_object::DeleteObjectError;

use super::S3Store;
use super::error::reply;
use super::read::time;
use crate::store::StoreError;

impl S3Store {
    pub(super) async fn delete_versions(&self, key: &str) -> Result<(), StoreError> {
        let versions = self.versions_of(key).await?;
        if versions.is_empty() {
            return Err(StoreError::NotFound { key: key.to_owned(), address: self.address.clone() });
        }
        for version in versions {
            let request = self.client.delete_object().bucket(&self.bucket).key(self.full(key)).version_id(&version);
            if let Err(error) = request.send().await {
                return Err(self.refused_delete(key, &version, &error).await);
            }
        }
        Ok(())
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
        let locked = words.contains("object lock") || words.contains("worm") || self.is_locked(key, version).await;
        if locked { StoreError::Retained { key: key.to_owned(), address: self.address.clone() } } else { refused }
    }

    async fn is_locked(&self, key: &str, version: &str) -> bool {
        let request = self.client.head_object().bucket(&self.bucket).key(self.full(key)).version_id(version);
        let Ok(head) = request.send().await else { return false };
        let held = head.object_lock_legal_hold_status().is_some_and(|status| status.as_str() == "ON");
        held || head.object_lock_retain_until_date().and_then(time).is_some_and(|until| until > self.clock.now())
    }
}
