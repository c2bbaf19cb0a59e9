//! Taking away what two plans agree on.
//!
//! 1. Every region is told that the sweep begins, and which backups it takes ([`sweeps`]).
//! 2. Everything is looked at once more: pins, intents, COMMITs. What somebody needs by now stays.
//! 3. Every region gets the records of what goes ([`tombs`](crate::repository::records::tombs)): from here on these backups do not exist.
//! 4. Once more the needs of all backups that exist are taken off. Then the objects go, COMMITs first, keysets last; a step
//!    is done in every region before the next one begins. WAL is recorded as gone ([`WalCut`](crate::repository::records::tombs::WalCut))
//!    immediately before it goes.
//! 5. What it announced and left alone is told, too ([`spare`](crate::repository::prune::spare)).
//!
//! Killed anywhere it leaves garbage, which the next plans find.

mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
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
use crate::repository::prune::facts::{Facts, Inventories};
use crate::repository::prune::garbage::{Garbage, Item, Search, Why, phase};
use crate::repository::prune::locked::{self, Locked};
use crate::repository::prune::plan::{Plan, enroll};
use crate::repository::prune::replaced;
use crate::repository::prune::wal::DeadEpoch;
use crate::repository::records;
use crate::repository::sweeps::{self, Begun};
use crate::store::{StoreError, VersionId};

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
    /// Which lock this process holds for as long as it sweeps.
    pub lock: Option<&'a str>,
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
    /// WAL frames that stay because their bundle is not what it should be, and why.
    pub doubts: Vec<String>,
}

impl Swept {
    /// A backup stays because its COMMIT is locked, or held, which has no end.
    pub fn tell_locked(&mut self, locked: &Locked) {
        self.retained += locked.copies;
        self.retained_until = self.retained_until.max(locked.until);
    }
}

/// When a sweep began: by a clock that nobody sets, and by the one that writers go by.
type Began = (Duration, DateTime<Utc>);

/// What became of one version.
enum Removal {
    Done,
    /// A lock holds it; until when, if the store tells.
    Locked(Option<DateTime<Utc>>),
    /// Something went wrong with another one first.
    LeftAlone,
}

/// What nobody needs by a look in the middle of a sweep, of what it began with.
struct Dead {
    items: Vec<Item>,
    epochs: Vec<DeadEpoch>,
}

impl Sweep<'_> {
    /// Sweeps `items`.
    ///
    /// # Errors
    /// Another sweep is at work, a region does not answer, or removing failed; what was not removed is found again.
    pub async fn run(&self, items: Vec<Item>, known: Inventories, progress: &Phase) -> Result<Swept> {
        let began = self.writer.clock.monotonic();
        let begun = self.announce(&items).await?;
        let began = (began, begun.at);
        let mut swept = Swept { id: Some(begun.id.clone()), ..Swept::default() };
        let done = self.work(&begun, items, (known, began), (&mut swept, progress)).await;
        let spared = self.spare(&begun).await;
        let ended = self.end(&swept, done.as_ref().err()).await;
        done.and(spared).and(ended).map(|()| swept)
    }

    async fn work(
        &self,
        begun: &Begun,
        items: Vec<Item>,
        (known, began): (Inventories, Began),
        (swept, progress): (&mut Swept, &Phase),
    ) -> Result<()> {
        let wanted = items.len();
        let mut facts = self.look(known).await?;
        let free = self.free(&facts, &begun.backups);
        let free = self.unlocked(&facts, free, swept).await?;
        let dead = self.still_dead(&facts, (&free, &items)).await?;
        self.bury(&facts, (begun, &free)).await?;
        facts = self.look(std::mem::take(&mut facts.inventories)).await?;
        // A pin that was taken meanwhile counts, and so does a lock.
        let free = self.free(&facts, &begun.backups).intersection(&free).cloned().collect();
        let mut free = self.unlocked(&facts, free, swept).await?;
        swept.backups = free.iter().cloned().collect();
        let mut dead = self.still_dead(&facts, (&free, &dead.items)).await?;
        self.without_doubt(&mut dead.items, swept).await;
        swept.spared = (wanted - dead.items.len()) as u64;
        let commits = self.commits(&dead.items).await?;
        for step in 0..=4 {
            if step == phase(layout::WAL) {
                self.cut(begun, &dead).await?;
            }
            let of_step: Vec<_> = dead.items.iter().filter(|item| phase(&item.key) == step).collect();
            let locked = self.remove(&of_step, began, (swept, progress)).await?;
            // A backup whose COMMIT a lock holds stays as a whole, with what it needs of others. One that was locked, or held
            // by law, only since it was asked is gone elsewhere by now.
            if step == 0 && !locked.is_empty() {
                self.bring_back((begun, &facts), &commits, &locked).await?;
                swept.backups.retain(|id| !locked.contains(id.as_str()));
                free.retain(|id| !locked.contains(id.as_str()));
                dead.items.retain(|item| !locked.contains(&item.of));
                facts = self.look(std::mem::take(&mut facts.inventories)).await?;
                dead = self.still_dead(&facts, (&free, &dead.items)).await?;
                self.without_doubt(&mut dead.items, swept).await;
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
            lock: self.lock.map(str::to_owned),
        };
        let key = layout::sweep(&begun.id);
        let body = records::encode(&repository.id, writer, (sweeps::BEGUN, &key), &begun)?;
        repository.regions.put_everywhere(&key, body).await.during(|| "announce the sweep")?;
        let others = sweeps::running(repository, at).await?;
        match others.iter().find(|other| other.id != begun.id && !other.held(self.lock)) {
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
        let facts = Facts::gather(self.repository, self.writer, (self.grace, known)).await?;
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

    /// What of `items` nobody needs if `doomed` go, and why by now: WAL that was to go as a whole epoch may be needed again, and go
    /// only because it lies in a bundle.
    async fn still_dead(&self, facts: &Facts, (doomed, items): (&BTreeSet<BackupId>, &[Item])) -> Result<Dead> {
        let search = Search { rules: self.rules, doomed, grace: self.grace, keysets: self.keysets };
        let Garbage { items: found, epochs, .. } = search.run(self.repository, facts).await?;
        let name = |item: &Item| (item.region.clone(), item.key.clone(), item.version.clone());
        let wanted: BTreeSet<_> = items.iter().map(name).collect();
        Ok(Dead { items: found.into_iter().filter(|item| wanted.contains(&name(item))).collect(), epochs })
    }

    /// Frames go when each of them was compared with its bundle, in every region, a moment before.
    async fn without_doubt(&self, items: &mut Vec<Item>, swept: &mut Swept) {
        let mut bundles: BTreeMap<&str, Vec<&Item>> = BTreeMap::new();
        for item in items.iter().filter(|item| item.why == Why::Bundled) {
            bundles.entry(&item.of).or_default().push(item);
        }
        let mut broken = BTreeSet::new();
        for (bundle, frames) in bundles {
            if let Err(error) = replaced::replaces(self.repository, bundle, &frames).await {
                let doubt = format!("the WAL frames of {bundle} stay: {error}");
                tracing::error!(%error, bundle, "WAL frames stay: their bundle is not what it should be");
                if !swept.doubts.contains(&doubt) {
                    swept.doubts.push(doubt);
                }
                broken.insert(bundle.to_owned());
            }
        }
        items.retain(|item| item.why != Why::Bundled || !broken.contains(&item.of));
    }

    /// Removes objects; tells what the locked ones are of.
    async fn remove(
        &self,
        items: &[&Item],
        began: Began,
        (swept, progress): (&mut Swept, &Phase),
    ) -> Result<BTreeSet<String>> {
        let (mut locked, mut first_error) = (BTreeSet::new(), None);
        let stopped = &AtomicBool::new(false);
        let mut deletes = stream::iter(items).map(|item| async move {
            match stopped.load(Ordering::Relaxed) {
                true => (*item, Ok(Removal::LeftAlone)),
                false => (*item, self.delete(item, began).await),
            }
        });
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
                Ok(Removal::LeftAlone) => {}
                // Those on their way are waited for: what is gone and what is not is asked next.
                Err(error) => {
                    stopped.store(true, Ordering::Relaxed);
                    first_error = first_error.or(Some(error));
                }
            }
        }
        first_error.map_or(Ok(locked), Err)
    }

    async fn delete(&self, item: &Item, began: Began) -> Result<Removal> {
        let clock = &self.writer.clock;
        // A host that sleeps counts no time meanwhile, and a clock may be set back.
        let awake = clock.monotonic().saturating_sub(began.0);
        let by_the_clock = (clock.now() - began.1).to_std().unwrap_or_default();
        if awake.max(by_the_clock) > AT_MOST {
            return Err(Error::new(Kind::Failed, "the sweep takes too long; the next one goes on"));
        }
        let region = self.repository.regions.named(&item.region)?;
        match region.store.delete_version(&item.key, &VersionId(item.version.clone())).await {
            Ok(()) => Ok(Removal::Done),
            Err(StoreError::Retained { until, .. }) => Ok(Removal::Locked(until)),
            Err(error) => Err(Error::from(error).during(format!("prune region {}", item.region))),
        }
    }
}
