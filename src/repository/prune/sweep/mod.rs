//! Taking away what two plans agree on.
//!
//! 1. Every region is told that the sweep begins, and which backups it takes ([`sweeps`]).
//! 2. Everything is looked at once more: pins, intents, COMMITs. What somebody needs by now stays.
//! 3. Every region gets the records of what goes ([`tombs`]): from here on these backups do not exist.
//! 4. Once more the needs of all backups that exist are taken off. Then the objects go, COMMITs first, keysets last; a step
//!    is done in every region before the next one begins.
//!
//! Killed anywhere it leaves garbage, which the next plans find.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, stream};

use crate::model::retention::Rules;
use crate::model::{BackupId, Error, KeysetId, Kind, PruneId, Result, ResultExt, TargetName};
use crate::observe::progress::Phase;
use crate::repository::FORMAT;
use crate::repository::catalog;
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::prune::bundled;
use crate::repository::prune::facts::{Facts, Inventories};
use crate::repository::prune::garbage::{Garbage, Item, Search, Why, phase};
use crate::repository::prune::locked::{self, Locked};
use crate::repository::prune::plan::{Plan, enroll};
use crate::repository::records;
use crate::repository::sweeps::{self, Begun, Ended};
use crate::repository::tombs::{self, Tomb, WalCut};
use crate::store::{Digest, StoreError, VersionId};

/// Deletes in flight.
const DELETES: usize = 24;
/// A sweep stops well before writers take it for dead.
const AT_MOST: Duration = Duration::from_secs(5 * 3600);

/// What a sweep works with.
#[derive(Debug)]
pub struct Sweep<'a> {
    /// The repository.
    pub repository: &'a Repository,
    /// Signs its records.
    pub writer: &'a Writer,
    /// The rules of the targets.
    pub rules: &'a BTreeMap<TargetName, Rules>,
    /// How long what nobody needs stays.
    pub grace: TimeDelta,
    /// The plan whose grace period is over.
    pub ripe: &'a Plan,
    /// Keysets of earlier plans.
    pub keysets: &'a BTreeSet<(TargetName, KeysetId)>,
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Swept {
    /// Which; `None` if there was nothing to do.
    pub id: Option<PruneId>,
    /// The backups that are gone.
    pub backups: Vec<BackupId>,
    /// Versions of objects that were removed, over all regions.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that a lock holds; of a backup that stays by the lock of its COMMIT, the COMMIT alone is counted.
    pub retained: u64,
    /// When the last of these locks ends, as far as the stores tell.
    pub retained_until: Option<DateTime<Utc>>,
    /// Objects that somebody needs by now.
    pub spared: u64,
}

impl Swept {
    /// A backup stays because its COMMIT is locked.
    pub fn tell_locked(&mut self, locked: &Locked) {
        self.retained += locked.copies;
        self.retained_until = self.retained_until.max(Some(locked.until));
    }
}

/// What became of one version.
enum Removal {
    Done,
    /// A lock holds it; until when, if the store tells.
    Locked(Option<DateTime<Utc>>),
}

impl Sweep<'_> {
    /// Sweeps `items`.
    ///
    /// # Errors
    /// Another sweep is at work, a region does not answer, or removing failed; what was not removed is found again.
    pub async fn run(&self, items: Vec<Item>, known: Inventories, progress: &Phase) -> Result<Swept> {
        let began = self.writer.clock.monotonic();
        let begun = self.announce(&items).await?;
        let mut swept = Swept { id: Some(begun.id.clone()), ..Swept::default() };
        let done = self.work(&begun, items, (known, began), (&mut swept, progress)).await;
        let ended = self.end(&swept, done.as_ref().err()).await;
        done.and(ended).map(|()| swept)
    }

    async fn work(
        &self,
        begun: &Begun,
        items: Vec<Item>,
        (known, began): (Inventories, Duration),
        (swept, progress): (&mut Swept, &Phase),
    ) -> Result<()> {
        let wanted = items.len();
        let mut facts = self.look(known).await?;
        let free = self.free(&facts, &begun.backups);
        let free = self.unlocked(&facts, free, swept).await?;
        let items = self.still_dead(&facts, (&free, &items)).await?;
        self.bury(&facts, (begun, &free), (&items.0, &items.1)).await?;
        swept.backups = free.iter().cloned().collect();
        facts = self.look(std::mem::take(&mut facts.inventories)).await?;
        // A pin that was taken meanwhile counts, and so does a lock.
        let free = self.free(&facts, &begun.backups).intersection(&free).cloned().collect();
        let mut free = self.unlocked(&facts, free, swept).await?;
        swept.backups.retain(|id| free.contains(id));
        let items = self.still_dead(&facts, (&free, &items.0)).await?.0;
        let mut items = self.without_doubt(items).await;
        swept.spared = (wanted - items.len()) as u64;
        let commits = self.commits(&items).await?;
        for step in 0..=4 {
            let of_step: Vec<_> = items.iter().filter(|item| phase(&item.key) == step).collect();
            let locked = self.remove(&of_step, began, (swept, progress)).await?;
            // A backup whose COMMIT a lock holds stays as a whole, with what it needs of others. One that was locked, or held
            // by law, only since it was asked is gone elsewhere by now.
            if step == 0 && !locked.is_empty() {
                self.bring_back(&facts, &commits, &locked).await?;
                swept.backups.retain(|id| !locked.contains(id.as_str()));
                free.retain(|id| !locked.contains(id.as_str()));
                items.retain(|item| !locked.contains(&item.of));
                facts = self.look(std::mem::take(&mut facts.inventories)).await?;
                items = self.still_dead(&facts, (&free, &items)).await?.0;
            }
        }
        Ok(())
    }

    /// Tells every region, and makes sure that nobody else is at it: of two that begin together at least one sees the other.
    async fn announce(&self, items: &[Item]) -> Result<Begun> {
        let (writer, repository) = (self.writer, self.repository);
        enroll(repository, writer).await?;
        let at = writer.clock.now();
        let commits = items.iter().filter(|item| item.key.starts_with(layout::COMMITS));
        let backups: BTreeSet<BackupId> = commits.filter_map(|item| item.of.parse().ok()).collect();
        let begun = Begun {
            format: FORMAT,
            id: PruneId::new(at, writer.rng.as_ref())?,
            plan: self.ripe.head.id.clone(),
            backups: backups.into_iter().collect(),
            objects: items.len() as u64,
            bytes: items.iter().map(|item| item.size).sum(),
            at,
            host: writer.host.clone(),
        };
        let key = layout::sweep(&begun.id);
        let body = records::encode(&repository.id, writer, (sweeps::BEGUN, &key), &begun)?;
        repository.regions.put_everywhere(&key, body).await.during(|| "announce the sweep")?;
        let others = sweeps::running(repository, at).await?;
        // A sweep of this host is dead: the lock of its state directory is ours.
        match others.iter().find(|other| other.id != begun.id && other.host != begun.host) {
            None => Ok(begun),
            Some(other) => {
                let error = Error::refused(format!("another prune is at work on {}", other.host));
                let error = error.because(format!("sweep {} began at {}", other.id, other.at));
                self.end(&Swept { id: Some(begun.id), ..Swept::default() }, Some(&error)).await?;
                Err(error.hint("let it finish; one that died counts for six hours"))
            }
        }
    }

    async fn look(&self, known: Inventories) -> Result<Facts> {
        let facts = Facts::gather(self.repository, self.writer.clock.as_ref(), (self.grace, known)).await?;
        match facts.refusals.first() {
            None => Ok(facts),
            Some(why) => Err(Error::refused("the sweep stops: something changed under it").because(why)),
        }
    }

    /// The backups that nobody came to need since the plan was made.
    fn free(&self, facts: &Facts, backups: &[BackupId]) -> BTreeSet<BackupId> {
        let exists = |id: &&BackupId| facts.backups.iter().find(|backup| backup.commit.id == **id);
        let is_free = |id: &&BackupId| {
            let Some(backup) = exists(id) else { return false };
            let target = &backup.commit.target;
            let Some(rules) = self.rules.get(target) else { return false };
            facts.candidates(target, rules).iter().any(|candidate| candidate.id == **id && candidate.needed.is_empty())
        };
        backups.iter().filter(is_free).cloned().collect()
    }

    /// Those of them whose COMMIT is locked nowhere.
    async fn unlocked(
        &self,
        facts: &Facts,
        mut free: BTreeSet<BackupId>,
        swept: &mut Swept,
    ) -> Result<BTreeSet<BackupId>> {
        for (id, locked) in locked::commits(self.repository, facts, &free).await? {
            swept.tell_locked(&locked);
            free.remove(&id);
        }
        Ok(free)
    }

    /// The bytes of every COMMIT that is about to go.
    async fn commits(&self, items: &[Item]) -> Result<BTreeMap<String, (String, Bytes)>> {
        let mut commits = BTreeMap::new();
        for item in items.iter().filter(|item| item.key.starts_with(layout::COMMITS)) {
            if !commits.contains_key(&item.of) {
                let check =
                    |bytes: Bytes| catalog::parse_commit(self.repository, &item.key, &bytes).map(|_| bytes.clone());
                let (bytes, _) = self.repository.regions.read(&item.key, None, check).await?;
                commits.insert(item.of.clone(), (item.key.clone(), bytes));
            }
        }
        Ok(commits)
    }

    /// Puts back the COMMITs of backups that stay after all: one that is missing in a region counts as pruned.
    async fn bring_back(
        &self,
        facts: &Facts,
        commits: &BTreeMap<String, (String, Bytes)>,
        locked: &BTreeSet<String>,
    ) -> Result<()> {
        for (of, (key, bytes)) in commits.iter().filter(|(of, _)| locked.contains(*of)) {
            let backup = facts.backups.iter().find(|backup| backup.commit.id.as_str() == of);
            let since = backup.map(|backup| backup.commit.started_at);
            for region in self.repository.regions.all() {
                let put = region.put(key, (bytes.clone(), Digest::of(bytes)), since).await;
                put.map_err(|error| {
                    let error = Error::from(error).during(format!("put {key} back into region {}", region.name));
                    error.hint(format!("{of} is locked in another region and counts as pruned without it"))
                })?;
            }
        }
        Ok(())
    }

    /// What of `items` nobody needs if `doomed` go.
    async fn still_dead(
        &self,
        facts: &Facts,
        (doomed, items): (&BTreeSet<BackupId>, &[Item]),
    ) -> Result<(Vec<Item>, Garbage)> {
        let search = Search { rules: self.rules, doomed, grace: self.grace, keysets: self.keysets };
        let garbage = search.run(self.repository, facts).await?;
        let name = |item: &Item| (item.region.clone(), item.key.clone(), item.version.clone());
        let dead: BTreeSet<_> = garbage.items.iter().map(name).collect();
        Ok((items.iter().filter(|item| dead.contains(&name(item))).cloned().collect(), garbage))
    }

    /// Frames go when each of them was read in its bundle, in every region, a moment before.
    async fn without_doubt(&self, mut items: Vec<Item>) -> Vec<Item> {
        let bundles = items.iter().filter(|item| item.why == Why::Bundled).map(|item| item.of.as_str());
        let whole = bundled::whole(self.repository, bundles).await;
        let broken: BTreeSet<String> =
            whole.iter().filter(|(_, whole)| !**whole).map(|(key, _)| (*key).to_owned()).collect();
        items.retain(|item| item.why != Why::Bundled || !broken.contains(&item.of));
        items
    }

    /// Writes down in every region what goes.
    async fn bury(
        &self,
        facts: &Facts,
        (begun, free): (&Begun, &BTreeSet<BackupId>),
        (items, garbage): (&[Item], &Garbage),
    ) -> Result<()> {
        for commit in facts.backups.iter().map(|backup| &backup.commit).filter(|commit| free.contains(&commit.id)) {
            let lines = facts.inventories.get(&commit.id).map(Vec::as_slice).unwrap_or_default();
            let why = self.ripe.head.backups.iter().find(|doomed| doomed.id == commit.id);
            let tomb = Tomb {
                format: FORMAT,
                backup: commit.id.clone(),
                target: commit.target.clone(),
                prune: begun.id.clone(),
                at: begun.at,
                why: why.map_or_else(String::new, |doomed| doomed.why.clone()),
                keysets: catalog::keysets(commit, lines).into_iter().collect(),
                wal: commit.wal.clone(),
                host: self.writer.host.clone(),
            };
            let key = layout::tomb(&commit.target, &commit.id);
            self.record((tombs::TOMB, &key), &tomb).await.during(|| format!("record the end of {}", commit.id))?;
        }
        let taken: BTreeSet<_> = items.iter().map(|item| item.of.as_str()).collect();
        for epoch in garbage.epochs.iter().filter(|epoch| taken.contains(epoch.prefix.as_str())) {
            let branch = epoch.branch.clone();
            let cut = WalCut {
                format: FORMAT,
                target: epoch.target.clone(),
                system_id: branch.system_id,
                timeline: branch.timeline,
                branch: branch.branch,
                epoch: epoch.epoch.clone(),
                before: epoch.before,
                keyset: epoch.keyset.clone(),
                prune: begun.id.clone(),
                at: begun.at,
            };
            let key = cut.key();
            self.record((tombs::CUT, &key), &cut).await.during(|| "record what WAL is gone")?;
        }
        Ok(())
    }

    /// Puts a record into every region. One that an earlier sweep has put into some of them is spread as it is.
    async fn record<T: serde::Serialize>(&self, (kind, key): (&str, &str), record: &T) -> Result<()> {
        let regions = &self.repository.regions;
        let check = |bytes: Bytes| records::verify(self.repository, (kind, key), &bytes).map(|_| bytes.clone());
        let body = match regions.read(key, None, check).await {
            Ok((known, _)) => known,
            Err(_) => records::encode(&self.repository.id, self.writer, (kind, key), record)?,
        };
        regions.put_everywhere(key, body).await
    }

    /// Removes objects; tells what the locked ones are of.
    async fn remove(
        &self,
        items: &[&Item],
        began: Duration,
        (swept, progress): (&mut Swept, &Phase),
    ) -> Result<BTreeSet<String>> {
        let mut locked = BTreeSet::new();
        let mut deletes = stream::iter(items).map(|item| async move { (*item, self.delete(item, began).await) });
        let mut deletes = std::pin::pin!((&mut deletes).buffer_unordered(DELETES));
        while let Some((item, done)) = deletes.next().await {
            match done {
                Ok(Removal::Done) => {
                    swept.objects += 1;
                    swept.bytes += item.size;
                    progress.advance(item.size);
                }
                Ok(Removal::Locked(until)) => {
                    swept.retained += 1;
                    swept.retained_until = swept.retained_until.max(until);
                    locked.insert(item.of.clone());
                }
                // What is in flight may or may not be done; the next plan finds what is left.
                Err(error) => return Err(error),
            }
        }
        Ok(locked)
    }

    async fn delete(&self, item: &Item, began: Duration) -> Result<Removal> {
        if self.writer.clock.monotonic().saturating_sub(began) > AT_MOST {
            return Err(Error::new(Kind::Failed, "the sweep takes too long; the next one goes on"));
        }
        let region = self.repository.regions.named(&item.region)?;
        match region.store.delete_version(&item.key, &VersionId(item.version.clone())).await {
            Ok(()) => Ok(Removal::Done),
            Err(StoreError::Retained { until, .. }) => Ok(Removal::Locked(until)),
            Err(error) => Err(Error::from(error).during(format!("prune region {}", item.region))),
        }
    }

    async fn end(&self, swept: &Swept, error: Option<&Error>) -> Result<()> {
        let Some(id) = swept.id.clone() else { return Ok(()) };
        let Swept { objects, bytes, retained, .. } = *swept;
        let (stopped, at) = (error.map(ToString::to_string), self.writer.clock.now());
        let ended = Ended { format: FORMAT, id, objects, bytes, retained, stopped, at };
        let key = layout::sweep_end(&ended.id);
        let body = records::encode(&self.repository.id, self.writer, (sweeps::ENDED, &key), &ended)?;
        self.repository.regions.put_everywhere(&key, body).await.during(|| "record the end of the sweep")
    }
}
