//! Bringing regions back to equal, without any key.
//!
//! For every name that some region holds there is one set of bytes that is right, and bytes prove themselves: by the
//! digest in a signed inventory, by their own signature, by the hash in their name. What a region lacks is copied verbatim
//! from one that has it, in the order of [`layout::REPAIR_ORDER`], and a COMMIT only where all of its backup arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::keys::{Wrap, WrapContext};
use crate::model::{Branch, Error, HolderId, KeysetId, Kind, RegionName, Result, SignerId, TargetName};
use crate::observe::progress::Phase;
use crate::repository::catalog::{self, Backup};
use crate::repository::escape;
use crate::repository::handle::Repository;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::layout;
use crate::repository::prune;
use crate::repository::records::pins;
use crate::repository::records::reports;
use crate::repository::records::runs;
use crate::repository::records::tombs::Pruned;
use crate::repository::regions::Region;
use crate::repository::regions::identity::RepositoryRecord;
use crate::repository::trust::SignerRecord;
use crate::repository::wal::bundling::check_bundle;
use crate::repository::wal::frame::{Frame, FrameKind, FramePlace};
use crate::repository::wal::gaps::Gap;
use crate::store::Digest;

mod displaced;

/// Objects in hand; each holds two copies at most.
const OBJECTS: usize = 8;

/// What is to be mended.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// Backups of this target alone, with what every backup shares.
    pub target: Option<TargetName>,
    /// This region alone.
    pub region: Option<RegionName>,
    /// Look at names and sizes alone, not at every byte.
    pub quick: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Nobody looks: a place that does not show that it is a region may not be mounted, and is left alone.
    pub unattended: bool,
}

/// What was done to one region.
#[derive(Debug, Clone, Serialize)]
pub struct Mended {
    /// The region.
    pub region: RegionName,
    /// Objects that it lacked.
    pub copied: u64,
    /// Objects whose wrong bytes were replaced.
    pub replaced: Vec<String>,
    /// Bytes written.
    pub bytes: u64,
    /// What it lacks still.
    pub still_missing: Vec<StillMissing>,
}

/// An object that could not be mended.
#[derive(Debug, Clone, Serialize)]
pub struct StillMissing {
    /// Its name.
    pub key: String,
    /// Why.
    pub why: String,
}

/// What makes bytes right.
#[derive(Debug, Clone)]
enum Proof {
    /// A signed inventory names size and digest.
    Listed(InventoryLine),
    /// The bytes speak for themselves.
    Own,
    /// Nothing but agreement: more than half of the regions that hold the name hold these bytes.
    Majority,
}

#[derive(Debug)]
struct Item {
    key: String,
    proof: Proof,
    /// Region → listed size.
    held: BTreeMap<RegionName, u64>,
    /// Regions that hold it in a bundle, and need it nowhere else.
    bundled: BTreeSet<RegionName>,
}

/// Mends the regions of `scope`.
///
/// # Errors
/// No region answers at all. What goes wrong with one object or one region is told in the result.
pub async fn mend(repository: &Repository, scope: &Scope, progress: &Phase) -> Result<Vec<Mended>> {
    if let Some(region) = &scope.region {
        repository.regions.named(region)?;
    }
    let regions = if scope.unattended { repository.regions.clone() } else { repository.regions.bare() };
    let repository = &Repository { regions, ..repository.clone() };
    let (backups, unreadable) = catalog::backups(repository, scope.target.as_ref()).await?;
    for error in &unreadable {
        tracing::warn!(%error, "no region holds this COMMIT intact");
    }
    let closure = closure(repository, &backups).await;
    let pruned = Pruned::load(repository).await?;
    let done = Mutex::new(start(repository, scope));
    let mender = Mender { repository, scope, closure, pruned, done, beaten: Mutex::default(), progress };
    for class in layout::REPAIR_ORDER {
        let items = mender.items(class).await?;
        stream::iter(items).for_each_concurrent(OBJECTS, |item| mender.settle(item)).await;
    }
    mender.put_beside().await;
    let done = mender.done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(done.into_values().collect())
}

fn start(repository: &Repository, scope: &Scope) -> BTreeMap<RegionName, Mended> {
    let wanted = repository.regions.all().iter().map(|region| region.name.clone());
    let wanted = wanted.filter(|name| scope.region.as_ref().is_none_or(|only| only == name));
    let begin = |region: RegionName| {
        let mended =
            Mended { region: region.clone(), copied: 0, replaced: Vec::new(), bytes: 0, still_missing: Vec::new() };
        (region, mended)
    };
    wanted.map(begin).collect()
}

/// Everything that readable inventories name, and which COMMIT needs it.
#[derive(Debug, Default)]
struct Closure {
    lines: BTreeMap<String, InventoryLine>,
    needs: BTreeMap<String, Vec<String>>,
    /// When the youngest backup began that needs an object: its lock counts from there, also where it is brought later.
    since: BTreeMap<String, DateTime<Utc>>,
}

impl Closure {
    fn has_keyset(&self, keyset: &KeysetId) -> bool {
        let of = |key: &String| key.strip_prefix(layout::KEYSETS)?.split('/').nth(1)?.parse::<KeysetId>().ok();
        let wraps = self.lines.range(layout::KEYSETS.to_owned()..);
        wraps
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(layout::KEYSETS))
            .any(|key| of(key).as_ref() == Some(keyset))
    }
}

async fn closure(repository: &Repository, backups: &[Backup]) -> Closure {
    let mut closure = Closure::default();
    for Backup { commit } in backups {
        let mut needs = catalog::own_records(commit);
        let key = needs.pop().unwrap_or_default();
        match catalog::inventory(repository, commit).await {
            Ok(lines) => {
                needs.extend(lines.iter().map(|line| line.key.clone()));
                closure.lines.extend(lines.into_iter().map(|line| (line.key.clone(), line)));
            }
            Err(error) => tracing::warn!(%error, backup = %commit.id, "its objects cannot be compared"),
        }
        for needed in needs.iter().chain([&key]) {
            let since = closure.since.entry(needed.clone()).or_insert(commit.started_at);
            *since = commit.started_at.max(*since);
        }
        closure.needs.insert(key, needs);
    }
    closure
}

struct Mender<'a> {
    repository: &'a Repository,
    scope: &'a Scope,
    closure: Closure,
    pruned: Pruned,
    done: Mutex<BTreeMap<RegionName, Mended>>,
    /// Frames whose name a SEAL has in some region.
    beaten: Mutex<BTreeSet<String>>,
    progress: &'a Phase,
}

/// What one region has under a name.
enum Found {
    Good,
    Wrong,
    Nothing,
    Unknown(String),
}

impl Mender<'_> {
    /// The objects of one class: those that a region lists, and those that an inventory names.
    async fn items(&self, class: &str) -> Result<Vec<Item>> {
        let prefix = self.prefix(class);
        let mut items: BTreeMap<String, Item> = BTreeMap::new();
        let mut answered = false;
        let mut last_error = None;
        for (region, list) in self.repository.regions.list_each(&prefix).await {
            match list {
                Ok(list) => {
                    answered = true;
                    // What lies beside a SEAL is made of the frame and comes last.
                    for object in list.into_iter().filter(|object| !displaced::is_beside(&object.key)) {
                        let Some(proof) = self.proof(&object.key) else { continue };
                        let item = |key: String| Item { key, proof, held: BTreeMap::new(), bundled: BTreeSet::new() };
                        let item = items.entry(object.key.clone()).or_insert_with(|| item(object.key));
                        item.held.insert(region.clone(), object.size);
                    }
                }
                Err(error) => {
                    self.still(&region, &prefix, error.to_string());
                    last_error = Some(error);
                }
            }
        }
        if let (false, Some(error)) = (answered, last_error) {
            return Err(error);
        }
        for (key, line) in self.closure.lines.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)) {
            let new = || Item {
                key: key.clone(),
                proof: Proof::Listed(line.clone()),
                held: BTreeMap::new(),
                bundled: BTreeSet::new(),
            };
            items.entry(key.clone()).or_insert_with(new);
        }
        note_bundled(&mut items);
        items.retain(|key, item| !self.is_gone(key, item));
        Ok(items.into_values().collect())
    }

    fn prefix(&self, class: &str) -> String {
        let of_target = ["keysets/", "packs/", "manifests/", "inventories/", layout::COMMITS];
        match &self.scope.target {
            Some(target) if of_target.contains(&class) => format!("{class}{target}/"),
            _ => class.to_owned(),
        }
    }

    /// What proves an object; `None` for one that nothing needs: packs of backups that were never committed.
    fn proof(&self, key: &str) -> Option<Proof> {
        if let Some(line) = self.closure.lines.get(key) {
            return Some(Proof::Listed(line.clone()));
        }
        if self.pruned.is_idle(key) {
            return None;
        }
        let class = key.split('/').next().unwrap_or_default();
        match class {
            "packs" | "manifests" => None,
            "inventories" => {
                let needed = self.closure.needs.values().any(|needs| needs.iter().any(|need| need == key));
                needed.then_some(Proof::Own)
            }
            // A wrap is authenticated by its holder alone, and no key is at hand here. A gap that two writers met has two
            // signed records of it.
            "escape" | "gaps" | "keysets" => Some(Proof::Majority),
            _ => Some(Proof::Own),
        }
    }

    /// What prune left in one region is not lacking in the others. What as many regions hold as have to hold what is acknowledged
    /// may be garbage that the next prune takes; or whoever may write said that it is gone, and another region lost it.
    fn is_gone(&self, key: &str, item: &Item) -> bool {
        let held = item.held.keys().chain(&item.bundled).collect::<BTreeSet<_>>().len();
        let few = held < self.repository.regions.lowest_quorum();
        few && self.pruned.covers(key, |keyset| self.closure.has_keyset(keyset))
    }

    /// Looks at one object everywhere and brings it where it is not.
    async fn settle(&self, item: Item) {
        let names: Vec<_> = lock(&self.done).keys().cloned().collect();
        let (good, found) = self.compare(&item, &names).await;
        let Some(good) = good else {
            for (region, found) in found {
                let why = match found {
                    Found::Good => continue,
                    Found::Unknown(why) => why,
                    Found::Nothing | Found::Wrong => "no region holds it intact".to_owned(),
                };
                self.still(&region.name, &item.key, why);
            }
            return;
        };
        for (region, found) in found {
            let wrong = match found {
                Found::Good => continue,
                Found::Unknown(why) => {
                    self.still(&region.name, &item.key, why);
                    continue;
                }
                Found::Wrong => true,
                Found::Nothing => false,
            };
            if let Some(lacking) = self.lacking(&region.name, &item.key) {
                self.still(&region.name, &item.key, format!("{lacking} of its backup is not there"));
                continue;
            }
            match self.bring(region, &item.key, &good, wrong).await {
                Ok(()) => self.note_done(&region.name, &item.key, good.len() as u64, wrong),
                Err(error) => self.still(&region.name, &item.key, error.to_string()),
            }
        }
        self.progress.advance(good.len() as u64);
    }

    /// The right bytes, and how each region of the scope stands to them.
    async fn compare(&self, item: &Item, wanted: &[RegionName]) -> (Option<Bytes>, Vec<(&Region, Found)>) {
        let regions = self.repository.regions.all();
        let is_bundled = |region: &Region| item.bundled.contains(&region.name) && !item.held.contains_key(&region.name);
        let whole =
            |region: &&Region| is_bundled(region) || self.scope.quick && self.has_listed_size(item, &region.name);
        // With names and sizes alone nothing is read as long as every region agrees.
        if regions.iter().filter(|region| wanted.contains(&region.name)).all(|region| whole(&region)) {
            return (None, Vec::new());
        }
        let mut good: Option<(Bytes, Digest)> = None;
        let (mut seen, mut seals) = (Vec::new(), Vec::new());
        for region in regions {
            let read = match item.held.contains_key(&region.name) {
                true => region.store.get(&item.key, None).await.map_err(Error::from),
                false => Err(Error::not_found("not there")),
            };
            let judged = read.and_then(|bytes| self.judge(item, &bytes).map(|()| bytes));
            seen.push((region, judged.as_ref().map(|bytes| Digest::of(bytes)).map_err(Clone::clone)));
            if let (Ok(bytes), Proof::Listed(_) | Proof::Own) = (&judged, &item.proof) {
                let is_seal = is_seal(&item.key, bytes);
                seals.extend(is_seal.then_some(&region.name));
                if good.as_ref().is_none_or(|(first, _)| !is_seal && self::is_seal(&item.key, first)) {
                    good = Some((bytes.clone(), Digest::of(bytes)));
                }
            }
        }
        if !seals.is_empty() && good.as_ref().is_some_and(|(bytes, _)| !is_seal(&item.key, bytes)) {
            lock(&self.beaten).insert(item.key.clone());
        }
        if matches!(item.proof, Proof::Majority) {
            good = self.majority(item, &seen).await;
        }
        let right = good.as_ref().map(|(_, digest)| *digest);
        let found =
            |(region, read): (&Region, Result<Digest>)| match is_bundled(region) || seals.contains(&&region.name) {
                true => Found::Good,
                false => stand(read, right, &item.proof),
            };
        let found = |(region, read)| (region, found((region, read)));
        let found = seen.into_iter().filter(|(region, _)| wanted.contains(&region.name)).map(found);
        (good.map(|(bytes, _)| bytes), found.collect())
    }

    fn has_listed_size(&self, item: &Item, region: &RegionName) -> bool {
        let Some(size) = item.held.get(region) else { return false };
        match &item.proof {
            Proof::Listed(line) => line.size == *size,
            Proof::Own | Proof::Majority => item.held.values().all(|other| other == size),
        }
    }

    async fn majority(&self, item: &Item, seen: &[(&Region, Result<Digest>)]) -> Option<(Bytes, Digest)> {
        let held: Vec<_> = seen.iter().filter_map(|(region, read)| Some((*region, *read.as_ref().ok()?))).collect();
        let votes = |digest: Digest| held.iter().filter(|(_, other)| *other == digest).count();
        let most = held.iter().copied().find(|(_, digest)| votes(*digest) * 2 > held.len());
        // Of the files that drctl itself brings along, this program knows one right copy.
        let own = escape::FILES.iter().find(|(name, _)| item.key == format!("{}{name}", layout::ESCAPE));
        let own = own.map(|(_, bytes)| Digest::of(bytes));
        let (region, digest) = most.or_else(|| held.iter().copied().find(|(_, digest)| Some(*digest) == own))?;
        let bytes = region.store.get(&item.key, None).await.ok()?;
        (Digest::of(&bytes) == digest).then_some((bytes, digest))
    }

    /// Whether these bytes are what this name promises.
    fn judge(&self, item: &Item, bytes: &Bytes) -> Result<()> {
        let wrong = |why: &str| Error::damaged(format!("{}: {why}", item.key));
        match &item.proof {
            Proof::Listed(line) => {
                let right = bytes.len() as u64 == line.size && Digest::of(bytes) == line.digest();
                if right { Ok(()) } else { Err(wrong("its digest is not the one in the inventory")) }
            }
            Proof::Majority => self.judge_record(&item.key, bytes).unwrap_or(Ok(())),
            Proof::Own => self.judge_record(&item.key, bytes).ok_or_else(|| wrong("it does not prove itself"))?,
        }
    }

    /// `None` for a name that is not one of ours.
    fn judge_record(&self, key: &str, bytes: &Bytes) -> Option<Result<()>> {
        let repository = self.repository;
        let parts: Vec<_> = key.split('/').collect();
        Some(match parts.as_slice() {
            [layout::REPOSITORY] => RepositoryRecord::parse(bytes).and_then(|record| {
                let own = record.repository == repository.id;
                if own { Ok(()) } else { Err(Error::damaged("it belongs to another repository")) }
            }),
            ["regions", _, digest] => {
                let right = Digest::of(bytes).to_string().starts_with(digest);
                if right { Ok(()) } else { Err(Error::damaged("its digest is not the one in its name")) }
            }
            ["signers", id] => SignerRecord::decode(&id.parse::<SignerId>().ok()?, bytes).map(|_| ()),
            ["keysets", target, keyset, holder] => {
                let target = target.parse().ok()?;
                let keyset = keyset.parse().ok()?;
                let context = WrapContext { repository: repository.id.clone(), target, keyset };
                let damaged = |error| Error::damaged("it is not a wrap of this holder").because(error);
                Wrap::from_bytes(&holder.parse::<HolderId>().ok()?, bytes).map_err(damaged).and_then(|wrap| {
                    let own = wrap.context == context;
                    if own { Ok(()) } else { Err(Error::damaged("it belongs to another keyset")) }
                })
            }
            ["history", _, name] => {
                let branch: Branch = layout::parse_branch(name)?.1;
                let right = Branch::from_history_digest(&Digest::of(bytes).0) == branch;
                if right { Ok(()) } else { Err(Error::damaged("its digest is not the one in its name")) }
            }
            ["wal", system, branch, epoch, seq] => {
                let (timeline, branch) = layout::parse_branch(branch)?;
                let (epoch, bundle) = (epoch.parse().ok()?, layout::parse_bundle(seq));
                let seq = bundle.map(|(first, _)| first).or_else(|| layout::parse_seq(seq))?;
                let place = FramePlace { system_id: system.parse().ok()?, timeline, branch, epoch, seq };
                if let Some(numbers) = bundle {
                    return Some(check_bundle(bytes, numbers, repository, &place));
                }
                Frame::decode(bytes, &repository.id, &place, &repository.trust).map(|_| ())
            }
            ["inventories", _, id, part] => {
                let (id, part) = (id.parse().ok()?, part.parse().ok()?);
                inventory::decode_part(bytes, &repository.id, (&id, part), &repository.trust).map(|_| ())
            }
            ["gaps", ..] => Gap::decode(repository, key, bytes).map(|_| ()),
            ["reports", ..] => reports::decode_head(repository, key, bytes).map(|_| ()),
            ["commits", ..] => catalog::parse_commit(repository, key, bytes).map(|_| ()),
            ["runs", ..] => runs::decode(repository, key, bytes).map(|_| ()),
            ["pins" | "unpins", ..] => pins::check(repository, key, bytes),
            ["pruned" | "sweeps", ..] => prune::check_record(repository, key, bytes),
            _ => return None,
        })
    }

    /// An object of the backup that this COMMIT makes exist, and that the region lacks still.
    fn lacking(&self, region: &RegionName, key: &str) -> Option<String> {
        let needs: BTreeSet<&str> = self.closure.needs.get(key)?.iter().map(String::as_str).collect();
        let done = lock(&self.done);
        let missing = done.get(region)?.still_missing.iter();
        missing.map(|missing| &missing.key).find(|key| needs.contains(key.as_str())).cloned()
    }

    async fn bring(&self, region: &Region, key: &str, good: &Bytes, wrong: bool) -> Result<()> {
        if self.scope.dry_run {
            return Ok(());
        }
        if wrong {
            remove_wrong_copy(region, key, Digest::of(good)).await?;
        }
        region.put(key, (good.clone(), Digest::of(good)), self.closure.since.get(key).copied()).await?;
        Ok(())
    }

    fn note_done(&self, region: &RegionName, key: &str, bytes: u64, wrong: bool) {
        if let Some(mended) = lock(&self.done).get_mut(region) {
            mended.bytes += bytes;
            if wrong { mended.replaced.push(key.to_owned()) } else { mended.copied += 1 }
        }
    }

    fn still(&self, region: &RegionName, key: &str, why: String) {
        if let Some(mended) = lock(&self.done).get_mut(region) {
            mended.still_missing.push(StillMissing { key: key.to_owned(), why });
        }
    }
}

/// A SEAL may stand under the name of a frame that another region took first, or of another SEAL. It is right where it is,
/// and the frame is what other regions need; how the region itself comes to it, see [`displaced`].
fn is_seal(key: &str, bytes: &[u8]) -> bool {
    key.starts_with(layout::WAL) && Frame::kind(bytes) == Some(FrameKind::Seal)
}

fn stand(read: Result<Digest>, right: Option<Digest>, proof: &Proof) -> Found {
    match read {
        Ok(digest) if Some(digest) == right => Found::Good,
        // Both prove themselves: which of them is right cannot be told without a key, so neither is touched.
        Ok(_) if right.is_none() || matches!(proof, Proof::Own) => {
            Found::Unknown("regions hold different copies, and nothing tells which is right".to_owned())
        }
        Ok(_) => Found::Wrong,
        Err(error) if error.kind() == Kind::NotFound => Found::Nothing,
        Err(error) if error.kind() == Kind::Damaged => Found::Wrong,
        Err(error) => Found::Unknown(error.to_string()),
    }
}

/// Removes an object whose bytes are provably not the right ones, so that the right ones can take its name.
///
/// Names are create-only and nothing else in drctl deletes outside of prune. This is the one exception, because the name
/// of a damaged object is the only place where readers look for the right one. The copy is read once more immediately
/// before, and stays if it is right after all; the right bytes are in hand, from another region, so that what is lost if
/// this process dies now is a copy that no reader would accept.
async fn remove_wrong_copy(region: &Region, key: &str, right: Digest) -> Result<()> {
    match region.store.get(key, None).await {
        Ok(bytes) if Digest::of(&bytes) == right => return Ok(()),
        Err(error) if error.is_not_found() => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(region.store.delete(key).await?)
}

/// Branches have a `-` in their names, too.
fn is_frame(key: &str) -> bool {
    key.rsplit('/').next().and_then(layout::parse_seq).is_some()
}

/// What prune took out of one region because it lies there in a bundle is not lacking.
fn note_bundled(items: &mut BTreeMap<String, Item>) {
    let bundle = |key: &String, item: &Item| {
        let (prefix, numbers) = key.split_at_checked(key.rfind('/')? + 1)?;
        let (first, last) = layout::parse_bundle(numbers)?;
        key.starts_with(layout::WAL).then(|| (prefix.to_owned(), first, last, item.held.keys().cloned().collect()))
    };
    let bundles: Vec<(_, _, _, BTreeSet<_>)> = items.iter().filter_map(|(key, item)| bundle(key, item)).collect();
    for (prefix, first, last, held) in bundles {
        let frames = layout::wal_frame(&prefix, first)..=layout::wal_frame(&prefix, last);
        // The bundles' own names sort among those of their frames.
        for (_, item) in items.range_mut(frames).filter(|(key, _)| is_frame(key)) {
            item.bundled.extend(held.iter().cloned());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
