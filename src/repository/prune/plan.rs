//! Plans: what a prune found, written down before anything is removed. Signed JSON lines in every region.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::codec::sign::split_text;
use crate::model::{BackupId, Error, KeysetId, Kind, PruneId, Result, ResultExt, SignerId, TargetName};
use crate::repository::FORMAT;
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::prune::garbage::Item;
use crate::repository::records;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::store::Digest;

const PLAN: &str = "prune plan";
const LINES_PER_PART: usize = 20_000;

/// The first line of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Version of the repository format.
    pub format: u32,
    /// Which.
    pub id: PruneId,
    /// When.
    pub at: DateTime<Utc>,
    /// Who.
    pub host: String,
    /// drctl's version.
    pub drctl: String,
    /// The backups that are to go, and why.
    pub backups: Vec<Doomed>,
    /// Objects in all parts.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How many parts there are.
    pub parts: u32,
}

/// A backup that is to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Doomed {
    /// Which.
    pub id: BackupId,
    /// Of what.
    pub target: TargetName,
    /// Whether a drill ever proved it.
    pub proven: bool,
    /// Why, in words.
    pub why: String,
}

/// What a prune found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Its first line.
    pub head: Head,
    /// What may go, sorted.
    pub items: Vec<Item>,
}

impl Plan {
    /// A plan of `items`.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(writer: &Writer, backups: Vec<Doomed>, mut items: Vec<Item>) -> Result<Self> {
        items.sort();
        let at = writer.clock.now();
        let head = Head {
            format: FORMAT,
            id: PruneId::new(at, writer.rng.as_ref())?,
            at,
            host: writer.host.clone(),
            drctl: env!("CARGO_PKG_VERSION").to_owned(),
            backups,
            objects: items.len() as u64,
            bytes: items.iter().map(|item| item.size).sum(),
            parts: u32::try_from(items.len().div_ceil(LINES_PER_PART).max(1)).unwrap_or(u32::MAX),
        };
        Ok(Self { head, items })
    }

    /// The keysets that it wants to remove.
    pub fn keysets(&self) -> BTreeSet<(TargetName, KeysetId)> {
        let wraps = self.items.iter().filter_map(|item| layout::parse_wrap(&item.key));
        wraps.map(|(target, keyset, _)| (target, keyset)).collect()
    }

    fn encode(&self, repository: &Repository, writer: &Writer) -> Result<Vec<(String, Bytes)>> {
        let chunks: Vec<_> = self.items.chunks(LINES_PER_PART).collect();
        let mut parts = Vec::new();
        for part in 0..self.head.parts {
            let key = layout::plan_part(&self.head.id, part);
            let mut body = Vec::new();
            if part == 0 {
                line(&mut body, &self.head)?;
            }
            for item in chunks.get(part as usize).copied().unwrap_or_default() {
                line(&mut body, item)?;
            }
            let bytes = records::sign(&repository.id, writer, (PLAN, &key), &body)?;
            parts.push((key, bytes));
        }
        Ok(parts)
    }

    /// Stores it in every region, the first part last: a plan without one was never finished.
    ///
    /// # Errors
    /// A region does not take it.
    pub async fn store(&self, repository: &Repository, writer: &Writer) -> Result<()> {
        enroll(repository, writer).await?;
        for (key, bytes) in self.encode(repository, writer)?.into_iter().rev() {
            repository.regions.put_everywhere(&key, bytes).await.during(|| "store the plan")?;
        }
        Ok(())
    }

    /// Reads the plan `id`, and checks that `trusted` accepts who signed it.
    ///
    /// # Errors
    /// It is not whole, not readable, or of a signer who is not accepted.
    pub async fn read(repository: &Repository, id: &PruneId, trusted: impl Fn(&SignerId) -> bool) -> Result<Self> {
        let mut lines = Vec::new();
        let mut head: Option<Head> = None;
        let mut part = 0;
        while part < head.as_ref().map_or(1, |head| head.parts) {
            let key = layout::plan_part(id, part);
            let body = read_part(repository, &key, &trusted).await?;
            let mut rows = body.split(|byte| *byte == b'\n').filter(|row| !row.is_empty());
            if part == 0 {
                let first = rows.next().ok_or_else(|| Error::damaged(format!("{key} is empty")))?;
                head = Some(parse(&key, first)?);
            }
            for row in rows {
                lines.push(parse::<Item>(&key, row)?);
            }
            part += 1;
        }
        let head = head.filter(|head| head.format == FORMAT && head.id == *id && head.objects == lines.len() as u64);
        let head = head.ok_or_else(|| Error::damaged(format!("the plan {id} is not whole")))?;
        Ok(Self { head, items: lines })
    }
}

fn line<T: Serialize>(body: &mut Vec<u8>, value: &T) -> Result<()> {
    serde_json::to_writer(&mut *body, value).map_err(|error| Error::failed("a plan is not JSON").because(error))?;
    body.push(b'\n');
    Ok(())
}

fn parse<T: serde::de::DeserializeOwned>(key: &str, row: &[u8]) -> Result<T> {
    serde_json::from_slice(row).map_err(|error| Error::damaged(format!("{key} is not readable")).because(error))
}

async fn read_part(repository: &Repository, key: &str, trusted: &impl Fn(&SignerId) -> bool) -> Result<Vec<u8>> {
    let check = |bytes: Bytes| {
        let signer = split_text(&bytes)?.signer;
        if !trusted(&signer) {
            let error = Error::refused(format!("{key} is signed by {signer}, whom nobody named"));
            return Err(error.hint(format!("if you know it: add it to `signers`, or pass --trust-signer {signer}")));
        }
        records::verify(repository, (PLAN, key), &bytes).map(<[u8]>::to_vec)
    };
    repository.regions.read(key, None, check).await.map(|(body, _)| body)
}

/// Publishes the writer's key in every region: what it signs is worth nothing without.
pub(super) async fn enroll(repository: &Repository, writer: &Writer) -> Result<()> {
    let out = FanOut::new(&repository.regions, Patience::PUSH);
    repository.enroll(writer, &out).await.during(|| "enrol the signer")?;
    out.drain().await;
    Ok(())
}

/// The ids of stored plans, oldest first, with the time since when every region holds them whole by its own clock.
///
/// # Errors
/// A region does not answer.
pub async fn stored(repository: &Repository) -> Result<BTreeMap<PruneId, Option<DateTime<Utc>>>> {
    let regions = repository.regions.all().len();
    let mut plans = BTreeMap::new();
    for (key, copies) in super::facts::list_everywhere(&repository.regions, layout::PRUNES).await? {
        let id = key.strip_prefix(layout::PRUNES).and_then(|rest| rest.strip_suffix("/000000")?.parse().ok());
        let Some(id) = id else { continue };
        let times: Option<Vec<_>> = copies.iter().map(|copy| copy.modified).collect();
        let since = times.filter(|times| times.len() == regions).and_then(|times| times.into_iter().max());
        plans.insert(id, since);
    }
    Ok(plans)
}

/// The newest plan whose grace period is over, by its own time and by the time at which each region got it.
///
/// # Errors
/// A region does not answer, or the plan is not readable or not of an accepted signer.
pub async fn ripe(
    repository: &Repository,
    (now, grace): (DateTime<Utc>, TimeDelta),
    trusted: impl Fn(&SignerId) -> bool,
) -> Result<Option<Plan>> {
    let is_over = |at: DateTime<Utc>| at + grace <= now;
    for (id, since) in stored(repository).await?.into_iter().rev() {
        if !is_over(id.began()) || !since.is_some_and(is_over) {
            continue;
        }
        return match Plan::read(repository, &id, &trusted).await {
            Ok(plan) if is_over(plan.head.at) => Ok(Some(plan)),
            Ok(_) => Err(Error::refused(format!("the plan {id} is younger than its name says"))),
            Err(error) => Err(Error::new(Kind::Refused, format!("the plan {id} cannot be relied on")).because(error)),
        };
    }
    Ok(None)
}

/// What both plans found, by what goes as a whole: where one object of it is in only one of them, none goes.
pub fn intersection(old: &Plan, new: &Plan) -> Vec<Item> {
    let name = |item: &Item| (item.region.clone(), item.key.clone(), item.version.clone());
    let known: BTreeSet<_> = old.items.iter().map(name).collect();
    let partial: BTreeSet<_> =
        new.items.iter().filter(|item| !known.contains(&name(item))).map(|item| &item.of).collect();
    new.items.iter().filter(|item| !partial.contains(&item.of)).cloned().collect()
}

/// As much as fits, by what goes as a whole, the oldest first and at least one; and whether something is left for later.
pub fn within(items: Vec<Item>, (objects, bytes): (u64, u64)) -> (Vec<Item>, bool) {
    let mut units: BTreeMap<(u8, String), Vec<Item>> = BTreeMap::new();
    for item in items {
        // Names of backups and epochs sort by time.
        units.entry((item.why as u8, item.of.clone())).or_default().push(item);
    }
    let (mut taken, mut size, mut left) = (Vec::new(), 0, false);
    for unit in units.into_values() {
        let of_unit: u64 = unit.iter().map(|item| item.size).sum();
        let fits = taken.len() as u64 + unit.len() as u64 <= objects && size + of_unit <= bytes;
        if fits || taken.is_empty() {
            size += of_unit;
            taken.extend(unit);
        } else {
            left = true;
        }
    }
    (taken, left)
}

/// What a person confirms: exactly these versions of these objects.
pub fn digest(items: &[Item]) -> String {
    let mut names: Vec<_> =
        items.iter().map(|item| format!("{}\n{}\n{}\n", item.region, item.key, item.version)).collect();
    names.sort();
    Digest::of(names.concat().as_bytes()).to_string().chars().take(8).collect()
}
