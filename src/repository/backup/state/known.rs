//! The pages of a backup as its writer remembers them: an index in memory, everything else read where it lies.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::Digest as _;

use super::{
    CHUNK, END, EndRecord, FILE, FileRecord, OBJECT, RECORD_HEAD, Scan, StateHead, decode_chunk, misplaced, parse,
};
use crate::codec::fingerprint::{Fingerprint, PageFingerprinter};
use crate::model::commit::StateDigest;
use crate::model::pages::PAGE_SIZE;
use crate::model::{BackupId, Error, KeysetId, RepositoryId, Result};
use crate::repository::FORMAT;
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::pages::relocation::Relocation;

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
        let known = Self::scanned(&mut scan, file, path).map_err(|error| wrong().because(error))?;
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

impl KnownPages {
    fn scanned(scan: &mut Scan, file: File, path: &Path) -> Result<Self> {
        let head = scan.head()?;
        let secret = hex::decode(&head.fingerprint_secret).map_err(|_| misplaced())?;
        let fingerprints = Arc::new(PageFingerprinter::new(secret.try_into().map_err(|_| misplaced())?));
        let (chunks, files, objects, sources, live) = Default::default();
        let (path, relocation) = (path.to_owned(), OnceLock::new());
        let mut known = Self { head, file, path, fingerprints, chunks, files, objects, sources, live, relocation };
        loop {
            let offset = scan.at + RECORD_HEAD as u64;
            match scan.record()? {
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
