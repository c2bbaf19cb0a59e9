//! Show: everything that is known of one backup without restoring it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::backup::streams::left_out;
use crate::jobs::list::{self, Listed};
use crate::model::commit::{Commit, Provenance, WalNeed};
use crate::model::{BackupId, Error, HolderId, KeysetId, RegionName, Result};
use crate::repository::{catalog, keysets, layout, survey};

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// As `list` shows it.
    #[serde(flatten)]
    pub listed: Listed,
    /// The backup whose pages it shares.
    pub parent: Option<BackupId>,
    /// Who wrote it, and how.
    pub provenance: Provenance,
    /// How many regions had to hold every object before it counted.
    pub quorum: u8,
    /// The WAL that makes it consistent.
    pub wal: Option<WalNeed>,
    /// What seals it.
    pub keyset: KeysetId,
    /// Who can open it.
    pub wraps: Vec<WrapShown>,
    /// Objects of the closure.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
    /// What each region holds of them.
    pub held: BTreeMap<RegionName, HeldShown>,
    /// Pages that were damaged on the source already.
    pub damaged_pages: u64,
    /// What should be in it and is not; `null` = not known: no key at hand opens what it says of itself.
    pub left_out: Option<Vec<String>>,
}

/// One wrap of the keyset.
#[derive(Debug, Clone, Serialize)]
pub struct WrapShown {
    /// The holder.
    pub holder: HolderId,
    /// Its kind.
    pub kind: String,
    /// Its own name of its key.
    pub key: String,
}

/// What a region holds.
#[derive(Debug, Clone, Serialize)]
pub struct HeldShown {
    /// Objects of the closure that are there.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that are not there.
    pub missing: u64,
    /// Objects of a wrong size.
    pub damaged: u64,
    /// Why the region could not be read.
    pub unreadable: Option<String>,
    /// Until when the region locks its COMMIT; `null` without a lock, or where it does not tell. `drctl check` asks for every
    /// object.
    pub locked_until: Option<DateTime<Utc>>,
}

/// Shows the backup that `what` names.
///
/// # Errors
/// No region answers, or nothing is named so.
pub async fn run(context: &Context, what: &str) -> Result<Report> {
    let repository = &context.repository;
    let (backups, unreadable) = catalog::backups(repository, None).await?;
    let commit = catalog::find((&backups, &unreadable), what)?.commit.clone();
    // What it has to itself is told by the others of its target.
    let others: Vec<_> = backups.iter().filter(|other| other.commit.target == commit.target).cloned().collect();
    let surveys = survey::survey(repository, &others).await?;
    let listed = surveys.iter().flat_map(list::list).find(|listed| listed.id == commit.id);
    let mut listed = listed.ok_or_else(|| Error::failed("the backup vanished"))?;
    let (_, wraps) = keysets::wraps(&repository.regions, &repository.id, &commit.target, &commit.keyset).await?;
    let wraps = wraps.into_iter().map(|wrap| WrapShown { holder: wrap.holder, kind: wrap.kind, key: wrap.key });
    let lines = catalog::inventory(repository, &commit).await.unwrap_or_default();
    let sizes: BTreeMap<_, _> = lines.iter().map(|line| (line.key.as_str(), line.size)).collect();
    let own = surveys.iter().flat_map(|survey| &survey.backups).filter(|(other, _)| other.commit.id == commit.id);
    let debts = own.flat_map(|(_, debts)| debts);
    let mut held: BTreeMap<_, _> = debts.map(|(region, debt)| (region.clone(), held(&sizes, debt))).collect();
    for region in repository.regions.all().iter().filter(|region| region.lock.is_some()) {
        if let Some(held) = held.get_mut(&region.name).filter(|held| held.unreadable.is_none()) {
            let until = region.store.locked_until(&layout::commit(&commit.target, &commit.id), None).await;
            held.locked_until = until.ok().flatten();
        }
    }
    let left_out = left_out(context, &commit).await;
    listed.left_out_count = left_out.as_ref().map(|list| list.len() as u64);
    let Commit { parent, provenance, quorum, wal, keyset, damaged_pages, .. } = commit;
    let (objects, object_bytes) = (sizes.len() as u64, sizes.values().sum());
    let wraps = wraps.collect();
    Ok(Report {
        listed,
        parent,
        provenance,
        quorum,
        wal,
        keyset,
        wraps,
        objects,
        object_bytes,
        held,
        damaged_pages,
        left_out,
    })
}

fn held(sizes: &BTreeMap<&str, u64>, debt: &catalog::Debt) -> HeldShown {
    let lost = || debt.missing.iter().chain(&debt.damaged).filter_map(|key| sizes.get(key.as_str()));
    let (objects, bytes): (u64, u64) = match debt.unreadable {
        Some(_) => (0, 0),
        None => (sizes.len() as u64 - lost().count() as u64, sizes.values().sum::<u64>() - lost().sum::<u64>()),
    };
    let (missing, damaged) = (debt.missing.len() as u64, debt.damaged.len() as u64);
    HeldShown { objects, bytes, missing, damaged, unreadable: debt.unreadable.clone(), locked_until: None }
}
