//! What a restore under way leaves in the directory, so that the next run knows whose it is.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::jobs::restore::MARKER;
use crate::model::{BackupId, SystemId};

/// Held while a restore works in the directory.
pub(super) const LOCK: &str = "drctl-restore.lock";
/// What [`MARKER`] says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Marker {
    pub(super) digest: String,
    pub(super) backup: BackupId,
    pub(super) tablespaces: Vec<PathBuf>,
    pub(super) started_at: DateTime<Utc>,
    /// Whose data directory this becomes: until then there is no control file that says so.
    #[serde(default)]
    pub(super) system_id: Option<SystemId>,
}

impl Marker {
    /// The one in `directory`.
    pub(super) fn read(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(directory.join(MARKER)).ok()?).ok()
    }
}

/// Whether `directory` holds an unfinished restore of this very plan.
pub(super) fn is_unfinished(directory: &Path, digest: &str) -> bool {
    Marker::read(directory).is_some_and(|marker| marker.digest == digest)
}
