//! Which bytes a backup has to itself, and which generations they come from. Told by inventories alone, without keys.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::model::BackupId;
use crate::model::commit::Commit;
use crate::repository::inventory::InventoryLine;

/// What a backup needs in each region.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// All of it.
    pub needs_bytes: u64,
    /// What no other backup needs: so much goes with it.
    pub unique_bytes: u64,
    /// Its pages, by the backup that wrote them first; oldest first.
    pub generations: Vec<Generation>,
}

/// Pages that one backup wrote first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Generation {
    /// That backup; it may be gone.
    pub backup: BackupId,
    /// Packs.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The shares of all backups of one target.
pub fn of(backups: &[(&Commit, &[InventoryLine])]) -> BTreeMap<BackupId, Share> {
    let mut users: HashMap<&str, u32> = HashMap::new();
    for (_, lines) in backups {
        for line in *lines {
            *users.entry(&line.key).or_default() += 1;
        }
    }
    let share = |(commit, lines): &(&Commit, &[InventoryLine])| {
        let alone = lines.iter().filter(|line| users.get(line.key.as_str()) == Some(&1));
        let own = commit.inventory.bytes;
        let share = Share {
            needs_bytes: lines.iter().map(|line| line.size).sum::<u64>() + own,
            unique_bytes: alone.map(|line| line.size).sum::<u64>() + own,
            generations: generations(lines),
        };
        (commit.id.clone(), share)
    };
    backups.iter().map(share).collect()
}

/// Bytes of a target in each region, each object once.
pub fn stored(backups: &[(&Commit, &[InventoryLine])]) -> u64 {
    let lines = backups.iter().flat_map(|(_, lines)| lines.iter());
    let objects: HashMap<&str, u64> = lines.map(|line| (line.key.as_str(), line.size)).collect();
    objects.values().sum::<u64>() + backups.iter().map(|(commit, _)| commit.inventory.bytes).sum::<u64>()
}

fn generations(lines: &[InventoryLine]) -> Vec<Generation> {
    let mut born: BTreeMap<BackupId, (u64, u64)> = BTreeMap::new();
    for line in lines {
        let birth = line.key.strip_prefix("packs/").and_then(|rest| rest.split('/').nth(1)?.parse().ok());
        if let Some(birth) = birth {
            let sum = born.entry(birth).or_default();
            *sum = (sum.0 + 1, sum.1 + line.size);
        }
    }
    born.into_iter().map(|(backup, (objects, bytes))| Generation { backup, objects, bytes }).collect()
}
