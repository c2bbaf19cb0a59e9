//! The journal of changed pages: what a receiver notes of each stretch of WAL as it passes, so that the next base backup
//! need not read what did not change.
//!
//! A file in the state directory, appended to before the WAL that it describes is shipped: whoever resumes at what is
//! durable finds no hole. It is a cache: what is not readable in it, or does not join what stands before, costs one
//! backup that reads every page.
//!
//! Layout: eight bytes that name it, then entries: length (u32), SHA-256 over the digest of the entry before and this
//! body, and the body: the [`Stretch`] as JSON behind its length (u16), and the pages. What follows the first entry that
//! is not right is not there.

mod tracker;

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub(super) use tracker::Tracker;

use crate::jobs::wal::position::reaches;
use crate::model::{Branch, Lsn, SystemId, TargetName, Timeline};
use crate::pg::wal::ChangedBlocks;

const MAGIC: &[u8; 8] = b"DRCTLJ1\n";
/// Length and digest of an entry.
const ENTRY_HEAD: usize = 36;
/// No entry is longer: a set of pages gives up whole relations before.
const ENTRY_LIMIT: u32 = 1 << 30;

type Chain = [u8; 32];

/// Where a target's journal is.
pub fn journal_path(state_dir: &Path, target: &TargetName) -> PathBuf {
    state_dir.join(format!("{target}.changed"))
}

/// A part of one history of WAL: all records that end behind `from` and at or before `to`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stretch {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// Where the first record begins, or the one before it ended.
    pub from: Lsn,
    /// Where the last record ends.
    pub to: Lsn,
    /// Where the last record begins; the next one names it.
    pub last: Lsn,
    /// Whether nothing is known of what was before the first record, even if something was read up to there: that one does
    /// not name it.
    pub anew: bool,
}

impl Stretch {
    fn is_of(&self, other: &Self) -> bool {
        (self.system_id, self.timeline, &self.branch) == (other.system_id, other.timeline, &other.branch)
    }

    /// Whether all records between `from` and `to` are in this part.
    fn covers(&self, from: Lsn, to: Lsn) -> bool {
        self.from <= from && reaches(self.to, to)
    }

    /// Both, if `next` goes on where this ends, or before: what is in two entries changed all the same.
    fn joined(&self, next: &Self) -> Option<Self> {
        let joins = !next.anew && self.is_of(next) && (self.from..=self.to).contains(&next.from);
        joins.then(|| Self { from: self.from, anew: self.anew, ..next.clone() })
    }
}

/// What a journal says of one stretch.
#[derive(Debug)]
pub enum Answer {
    /// The pages that changed in it.
    Covered(ChangedBlocks),
    /// It ends before, so far.
    NotYet(Lsn),
    /// It cannot say, and why.
    Unknown(String),
}

/// Asks the journal what changed between two positions of a history.
pub fn ask(path: &Path, wanted: &Stretch) -> Answer {
    let mut changed = ChangedBlocks::default();
    let collect = |run: &Stretch, entry: &Stretch, joins: bool, blocks: &[u8]| {
        if !joins {
            changed = ChangedBlocks::default();
        }
        // What ends before the wanted stretch was compared by an earlier backup.
        if !run.is_of(wanted) || entry.to <= wanted.from {
            return Some(());
        }
        changed.merge(&ChangedBlocks::decode(blocks)?);
        Some(())
    };
    let run = match scan(path, collect) {
        Ok(found) => found.run,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Answer::Unknown("no receiver on this machine has noted changed pages".to_owned());
        }
        Err(error) => return Answer::Unknown(format!("{} is not readable: {error}", path.display())),
    };
    match run {
        Some(run) if !run.is_of(wanted) => Answer::Unknown("the WAL that was read is of another history".to_owned()),
        Some(run) if run.covers(wanted.from, wanted.to) => Answer::Covered(changed),
        Some(run) if run.from <= wanted.from && run.to < wanted.to => Answer::NotYet(run.to),
        Some(run) => Answer::Unknown(format!("WAL was read from {} on, not from {}", run.from, wanted.from)),
        None => Answer::Unknown("no WAL was read yet".to_owned()),
    }
}

/// What was found in a journal.
#[derive(Debug)]
struct Found {
    /// The unbroken stretch that ends with the last entry.
    run: Option<Stretch>,
    /// The digest of the last entry.
    chain: Chain,
    /// Bytes up to there; 0 without the name of a journal.
    bytes: u64,
}

/// Reads every entry: `each` is given the unbroken stretch that it ends, itself, whether it joins what stands before,
/// and its pages; `None` from it means that they are not readable.
fn scan(path: &Path, mut each: impl FnMut(&Stretch, &Stretch, bool, &[u8]) -> Option<()>) -> std::io::Result<Found> {
    let mut input = BufReader::with_capacity(1 << 18, File::open(path)?);
    let mut found = Found { run: None, chain: [0; 32], bytes: 0 };
    let mut magic = [0; MAGIC.len()];
    if input.read_exact(&mut magic).is_err() || magic != *MAGIC {
        return Ok(found);
    }
    found.bytes = MAGIC.len() as u64;
    while let Some((body, chain)) = entry(&mut input, &found.chain) {
        let Some((stretch, blocks)) = parse(&body) else { break };
        let joined = found.run.as_ref().and_then(|run| run.joined(&stretch));
        let joins = joined.is_some();
        let run = joined.unwrap_or_else(|| stretch.clone());
        if each(&run, &stretch, joins, blocks).is_none() {
            break;
        }
        let bytes = found.bytes + (ENTRY_HEAD + body.len()) as u64;
        found = Found { run: Some(run), chain, bytes };
    }
    Ok(found)
}

/// The next entry, if it is whole and what follows the one before.
fn entry(input: &mut impl Read, before: &Chain) -> Option<(Vec<u8>, Chain)> {
    let mut head = [0; ENTRY_HEAD];
    input.read_exact(&mut head).ok()?;
    let (length, digest) = head.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length);
    if length > ENTRY_LIMIT {
        return None;
    }
    let mut body = Vec::new();
    input.take(u64::from(length)).read_to_end(&mut body).ok()?;
    let chain = chained(before, &body);
    (body.len() == length as usize && chain == digest).then_some((body, chain))
}

fn chained(before: &Chain, body: &[u8]) -> Chain {
    Sha256::new().chain_update(before).chain_update(body).finalize().into()
}

fn parse(body: &[u8]) -> Option<(Stretch, &[u8])> {
    let (length, rest) = body.split_first_chunk::<2>()?;
    let (text, blocks) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    let stretch: Stretch = serde_json::from_slice(text).ok()?;
    (stretch.from <= stretch.to && stretch.last < stretch.to).then_some((stretch, blocks))
}

/// The bytes of an entry behind `before`, and its digest.
fn print(stretch: &Stretch, blocks: &ChangedBlocks, before: &Chain) -> Option<(Vec<u8>, Chain)> {
    let text = serde_json::to_vec(stretch).ok()?;
    let mut body = u16::try_from(text.len()).ok()?.to_le_bytes().to_vec();
    body.extend_from_slice(&text);
    blocks.encode(&mut body);
    let chain = chained(before, &body);
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= ENTRY_LIMIT)?;
    let mut bytes = Vec::with_capacity(ENTRY_HEAD + body.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&chain);
    bytes.extend_from_slice(&body);
    Some((bytes, chain))
}

#[cfg(test)]
mod tests;
