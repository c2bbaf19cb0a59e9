//! Recorded gaps: WAL that the server no longer had when its receiver came back, and WAL of which two versions were
//! stored. Recovery never crosses either, so it is written down before streaming goes on, and nothing derives "no gap" from
//! silence.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::codec::sign::sign_text;
use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Kind, Lsn, RepositoryId, Result, ResultExt, SystemId, TargetName, Timeline};
use crate::repository::FORMAT;
use crate::repository::format;
use crate::repository::handle::{Repository, Writer};
use crate::repository::layout;
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::index::BranchId;
use crate::store::{Digest, StoreError};

/// How the name of a contradiction ends.
const CONTRADICTION: &str = "-contradiction";
/// Records that are read at the same time.
const READS: usize = 16;

/// A gap `[from, to)` in the WAL of one branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gap {
    /// Version of the repository format.
    pub format: u32,
    /// The target whose receiver met it.
    pub target: TargetName,
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline of the last WAL before it.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// The end of the last complete record before it.
    pub from: Lsn,
    /// Where streaming went on.
    pub to: Lsn,
    /// What the server said, or who stored which version.
    pub reason: String,
    /// Whether nothing is missing here and two versions are stored instead: no WAL that comes later fills that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contradiction: bool,
    /// When it was met.
    pub at: DateTime<Utc>,
}

impl Gap {
    /// A gap in a branch.
    pub fn new(
        target: &TargetName,
        branch: &BranchId,
        (from, to): (Lsn, Lsn),
        reason: &str,
        at: DateTime<Utc>,
    ) -> Self {
        let BranchId { system_id, timeline, branch } = branch.clone();
        // A server may say anything at any length; the record stays small.
        let reason = reason.chars().filter(|c| !c.is_control()).take(500).collect();
        let (target, contradiction) = (target.clone(), false);
        Self { format: FORMAT, target, system_id, timeline, branch, from, to, reason, contradiction, at }
    }

    /// The same range, of which two versions are stored.
    pub fn contradicted(self) -> Self {
        Self { contradiction: true, ..self }
    }

    /// Whether recovery still ends here, given what is stored by now: WAL that came later fills a hole, and nothing settles
    /// a contradiction.
    pub fn is_open(&self, is_stored: impl Fn(Lsn, Lsn) -> bool) -> bool {
        self.contradiction || !is_stored(self.from, self.to)
    }

    /// Whether a backup begins behind it, so that nobody needs to cross it.
    pub fn is_before(&self, need: &WalNeed, started_at: DateTime<Utc>) -> bool {
        // Positions of two clusters do not compare: one that was made anew behind the name left its past.
        match need.system_id == self.system_id {
            true => (need.timeline, need.start_lsn) >= (self.timeline, self.to),
            false => started_at > self.at,
        }
    }

    /// The object's name.
    pub fn key(&self) -> String {
        let key = layout::gap(&layout::gaps(self.system_id, self.timeline, &self.branch), self.from, self.to);
        // A hole and a contradiction of one range are two facts.
        if self.contradiction { key + CONTRADICTION } else { key }
    }

    fn encode(&self, repository: &RepositoryId, writer: &Writer) -> Result<Bytes> {
        let mut body = serde_json::to_vec(self).map_err(|error| Error::failed("a gap is not JSON").because(error))?;
        body.push(b'\n');
        Ok(Bytes::from(sign_text(&writer.signer, &context(repository, &self.key()), &body)?))
    }

    /// Reads the record of this name.
    ///
    /// # Errors
    /// It is not signed by a trusted signer as this gap, or not readable.
    pub fn decode(repository: &Repository, key: &str, bytes: &[u8]) -> Result<Self> {
        let wrong = |why: &str| Error::damaged(format!("{key} {why}"));
        let body = repository.trust.verify_text(&context(&repository.id, key), bytes)?;
        let gap: Self = format::parse(key, body)?;
        if gap.key() == key { Ok(gap) } else { Err(wrong("belongs elsewhere")) }
    }
}

fn context(repository: &RepositoryId, key: &str) -> String {
    format!("gap {repository} {key}")
}

/// Stores a gap at the write quorum. The same gap met again, by whoever and whenever, is the same gap: what is there
/// stays.
///
/// # Errors
/// The quorum was not reached.
pub async fn record(repository: &Repository, writer: &Writer, gap: &Gap, out: &FanOut) -> Result<()> {
    repository.enroll(writer, out).await.during(|| "enrol the signer")?;
    let key = gap.key();
    let body = match known(repository, &key).await {
        // Spread as it is: other bytes under this name would be a conflict.
        Some(body) => body,
        None => gap.encode(&repository.id, writer)?,
    };
    let digest = Digest::of(&body);
    out.put(key, body, digest).await.during(|| format!("record the gap from {} to {}", gap.from, gap.to))
}

async fn known(repository: &Repository, key: &str) -> Option<Bytes> {
    let check = |bytes: Bytes| Gap::decode(repository, key, &bytes).map(|_| bytes);
    for region in repository.regions.all() {
        match region.store.get(key, None).await {
            Ok(bytes) => match check(bytes) {
                Ok(bytes) => return Some(bytes),
                Err(error) => tracing::warn!(%error, region = %region.name, "recorded gap is not readable"),
            },
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => tracing::debug!(%error, "recorded gap is not readable"),
        }
    }
    None
}

/// The gaps of one branch, ascending. A record that no region holds intact is still a gap: its name says from where to
/// where; it is reported as an error beside the others.
///
/// # Errors
/// No region answers.
pub async fn read(repository: &Repository, branch: &BranchId) -> Result<(Vec<Gap>, Vec<Error>)> {
    let prefix = layout::gaps(branch.system_id, branch.timeline, &branch.branch);
    let keys: BTreeSet<String> = repository.regions.list_union(&prefix).await?;
    let (mut gaps, mut errors) = (Vec::new(), Vec::new());
    let read = |key: String| async move {
        repository.regions.read(&key, None, |bytes| Gap::decode(repository, &key, &bytes)).await
    };
    for read in stream::iter(keys).map(read).buffered(READS).collect::<Vec<_>>().await {
        match read {
            Ok((gap, _)) => gaps.push(gap),
            Err(error) => errors.push(error),
        }
    }
    Ok((gaps, errors))
}

/// What was recorded of a range, as far as it concerns whoever serves the WAL around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Barrier {
    /// Where it begins.
    pub from: Lsn,
    /// Behind its end.
    pub to: Lsn,
    /// Whether two versions are stored, rather than nothing.
    pub contradiction: bool,
    /// What was met.
    pub reason: String,
}

impl Barrier {
    /// As [`Gap::is_open`].
    pub fn is_open(&self, is_stored: impl Fn(Lsn, Lsn) -> bool) -> bool {
        self.contradiction || !is_stored(self.from, self.to)
    }

    /// By its name alone.
    fn named(name: &str, reason: String) -> Option<Self> {
        let (range, contradiction) = name.strip_suffix(CONTRADICTION).map_or((name, false), |range| (range, true));
        let (from, to) = layout::parse_gap(range)?;
        Some(Self { from, to, contradiction, reason })
    }
}

impl From<Gap> for Barrier {
    fn from(Gap { from, to, contradiction, reason, .. }: Gap) -> Self {
        Self { from, to, contradiction, reason }
    }
}

/// What was recorded of a branch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Barriers {
    /// What may not be crossed, ascending.
    pub standing: Vec<Barrier>,
    /// Objects that are no record: whatever they were to say was never acknowledged.
    pub ignored: BTreeSet<String>,
}

impl Barriers {
    /// Says what is ignored.
    pub fn tell(&self) {
        for why in &self.ignored {
            tracing::warn!(why, "an object among the recorded gaps is no record and is ignored: see drctl status");
        }
    }
}

/// As [`read`], for whoever serves WAL: bytes that nobody signed stop nothing but what their name speaks of, and that only where
/// they may be what is left of a record. A record is in a write quorum before anything behind it is acknowledged, so what
/// fewer regions list, or a name that no record has, never was one.
///
/// # Errors
/// No region answers.
pub async fn barriers(repository: &Repository, branch: &BranchId) -> Result<Barriers> {
    let prefix = layout::gaps(branch.system_id, branch.timeline, &branch.branch);
    let (mut holders, mut silent, mut failed) = (BTreeMap::<String, usize>::new(), 0, None);
    for (_, listed) in repository.regions.list_each(&prefix).await {
        match listed {
            Ok(objects) => objects.into_iter().for_each(|object| *holders.entry(object.key).or_default() += 1),
            Err(error) => (silent, failed) = (silent + 1, Some(error)),
        }
    }
    if let Some(error) = failed.filter(|_| silent == repository.regions.all().len()) {
        let error = Error::new(Kind::Unavailable, "no region tells what was recorded of the WAL").because(error);
        return Err(error.transient(true));
    }
    let read = |(key, held): (String, usize)| async move {
        let read = repository.regions.read(&key, None, |bytes| Gap::decode(repository, &key, &bytes)).await;
        (key, held, read)
    };
    let mut barriers = Barriers::default();
    for (key, held, read) in stream::iter(holders).map(read).buffered(READS).collect::<Vec<_>>().await {
        let error = match read {
            Ok((gap, _)) => {
                barriers.standing.push(gap.into());
                continue;
            }
            Err(error) => error,
        };
        let named = Barrier::named(key.strip_prefix(&prefix).unwrap_or(&key), error.to_string());
        match named.filter(|_| held + silent >= repository.regions.lowest_quorum()) {
            Some(named) => barriers.standing.push(named),
            None => drop(barriers.ignored.insert(error.to_string())),
        }
    }
    Ok(barriers)
}
