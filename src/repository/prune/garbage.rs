//! What nobody needs: every object of a backup that no backup that stays has in its inventory.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::model::retention::Rules;
use crate::model::{BackupId, KeysetId, RegionName, Result, TargetName};
use crate::repository::backup::intent::{INTENT_DAYS, Intent};
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::bundled::{self, Doubled};
use crate::repository::prune::facts::{Copy, Facts, list_everywhere};
use crate::repository::prune::wal::{self, DeadEpoch};

/// One version of one object in one region that may go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// The region.
    pub region: RegionName,
    /// The object.
    pub key: String,
    /// The version, in the store's own words.
    pub version: String,
    /// Its bytes.
    pub size: u64,
    /// Why it may go.
    pub why: Why,
    /// What goes as a whole or not at all: a backup, an epoch of WAL, a single record.
    pub of: String,
}

/// Why an object may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Its backup goes.
    Backup,
    /// Its backup was pruned, and what it had in common with others is no longer needed by them.
    Leftover,
    /// Its backup never came to be.
    Orphan,
    /// WAL that leads to no backup that stays.
    Wal,
    /// WAL that lies in a bundle, too.
    Bundled,
    /// A record of a backup under way, long after its end.
    Intent,
    /// An old plan.
    Plan,
}

impl Why {
    /// As people read it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Backup => "of backups that expire",
            Self::Leftover => "left of backups that were pruned",
            Self::Orphan => "of backups that were never finished",
            Self::Wal => "of WAL that no backup needs",
            Self::Bundled => "of WAL that lies in a bundle, too",
            Self::Intent => "records of backups long over",
            Self::Plan => "old plans",
        }
    }
}

/// The order of removal: a backup stops to exist first, and what opens it goes last, so that a sweep that is killed leaves
/// nothing but garbage.
pub fn phase(key: &str) -> u8 {
    match key.split('/').next().unwrap_or_default() {
        "commits" => 0,
        "inventories" | "manifests" => 1,
        "packs" | "wal" => 2,
        "keysets" => 3,
        _ => 4,
    }
}

/// What nobody needs.
#[derive(Debug, Default)]
pub struct Garbage {
    /// Objects.
    pub items: Vec<Item>,
    /// Epochs of WAL among them.
    pub epochs: Vec<DeadEpoch>,
    /// What was left alone because something about it is not known.
    pub notes: Vec<String>,
}

/// What is asked of a search.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// Targets that have rules; nothing of any other is looked at.
    pub rules: &'a BTreeMap<TargetName, Rules>,
    /// Backups that are to go; all others that exist stay.
    pub doomed: &'a BTreeSet<BackupId>,
    /// How long what nobody needs stays.
    pub grace: TimeDelta,
    /// Keysets that earlier plans wanted to remove together with what they opened.
    pub keysets: &'a BTreeSet<(TargetName, KeysetId)>,
}

impl Search<'_> {
    /// Finds what nobody needs.
    ///
    /// # Errors
    /// A region does not answer.
    pub async fn run(&self, repository: &Repository, facts: &Facts) -> Result<Garbage> {
        let mut garbage = Garbage::default();
        let needed = self.needed(facts);
        for (key, copies) in &facts.objects {
            if needed.contains(key.as_str()) {
                continue;
            }
            if let Some((why, of)) = self.judge(facts, key, copies) {
                garbage.add(key, copies, (why, of.as_str()));
            }
        }
        let survivors = facts.backups.iter().filter(|backup| !self.doomed.contains(&backup.commit.id));
        let survivors: Vec<_> = survivors.map(|backup| &backup.commit).collect();
        let wal = wal::dead(repository, facts, (&survivors, self.rules), self.grace).await?;
        garbage.notes.extend(wal.notes);
        let living = Living { keysets: wal.alive, is_blind: wal.is_blind };
        for epoch in wal.epochs {
            for (key, copies) in list_everywhere(&repository.regions, &epoch.prefix).await? {
                let name = key.rsplit('/').next().unwrap_or_default();
                let last = layout::parse_seq(name).or_else(|| layout::parse_bundle(name).map(|(_, last)| last));
                if last.is_some_and(|last| last < epoch.before) {
                    garbage.add(&key, &copies, (Why::Wal, epoch.prefix.as_str()));
                }
            }
            garbage.epochs.push(epoch);
        }
        self.doubled(repository, facts, &mut garbage).await?;
        self.keysets(repository, facts, (living, &mut garbage)).await?;
        self.records(repository, facts, &mut garbage).await?;
        Ok(garbage)
    }

    /// The names that backups need that stay, and parents of backups under way, which are among them.
    fn needed<'f>(&self, facts: &'f Facts) -> BTreeSet<&'f str> {
        let stay = facts.backups.iter().map(|backup| &backup.commit.id).filter(|id| !self.doomed.contains(id));
        stay.filter_map(|id| facts.inventories.get(id)).flatten().map(|line| line.key.as_str()).collect()
    }

    /// Whether the objects of a target are looked at at all.
    fn looks_at(&self, facts: &Facts, target: &TargetName) -> bool {
        let ruled = self.rules.get(target).is_some_and(|rules| !rules.keep_everything());
        // The parent of a backup under way was pruned: that backup will give up, and until then nothing moves.
        let parent = |intent: &Intent| {
            let of_target = |id: &BackupId| id.target().is_ok_and(|of| of == *target);
            intent.leans_on().any(|parent| facts.tombs.contains_key(parent) && of_target(parent))
        };
        ruled && !facts.is_held(target) && !facts.intents.iter().any(parent)
    }

    /// Why an object that no survivor lists may go; `None` if it stays.
    fn judge(&self, facts: &Facts, key: &str, copies: &[Copy]) -> Option<(Why, String)> {
        let mut parts = key.split('/').skip(1);
        let target: TargetName = parts.next()?.parse().ok()?;
        let id: BackupId = parts.next()?.parse().ok()?;
        if !self.looks_at(facts, &target) || id.target().ok()? != target {
            return None;
        }
        let of = id.to_string();
        if self.doomed.contains(&id) {
            return Some((Why::Backup, of));
        }
        if facts.exists(&id) {
            // Its own records are in no inventory; a pack that it does not name is of an attempt that was repeated.
            return None;
        }
        if facts.tombs.contains_key(&id) {
            return Some((Why::Leftover, of));
        }
        // A COMMIT that is not readable refuses the run; one that appeared a moment ago is not of an orphan.
        if key.starts_with(layout::COMMITS) || facts.intents.iter().any(|intent| intent.backup == id) {
            return None;
        }
        let announced = facts.over.iter().any(|intent| intent.backup == id);
        let age = if announced { self.grace } else { TimeDelta::days(INTENT_DAYS) + self.grace };
        all_older(copies, facts.now - age).then_some((Why::Orphan, of))
    }

    /// Keysets go only together with what they opened, and only those that nothing opens with any more. One that nothing
    /// refers to may belong to an epoch that has not written its first frame: it stays.
    async fn keysets(
        &self,
        repository: &Repository,
        facts: &Facts,
        (living, garbage): (Living, &mut Garbage),
    ) -> Result<()> {
        let mut dead: BTreeMap<(TargetName, KeysetId), (Why, String)> = BTreeMap::new();
        // What an earlier plan wanted may be needed by now: by WAL that a pin or another rule keeps.
        for key in self.keysets.iter().filter(|_| !living.is_blind) {
            dead.insert(key.clone(), (Why::Leftover, layout::keyset(&key.0, &key.1)));
        }
        for tomb in facts.tombs.values().filter(|tomb| !facts.exists(&tomb.backup)) {
            let found = tomb
                .keysets
                .iter()
                .map(|id| ((tomb.target.clone(), id.clone()), (Why::Leftover, tomb.backup.to_string())));
            dead.extend(found);
        }
        let mut alive = living.keysets;
        for commit in facts.backups.iter().map(|backup| &backup.commit) {
            let lines = facts.inventories.get(&commit.id).map(Vec::as_slice).unwrap_or_default();
            let keysets = catalog::keysets(commit, lines).into_iter().map(|id| (commit.target.clone(), id));
            match self.doomed.contains(&commit.id) {
                true => dead.extend(keysets.map(|keyset| (keyset, (Why::Backup, commit.id.to_string())))),
                false => alive.extend(keysets),
            }
        }
        for epoch in &garbage.epochs {
            let keyset = epoch.keyset.iter().map(|id| (epoch.target.clone(), id.clone()));
            dead.extend(keyset.map(|keyset| (keyset, (Why::Wal, epoch.prefix.clone()))));
        }
        for ((target, id), (why, of)) in dead.into_iter().filter(|(keyset, _)| !alive.contains(keyset)) {
            if !self.looks_at(facts, &target) {
                continue;
            }
            for (key, copies) in list_everywhere(&repository.regions, &layout::keyset(&target, &id)).await? {
                garbage.add(&key, &copies, (why, of.as_str()));
            }
        }
        Ok(())
    }

    /// Frames that every region has in a bundle, as far as their epoch does not go anyway.
    async fn doubled(&self, repository: &Repository, facts: &Facts, garbage: &mut Garbage) -> Result<()> {
        let (doubled, notes) = bundled::doubled(repository, facts, self.grace).await?;
        garbage.notes.extend(notes);
        for Doubled { bundle, target, frames } in doubled {
            let goes = garbage.epochs.iter().any(|epoch| bundle.starts_with(epoch.prefix.as_str()));
            if goes || !self.looks_at(facts, &target) {
                continue;
            }
            for (key, copies) in frames {
                garbage.add(&key, &copies, (Why::Bundled, bundle.as_str()));
            }
        }
        Ok(())
    }

    /// Intents and plans that are long over.
    async fn records(&self, repository: &Repository, facts: &Facts, garbage: &mut Garbage) -> Result<()> {
        let over = |key: &str| facts.over.iter().any(|intent| layout::intent(&intent.backup) == key);
        for (key, copies) in list_everywhere(&repository.regions, layout::INTENTS).await? {
            if over(&key) && all_older(&copies, facts.now - self.grace) {
                garbage.add(&key, &copies, (Why::Intent, &key));
            }
        }
        for (key, copies) in list_everywhere(&repository.regions, layout::PRUNES).await? {
            if all_older(&copies, facts.now - PLANS_STAY - self.grace) {
                garbage.add(&key, &copies, (Why::Plan, &key));
            }
        }
        Ok(())
    }
}

/// Which keysets open WAL that stays.
struct Living {
    keysets: BTreeSet<(TargetName, KeysetId)>,
    /// Whether there may be more of them.
    is_blind: bool,
}

/// A plan is evidence of what a sweep did; the sweep's own records stay for ever.
const PLANS_STAY: TimeDelta = TimeDelta::days(90);

fn all_older(copies: &[Copy], limit: DateTime<Utc>) -> bool {
    copies.iter().all(|copy| copy.modified.is_some_and(|modified| modified <= limit))
}

impl Garbage {
    fn add(&mut self, key: &str, copies: &[Copy], (why, of): (Why, &str)) {
        self.items.extend(copies.iter().map(|copy| Item {
            region: copy.region.clone(),
            key: key.to_owned(),
            version: copy.version.0.clone(),
            size: copy.size,
            why,
            of: of.to_owned(),
        }));
    }
}
