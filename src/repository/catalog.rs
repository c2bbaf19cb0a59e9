//! Which backups exist, and in which regions they are whole.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures::future::join;
use futures::{StreamExt, TryStreamExt, stream};

use crate::codec::sign::split_text;
use crate::model::commit::{Commit, CopyOf};
use crate::model::{BackupId, Error, KeysetId, Kind, RegionName, RepositoryId, Result, SignerId, TargetName};
use crate::repository::format;
use crate::repository::handle::Repository;
use crate::repository::inventory::{self, InventoryLine};
use crate::repository::layout;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::records::tombs::{self, Torn};
use crate::repository::regions::Region;
use crate::repository::regions::list_all;
use crate::store::{Digest, ListedObject};

/// A backup that exists: its COMMIT is readable in at least one region.
#[derive(Debug, Clone)]
pub struct Backup {
    /// What it says of itself.
    pub commit: Commit,
    /// Who signed that.
    pub signer: SignerId,
}

/// What a region lacks of a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Debt {
    /// Objects that are not there.
    pub missing: Vec<String>,
    /// Objects whose size is wrong.
    pub damaged: Vec<String>,
    /// Whether the region could be read at all.
    pub unreadable: Option<String>,
}

impl Debt {
    /// Whether the region holds the whole backup, as far as names and sizes tell.
    pub const fn is_none(&self) -> bool {
        self.missing.is_empty() && self.damaged.is_empty() && self.unreadable.is_none()
    }
}

/// Requests in flight when many small records are read.
const READS: usize = 16;

/// All backups of `target`, or of every target, oldest first. One that is being pruned is none, also where its COMMIT is
/// left. A COMMIT that no region holds intact is an error in the
/// second list, never a backup that is quietly missing.
///
/// # Errors
/// No region answers.
pub async fn backups(repository: &Repository, target: Option<&TargetName>) -> Result<(Vec<Backup>, Vec<Error>)> {
    let prefix = target.map_or_else(|| layout::COMMITS.to_owned(), layout::commits);
    let keys = without_pruned(repository, target, tombs::holders(repository, &prefix).await?).await?;
    let reads = stream::iter(keys).map(|key| async move { read_commit(repository, &key).await });
    let (mut backups, mut errors) = (Vec::new(), Vec::new());
    for read in reads.buffered(READS).collect::<Vec<_>>().await {
        match read {
            Ok(backup) => backups.push(backup),
            Err(error) => errors.push(error),
        }
    }
    backups.sort_by(|a, b| (a.commit.started_at, &a.commit.id).cmp(&(b.commit.started_at, &b.commit.id)));
    Ok((backups, errors))
}

/// The backups that `what` may name, as [`backups`] gives them: where it is the whole id of one, that one alone.
///
/// # Errors
/// No region answers; or a newer drctl wrote the one that is named.
pub async fn named(repository: &Repository, what: &str) -> Result<(Vec<Backup>, Vec<Error>)> {
    if let Ok(id) = what.parse::<BackupId>()
        && let Ok(target) = id.target()
    {
        let key = layout::commit(&target, &id);
        let (held, backup) = join(tombs::holders(repository, &key), read_commit(repository, &key)).await;
        let keys = without_pruned(repository, Some(&target), held?).await?;
        match backup {
            Ok(backup) if keys.contains(&key) => return Ok((vec![backup], Vec::new())),
            Err(error) if keys.contains(&key) && error.kind() == Kind::Newer => return Err(error),
            _ => {}
        }
    }
    backups(repository, None).await
}

/// The names of COMMITs in any region that answers, except of backups that a sweep has begun to remove.
///
/// A tomb alone hides nothing, since whoever may write could write one: a COMMIT must be gone as well, in a region that holds the
/// tomb, and in more of them than may owe it; and those that have it must hold the tomb, too. Before that nothing of the backup is gone anywhere, because COMMITs go first.
async fn without_pruned(
    repository: &Repository,
    target: Option<&TargetName>,
    (copies, answered): (BTreeMap<String, BTreeSet<RegionName>>, BTreeSet<RegionName>),
) -> Result<BTreeSet<String>> {
    let id = |key: &String| key.rsplit('/').next()?.parse::<BackupId>().ok();
    let torn = copies.iter().filter(|(_, held)| held.len() < answered.len());
    let torn = torn.filter_map(|(key, held)| Some((id(key)?, Torn::new(held.clone(), &answered))));
    let gone = tombs::gone(repository, target, &torn.collect()).await?;
    let exists = |key: &String| id(key).is_none_or(|id| !gone.contains(&id));
    Ok(copies.into_keys().filter(exists).collect())
}

/// Whether a backup was pruned: taken, or about to be by a sweep that already took a copy of its COMMIT.
///
/// # Errors
/// No region answers.
pub async fn is_pruned(repository: &Repository, backup: &BackupId) -> Result<bool> {
    let target = backup.target()?;
    let key = layout::commit(&target, backup);
    let (names, answered) = tombs::holders(repository, &key).await?;
    let torn = Torn::new(names.get(&key).cloned().unwrap_or_default(), &answered);
    let gone = tombs::gone(repository, Some(&target), &BTreeMap::from([(backup.clone(), torn)])).await?;
    Ok(gone.contains(backup))
}

async fn read_commit(repository: &Repository, key: &str) -> Result<Backup> {
    let parse = |bytes: Bytes| {
        let commit = parse_commit(repository, key, &bytes)?;
        Ok(Backup { commit, signer: split_text(&bytes)?.signer })
    };
    repository.regions.read(key, None, parse).await.map(|(backup, _)| backup)
}

/// What a COMMIT's signature is bound to.
pub fn commit_context(repository: &RepositoryId, id: &BackupId) -> String {
    format!("commit {repository} {id}")
}

/// Reads a COMMIT object and checks signature and name.
///
/// # Errors
/// It is not a COMMIT of this repository under this name, not signed by a trusted signer, or of a newer drctl.
pub fn parse_commit(repository: &Repository, key: &str, bytes: &[u8]) -> Result<Commit> {
    let wrong = |why: &str| Error::damaged(format!("{key} {why}"));
    let id: BackupId =
        key.rsplit('/').next().unwrap_or_default().parse().map_err(|_| wrong("is not named as a backup"))?;
    let body = repository.trust.verify_text(&commit_context(&repository.id, &id), bytes)?;
    let commit: Commit = format::parse(key, body)?;
    // Below the name of another target, one id would stand for two backups.
    if commit.id != id || id.target()? != commit.target || layout::commit(&commit.target, &id) != key {
        return Err(wrong("belongs elsewhere"));
    }
    Ok(commit)
}

/// What `commit` says that it is a copy of. A copy that contradicts the backup which it says it is of counts as a backup of
/// its own: it must not take that one's place.
pub fn copy_among(commit: &Commit, all: &[&Commit]) -> Option<CopyOf> {
    let copy = commit.copy.clone()?;
    let original = all.iter().find(|other| other.id == copy.backup);
    original.is_none_or(|original| commit.is_of_the_moment_of(original)).then_some(copy)
}

/// Finds the one backup that `text` names: a whole id, an unambiguous prefix, a target (its newest) or `latest`.
///
/// # Errors
/// Nothing fits, or several do; the error lists them.
pub fn select<'a>(backups: &'a [Backup], text: &str) -> Result<&'a Backup> {
    let newest = |target: Option<&str>| {
        let of_target = |backup: &&Backup| target.is_none_or(|target| backup.commit.target.as_str() == target);
        backups.iter().rfind(of_target)
    };
    if let Some(exact) = backups.iter().find(|backup| backup.commit.id.as_str() == text) {
        return Ok(exact);
    }
    if text == "latest" {
        let targets: BTreeSet<_> = backups.iter().map(|backup| backup.commit.target.as_str()).collect();
        if targets.len() > 1 {
            let names = targets.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::usage("`latest` fits several targets").hint(format!("name one of: {names}")));
        }
        return newest(None).ok_or_else(|| Error::not_found("there is no backup yet"));
    }
    if let Some(backup) = newest(Some(text)) {
        return Ok(backup);
    }
    let fitting: Vec<_> = backups.iter().filter(|backup| backup.commit.id.as_str().starts_with(text)).collect();
    match fitting.as_slice() {
        [one] => Ok(one),
        [] => Err(Error::not_found(format!("no backup and no target is named `{text}`")).hint("see: drctl list")),
        several => {
            let ids = several.iter().map(|backup| backup.commit.id.as_str()).collect::<Vec<_>>().join(", ");
            Err(Error::usage(format!("`{text}` fits {} backups", several.len())).hint(format!("one of: {ids}")))
        }
    }
}

/// The same, of what [`backups`] found: one that is named by its whole id and could not be read does not just fail to exist.
///
/// # Errors
/// As [`select`]; or why it could not be read.
pub fn find<'a>((backups, unreadable): (&'a [Backup], &[Error]), text: &str) -> Result<&'a Backup> {
    select(backups, text).map_err(|error| {
        let named = |unread: &&Error| text.parse::<BackupId>().is_ok() && unread.message().contains(text);
        unreadable.iter().find(named).cloned().unwrap_or(error)
    })
}

/// Every object that a backup needs, except its COMMIT, the inventory itself and WAL.
///
/// # Errors
/// A part is in no region intact, or the parts are not those that COMMIT signed.
pub async fn inventory(repository: &Repository, commit: &Commit) -> Result<Vec<InventoryLine>> {
    let (mut lines, mut summary) = (Vec::new(), PartsSummary::default());
    let reads = stream::iter(0..commit.inventory.count).map(|part| async move {
        let key = layout::inventory(&commit.target, &commit.id, part);
        let parse = |bytes: Bytes| {
            let lines = inventory::decode_part(&bytes, &repository.id, (&commit.id, part), &repository.trust)?;
            Ok((lines, bytes.len() as u64, Digest::of(&bytes)))
        };
        repository.regions.read(&key, None, parse).await
    });
    let mut reads = std::pin::pin!(reads.buffered(READS));
    while let Some(((part, size, digest), _)) = reads.try_next().await? {
        summary.add(size, digest);
        lines.extend(part);
    }
    if summary.finish() != commit.inventory {
        return Err(Error::damaged(format!("the inventory of {} is not the one that its COMMIT signed", commit.id)));
    }
    Ok(lines)
}

/// Every keyset of a backup's closure: its own, and those of earlier backups whose pages it shares.
pub fn keysets(commit: &Commit, inventory: &[InventoryLine]) -> BTreeSet<KeysetId> {
    let wrapped = inventory.iter().filter_map(|line| {
        let mut parts = line.key.strip_prefix("keysets/")?.split('/').skip(1);
        parts.next()?.parse().ok()
    });
    wrapped.chain([commit.keyset.clone()]).collect()
}

/// The objects of a backup beyond its inventory: the inventory's own parts and COMMIT. Their sizes are not listed
/// anywhere; they authenticate themselves.
pub fn own_records(commit: &Commit) -> Vec<String> {
    let parts = (0..commit.inventory.count).map(|part| layout::inventory(&commit.target, &commit.id, part));
    parts.chain([layout::commit(&commit.target, &commit.id)]).collect()
}

/// The names and sizes that one region holds of one target, read once for many backups.
#[derive(Debug)]
pub struct Held {
    objects: Result<BTreeMap<String, u64>>,
}

impl Held {
    /// Lists a region.
    pub async fn list(region: &Region, target: &TargetName) -> Self {
        let lists = ["commits", "inventories", "keysets", "manifests", "packs"]
            .map(|kind| async move { list_all(region.store.as_ref(), &format!("{kind}/{target}/")).await });
        let lists = futures::future::try_join_all(lists).await;
        let sizes = |object: ListedObject| (object.key, object.size);
        Self { objects: lists.map(|lists| lists.into_iter().flatten().map(sizes).collect()) }
    }

    /// What the region lacks of a backup.
    pub fn debt(&self, commit: &Commit, inventory: &[InventoryLine]) -> Debt {
        let objects = match &self.objects {
            Ok(objects) => objects,
            Err(error) => return Debt { unreadable: Some(error.to_string()), ..Debt::default() },
        };
        let mut debt = Debt::default();
        for line in inventory {
            match objects.get(&line.key) {
                None => debt.missing.push(line.key.clone()),
                Some(size) if *size != line.size => debt.damaged.push(line.key.clone()),
                Some(_) => {}
            }
        }
        debt.missing.extend(own_records(commit).into_iter().filter(|key| !objects.contains_key(key)));
        debt
    }

    /// Which of these objects are not there with their size; `None` if the region could not be read.
    pub fn lacks(&self, lines: &[InventoryLine]) -> Option<Vec<String>> {
        let objects = self.objects.as_ref().ok()?;
        let lacking = lines.iter().filter(|line| objects.get(&line.key) != Some(&line.size));
        Some(lacking.map(|line| line.key.clone()).collect())
    }

    /// Whether it holds this name.
    pub fn has(&self, key: &str) -> bool {
        self.objects.as_ref().is_ok_and(|objects| objects.contains_key(key))
    }

    /// The names it holds below `prefix`.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let keys = self.objects.iter().flat_map(BTreeMap::keys);
        keys.map(String::as_str).filter(move |key| key.starts_with(prefix))
    }
}

/// What every region lists of a target.
pub async fn held_everywhere(repository: &Repository, target: &TargetName) -> Vec<(RegionName, Held)> {
    let held = repository
        .regions
        .all()
        .iter()
        .map(|region| async move { (region.name.clone(), Held::list(region, target).await) });
    futures::future::join_all(held).await
}

/// What each region lacks of each backup of one target.
///
/// # Errors
/// An inventory is in no region intact.
pub async fn debts(repository: &Repository, backups: &[Backup]) -> Result<BTreeMap<BackupId, Vec<(RegionName, Debt)>>> {
    let targets: BTreeSet<_> = backups.iter().map(|backup| &backup.commit.target).collect();
    let mut debts = BTreeMap::new();
    for target in targets {
        let held = held_everywhere(repository, target).await;
        for backup in backups.iter().filter(|backup| backup.commit.target == *target) {
            let lines = inventory(repository, &backup.commit).await?;
            let of_region = |(name, held): &(RegionName, Held)| (name.clone(), held.debt(&backup.commit, &lines));
            debts.insert(backup.commit.id.clone(), held.iter().map(of_region).collect());
        }
    }
    Ok(debts)
}
