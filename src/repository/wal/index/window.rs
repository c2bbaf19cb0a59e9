//! Recoverable windows: runs that join without a hole.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::Lsn;
use crate::repository::wal::index::runs::Run;

/// A range of WAL without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Window {
    /// Position of its first byte.
    pub start: Lsn,
    /// Position after its last byte.
    pub end: Lsn,
    /// Start of its last complete record: what recovery aims at to reach the end.
    pub last_record: Option<Lsn>,
    /// End of that record.
    pub last_record_end: Option<Lsn>,
    /// Newest commit time that its last run is known to hold.
    pub last_commit: Option<DateTime<Utc>>,
    /// When its last frame was written.
    pub written_at: DateTime<Utc>,
}

/// Joins runs into windows. Where one run ends inside another, or exactly where another starts, there is no hole.
pub fn windows(runs: &[Run]) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for run in runs.iter().filter(|run| run.end() > run.start()) {
        let span = &run.last.span;
        let window = Window {
            start: run.start(),
            end: run.end(),
            last_record: span.last_record,
            last_record_end: span.last_record_end,
            last_commit: run.last_commit,
            written_at: run.last.written_at,
        };
        match windows.last_mut() {
            Some(open) if window.start <= open.end => open.absorb(window),
            _ => windows.push(window),
        }
    }
    windows
}

impl Window {
    fn absorb(&mut self, next: Self) {
        self.last_commit = self.last_commit.max(next.last_commit);
        if next.end > self.end {
            let last_record = next.last_record.or(self.last_record);
            let last_record_end = next.last_record_end.or(self.last_record_end);
            *self = Self { start: self.start, last_record, last_record_end, last_commit: self.last_commit, ..next };
        }
    }

    /// Whether the whole range `[from, to)` lies in it.
    pub fn covers(&self, from: Lsn, to: Lsn) -> bool {
        self.start <= from && to <= self.end
    }
}
