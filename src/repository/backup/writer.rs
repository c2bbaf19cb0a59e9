//! Writing one backup: intent, keyset, packs, manifest, inventory, and COMMIT last.
//!
//! Until COMMIT is in `write_quorum` regions there is no backup, whatever else was written; what a killed run leaves is
//! orphaned packs that `verify` lists and prune removes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::keys::keyset::Keyset;
use crate::model::commit::BackupKind;
use crate::model::pages::{Batch, FileId, Piece};
use crate::model::{BackupId, Error, HolderId, KeysetId, Lsn, RepositoryId, Result, ResultExt, TargetName};
use crate::repository::backup::compare::{Proof, Tally};
use crate::repository::backup::packer::{Placed, Work};
use crate::repository::backup::parent::Basis;
use crate::repository::backup::repack::Moved;
use crate::repository::backup::state::Keeper;
use crate::repository::backup::tree::{CompleteFile, FileRun, Tree};
use crate::repository::backup::uploads::put_object;
use crate::repository::handle::{Repository, Writer};
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::pages::manifest::{ChunkUse, Line, ManifestSeal, ManifestWriter, PartsSummary};
use crate::repository::regions::fan_out::FanOut;
use crate::repository::sweeps;
use crate::repository::wrap_debts::WrapDebts;

mod beginning;
mod committing;

pub use committing::{PageCounts, Written};

/// How a backup is written.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// What is backed up.
    pub target: TargetName,
    /// The kind of the target, for COMMIT.
    pub source: &'static str,
    /// How it is read, for COMMIT.
    pub method: String,
    /// Its kind, where that is not a matter of whether it has a parent.
    pub kind: Option<BackupKind>,
    /// zstd level of pages.
    pub level: i32,
    /// Worker threads.
    pub workers: usize,
    /// Whether the source's pages carry checksums.
    pub page_checksums: bool,
    /// Bytes that a pack stays within.
    pub pack_size: usize,
    /// Where replay of it begins, of a cluster.
    pub start_lsn: Option<Lsn>,
    /// How it finds the pages that changed, for COMMIT.
    pub detection: Option<String>,
    /// How claims of its source are proved, if they are.
    pub proof: Option<Proof>,
    /// Where its pages are remembered for the next backup; `None` to forget them.
    pub state: Option<PathBuf>,
}

/// A backup that is being written.
#[derive(Debug)]
pub struct BackupWriter {
    id: BackupId,
    started_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
    repository: Repository,
    writer: Writer,
    options: BackupOptions,
    out: Arc<FanOut>,
    keyset: Arc<Keyset>,
    wrap_debts: Vec<(HolderId, String)>,
    owed_wraps: WrapDebts,
    inventory: Vec<InventoryLine>,
    manifest: ManifestWriter,
    manifest_parts: PartsSummary,
    tree: Tree,
    basis: Basis,
    sources: Vec<(BackupId, KeysetId)>,
    source_numbers: HashMap<BackupId, u16>,
    keeper: Arc<Keeper>,
    tally: Arc<Mutex<Tally>>,
    batches: Option<mpsc::Sender<Work>>,
    placed: mpsc::UnboundedReceiver<Placed>,
    uploads: JoinHandle<Result<Vec<InventoryLine>>>,
    damaged_pages: u64,
    moved: Moved,
}

impl BackupWriter {
    /// What is in it is the state of an earlier moment: COMMIT promises no later one.
    pub fn holds_only(&mut self, moment: DateTime<Utc>) {
        self.started_at = self.started_at.min(moment);
    }

    /// The backup's id.
    pub const fn id(&self) -> &BackupId {
        &self.id
    }

    /// Adds a line to the manifest.
    ///
    /// # Errors
    /// A part that became full did not reach the quorum.
    pub async fn line(&mut self, line: &Line) -> Result<()> {
        let part = self.manifest.add(line, &manifest_seal(&self.repository.id, &self.keyset, &self.id))?;
        match part {
            Some(part) => self.put_manifest_part(part).await,
            None => Ok(()),
        }
    }

    /// A file begins.
    ///
    /// # Errors
    /// The source contradicts itself.
    pub fn file(&mut self, id: FileId, path: String, mode: u32) -> Result<()> {
        self.tree.begin(id, path, mode)
    }

    /// A file was dropped by PostgreSQL before it could be read; replay drops it as well.
    pub fn vanished(&mut self, id: FileId) {
        self.tree.forget(id);
    }

    /// Pages; waits while the workers are busy.
    ///
    /// # Errors
    /// Packing or uploading failed.
    pub async fn batch(&mut self, batch: Batch) -> Result<()> {
        let known = batch.pieces.iter().map(|piece| {
            let path = self.tree.path(piece.file)?;
            self.basis.parent()?.pages.file(path)
        });
        let known = known.collect();
        let path = |piece: &Piece| self.tree.path(piece.file).unwrap_or_default().to_owned();
        let paths = if batch.claims.read { batch.pieces.iter().map(path).collect() } else { Vec::new() };
        let work = Work { known, paths, batch };
        let sent = match &self.batches {
            Some(batches) => batches.send(work).await.is_ok(),
            None => false,
        };
        if !sent {
            return Err(self.upload_error().await);
        }
        while let Ok(placed) = self.placed.try_recv() {
            self.place(&placed).await?;
        }
        Ok(())
    }

    /// A file was read to its end.
    ///
    /// # Errors
    /// The source contradicts itself, or a manifest part did not reach the quorum.
    pub async fn file_done(&mut self, id: FileId, size: u64, damaged: Vec<u32>) -> Result<()> {
        self.damaged_pages += damaged.len() as u64;
        let complete = self.tree.done(id, size, damaged)?;
        self.complete(complete).await
    }

    /// Waits until every page is durable at quorum.
    ///
    /// # Errors
    /// Packing or uploading failed, or a file is incomplete.
    pub async fn flush(&mut self) -> Result<()> {
        self.batches = None;
        while let Some(placed) = self.placed.recv().await {
            self.place(&placed).await?;
        }
        let packs =
            (&mut self.uploads).await.map_err(|error| Error::failed("the upload task died").because(error))??;
        self.inventory.extend(packs);
        std::mem::take(&mut self.tree).finish()?;
        // The secret is forgotten with this process: a holder that was away at the start gets its last chance.
        self.inventory.extend(self.owed_wraps.settle(&self.out).await);
        self.wrap_debts.retain(|(holder, _)| self.owed_wraps.holders().any(|owing| owing == holder));
        Ok(())
    }

    async fn place(&mut self, placed: &Placed) -> Result<()> {
        let complete = self.tree.placed(placed)?;
        self.complete(complete).await
    }

    async fn complete(&mut self, files: impl IntoIterator<Item = CompleteFile>) -> Result<()> {
        for CompleteFile { mut line, runs } in files {
            let number = |backup: &BackupId| {
                let unknown = || Error::failed(format!("{backup} is not among the sources of {}", self.id));
                self.source_numbers.get(backup).copied().ok_or_else(unknown)
            };
            let chunk_use = |run: &FileRun| ChunkUse::new(&run.chunk, number, (run.first_entry, run.pages));
            line.chunks = runs.iter().map(chunk_use).collect::<Result<_>>()?;
            let damaged = !line.damaged_blocks.is_empty();
            self.keeper.file(
                &line.path,
                (line.size, damaged),
                runs.iter().map(|run| (run.kept, run.first_entry, run.pages)).collect(),
            );
            self.line(&Line::File(line)).await?;
        }
        Ok(())
    }

    async fn put_manifest_part(&mut self, (part, bytes): (u32, Vec<u8>)) -> Result<()> {
        let key = layout::manifest(&self.options.target, &self.id, part);
        let line = put_object(&self.out, key, bytes).await?;
        self.manifest_parts.add(line.size, line.digest());
        self.inventory.push(line);
        Ok(())
    }

    async fn upload_error(&mut self) -> Error {
        match (&mut self.uploads).await {
            Ok(Err(error)) => error,
            _ => Error::failed("the workers stopped"),
        }
    }
}

/// The intent is announced: a sweep that has not begun yet will see it, and one that has is seen here.
async fn refuse_if_pruned(repository: &Repository, basis: &Basis, now: DateTime<Utc>) -> Result<()> {
    let Some(parent) = basis.parent() else { return Ok(()) };
    let checked = sweeps::refuse_if_condemned(repository, &parent.commit.id, now).await;
    checked.during(|| format!("share pages with {}", parent.commit.id))
}

fn manifest_seal<'a>(repository: &'a RepositoryId, keyset: &'a Keyset, backup: &'a BackupId) -> ManifestSeal<'a> {
    ManifestSeal { repository, keyset: keyset.id(), backup, key: keyset.meta() }
}
