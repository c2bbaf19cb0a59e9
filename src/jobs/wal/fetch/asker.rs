//! Who asks for WAL: a cluster, and the timelines that it knows as its own. And what it may be told.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use crate::model::{Branch, Error, Result, SystemId, Timeline, WalSegmentSize};
use crate::pg::control::ControlFile;
use crate::repository::wal::log::branch_of;

/// The cluster that asks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asker {
    /// Which it is.
    pub system_id: SystemId,
    /// Bytes per segment.
    pub segment_size: u64,
    /// The timelines whose history files it has: they decide between two of one number.
    pub own: BTreeMap<Timeline, Branch>,
}

impl Asker {
    /// The cluster of a data directory; `None` if that says nothing.
    ///
    /// # Errors
    /// Its control file is damaged.
    pub fn of(data_dir: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(data_dir.join("global/pg_control")) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::failed("whose WAL is asked for: pg_control").because(error)),
        };
        let control = ControlFile::parse(&bytes).map_err(|error| Error::damaged("pg_control").because(error))?;
        let segment_size = control.wal_segment_size.bytes();
        Ok(Some(Self { system_id: control.system_id, segment_size, own: own_histories(data_dir) }))
    }

    pub(super) fn size(&self) -> Result<WalSegmentSize> {
        WalSegmentSize::try_from(self.segment_size)
    }
}

/// The branches of the history files in a data directory.
pub(super) fn own_histories(data_dir: &Path) -> BTreeMap<Timeline, Branch> {
    let Ok(entries) = std::fs::read_dir(data_dir.join("pg_wal")) else { return BTreeMap::new() };
    let history = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        let timeline = history_of(path.file_name()?.to_str()?)?;
        Some((timeline, branch_of(&std::fs::read(path).ok()?)))
    };
    entries.filter_map(history).collect()
}

/// The timeline of a history file, by its name.
pub(super) fn history_of(file: &str) -> Option<Timeline> {
    let number = file.strip_suffix(".history").filter(|number| number.len() == 8)?;
    u32::from_str_radix(number, 16).ok().map(Timeline)
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// It is there, whole and durable.
    Copied,
    /// No region has it, and all that may have it were asked.
    Absent,
}
