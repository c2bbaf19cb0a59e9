//! What is handed over, and what may become of it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tempfile::SpooledTempFile;

use crate::jobs::wal::position::Position;
use crate::model::SystemId;

/// What became of a file that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Receipt {
    /// It is stored now.
    Stored,
    /// The same bytes were stored before.
    Known,
    /// Recovery needs nothing of it.
    NotNeeded,
}

/// A file, as `archive_command` handed it over.
#[derive(Debug)]
pub(in crate::jobs::wal) struct Handed {
    /// PostgreSQL's name for it.
    pub(in crate::jobs::wal) name: String,
    /// Its bytes.
    pub(in crate::jobs::wal) file: SpooledTempFile,
    /// How many.
    pub(in crate::jobs::wal) length: u64,
    /// The cluster whose directory it came from, as far as whoever sent it could see.
    pub(in crate::jobs::wal) system_id: Option<SystemId>,
}

/// Where streaming stands, if the target is streamed.
#[derive(Clone)]
pub(in crate::jobs::wal) struct Streamed(pub(in crate::jobs::wal) Arc<dyn Fn() -> Position + Send + Sync>);

impl std::fmt::Debug for Streamed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streamed")
    }
}
