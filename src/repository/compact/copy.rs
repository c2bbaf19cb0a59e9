//! Writing copies: frames move once for all of them, then each gets its maps, manifest, inventory and COMMIT.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use crate::keys::keyset::Keyset;
use crate::model::commit::{Commit, CopyOf, Parts, Provenance};
use crate::model::{BackupId, Error, Kind, Result, ResultExt, TargetName};
use crate::repository::FORMAT;
use crate::repository::backup::intent::{Intent, intent_context};
use crate::repository::backup::repack;
use crate::repository::backup::uploads::{put_object, put_signed};
use crate::repository::catalog::commit_context;
use crate::repository::compact::manifest::Rewriter;
use crate::repository::compact::run::{Run, Written};
use crate::repository::compact::{Copied, Hands, Lines, Original};
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::keysets;
use crate::repository::layout;
use crate::repository::locks;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::pages::relocation::Relocation;
use crate::repository::sweeps;

/// One copy takes no longer. If it is killed, its original is kept for as long.
const LONGEST: TimeDelta = TimeDelta::days(1);

/// A copy under way.
struct Beginning {
    id: BackupId,
    expires_at: DateTime<Utc>,
    keyset: Arc<Keyset>,
}

impl Run<'_> {
    /// Makes the copy of one backup.
    pub(super) async fn copy(&mut self, original: &Original) -> Result<Copied> {
        let before: u64 = self.bytes();
        let beginning = self.begin(original).await?;
        let first_pack = match self.relocation {
            None => self.move_frames(&beginning.id).await?,
            Some(_) => 0,
        };
        self.copies.push((beginning.id.clone(), beginning.keyset.id().clone()));
        let Beginning { id, keyset, .. } = &beginning;
        let written = Rewriter::new(self, original, (id, keyset), first_pack)?.write().await?;
        self.phase.note(id.to_string());
        let manifest = written.manifest;
        let closure = closure(&self.target(), (original, &self.lines), written)?;
        let inventory = self.put_inventory(id, &closure).await?;
        let commit = Commit {
            id: id.clone(),
            keyset: keyset.id().clone(),
            stored_bytes: self.bytes() - before + inventory.bytes,
            manifest,
            inventory,
            // Its writer remembers the original.
            page_map: None,
            quorum: u8::try_from(self.hands.repository.regions.quorum()).unwrap_or(u8::MAX),
            provenance: self.provenance(&original.commit),
            copy: Some(CopyOf { backup: original.commit.origin().clone(), at: self.hands.writer.clock.now() }),
            ..original.commit.clone()
        };
        let compared = self.comparison.compare((self.hands, self.survey), original, (&commit, &closure)).await;
        compared.during(|| "compare the copy with its original")?;
        self.lock(&commit, &closure).await;
        self.commit(&commit, (original, &beginning)).await?;
        Ok(Copied { original: original.commit.id.clone(), copy: commit.id, stored_bytes: commit.stored_bytes })
    }

    /// Announces the copy: while it is under way, prune leaves its objects, its original and the copies before it alone. Then
    /// draws its keyset.
    async fn begin(&mut self, original: &Original) -> Result<Beginning> {
        let Hands { repository, writer, .. } = self.hands;
        let now = writer.clock.now();
        let id = BackupId::new(&self.survey.target, original.commit.started_at, writer.rng.as_ref())?;
        repository.enroll(writer, &self.out).await.during(|| "enrol the signer")?;
        let expires_at = now + LONGEST;
        let intent = Intent {
            format: FORMAT,
            backup: id.clone(),
            parent: Some(original.commit.id.clone()),
            also: self.copies.iter().map(|(id, _)| id.clone()).collect(),
            created_at: now,
            expires_at,
        };
        put_signed(&self.out, writer, layout::intent(&id), &intent_context(&repository.id, &id), &intent).await?;
        self.refuse_if_condemned(original).await?;
        let (holders, rng) = (&writer.holders, writer.rng.as_ref());
        let stored = keysets::create(&repository.id, &self.survey.target, holders, rng, &self.out).await?;
        if let Some((holder, why)) = stored.missing.first() {
            // The original may be one that this holder opens, and it is to be replaced.
            let error = Error::new(Kind::Unavailable, format!("key holder {holder} did not wrap the keyset of a copy"));
            return Err(error.because(why).hint("run it again when every key holder answers"));
        }
        self.lines.extend(stored.wraps.into_iter().map(|line| (line.key.clone(), line)));
        Ok(Beginning { id, expires_at, keyset: stored.keyset })
    }

    async fn refuse_if_condemned(&self, original: &Original) -> Result<()> {
        let now = self.hands.writer.clock.now();
        let leaned = self.copies.iter().map(|(id, _)| id).chain([&original.commit.id]);
        for id in leaned {
            sweeps::refuse_if_condemned(self.hands.repository, id, now).await?;
        }
        Ok(())
    }

    /// Copies what lives in the packs that are left into packs of the first copy; answers how many those are.
    async fn move_frames(&mut self, id: &BackupId) -> Result<u32> {
        let target = self.target();
        let (mut places, mut moved) =
            (HashMap::new(), repack::Copy::new(&self.out, (&target, id), self.hands.pack_size));
        for pack in &self.survey.plan.packs {
            let line = &pack.line;
            let read = self.hands.repository.regions.read_exact(&line.key, line.size, line.digest()).await;
            let (bytes, _) = read.during(|| format!("read {}", line.key))?;
            for (offset, length) in self.survey.live.moving(&pack.id, &self.left) {
                let place = moved.frame((&pack.id, offset, length), &bytes).await?;
                places.insert((pack.id.clone(), offset), place);
                self.phase.advance(u64::from(length));
            }
        }
        let lines = moved.end().await?.lines;
        let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
        self.lines.extend(lines.into_iter().map(|line| (line.key.clone(), line)));
        self.relocation = Some(Relocation::new(places, HashSet::new()));
        Ok(count)
    }

    async fn put_inventory(&self, id: &BackupId, lines: &[InventoryLine]) -> Result<Parts> {
        let Hands { repository, writer, .. } = self.hands;
        let mut summary = PartsSummary::default();
        for (part, bytes) in inventory::encode(lines, &repository.id, id, &writer.signer)?.into_iter().enumerate() {
            let part = u32::try_from(part).unwrap_or(u32::MAX);
            let line = put_object(&self.out, layout::inventory(&self.survey.target, id, part), bytes).await?;
            summary.add(line.size, line.digest());
        }
        Ok(summary.finish())
    }

    fn provenance(&self, original: &Commit) -> Provenance {
        let (host, drctl) = (self.hands.writer.host.clone(), env!("CARGO_PKG_VERSION").to_owned());
        Provenance { host, drctl, ..original.provenance.clone() }
    }

    /// Before COMMIT, as for every backup: what a copy needs is never locked shorter than the copy itself. A region that refuses owes
    /// the locks.
    async fn lock(&self, commit: &Commit, closure: &[InventoryLine]) {
        let cluster = (&commit.target, commit.wal.as_ref().map(|need| need.system_id));
        let locks = locks::extend::extend(self.hands.repository, cluster, (closure, commit.started_at)).await;
        for owing in locks.iter().filter(|locks| locks.owed > 0) {
            let (region, why) = (&owing.region, owing.error.as_deref().unwrap_or_default());
            tracing::warn!(%region, owed = owing.owed, why, "objects of a copy are not locked as long as it; drctl repair asks again");
        }
    }

    async fn commit(&self, commit: &Commit, (original, beginning): (&Original, &Beginning)) -> Result<()> {
        let Hands { repository, writer, .. } = self.hands;
        if writer.clock.now() >= beginning.expires_at {
            return Err(Error::failed(format!("copy {} took longer than its intent allows", commit.id)));
        }
        self.refuse_if_condemned(original).await?;
        let key = layout::commit(&commit.target, &commit.id);
        put_signed(&self.out, writer, key, &commit_context(&repository.id, &commit.id), commit).await
    }
}

/// Every object without which a copy cannot be read: what this run put, and what the original needs too.
fn closure(target: &TargetName, (original, put): (&Original, &Lines), written: Written) -> Result<Vec<InventoryLine>> {
    let known: Lines = original.inventory.iter().map(|line| (line.key.clone(), line.clone())).collect();
    let missing = |what: &str| super::not_listed(what, &original.commit.id);
    let mut lines = written.manifest_lines;
    for pack in &written.packs {
        let key = layout::pack(target, &pack.backup, pack.ordinal);
        let line = put.get(&key).or_else(|| known.get(&key));
        lines.push(line.ok_or_else(|| missing(&key))?.clone());
    }
    for keyset in &written.keysets {
        let prefix = layout::keyset(target, keyset);
        let below = |lines: &Lines| {
            let from = lines.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
            from.map(|(_, line)| line.clone()).collect::<Vec<_>>()
        };
        let wraps = [below(put), below(&known)].concat();
        if wraps.is_empty() {
            return Err(missing(&prefix));
        }
        lines.extend(wraps);
    }
    lines.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(lines)
}
