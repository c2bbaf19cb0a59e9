//! What there is, from every region, and every reason not to touch it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::future::join_all;

use crate::model::retention::{Candidate, Rules};
use crate::model::{BackupId, Clock, Error, RegionName, Result, SignerId, TargetName};
use crate::repository::backup::intent::{Intent, intent_context};
use crate::repository::catalog::{self, Backup};
use crate::repository::format;
use crate::repository::handle::{Repository, Writer};
use crate::repository::health;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::prune::proofs::Proofs;
use crate::repository::records::pins::{self, Pin};
use crate::repository::records::tombs::{self, Stone, Tomb};
use crate::repository::regions::{Region, Regions};
use crate::repository::survey::{self, State};
use crate::repository::sweeps::SKEW;
use crate::store::VersionId;

/// How long a region may take to answer a question.
const PATIENCE: Duration = Duration::from_secs(30);

/// One version of an object in one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The region.
    pub region: RegionName,
    /// The version.
    pub version: VersionId,
    /// Its bytes.
    pub size: u64,
    /// When its store says that it was written.
    pub modified: Option<DateTime<Utc>>,
}

/// Every copy of every name.
pub type Listing = BTreeMap<String, Vec<Copy>>;

/// Names of backups' objects.
const OF_BACKUPS: [&str; 4] = [layout::COMMITS, "inventories/", "manifests/", "packs/"];

/// Inventories never change, so they are read once for several looks.
pub type Inventories = BTreeMap<BackupId, Vec<InventoryLine>>;

/// What there is.
#[derive(Debug)]
pub struct Facts {
    /// The time of this look.
    pub now: DateTime<Utc>,
    /// The backups that exist, oldest first.
    pub backups: Vec<Backup>,
    /// Those that a drill proved.
    pub proven: BTreeSet<BackupId>,
    /// By whose word.
    pub proofs: Proofs,
    /// Pins and holds.
    pub pins: Vec<Pin>,
    /// Backups under way.
    pub intents: Vec<Intent>,
    /// Intents that are over, and whose backup never came to be.
    pub over: Vec<Intent>,
    /// What was pruned earlier.
    pub tombs: BTreeMap<BackupId, Tomb>,
    /// What each backup needs.
    pub inventories: Inventories,
    /// The objects of backups, those that exist and others.
    pub objects: Listing,
    /// Why nothing may be removed.
    pub refusals: Vec<String>,
}

impl Facts {
    /// Looks at every region, as `writer` who prunes. `grace` is how long an intent counts beyond its end.
    ///
    /// # Errors
    /// A region does not answer: what it holds is not known.
    pub async fn gather(
        repository: &Repository,
        writer: &Writer,
        (grace, known): (TimeDelta, Inventories),
    ) -> Result<Self> {
        let mut refusals = refuse_strange_regions(&repository.regions, writer.clock.as_ref(), repository).await;
        // COMMITs and objects before intents: a backup that commits meanwhile is seen as one or the other, and every object
        // that is listed was announced before it was written.
        let now = writer.clock.now();
        let proofs = Proofs::load(repository, Some(writer.signer.id()), None).await?;
        let by = |signer: &SignerId| proofs.relies_on(signer);
        let (pins, unreadable_pins) = pins::active_by(repository, None, (now, by)).await?;
        let (backups, unreadable) = catalog::backups(repository, None).await?;
        let unreadable = unreadable.iter().chain(&unreadable_pins);
        refusals.extend(unreadable.map(|error| format!("a record is not readable: {error}")));
        let mut objects = Listing::new();
        for class in OF_BACKUPS {
            objects.extend(list_everywhere(&repository.regions, class).await?);
        }
        let drilled = backups.iter().filter(|backup| proofs.is_drilled(backup));
        let mut facts = Self {
            now,
            proven: drilled.map(|backup| backup.commit.id.clone()).collect(),
            proofs,
            pins,
            intents: Vec::new(),
            over: Vec::new(),
            tombs: BTreeMap::new(),
            inventories: known,
            objects,
            backups,
            refusals,
        };
        facts.read_tombs(repository).await?;
        facts.read_intents(repository, grace).await?;
        facts.read_inventories(repository).await;
        facts.refuse_times_to_come();
        Ok(facts)
    }

    /// Whoever may write can write a tomb. One that nobody relies on buries nothing here, and where it hides a COMMIT from every
    /// other reader, what that COMMIT needs must not be taken for something that nobody needs.
    async fn read_tombs(&mut self, repository: &Repository) -> Result<()> {
        let standing = tombs::standing(repository, None, |_| true).await?;
        self.refusals.extend(standing.unreadable.iter().map(|error| format!("a record is not readable: {error}")));
        for Stone { tomb, signer, .. } in standing.tombs {
            let commit = layout::commit(&tomb.target, &tomb.backup);
            if self.proofs.relies_on(&signer) {
                self.tombs.insert(tomb.backup.clone(), tomb);
            } else if self.objects.contains_key(&commit) && !self.exists(&tomb.backup) {
                let (key, backup) = (tomb.key(), &tomb.backup);
                self.refusals.push(format!(
                    "{key} says that {backup} was pruned, by the word of {signer}, who is not in `signers`, and a region still has its COMMIT"
                ));
            }
        }
        Ok(())
    }

    async fn read_intents(&mut self, repository: &Repository, grace: TimeDelta) -> Result<()> {
        let exists: BTreeSet<_> = self.backups.iter().map(|backup| backup.commit.id.clone()).collect();
        for key in repository.regions.list_union(layout::INTENTS).await? {
            let Some(id) = key.strip_prefix(layout::INTENTS).and_then(|id| id.parse::<BackupId>().ok()) else {
                continue;
            };
            let parse = |bytes: bytes::Bytes| {
                let body = repository.trust.verify_text(&intent_context(&repository.id, &id), &bytes)?;
                format::parse::<Intent>(&key, body)
            };
            match repository.regions.read(&key, None, parse).await {
                Ok((intent, _)) if intent.expires_at + grace <= self.now => self.over.push(intent),
                // An intent ends with its COMMIT.
                Ok((intent, _)) if exists.contains(&intent.backup) || self.tombs.contains_key(&intent.backup) => {}
                Ok((intent, _)) => self.intents.push(intent),
                Err(error) => self.refusals.push(format!("a record is not readable: {error}")),
            }
        }
        Ok(())
    }

    async fn read_inventories(&mut self, repository: &Repository) {
        for Backup { commit, .. } in &self.backups {
            if self.inventories.contains_key(&commit.id) {
                continue;
            }
            match catalog::inventory(repository, commit).await {
                Ok(lines) => {
                    self.inventories.insert(commit.id.clone(), lines);
                }
                Err(error) => self.refusals.push(format!("what {} needs is not known: {error}", commit.id)),
            }
        }
    }

    /// A clock that ran ahead once and is right again, or one that is behind: what is stored knows of later times.
    fn refuse_times_to_come(&mut self) {
        let limit = self.now + SKEW;
        let finished = self.backups.iter().map(|backup| (backup.commit.finished_at, backup.commit.id.to_string()));
        let stored = self.objects.iter().flat_map(|(key, copies)| copies.iter().map(move |copy| (copy.modified, key)));
        let stored = stored.filter_map(|(modified, key)| Some((modified?, key.clone())));
        if let Some((at, what)) = finished.chain(stored).max().filter(|(at, _)| *at > limit) {
            self.refusals.push(format!("the clocks disagree: {what} is of {at}, and here it is {}", self.now));
        }
    }

    /// Refuses while one of `survivors` is not whole in every region, its WAL included: the older backups that would go may
    /// be the only ones left.
    ///
    /// # Errors
    /// No region answers.
    pub async fn refuse_gaps(&mut self, repository: &Repository, survivors: &[Backup]) -> Result<()> {
        for survey in survey::survey(repository, survivors).await? {
            for (backup, debts) in &survey.backups {
                let id = &backup.commit.id;
                for (region, debt) in debts {
                    let what = match survey.state(&backup.commit, region, debt) {
                        State::Complete => continue,
                        State::Debt if debt.missing.is_empty() => "lacks WAL of it".to_owned(),
                        State::Debt => format!("lacks {} objects of it", debt.missing.len()),
                        State::Damaged => format!("holds {} objects of it with a wrong size", debt.damaged.len()),
                        State::Unreachable => debt.unreadable.clone().unwrap_or_default(),
                    };
                    self.refusals.push(format!(
                        "{id} stays and is not whole: region {region} {what}; drctl repair {}",
                        survey.target
                    ));
                }
            }
        }
        Ok(())
    }

    /// The backups of one target as the rules see them.
    pub fn candidates(&self, target: &TargetName, rules: &Rules) -> Vec<Candidate> {
        let own: Vec<_> = self.backups.iter().filter(|backup| backup.commit.target == *target).collect();
        self.proofs.candidates(&own, rules, |id| self.needed_by(target, id))
    }

    fn needed_by(&self, target: &TargetName, id: &BackupId) -> Vec<String> {
        let pins = self.pins.iter().filter(|pin| pin.keeps(target, id)).map(Pin::words);
        let children = self.intents.iter().filter(|intent| intent.leans_on().any(|other| other == id));
        pins.chain(children.map(|intent| format!("backup {} is under way and shares its pages", intent.backup)))
            .collect()
    }

    /// Whether this backup exists.
    pub fn exists(&self, id: &BackupId) -> bool {
        self.backups.iter().any(|backup| backup.commit.id == *id)
    }

    /// Whether a hold keeps all of a target.
    pub fn is_held(&self, target: &TargetName) -> bool {
        self.pins.iter().any(|pin| pin.target == *target && pin.backup.is_none())
    }
}

/// Every version below `prefix` in every region.
///
/// # Errors
/// A region does not answer.
pub async fn list_everywhere(regions: &Regions, prefix: &str) -> Result<Listing> {
    let lists = regions.all().iter().map(|region| list_versions(region, prefix));
    let mut listing = Listing::new();
    for list in join_all(lists).await {
        for (key, copy) in list? {
            listing.entry(key).or_default().push(copy);
        }
    }
    Ok(listing)
}

async fn list_versions(region: &Region, prefix: &str) -> Result<Vec<(String, Copy)>> {
    let (mut copies, mut after) = (Vec::new(), None);
    loop {
        let page = region.store.list_versions(prefix, after.as_ref()).await;
        let page = page.map_err(|error| Error::from(error).during(format!("list region {}", region.name)))?;
        copies.extend(page.versions.into_iter().map(|listed| {
            let copy = Copy {
                region: region.name.clone(),
                version: listed.version,
                size: listed.size,
                modified: listed.modified,
            };
            (listed.key, copy)
        }));
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(copies),
        }
    }
}

async fn refuse_strange_regions(regions: &Regions, clock: &dyn Clock, repository: &Repository) -> Vec<String> {
    let mut refusals = Vec::new();
    for health in health::examine(regions, clock, PATIENCE).await {
        let region = &health.region;
        let answers = match health.answers {
            Ok(answers) => answers,
            Err(error) => {
                refusals.push(format!("region {region} is not readable: {error}"));
                continue;
            }
        };
        match answers.repository {
            Ok(Some(id)) if id == repository.id => {}
            Ok(_) => refusals.push(format!("region {region} does not hold this repository")),
            Err(error) => refusals.push(format!("region {region} is not readable: {error}")),
        }
        match answers.skew {
            Ok(skew) if skew.is_some_and(|skew| skew.abs() > SKEW) => {
                let apart = skew.unwrap_or_default().num_seconds();
                refusals.push(format!("the clocks disagree: that of region {region} is {apart} s ahead of ours"));
            }
            Ok(_) => {}
            Err(error) => refusals.push(format!("region {region} does not tell its time: {error}")),
        }
    }
    refusals
}
