//! Before the first page: the intent, the keyset, what the pages are compared with, and the workers.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use super::{BackupOptions, BackupWriter, refuse_if_pruned};
use crate::codec::fingerprint::PageFingerprinter;
use crate::model::pages::PAGE_SIZE;
use crate::model::{BackupId, KeysetId, Result, ResultExt};
use crate::repository::FORMAT;
use crate::repository::backup::intent::{INTENT_DAYS, Intent, intent_context};
use crate::repository::backup::packer::{PackSettings, Packer};
use crate::repository::backup::parent::{Basis, Parent};
use crate::repository::backup::repack::{Repacked, repack};
use crate::repository::backup::state::{Keeper, StateHead};
use crate::repository::backup::tree::Tree;
use crate::repository::backup::uploads::{put_signed, spawn_uploads};
use crate::repository::handle::{Repository, Writer};
use crate::repository::keysets;
use crate::repository::layout;
use crate::repository::pages::manifest::{self, Line, ManifestWriter, PartsSummary};
use crate::repository::pages::pack::FrameSeal;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::wrap_debts::WrapDebts;

/// A backup that is announced.
struct Announced {
    id: BackupId,
    started_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
    out: Arc<FanOut>,
}

impl BackupWriter {
    /// Announces the backup and makes its keyset.
    ///
    /// # Errors
    /// Intent or keyset did not reach the quorum; too few key holders answered.
    pub async fn begin(repository: &Repository, writer: &Writer, options: BackupOptions, basis: Basis) -> Result<Self> {
        let announced = announce(repository, writer, &options, &basis).await?;
        let Announced { id, started_at, expires_at, out } = announced;
        let stored =
            keysets::create(&repository.id, &options.target, &writer.holders, writer.rng.as_ref(), &out).await?;
        let fingerprints = fingerprints(&basis, writer)?;
        let repacked = take_along(repository, &out, (&options, &id), &basis).await?;
        let head = state_head(repository, (&id, started_at), (&options, &basis), &fingerprints);
        let keeper = Arc::new(Keeper::begin(options.state.as_deref(), &head));
        let settings = PackSettings {
            seal: FrameSeal {
                repository: repository.id.clone(),
                keyset: stored.keyset.id().clone(),
                backup: id.clone(),
            },
            keyset: Arc::clone(&stored.keyset),
            fingerprints: Arc::clone(&fingerprints),
            level: options.level,
            pack_size: options.pack_size,
            parent: basis.parent().map(|parent| Arc::clone(&parent.pages)),
            keeper: Arc::clone(&keeper),
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
            keeper,
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
}

/// From here on prune leaves alone what the backup writes and what it leans on.
async fn announce(
    repository: &Repository,
    writer: &Writer,
    options: &BackupOptions,
    basis: &Basis,
) -> Result<Announced> {
    let started_at = writer.clock.now();
    let out = Arc::new(FanOut::new(&repository.regions, Patience::BACKUP).locked_since(started_at));
    let id = BackupId::new(&options.target, started_at, writer.rng.as_ref())?;
    repository.enroll(writer, &out).await.during(|| "enrol the signer")?;
    let expires_at = started_at + TimeDelta::days(INTENT_DAYS);
    let parent = basis.parent().map(|parent| parent.commit.id.clone());
    let also = Vec::new();
    let intent = Intent { format: FORMAT, backup: id.clone(), parent, also, created_at: started_at, expires_at };
    put_signed(&out, writer, layout::intent(&id), &intent_context(&repository.id, &id), &intent).await?;
    refuse_if_pruned(repository, basis, started_at).await?;
    Ok(Announced { id, started_at, expires_at, out })
}

/// One secret for a generation: under another one no page would look the same.
fn fingerprints(basis: &Basis, writer: &Writer) -> Result<Arc<PageFingerprinter>> {
    Ok(match basis.parent() {
        Some(parent) => parent.pages.fingerprints(),
        None => Arc::new(PageFingerprinter::generate(writer.rng.as_ref())?),
    })
}

async fn take_along(
    repository: &Repository,
    out: &FanOut,
    (options, id): (&BackupOptions, &BackupId),
    basis: &Basis,
) -> Result<Repacked> {
    let Some(parent) = basis.parent() else { return Ok(Repacked::default()) };
    let from = (&parent.pages, options.pack_size);
    repack(repository, out, (&options.target, id), from).await.during(|| "repack")
}

/// What the pages are remembered under.
fn state_head(
    repository: &Repository,
    (id, started_at): (&BackupId, DateTime<Utc>),
    (options, basis): (&BackupOptions, &Basis),
    fingerprints: &PageFingerprinter,
) -> StateHead {
    StateHead {
        format: FORMAT,
        repository: repository.id.clone(),
        backup: id.clone(),
        fingerprint_secret: hex::encode(fingerprints.secret()),
        start_lsn: options.start_lsn,
        generation: Some(basis.parent().map_or(started_at, Parent::generation)),
        page_checksums: Some(options.page_checksums),
    }
}

/// The backups whose map chunks this one may use, itself first. They must be known before the first page is read, since
/// the manifest begins with them: every source of the parent.
fn sources(id: &BackupId, keyset: &KeysetId, parent: Option<&Parent>) -> Vec<(BackupId, KeysetId)> {
    let earlier = parent.into_iter().flat_map(|parent| parent.pages.sources());
    let earlier = earlier.map(|(backup, keyset)| (backup.clone(), keyset.clone()));
    [(id.clone(), keyset.clone())].into_iter().chain(earlier).collect()
}
