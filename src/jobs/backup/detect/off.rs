//! The note that keeps change detection switched off after it was proved wrong, until somebody removes it.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::disk::place;
use crate::model::TargetName;
use crate::repository::backup::compare::Missed;

/// Why it is off.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reason {
    /// The backup that found it out.
    backup: String,
    /// How many pages were missed.
    pages: u64,
    /// The first of them.
    examples: Vec<String>,
    /// When.
    at: DateTime<Utc>,
}

impl Reason {
    pub(super) fn new(backup: &str, missed: &Missed, at: DateTime<Utc>) -> Self {
        Self { backup: backup.to_owned(), pages: missed.pages, examples: missed.examples.clone(), at }
    }
}

fn path(state_dir: &Path, target: &TargetName) -> PathBuf {
    state_dir.join(format!("{target}.detection-off"))
}

/// Switches it off. If that fails, the error of the backup says enough.
pub(super) fn switch_off(state_dir: &Path, target: &TargetName, reason: &Reason) {
    let path = path(state_dir, target);
    let text = serde_json::to_vec_pretty(reason).unwrap_or_default();
    if let Err(error) = place::place(&path, &text, 0o600) {
        tracing::error!(%error, "change detection is not switched off: set detection = \"read\"");
    }
}

/// Why it is off, if it is. A note that cannot be read is one all the same.
pub(super) fn reason(state_dir: &Path, target: &TargetName) -> Option<String> {
    let path = path(state_dir, target);
    if matches!(path.try_exists(), Ok(false)) {
        return None;
    }
    let read = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Reason>(&text).ok());
    let why =
        read.map_or_else(String::new, |Reason { backup, pages, .. }| format!(": {backup} found {pages} missed pages"));
    Some(format!("change detection is switched off{why}; once that is understood, remove {}", path.display()))
}
