//! What a restore under way leaves in the directory, so that the next run knows whose it is.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::disk::{DiskError, empty};
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

/// Whether nothing but a lock that a killed run left is in a directory.
pub(super) fn is_free(directory: &Path) -> Result<bool, DiskError> {
    Ok(match empty::contents(directory)? {
        empty::Contents::Missing | empty::Contents::Empty => true,
        empty::Contents::Occupied(_) => entries(directory)?.iter().all(|path| path.ends_with(LOCK)),
    })
}

/// What is in a directory.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, DiskError> {
    let io = |error| DiskError::new("read directory", directory, error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io)? {
        paths.push(entry.map_err(io)?.path());
    }
    Ok(paths)
}
