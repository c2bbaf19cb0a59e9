//! Writing one backup: intent, keyset, packs, manifest, inventory, and COMMIT last.
//!
//! Until COMMIT is in `write_quorum` regions there is no backup, whatever else was written; what a killed run leaves is
//! orphaned packs that `verify` lists and prune removes.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::codec::fingerprint::PageFingerprinter;
use crate::keys::keyset::Keyset;
use crate::model::commit::{BackupKind, Commit, Provenance, WalNeed};
use crate::model::pages::{Batch, FileId, PAGE_SIZE, Piece};
use crate::model::{BackupId, Error, HolderId, KeysetId, Lsn, RepositoryId, Result, ResultExt, TargetName};
use crate::repository::FORMAT;
use crate::repository::backup::compare::{Missed, Proof, Tally};
use crate::repository::backup::packer::{PackSettings, Packer, Placed, Work};
use crate::repository::backup::parent::{Basis, Parent};
use crate::repository::backup::repack::{Moved, Repacked, repack};
use crate::repository::backup::state::{Keeper, Kept, StateHead};
use crate::repository::backup::tree::{CompleteFile, FileRun, Tree};
use crate::repository::backup::uploads::{put_object, put_signed, spawn_uploads};
use crate::repository::catalog::commit_context;
use crate::repository::handle::{Repository, Writer};
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::keysets;
use crate::repository::layout;
use crate::repository::locks::{self, extend::Extended};
use crate::repository::pages::manifest::{self, ChunkUse, Line, ManifestSeal, ManifestWriter, PartsSummary};
use crate::repository::pages::pack::FrameSeal;
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::sweeps;
use crate::repository::wrap_debts::WrapDebts;

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

/// An intent holds for a week: longer than any backup that is still alive.
pub const INTENT_DAYS: i64 = 7;

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

/// A backup that exists.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// Its COMMIT.
    pub commit: Commit,
    /// What each region owes.
    pub regions: Vec<LaneOutcome>,
    /// Key holders that could not wrap the keyset.
    pub wrap_debts: Vec<(HolderId, String)>,
    /// What it shares with earlier ones, locked anew in each region that locks.
    pub locks: Vec<Extended>,
    /// Why it shares no pages with an earlier one; `None` if it does.
    pub full_because: Option<String>,
    /// What was looked at.
    pub pages: PageCounts,
    /// What was taken along from packs that were mostly dead.
    pub moved: Moved,
    /// Why the next backup will not find its pages remembered.
    pub not_remembered: Option<String>,
}

/// Pages of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PageCounts {
    /// Read from the source.
    pub read: u64,
    /// Not the same as in the parent, at the same place; all of them in a full backup.
    pub changed: u64,
    /// Not read: change detection says that they are the parent's.
    pub unread: u64,
    /// What it did not see, if that was to be proved; told with the detection.
    #[serde(skip)]
    pub missed: Missed,
}

impl BackupWriter {
    /// Announces the backup and makes its keyset.
    ///
    /// # Errors
    /// Intent or keyset did not reach the quorum; too few key holders answered.
    pub async fn begin(repository: &Repository, writer: &Writer, options: BackupOptions, basis: Basis) -> Result<Self> {
        let started_at = writer.clock.now();
        let out = Arc::new(FanOut::new(&repository.regions, Patience::BACKUP).locked_since(started_at));
        let id = BackupId::new(&options.target, started_at, writer.rng.as_ref())?;
        repository.enroll(writer, &out).await.during(|| "enrol the signer")?;
        let expires_at = started_at + TimeDelta::days(INTENT_DAYS);
        let parent = basis.parent().map(|parent| parent.commit.id.clone());
        let also = Vec::new();
        let intent = Intent { format: FORMAT, backup: id.clone(), parent, also, created_at: started_at, expires_at };
        put_signed(&out, writer, layout::intent(&id), &intent_context(&repository.id, &id), &intent).await?;
        refuse_if_pruned(repository, &basis, started_at).await?;
        let stored =
            keysets::create(&repository.id, &options.target, &writer.holders, writer.rng.as_ref(), &out).await?;
        // One secret for a generation: under another one no page would look the same.
        let fingerprints = match basis.parent() {
            Some(parent) => parent.pages.fingerprints(),
            None => Arc::new(PageFingerprinter::generate(writer.rng.as_ref())?),
        };
        let repacked = match basis.parent() {
            Some(parent) => {
                let from = (&parent.pages, options.pack_size);
                repack(repository, &out, (&options.target, &id), from).await.during(|| "repack")?
            }
            None => Repacked::default(),
        };
        let seal =
            FrameSeal { repository: repository.id.clone(), keyset: stored.keyset.id().clone(), backup: id.clone() };
        let head = StateHead {
            format: FORMAT,
            repository: repository.id.clone(),
            backup: id.clone(),
            fingerprint_secret: hex::encode(fingerprints.secret()),
            start_lsn: options.start_lsn,
            generation: Some(basis.parent().map_or(started_at, Parent::generation)),
            page_checksums: Some(options.page_checksums),
        };
        let settings = PackSettings {
            seal,
            keyset: Arc::clone(&stored.keyset),
            fingerprints: Arc::clone(&fingerprints),
            level: options.level,
            pack_size: options.pack_size,
            parent: basis.parent().map(|parent| Arc::clone(&parent.pages)),
            keeper: Arc::new(Keeper::begin(options.state.as_deref(), &head)),
            proof: options.proof,
            first_pack: u32::try_from(repacked.lines.len()).unwrap_or(u32::MAX),
        };
        let sources = sources(&id, stored.keyset.id(), basis.parent());
        let Packer { batches, packs, placed, tally } = Packer::start(&settings, options.workers);
        let uploads = spawn_uploads(Arc::clone(&out), options.target.clone(), packs);
        let mut backup = Self {
            id,
            started_at,
            expires_at,
            repository: repository.clone(),
            writer: writer.clone(),
            out,
            owed_wraps: WrapDebts::new(&writer.holders, &stored, &writer.clock),
            keyset: stored.keyset,
            wrap_debts: stored.missing,
            inventory: stored.wraps.into_iter().chain(repacked.lines).collect(),
            moved: repacked.moved,
            manifest: ManifestWriter::default(),
            manifest_parts: PartsSummary::default(),
            tree: Tree::default(),
            basis,
            source_numbers: (0..).zip(&sources).map(|(number, (id, _))| (id.clone(), number)).collect(),
            sources,
            keeper: settings.keeper,
            tally,
            batches: Some(batches),
            placed,
            uploads,
            damaged_pages: 0,
            options,
        };
        let begin = backup.begin_line(&fingerprints);
        backup.line(&begin).await?;
        Ok(backup)
    }

    /// What is in it is the state of an earlier moment: COMMIT promises no later one.
    pub fn holds_only(&mut self, moment: DateTime<Utc>) {
        self.started_at = self.started_at.min(moment);
    }

    /// The backup's id.
    pub const fn id(&self) -> &BackupId {
        &self.id
    }

    fn begin_line(&self, fingerprints: &PageFingerprinter) -> Line {
        Line::Begin(manifest::Begin {
            format: FORMAT,
            backup: self.id.clone(),
            page_size: u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX),
            fingerprint_secret: hex::encode(fingerprints.secret()),
            page_checksums: self.options.page_checksums,
            sources: self.sources.clone(),
        })
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

    /// Writes the rest of the manifest, the inventory and COMMIT. Call [`flush`](Self::flush) first.
    ///
    /// # Errors
    /// Something did not reach the quorum, or the intent has expired.
    pub async fn commit(mut self, wal: Option<WalNeed>) -> Result<Written> {
        let seal = manifest_seal(&self.repository.id, &self.keyset, &self.id);
        let (parts, size_bytes) = std::mem::take(&mut self.manifest).finish(&seal)?;
        for part in parts {
            self.put_manifest_part(part).await?;
        }
        let own_bytes: u64 = self.inventory.iter().map(|line| line.size).sum();
        let carried = self.carried()?;
        let closure = self.inventory.iter().chain(&carried).filter(|line| !line.key.starts_with("manifests/"));
        let (kept, not_remembered) = self.keeper.finish(closure);
        let cluster = (&self.options.target, wal.as_ref().map(|need| need.system_id));
        // Before COMMIT: what a backup needs is never locked shorter than the backup itself, wherever this process dies.
        let locks = locks::extend::extend(&self.repository, cluster, (&carried, self.started_at)).await;
        self.inventory.extend(carried);
        let inventory = self.put_inventory().await?;
        let now = self.writer.clock.now();
        if now >= self.expires_at {
            let text = format!("backup {} took longer than its intent allows", self.id);
            return Err(Error::failed(text).hint("its objects may be pruned already: take a new backup"));
        }
        refuse_if_pruned(&self.repository, &self.basis, now).await?;
        let parent = self.basis.parent().map(|parent| parent.commit.id.clone());
        let commit = Commit {
            format: FORMAT,
            repository: self.repository.id.clone(),
            id: self.id.clone(),
            target: self.options.target.clone(),
            source: self.options.source.to_owned(),
            kind: self.options.kind.unwrap_or(match parent {
                Some(_) => BackupKind::Incremental,
                None => BackupKind::Full,
            }),
            parent,
            started_at: self.started_at,
            finished_at: now,
            size_bytes,
            stored_bytes: own_bytes + inventory.bytes,
            damaged_pages: self.damaged_pages,
            keyset: self.keyset.id().clone(),
            wal,
            manifest: self.manifest_parts.finish(),
            inventory,
            page_map: kept.as_ref().map(|kept| kept.digest),
            quorum: u8::try_from(self.out.quorum()).unwrap_or(u8::MAX),
            provenance: self.provenance(),
            copy: None,
        };
        let key = layout::commit(&self.options.target, &self.id);
        put_signed(&self.out, &self.writer, key, &commit_context(&self.repository.id, &self.id), &commit).await?;
        // From here on the backup exists; a state that does not get into its place costs the next one a full.
        let placed = kept.map_or(Ok(()), Kept::place).map_err(|error| error.to_string());
        let pages = self.counts();
        let out = Arc::into_inner(self.out).ok_or_else(|| Error::failed("an upload is still running"))?;
        let mut regions = out.drain().await;
        if let Some(parent) = self.basis.parent() {
            for lane in &mut regions {
                let missing = parent.missing_in(&lane.region, &self.inventory);
                lane.missing_objects += missing;
                if missing > 0 {
                    let why = || format!("it lacks objects of {}, whose pages are shared", parent.commit.id);
                    lane.last_error.get_or_insert_with(why);
                }
            }
        }
        Ok(Written {
            commit,
            regions,
            wrap_debts: self.wrap_debts,
            full_because: self.basis.full_because().map(str::to_owned),
            pages,
            moved: self.moved,
            locks,
            not_remembered: not_remembered.or(placed.err()),
        })
    }

    fn counts(&self) -> PageCounts {
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        PageCounts { read: tally.read, changed: tally.changed, unread: tally.unread, missed: tally.missed.clone() }
    }

    /// The objects of earlier backups without which this one cannot be read: packs that it refers to, and the wraps of
    /// the keysets that open them.
    fn carried(&self) -> Result<Vec<InventoryLine>> {
        let Some(parent) = self.basis.parent() else { return Ok(Vec::new()) };
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let target = &self.options.target;
        let earlier = tally.packs.iter().filter(|pack| pack.backup != self.id);
        let packs = earlier.map(|pack| layout::pack(target, &pack.backup, pack.ordinal));
        let packs: BTreeSet<_> = packs.collect();
        let keysets: Vec<_> = tally.keysets.iter().map(|keyset| layout::keyset(target, keyset)).collect();
        let wanted = |line: &&InventoryLine| {
            packs.contains(&line.key) || keysets.iter().any(|keyset| line.key.starts_with(keyset))
        };
        let lines: Vec<_> = parent.pages.objects().iter().filter(wanted).cloned().collect();
        let keys: BTreeSet<_> = lines.iter().map(|line| line.key.as_str()).collect();
        let wrapped = |keyset: &String| keys.range(keyset.as_str()..).next().is_some_and(|key| key.starts_with(keyset));
        if packs.iter().all(|pack| keys.contains(pack.as_str())) && keysets.iter().all(wrapped) {
            return Ok(lines);
        }
        let text = format!("the closure of {} lacks what its pages are in", parent.commit.id);
        Err(Error::failed(text).hint("take a full backup: drctl backup --full"))
    }

    fn provenance(&self) -> Provenance {
        let drctl = env!("CARGO_PKG_VERSION").to_owned();
        let (method, detection) = (self.options.method.clone(), self.options.detection.clone());
        Provenance { host: self.writer.host.clone(), drctl, method, detection }
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

    async fn put_inventory(&self) -> Result<crate::model::commit::Parts> {
        let mut summary = PartsSummary::default();
        let parts = inventory::encode(&self.inventory, &self.repository.id, &self.id, &self.writer.signer)?;
        for (part, bytes) in parts.into_iter().enumerate() {
            let part = u32::try_from(part).unwrap_or(u32::MAX);
            let line = put_object(&self.out, layout::inventory(&self.options.target, &self.id, part), bytes).await?;
            summary.add(line.size, line.digest());
        }
        Ok(summary.finish())
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

/// The backups whose map chunks this one may use, itself first. They must be known before the first page is read, since
/// the manifest begins with them: every source of the parent.
fn sources(id: &BackupId, keyset: &KeysetId, parent: Option<&Parent>) -> Vec<(BackupId, KeysetId)> {
    let earlier = parent.into_iter().flat_map(|parent| parent.pages.sources());
    let earlier = earlier.map(|(backup, keyset)| (backup.clone(), keyset.clone()));
    [(id.clone(), keyset.clone())].into_iter().chain(earlier).collect()
}

fn manifest_seal<'a>(repository: &'a RepositoryId, keyset: &'a Keyset, backup: &'a BackupId) -> ManifestSeal<'a> {
    ManifestSeal { repository, keyset: keyset.id(), backup, key: keyset.meta() }
}

/// What an intent's signature is bound to.
pub fn intent_context(repository: &RepositoryId, id: &BackupId) -> String {
    format!("intent {repository} {id}")
}
