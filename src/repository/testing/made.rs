//! What is backed up: made-up files, and the log and the need that go with them.

use std::collections::BTreeSet;

use crate::model::commit::WalNeed;
use crate::model::pages::{BATCH_PAGES, Batch, FileId, PAGE_SIZE, Piece};
use crate::model::{Branch, Lsn, SystemId, Timeline, WalSegmentSize};
use crate::repository::backup::writer::{BackupOptions, BackupWriter};
use crate::repository::pages::manifest::Line;
use crate::repository::pages::pack::OBJECT_LIMIT;
use crate::repository::wal::log::Log;

/// A file of a made-up source.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its path.
    pub path: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Made {
    /// A file of these bytes.
    pub fn new(path: &str, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), bytes }
    }
}

/// Some history file.
pub const HISTORY: &[u8] = b"1\t0/3000000\tno recovery target specified\n";

/// How the fixture's backups are written.
pub fn options() -> BackupOptions {
    BackupOptions {
        start_lsn: None,
        detection: None,
        proof: None,
        target: "ledger".parse().unwrap(),
        source: "postgres",
        method: "local".to_owned(),
        kind: None,
        level: 1,
        workers: 2,
        page_checksums: true,
        pack_size: OBJECT_LIMIT,
        state: None,
    }
}

/// The log of the fixture's epochs.
pub fn log() -> Log {
    Log {
        target: "ledger".parse().unwrap(),
        system_id: SystemId(7),
        timeline: Timeline::FIRST,
        branch: Branch::root(),
        wal_segment_size: WalSegmentSize::DEFAULT,
    }
}

/// A need for `[start, stop)` of the fixture's log.
pub fn need(start: u64, stop: u64) -> WalNeed {
    WalNeed {
        system_id: SystemId(7),
        timeline: Timeline::FIRST,
        branch: Branch::root(),
        start_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        wal_segment_size: WalSegmentSize::DEFAULT,
        server_version: 170_000,
    }
}

/// Hands made-up files to a backup as a source does: small files share batches, large ones send their own.
pub async fn send(writer: &mut BackupWriter, files: &[Made]) {
    let parents: BTreeSet<_> =
        files.iter().filter_map(|file| file.path.split_once('/')).map(|(first, _)| first).collect();
    for path in parents.into_iter().map(str::to_owned) {
        writer.line(&Line::Directory { path, mode: 0o700 }).await.unwrap();
    }
    let mut shared = Batch::default();
    for (number, file) in files.iter().enumerate() {
        let id = FileId(number as u32);
        writer.file(id, file.path.clone(), 0o600).unwrap();
        let mut data = file.bytes.clone();
        data.resize(data.len().next_multiple_of(PAGE_SIZE), 0);
        if data.len() >= 64 * PAGE_SIZE {
            for (at, pages) in data.chunks(BATCH_PAGES * PAGE_SIZE).enumerate() {
                let first_page = (at * BATCH_PAGES) as u32;
                let piece = Piece { file: id, first_page, pages: (pages.len() / PAGE_SIZE) as u32 };
                writer.batch(Batch { pieces: vec![piece], data: pages.to_vec(), ..Batch::default() }).await.unwrap();
            }
        } else if !data.is_empty() {
            if (shared.data.len() + data.len()) / PAGE_SIZE > BATCH_PAGES {
                let full = std::mem::take(&mut shared);
                writer.batch(full).await.unwrap();
            }
            shared.pieces.push(Piece { file: id, first_page: 0, pages: (data.len() / PAGE_SIZE) as u32 });
            shared.data.extend_from_slice(&data);
        }
        writer.file_done(id, file.bytes.len() as u64, Vec::new()).await.unwrap();
    }
    if !shared.data.is_empty() {
        writer.batch(shared).await.unwrap();
    }
}
