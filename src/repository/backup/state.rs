//! The page-map state: what a writer remembers of its latest backup, so that the next one stores only what changed.
//!
//! The writer cannot decrypt, so it cannot read back the maps that it wrote; it keeps them in its state directory. The file
//! is a cache: COMMIT names its digest, and a file that is not that one costs one full backup and nothing else. It is
//! written while the backup runs and read positionally, because the fingerprints of a large cluster do not fit in memory:
//! an index of paths and places does.
//!
//! Layout, read and written here: eight bytes that name it, then records of one tag byte, a length (u32) and a body: the
//! head, map chunks and files mixed, a file after the chunks that it uses, the objects of the backup's closure, the end.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::disk::place::Draft;
use crate::model::{BackupId, Error, Lsn, RepositoryId, Result};
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::map::{FrameRef, MapChunk};

mod keeper;
mod known;

pub use keeper::{Keeper, Kept};
pub use known::{KnownFile, KnownPages, KnownRun};

const MAGIC: &[u8; 8] = b"DRCTLS1\n";
/// Tag and length of a record.
const RECORD_HEAD: usize = 5;
/// No record is longer: the largest is the line of a file with very many chunks.
const RECORD_LIMIT: u32 = 16 * 1024 * 1024;

const HEAD: u8 = b'H';
const CHUNK: u8 = b'C';
const FILE: u8 = b'F';
const OBJECT: u8 = b'O';
const END: u8 = b'E';

/// Whose state it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateHead {
    /// Version of the repository format.
    pub format: u32,
    /// The repository.
    pub repository: RepositoryId,
    /// The backup.
    pub backup: BackupId,
    /// The secret of the page fingerprints, hex.
    pub fingerprint_secret: String,
    /// Where replay of the backup begins: its pages are as they were there, or newer.
    #[serde(default)]
    pub start_lsn: Option<Lsn>,
    /// When the last backup began that stored every page.
    #[serde(default)]
    pub generation: Option<DateTime<Utc>>,
    /// Whether its pages carry checksums: switching them on changes pages without WAL.
    #[serde(default)]
    pub page_checksums: Option<bool>,
}

/// Where some pages of a file are described: number of the chunk, first entry, entries.
pub type KeptUse = (u32, u16, u16);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    path: String,
    /// Bytes; without it, nothing of the file is taken for known without being read.
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    damaged: bool,
    uses: Vec<KeptUse>,
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct EndRecord {
    chunks: u32,
    files: u64,
    objects: u64,
}

/// The file as it is written: its digest, and how much of each kind is in it.
#[derive(Debug)]
struct Writing {
    draft: Draft,
    hash: Sha256,
    bytes: u64,
    end: (u32, u64, u64),
}

impl Writing {
    fn begin(draft: Draft, head: &StateHead) -> Result<Self> {
        let mut writing = Self { draft, hash: Sha256::new(), bytes: 0, end: (0, 0, 0) };
        writing.raw(MAGIC)?;
        writing.json(HEAD, head)?;
        Ok(writing)
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(self.draft.write(bytes)?)
    }

    fn record(&mut self, tag: u8, parts: &[&[u8]]) -> Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let length = u32::try_from(length).ok().filter(|length| *length <= RECORD_LIMIT);
        let length = length.ok_or_else(|| Error::failed("a record of the page map state is too long"))?;
        self.raw(&[tag])?;
        self.raw(&length.to_le_bytes())?;
        parts.iter().try_for_each(|part| self.raw(part))
    }

    fn json<T: Serialize>(&mut self, tag: u8, value: &T) -> Result<()> {
        let body = serde_json::to_vec(value).map_err(|error| Error::failed("a record is not JSON").because(error))?;
        self.record(tag, &[&body])
    }

    /// The chunk's own place is spelled as a map chunk that names one frame.
    fn chunk(&mut self, frame: &FrameRef, encoded: &[u8]) -> Result<u32> {
        let place = MapChunk { frames: vec![frame.clone()], entries: Vec::new() }.encode();
        let length = u32::try_from(place.len()).unwrap_or(u32::MAX);
        self.record(CHUNK, &[&length.to_le_bytes(), &place, encoded])?;
        let number = self.end.0;
        self.end.0 += 1;
        Ok(number)
    }

    fn close<'a>(&mut self, objects: impl Iterator<Item = &'a InventoryLine>) -> Result<()> {
        for object in objects {
            self.end.2 += 1;
            self.json(OBJECT, object)?;
        }
        let (chunks, files, objects) = self.end;
        self.json(END, &EndRecord { chunks, files, objects })?;
        Ok(self.draft.flush()?)
    }
}

fn decode_chunk(body: &[u8]) -> Result<(FrameRef, MapChunk)> {
    let wrong = || Error::damaged("a chunk of the page map state is not readable");
    let (length, rest) = body.split_first_chunk::<4>().ok_or_else(wrong)?;
    let (place, chunk) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(wrong)?;
    let frame = MapChunk::decode(place)?.frames.pop().ok_or_else(wrong)?;
    Ok((frame, MapChunk::decode(chunk)?))
}

/// One pass over the file, record by record, and the digest of all that was passed.
struct Scan {
    input: BufReader<File>,
    hash: Sha256,
    at: u64,
}

impl StateHead {
    /// What a state file says of itself. It proves nothing: [`KnownPages::open`] compares the whole of it with COMMIT.
    pub fn read(path: &Path) -> Option<Self> {
        Scan::of(File::open(path).ok()?).head().ok()
    }
}

impl Scan {
    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(length as u64).read_to_end(&mut bytes);
        read.map_err(|error| Error::failed("read the page map state").because(error))?;
        if bytes.len() < length {
            return Err(Error::damaged("it ends too early"));
        }
        self.hash.update(&bytes);
        self.at += length as u64;
        Ok(bytes)
    }

    fn record(&mut self) -> Result<(u8, Vec<u8>)> {
        let head = self.take(RECORD_HEAD)?;
        let [tag, length @ ..] = head.as_slice() else { return Err(misplaced()) };
        let length = u32::from_le_bytes(length.try_into().map_err(|_| misplaced())?);
        if length > RECORD_LIMIT {
            return Err(misplaced());
        }
        Ok((*tag, self.take(length as usize)?))
    }

    fn of(file: File) -> Self {
        Self { input: BufReader::with_capacity(1 << 20, file), hash: Sha256::new(), at: 0 }
    }

    fn head(&mut self) -> Result<StateHead> {
        if self.take(MAGIC.len())? != MAGIC {
            return Err(misplaced());
        }
        match self.record()? {
            (HEAD, body) => parse(&body),
            _ => Err(misplaced()),
        }
    }
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| misplaced().because(error))
}

fn misplaced() -> Error {
    Error::damaged("a record of the page map state is not readable")
}

#[cfg(test)]
mod tests;
