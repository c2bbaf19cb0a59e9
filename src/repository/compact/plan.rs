//! Which packs are left, for which backups, and whether it is worth it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::model::{BackupId, TargetName};
use crate::repository::backup::repack::LIVE_PERCENT;
use crate::repository::compact::Original;
use crate::repository::compact::live::Live;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::pages::map::PackId;

/// Every copy costs a drill: what is gained must be this share of all that the backups refer to which may be copied.
const GAIN_PERCENT: u64 = 5;

/// What a compaction would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The packs that are left, the emptiest first.
    pub packs: Vec<ThinPack>,
    /// The backups that are copied, the oldest first.
    pub backups: Vec<BackupId>,
    /// Bytes of frames that move.
    pub moved_bytes: u64,
    /// Bytes of map chunks that are written anew.
    pub renewed_bytes: u64,
    /// Bytes of packs in each region that nobody needs once the originals are pruned.
    pub frees_bytes: u64,
    /// Why nothing is done although packs are mostly dead.
    pub not_worth: Option<String>,
}

/// A pack that is mostly dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ThinPack {
    /// Its object.
    pub key: String,
    /// Its bytes.
    pub bytes: u64,
    /// Those of them that a backup refers to.
    pub live_bytes: u64,
    #[serde(skip)]
    pub(super) id: PackId,
    #[serde(skip)]
    pub(super) line: InventoryLine,
}

impl Plan {
    /// Of `originals`, which may be copied; packs of `fixed` are needed by others that stay as they are.
    pub(super) fn make((target, live): (&TargetName, &Live), originals: &[Original], fixed: &BTreeSet<String>) -> Self {
        let objects: BTreeMap<&str, &InventoryLine> =
            originals.iter().flat_map(|one| &one.inventory).map(|line| (line.key.as_str(), line)).collect();
        let thin = live.bytes().into_iter().filter_map(|(id, live_bytes)| {
            let line = *objects.get(layout::pack(target, &id.backup, id.ordinal).as_str())?;
            let is_thin = live_bytes * 100 < line.size * LIVE_PERCENT && !fixed.contains(&line.key);
            let key = line.key.clone();
            is_thin.then(|| ThinPack { key, bytes: line.size, live_bytes, id: id.clone(), line: line.clone() })
        });
        let mut packs: Vec<_> = thin.collect();
        packs.sort_by_key(|pack| (pack.live_bytes * 1000 / pack.bytes.max(1), pack.id.clone()));
        let left: BTreeSet<_> = packs.iter().map(|pack| pack.id.clone()).collect();
        let keys: BTreeSet<_> = packs.iter().map(|pack| pack.key.as_str()).collect();
        let lists = |one: &&Original| one.inventory.iter().any(|line| keys.contains(line.key.as_str()));
        let backups: Vec<_> = originals.iter().filter(lists).map(|one| one.commit.id.clone()).collect();
        let length = |id: &PackId| live.moving(id, &left).into_iter().map(|(_, length)| u64::from(length)).sum::<u64>();
        let plan = Self {
            moved_bytes: left.iter().map(length).sum(),
            renewed_bytes: live.renewed(backups.iter(), &left),
            frees_bytes: packs.iter().map(|pack| pack.bytes).sum(),
            not_worth: None,
            packs,
            backups,
        };
        let packs = objects.values().filter(|line| line.key.starts_with("packs/"));
        plan.if_worth_it(packs.map(|line| line.size).sum())
    }

    /// A pack of a few pages that many large maps name may cost more than it frees, and an old map of a few pages is not worth
    /// the trouble.
    fn if_worth_it(self, stored: u64) -> Self {
        let written = self.moved_bytes + self.renewed_bytes;
        let gain = self.frees_bytes.saturating_sub(written);
        if self.packs.is_empty() || gain * 100 >= stored * GAIN_PERCENT {
            return self;
        }
        let (count, frees) = (self.packs.len(), self.frees_bytes);
        let why = format!("leaving {count} packs would free {frees} bytes of {stored}, and write {written}");
        Self { not_worth: Some(why), ..Self::default() }
    }

    pub(super) fn left(&self) -> BTreeSet<PackId> {
        self.packs.iter().map(|pack| pack.id.clone()).collect()
    }
}
