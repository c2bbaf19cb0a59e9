//! A directory that is filled, and looks unfinished until it is not.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::disk::{DiskError, empty, place};
use crate::jobs::restore::MARKER;
use crate::model::{BackupId, Error, Result};

/// What [`MARKER`] says here.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Marker {
    digest: String,
    backup: BackupId,
    started_at: DateTime<Utc>,
}

/// Why a directory cannot be taken; `None` if it can.
pub(super) fn occupied(directory: &Path, digest: &str) -> Result<Option<String>, DiskError> {
    Ok(match empty::contents(directory)? {
        empty::Contents::Missing | empty::Contents::Empty => None,
        empty::Contents::Occupied(_) if is_unfinished(directory, digest) => None,
        empty::Contents::Occupied(example) => Some(example),
    })
}

/// Whether it holds an unfinished run of this very plan.
pub(super) fn is_unfinished(directory: &Path, digest: &str) -> bool {
    let marker = std::fs::read(directory.join(MARKER)).ok();
    let marker: Option<Marker> = marker.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    marker.is_some_and(|marker| marker.digest == digest)
}

/// A directory that belongs to this run.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) directory: PathBuf,
}

impl Site {
    /// Takes it: empty, or left by a run of the same plan, which is wiped.
    pub(super) fn take(directory: &Path, (digest, backup): (&str, &BackupId), now: DateTime<Utc>) -> Result<Self> {
        if let Some(example) = occupied(directory, digest)? {
            return Err(DiskError::NotEmpty { path: directory.to_owned(), example }.into());
        }
        if is_unfinished(directory, digest) {
            wipe(directory)?;
        }
        // A directory that exists keeps its own mode.
        if !directory.is_dir() {
            empty::create_empty(directory)?;
        }
        let marker = Marker { digest: digest.to_owned(), backup: backup.clone(), started_at: now };
        let marker =
            serde_json::to_vec_pretty(&marker).map_err(|error| Error::failed("encode the marker").because(error))?;
        place::place(&directory.join(MARKER), &marker, 0o600)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Everything is there, durably.
    pub(super) fn release(self) -> Result<()> {
        place::sync_filesystem(&self.directory)?;
        let path = self.directory.join(MARKER);
        std::fs::remove_file(&path).map_err(|error| DiskError::new("remove", &path, error))?;
        Ok(place::sync_dir(&self.directory)?)
    }
}

fn wipe(directory: &Path) -> Result<(), DiskError> {
    let io = |error| DiskError::new("read directory", directory, error);
    for entry in std::fs::read_dir(directory).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.ends_with(MARKER) {
            continue;
        }
        // Links are removed, never followed.
        let is_dir = std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir());
        let removed = if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(|error| DiskError::new("remove", &path, error))?;
    }
    Ok(())
}
