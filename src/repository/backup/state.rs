//! The page-map state: what a writer remembers of its latest backup, so that the next one stores only what changed.
//!
//! The writer cannot decrypt, so it cannot read back the maps that it wrote; it keeps them in its state directory. The file
//! is a cache: COMMIT names its digest, and a file that is not that one costs one full backup and nothing else. It is
//! written while the backup runs and read positionally, because the fingerprints of a large cluster do not fit in memory:
//! an index of paths and places does.
//!
//! Layout: eight bytes that name it, then records of one tag byte, a length (u32) and a body: the head, map chunks and files
//! mixed, a file after the chunks that it uses, the objects of the backup's closure, the end.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::codec::fingerprint::{Fingerprint, PageFingerprinter};
use crate::disk::place::Draft;
use crate::model::commit::StateDigest;
use crate::model::pages::PAGE_SIZE;
use crate::model::{BackupId, Error, KeysetId, Lsn, RepositoryId, Result};
use crate::repository::FORMAT;
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::pages::relocation::Relocation;

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

// ---- Writing -------------------------------------------------------------------------------------------------------

/// Keeps the state of a backup under way. A state that cannot be written is given up, not the backup.
#[derive(Debug)]
pub struct Keeper(Mutex<Keeping>);

#[derive(Debug)]
struct Keeping {
    writing: Option<Writing>,
    why_not: Option<String>,
    /// Chunks of the parent that were copied, by their numbers there.
    carried: HashMap<u32, u32>,
}

#[derive(Debug)]
struct Writing {
    draft: Draft,
    hash: Sha256,
    bytes: u64,
    end: (u32, u64, u64),
}

/// A complete state that waits for its COMMIT.
#[derive(Debug)]
pub struct Kept {
    /// What COMMIT says of it.
    pub digest: StateDigest,
    draft: Draft,
}

impl Kept {
    /// To be called once COMMIT is at the quorum.
    ///
    /// # Errors
    /// The disk refuses; the next backup is then a full one.
    pub fn place(self) -> Result<()> {
        Ok(self.draft.place()?)
    }
}

impl Keeper {
    /// Keeps what the backup writes for `path`, or nothing.
    pub fn begin(path: Option<&Path>, head: &StateHead) -> Self {
        let keeping = Keeping { writing: None, why_not: None, carried: HashMap::new() };
        let keeper = Self(Mutex::new(keeping));
        if let Some(path) = path {
            let begun = Draft::begin(path, 0o600).map_err(Error::from).and_then(|draft| Writing::begin(draft, head));
            let mut keeping = keeper.lock();
            match begun {
                Ok(writing) => keeping.writing = Some(writing),
                Err(error) => keeping.why_not = Some(error.to_string()),
            }
        }
        keeper
    }

    fn lock(&self) -> MutexGuard<'_, Keeping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a chunk and answers its number.
    pub fn chunk(&self, frame: &FrameRef, encoded: &[u8]) -> u32 {
        self.lock().write(|writing| writing.chunk(frame, encoded)).unwrap_or(0)
    }

    /// Keeps a chunk that the parent knew as `number`, once however many files use it.
    pub fn carry(&self, number: u32, frame: &FrameRef, chunk: &MapChunk) -> u32 {
        let mut keeping = self.lock();
        if let Some(known) = keeping.carried.get(&number) {
            return *known;
        }
        let new = keeping.write(|writing| writing.chunk(frame, &chunk.encode())).unwrap_or(0);
        keeping.carried.insert(number, new);
        new
    }

    /// Keeps a file; its chunks are kept already.
    pub fn file(&self, path: &str, (size, damaged): (u64, bool), uses: Vec<KeptUse>) {
        let record = FileRecord { path: path.to_owned(), size: Some(size), damaged, uses };
        self.lock().write(|writing| {
            writing.end.1 += 1;
            writing.json(FILE, &record)
        });
    }

    /// Closes the state; without one, says why if it was wanted.
    pub fn finish<'a>(&self, objects: impl Iterator<Item = &'a InventoryLine>) -> (Option<Kept>, Option<String>) {
        let mut keeping = self.lock();
        keeping.write(|writing| writing.close(objects));
        (keeping.writing.take().map(Writing::into_kept), keeping.why_not.take())
    }
}

impl Keeping {
    fn write<T>(&mut self, write: impl FnOnce(&mut Writing) -> Result<T>) -> Option<T> {
        match write(self.writing.as_mut()?) {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::warn!(%error, "the page map is not kept; the next backup will be a full one");
                self.why_not = Some(error.to_string());
                self.writing = None;
                None
            }
        }
    }
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

    fn into_kept(self) -> Kept {
        let digest = StateDigest { bytes: self.bytes, sha256: self.hash.finalize().into() };
        Kept { digest, draft: self.draft }
    }
}

// ---- Reading -------------------------------------------------------------------------------------------------------

/// The pages of a backup as its writer remembers them.
#[derive(Debug)]
pub struct KnownPages {
    head: StateHead,
    file: File,
    path: PathBuf,
    fingerprints: Arc<PageFingerprinter>,
    chunks: Vec<KnownChunk>,
    files: HashMap<String, Arc<KnownFile>>,
    objects: Vec<InventoryLine>,
    sources: BTreeMap<BackupId, KeysetId>,
    /// Bytes of frames and chunks that it refers to, by the pack that holds them.
    live: HashMap<PackId, u64>,
    /// What was moved since.
    relocation: OnceLock<Relocation>,
}

#[derive(Debug)]
struct KnownChunk {
    offset: u64,
    length: u32,
    entries: u16,
    /// Of the record as it was when the digest of the whole file was right.
    check: Fingerprint,
}

/// A file of that backup.
#[derive(Debug, PartialEq, Eq)]
pub struct KnownFile {
    runs: Vec<KnownRun>,
    /// Pages that are whole, and whose checksums were right or are none.
    sound_pages: u32,
}

/// Pages of a file that one chunk describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownRun {
    /// The first of them.
    pub first_page: u32,
    /// How many.
    pub pages: u16,
    /// The chunk's number.
    pub chunk: u32,
    /// The entry of the first page.
    pub first_entry: u16,
}

impl KnownRun {
    /// Its entries in the chunk.
    pub fn entries(&self) -> Range<usize> {
        let first = usize::from(self.first_entry);
        first..first + usize::from(self.pages)
    }
}

impl KnownFile {
    /// How many pages there are that a backup may take over without reading them. A page that was not whole when it was
    /// read is none, and neither is any page of a file that was damaged: that has to be found again.
    pub fn sound_pages(&self) -> u32 {
        self.sound_pages
    }

    /// The run that describes a page.
    pub fn run_of(&self, page: u32) -> Option<&KnownRun> {
        let after = self.runs.partition_point(|run| run.first_page <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (page - run.first_page < u32::from(run.pages)).then_some(run)
    }
}

impl KnownPages {
    /// Reads the state of `backup`, every byte of it once.
    ///
    /// # Errors
    /// It is not there, or it is not the one that COMMIT names.
    pub fn open(path: &Path, (repository, backup): (&RepositoryId, &BackupId), digest: &StateDigest) -> Result<Self> {
        let unreadable = |error: std::io::Error| {
            let text = match error.kind() {
                std::io::ErrorKind::NotFound => format!("the page map of {backup} is not in {}", path.display()),
                _ => format!("the page map of {backup} in {} is not readable", path.display()),
            };
            Error::not_found(text).because(error)
        };
        let wrong =
            || Error::damaged(format!("{} is not the page map that the COMMIT of {backup} names", path.display()));
        let file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.len() != digest.bytes {
            return Err(wrong());
        }
        let mut scan = Scan::of(file.try_clone().map_err(unreadable)?);
        let known = scan.read(file, path).map_err(|error| wrong().because(error))?;
        let head = &known.head;
        let ours = head.format == FORMAT && head.repository == *repository && head.backup == *backup;
        let sha256: [u8; 32] = scan.hash.finalize().into();
        if ours && sha256 == digest.sha256 && scan.at == digest.bytes { Ok(known) } else { Err(wrong()) }
    }

    /// What it says of the backup.
    pub const fn head(&self) -> &StateHead {
        &self.head
    }

    /// The parts of `range` that hold pages which are not of zeros: those have never been written, and what comes there
    /// first may come past the WAL that follows.
    ///
    /// # Errors
    /// As [`chunk`](Self::chunk).
    pub fn written(&self, file: &KnownFile, range: Range<u32>) -> Result<Vec<Range<u32>>> {
        let mut written: Vec<Range<u32>> = Vec::new();
        let mut page = range.start;
        while let Some(run) = file.run_of(page).filter(|_| page < range.end) {
            let (_, chunk) = self.chunk(run.chunk)?;
            let end = run.first_page + u32::from(run.pages);
            let entries = chunk.entries.get(run.entries()).unwrap_or_default();
            for entry in entries.iter().skip((page - run.first_page) as usize) {
                match written.last_mut().filter(|last| last.end == page) {
                    _ if entry.place.is_none() || page >= range.end => {}
                    Some(last) => last.end += 1,
                    None => written.push(page..page + 1),
                }
                page += 1;
            }
            page = end;
        }
        Ok(written)
    }

    /// Detects change, under the secret of this generation.
    pub fn fingerprints(&self) -> Arc<PageFingerprinter> {
        Arc::clone(&self.fingerprints)
    }

    /// A file by its path.
    pub fn file(&self, path: &str) -> Option<Arc<KnownFile>> {
        self.files.get(path).cloned()
    }

    /// Every object of the closure, except manifest and inventory.
    pub fn objects(&self) -> &[InventoryLine] {
        &self.objects
    }

    /// The backups that wrote its map chunks, with their keysets.
    pub const fn sources(&self) -> &BTreeMap<BackupId, KeysetId> {
        &self.sources
    }

    /// A chunk and the frame that it is.
    ///
    /// # Errors
    /// The file changed since it was opened.
    pub fn chunk(&self, number: u32) -> Result<(FrameRef, MapChunk)> {
        let wrong = || Error::damaged(format!("{} has changed since it was checked", self.path.display()));
        let known = self.chunks.get(number as usize).ok_or_else(wrong)?;
        let mut body = vec![0; known.length as usize];
        self.file.read_exact_at(&mut body, known.offset).map_err(|error| wrong().because(error))?;
        if self.fingerprints.of(&body) != known.check {
            return Err(wrong());
        }
        let (frame, mut map) = decode_chunk(&body)?;
        self.relocation.get().inspect(|relocation| relocation.apply(&mut map));
        Ok((frame, map))
    }

    /// How many chunks there are.
    pub fn chunk_count(&self) -> u32 {
        u32::try_from(self.chunks.len()).unwrap_or(u32::MAX)
    }

    /// Bytes that are referred to, by the pack that holds them.
    pub const fn live(&self) -> &HashMap<PackId, u64> {
        &self.live
    }

    /// Frames were moved: from now on chunks say where they are.
    pub fn relocate(&self, relocation: Relocation) {
        // Once per backup, and a backup has this state for itself.
        let _ = self.relocation.set(relocation);
    }

    /// Whether a chunk cannot be referred to as it is, because frames that it names were moved.
    pub fn renews(&self, chunk: u32) -> bool {
        self.relocation.get().is_some_and(|relocation| relocation.renews(chunk))
    }
}

fn decode_chunk(body: &[u8]) -> Result<(FrameRef, MapChunk)> {
    let wrong = || Error::damaged("a chunk of the page map state is not readable");
    let (length, rest) = body.split_first_chunk::<4>().ok_or_else(wrong)?;
    let (place, chunk) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(wrong)?;
    let frame = MapChunk::decode(place)?.frames.pop().ok_or_else(wrong)?;
    Ok((frame, MapChunk::decode(chunk)?))
}

/// One pass over the file: index and digest.
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

    fn read(&mut self, file: File, path: &Path) -> Result<KnownPages> {
        let head = self.head()?;
        let secret = hex::decode(&head.fingerprint_secret).map_err(|_| misplaced())?;
        let fingerprints = Arc::new(PageFingerprinter::new(secret.try_into().map_err(|_| misplaced())?));
        let (chunks, files, objects, sources, live) = Default::default();
        let (path, relocation) = (path.to_owned(), OnceLock::new());
        let mut known =
            KnownPages { head, file, path, fingerprints, chunks, files, objects, sources, live, relocation };
        loop {
            let offset = self.at + RECORD_HEAD as u64;
            match self.record()? {
                (CHUNK, body) => known.add_chunk(offset, &body)?,
                (FILE, body) => known.add_file(parse(&body)?)?,
                (OBJECT, body) => known.objects.push(parse(&body)?),
                (END, body) => {
                    let end: EndRecord = parse(&body)?;
                    let chunks = u32::try_from(known.chunks.len()).unwrap_or(u32::MAX);
                    let (files, objects) = (known.files.len() as u64, known.objects.len() as u64);
                    let whole = end == EndRecord { chunks, files, objects };
                    return if whole { Ok(known) } else { Err(misplaced()) };
                }
                _ => return Err(misplaced()),
            }
        }
    }
}

impl KnownPages {
    fn add_chunk(&mut self, offset: u64, body: &[u8]) -> Result<()> {
        let (frame, chunk) = decode_chunk(body)?;
        let length = u32::try_from(body.len()).map_err(|_| misplaced())?;
        let entries = u16::try_from(chunk.entries.len()).map_err(|_| misplaced())?;
        self.chunks.push(KnownChunk { offset, length, entries, check: self.fingerprints.of(body) });
        for frame in chunk.frames.iter().chain([&frame]) {
            *self.live.entry(frame.pack.clone()).or_default() += u64::from(frame.length);
        }
        // The manifest numbers the backup that now holds a frame as well; its keyset is not looked at there.
        self.sources.entry(frame.pack.backup).or_insert_with(|| frame.keyset.clone());
        self.sources.insert(frame.id.pack.backup, frame.keyset);
        Ok(())
    }

    fn add_file(&mut self, FileRecord { path, size, damaged, uses }: FileRecord) -> Result<()> {
        let (mut runs, mut first_page) = (Vec::with_capacity(uses.len()), 0u32);
        for (chunk, first_entry, pages) in uses {
            let known = self.chunks.get(chunk as usize).ok_or_else(misplaced)?;
            if u32::from(first_entry) + u32::from(pages) > u32::from(known.entries) {
                return Err(misplaced());
            }
            runs.push(KnownRun { first_page, pages, chunk, first_entry });
            first_page = first_page.checked_add(u32::from(pages)).ok_or_else(misplaced)?;
        }
        let sound = size.filter(|_| !damaged).map_or(0, |size| size / PAGE_SIZE as u64);
        let sound_pages = u32::try_from(sound).unwrap_or(0).min(first_page);
        let twice = self.files.insert(path, Arc::new(KnownFile { runs, sound_pages }));
        if twice.is_none() { Ok(()) } else { Err(misplaced()) }
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
