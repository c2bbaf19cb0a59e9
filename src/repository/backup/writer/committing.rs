//! The end of a backup: the rest of the manifest, the inventory, the locks of what it shares, and COMMIT last.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::{BackupWriter, manifest_seal, refuse_if_pruned};
use crate::model::commit::{BackupKind, Commit, Parts, Provenance, WalNeed};
use crate::model::{Error, HolderId, Result};
use crate::repository::FORMAT;
use crate::repository::backup::compare::Missed;
use crate::repository::backup::parent::Parent;
use crate::repository::backup::repack::Moved;
use crate::repository::backup::state::Kept;
use crate::repository::backup::uploads::{put_object, put_signed};
use crate::repository::catalog::commit_context;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::layout;
use crate::repository::locks::{self, extend::Extended};
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::regions::fan_out::LaneOutcome;

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
    /// Writes the rest of the manifest, the inventory and COMMIT. Call [`flush`](Self::flush) first.
    ///
    /// # Errors
    /// Something did not reach the quorum, or the intent has expired.
    pub async fn commit(mut self, wal: Option<WalNeed>) -> Result<Written> {
        let size_bytes = self.finish_manifest().await?;
        let own_bytes: u64 = self.inventory.iter().map(|line| line.size).sum();
        let carried = self.carried()?;
        let closure = self.inventory.iter().chain(&carried).filter(|line| !line.key.starts_with("manifests/"));
        let (kept, not_remembered) = self.keeper.finish(closure);
        let cluster = (&self.options.target, wal.as_ref().map(|need| need.system_id));
        // Before COMMIT: what a backup needs is never locked shorter than the backup itself, wherever this process dies.
        let locks = locks::extend::extend(&self.repository, cluster, (&carried, self.started_at)).await;
        self.inventory.extend(carried);
        let inventory = self.put_inventory().await?;
        let now = self.must_be_alive().await?;
        let commit = self.record((wal, now), (size_bytes, own_bytes), inventory, kept.as_ref());
        let key = layout::commit(&self.options.target, &self.id);
        put_signed(&self.out, &self.writer, key, &commit_context(&self.repository.id, &self.id), &commit).await?;
        // From here on the backup exists; a state that does not get into its place costs the next one a full.
        let placed = kept.map_or(Ok(()), Kept::place).map_err(|error| error.to_string());
        let pages = self.counts();
        let out = Arc::into_inner(self.out).ok_or_else(|| Error::failed("an upload is still running"))?;
        let mut regions = out.drain().await;
        if let Some(parent) = self.basis.parent() {
            note_missing(&mut regions, parent, &self.inventory);
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

    /// Returns the bytes of the files.
    async fn finish_manifest(&mut self) -> Result<u64> {
        let seal = manifest_seal(&self.repository.id, &self.keyset, &self.id);
        let (parts, size_bytes) = std::mem::take(&mut self.manifest).finish(&seal)?;
        for part in parts {
            self.put_manifest_part(part).await?;
        }
        Ok(size_bytes)
    }

    /// Nothing that it needs may have been pruned. Returns the time for which that is known.
    async fn must_be_alive(&self) -> Result<DateTime<Utc>> {
        let now = self.writer.clock.now();
        if now >= self.expires_at {
            let text = format!("backup {} took longer than its intent allows", self.id);
            return Err(Error::failed(text).hint("its objects may be pruned already: take a new backup"));
        }
        refuse_if_pruned(&self.repository, &self.basis, now).await?;
        Ok(now)
    }

    fn record(
        &self,
        (wal, finished_at): (Option<WalNeed>, DateTime<Utc>),
        (size_bytes, own_bytes): (u64, u64),
        inventory: Parts,
        kept: Option<&Kept>,
    ) -> Commit {
        let parent = self.basis.parent().map(|parent| parent.commit.id.clone());
        Commit {
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
            finished_at,
            size_bytes,
            stored_bytes: own_bytes + inventory.bytes,
            damaged_pages: self.damaged_pages,
            keyset: self.keyset.id().clone(),
            wal,
            manifest: self.manifest_parts.finish(),
            inventory,
            page_map: kept.map(|kept| kept.digest),
            quorum: u8::try_from(self.out.quorum()).unwrap_or(u8::MAX),
            provenance: self.provenance(),
            copy: None,
        }
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

    async fn put_inventory(&self) -> Result<Parts> {
        let mut summary = PartsSummary::default();
        let parts = inventory::encode(&self.inventory, &self.repository.id, &self.id, &self.writer.signer)?;
        for (part, bytes) in parts.into_iter().enumerate() {
            let part = u32::try_from(part).unwrap_or(u32::MAX);
            let line = put_object(&self.out, layout::inventory(&self.options.target, &self.id, part), bytes).await?;
            summary.add(line.size, line.digest());
        }
        Ok(summary.finish())
    }

    fn counts(&self) -> PageCounts {
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        PageCounts { read: tally.read, changed: tally.changed, unread: tally.unread, missed: tally.missed.clone() }
    }

    fn provenance(&self) -> Provenance {
        let drctl = env!("CARGO_PKG_VERSION").to_owned();
        let (method, detection) = (self.options.method.clone(), self.options.detection.clone());
        Provenance { host: self.writer.host.clone(), drctl, method, detection }
    }
}

/// A region without the pages that are shared lacks them of this backup as well.
fn note_missing(regions: &mut [LaneOutcome], parent: &Parent, inventory: &[InventoryLine]) {
    for lane in regions {
        let missing = parent.missing_in(&lane.region, inventory);
        lane.missing_objects += missing;
        if missing > 0 {
            let why = || format!("it lacks objects of {}, whose pages are shared", parent.commit.id);
            lane.last_error.get_or_insert_with(why);
        }
    }
}
