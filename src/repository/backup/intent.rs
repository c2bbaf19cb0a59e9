//! The word that a backup is under way, so that nothing that it needs is taken away meanwhile.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{BackupId, RepositoryId};

/// An intent holds for a week: longer than any backup that is still alive.
pub const INTENT_DAYS: i64 = 7;

/// A backup under way, so that prune leaves its objects and its parent alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// Version of the repository format.
    pub format: u32,
    /// The backup.
    pub backup: BackupId,
    /// The backup whose pages it may refer to.
    pub parent: Option<BackupId>,
    /// Further ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<BackupId>,
    /// The writer's clock.
    pub created_at: DateTime<Utc>,
    /// After this the backup is given up: it must not commit, and prune may take its objects.
    pub expires_at: DateTime<Utc>,
}

impl Intent {
    /// The backups that must stay while this one is under way.
    pub fn leans_on(&self) -> impl Iterator<Item = &BackupId> {
        self.parent.iter().chain(&self.also)
    }
}

/// What an intent's signature is bound to.
pub fn intent_context(repository: &RepositoryId, id: &BackupId) -> String {
    format!("intent {repository} {id}")
}
