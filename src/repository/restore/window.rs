//! A bounded part of a restore: create files, read their maps, write their pages, checksum them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codec::compress::Decompressor;
use crate::codec::fingerprint::PageFingerprinter;
use crate::codec::seal::Unit;
use crate::disk::sparse::FilePool;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Result};
use crate::observe::progress::Phase;
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::manifest::{Begin, ChunkUse, FileLine};
use crate::repository::pack::unpack_frame;
use crate::repository::page_map::{FrameRef, MapChunk};
use crate::repository::restore::frames::{Fetched, fetch_frames};
use crate::repository::restore::{of_file, page_count};

/// Pages handled together: 4 GiB of data, some 30 MiB of bookkeeping.
pub const WINDOW_PAGES: u64 = 512 * 1024;
/// What restore needs of a file's mode while it writes it.
const OWNER_WRITES: u32 = 0o600;
/// Files handled together.
const WINDOW_FILES: usize = 20_000;

/// A file that was written completely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// As in the manifest, relative.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// CRC-32C of its bytes as the operating system gives them back.
    pub crc32c: u32,
}

/// What the manifest's first line gives.
#[derive(Debug)]
pub(super) struct Secrets {
    begin: Begin,
    fingerprints: Arc<PageFingerprinter>,
}

impl Secrets {
    pub(super) fn new(begin: Begin) -> Result<Self> {
        let wrong = || Error::damaged(format!("the manifest of {} has no usable fingerprint secret", begin.backup));
        let secret = hex::decode(&begin.fingerprint_secret).map_err(|_| wrong())?;
        let secret = secret.try_into().map_err(|_| wrong())?;
        Ok(Self { fingerprints: Arc::new(PageFingerprinter::new(secret)), begin })
    }
}

#[derive(Debug, Default)]
pub(super) struct Window {
    files: Vec<(FileLine, PathBuf)>,
    pages: u64,
}

/// Where a page of a frame goes.
#[derive(Debug, Clone, Copy)]
struct PageTarget {
    file: u32,
    page: u32,
    slot: u8,
    fingerprint: [u8; 16],
}

type Sink<'a> = (&'a Arc<FilePool>, &'a Arc<Phase>, &'a mut (dyn FnMut(WrittenFile) -> Result<()> + Send));

impl Window {
    pub(super) fn add(&mut self, file: FileLine, path: PathBuf, pool: &FilePool) -> Result<()> {
        // A file that its owner may not write gets its mode when it is complete: it may be opened more than once before.
        let handle = of_file(pool.create(&path, file.mode & 0o7777 | OWNER_WRITES), &path)?;
        of_file(handle.set_len(file.size), &path)?;
        self.add_known(file, path)
    }

    /// Adds a file that is only looked at.
    pub(super) fn add_known(&mut self, file: FileLine, path: PathBuf) -> Result<()> {
        let pages: u64 = file.chunks.iter().map(|chunk| u64::from(chunk.entries().1)).sum();
        if pages != page_count(file.size) {
            let text = format!("the manifest maps {pages} pages of {}, which has {} bytes", file.path, file.size);
            return Err(Error::damaged(text));
        }
        self.pages += pages;
        self.files.push((file, path));
        Ok(())
    }

    pub(super) fn is_full(&self) -> bool {
        self.pages >= WINDOW_PAGES || self.files.len() >= WINDOW_FILES
    }

    /// Writes all files of the window and empties it. Returns the bytes fetched.
    pub(super) async fn write(
        &mut self,
        repository: &Repository,
        ring: &KeyRing,
        secrets: &Secrets,
        (pool, progress, written): Sink<'_>,
    ) -> Result<u64> {
        let window = std::mem::take(self);
        let (frames, map_bytes) = window.locate_pages(repository, ring, secrets).await?;
        let files = Arc::new(window.files);
        let checker = PageChecker { files: Arc::clone(&files), fingerprints: Arc::clone(&secrets.fingerprints) };
        let writer = PageWriter { checker, pool: Arc::clone(pool), progress: Arc::clone(progress) };
        let bytes = fetch_frames(repository, ring, Unit::Frame, frames, move |frames| writer.write(frames)).await?;
        for file in checksum_all(files, Arc::clone(pool)).await? {
            written(file)?;
        }
        Ok(map_bytes + bytes)
    }

    /// Reads everything that [`write`](Self::write) would write, and writes nothing.
    pub(super) async fn check(
        &mut self,
        repository: &Repository,
        ring: &KeyRing,
        secrets: &Secrets,
        progress: &Arc<Phase>,
    ) -> Result<()> {
        let window = std::mem::take(self);
        let (frames, _) = window.locate_pages(repository, ring, secrets).await?;
        let checker = PageChecker { files: Arc::new(window.files), fingerprints: Arc::clone(&secrets.fingerprints) };
        let progress = Arc::clone(progress);
        let look = move |frames: Vec<Fetched<Vec<PageTarget>>>| {
            let mut decompressor = Decompressor::new()?;
            for Fetched { frame, note: pages, payload } in frames {
                checker.check_all(&frame, &pages, &unpack_frame(&frame, &payload, &mut decompressor)?)?;
                progress.advance((pages.len() * PAGE_SIZE) as u64);
            }
            Ok(())
        };
        fetch_frames(repository, ring, Unit::Frame, frames, look).await.map(|_| ())
    }

    /// Reads the one file of the window into memory. Returns it and the bytes fetched.
    pub(super) async fn read(
        self,
        repository: &Repository,
        ring: &KeyRing,
        secrets: &Secrets,
    ) -> Result<(Vec<u8>, u64)> {
        let (frames, map_bytes) = self.locate_pages(repository, ring, secrets).await?;
        let size = self.files.first().map_or(0, |(line, _)| line.size);
        let pages = usize::try_from(page_count(size)).unwrap_or(usize::MAX);
        // Pages that are stored nowhere are of zeros.
        let memory = Arc::new(Mutex::new(vec![0; pages * PAGE_SIZE]));
        let checker = PageChecker { files: Arc::new(self.files), fingerprints: Arc::clone(&secrets.fingerprints) };
        let fill = {
            let memory = Arc::clone(&memory);
            move |frames: Vec<Fetched<Vec<PageTarget>>>| {
                let mut decompressor = Decompressor::new()?;
                for Fetched { frame, note: pages, payload } in frames {
                    let plain = unpack_frame(&frame, &payload, &mut decompressor)?;
                    checker.check_all(&frame, &pages, &plain)?;
                    let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                    for page in &pages {
                        let place = page.page as usize * PAGE_SIZE;
                        let bytes = slot(&plain, page.slot, 1).unwrap_or_default();
                        memory[place..place + PAGE_SIZE].copy_from_slice(bytes);
                    }
                }
                Ok(())
            }
        };
        let bytes = fetch_frames(repository, ring, Unit::Frame, frames, fill).await?;
        let mut memory = std::mem::take(&mut *memory.lock().unwrap_or_else(PoisonError::into_inner));
        memory.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok((memory, map_bytes + bytes))
    }

    /// Reads the map chunks: which frame holds which pages.
    async fn locate_pages(
        &self,
        repository: &Repository,
        ring: &KeyRing,
        secrets: &Secrets,
    ) -> Result<(Vec<(FrameRef, Vec<PageTarget>)>, u64)> {
        let found = Arc::new(Mutex::new(Vec::new()));
        // A page without a place is one of zeros, which stays a hole; its fingerprint must say the same.
        let zero = secrets.fingerprints.of(&[0; PAGE_SIZE]);
        let place = {
            let found = Arc::clone(&found);
            move |chunks: Vec<Fetched<Vec<Use>>>| {
                let mut decompressor = Decompressor::new()?;
                for Fetched { frame, note, payload } in chunks {
                    let chunk = MapChunk::decode(&unpack_frame(&frame, &payload, &mut decompressor)?)?;
                    if chunk.entries.iter().any(|entry| entry.place.is_none() && entry.fingerprint != zero) {
                        return Err(Error::damaged(format!("map chunk {} says nothing is stored of a page", frame.id)));
                    }
                    let located = targets(&chunk, &frame, &note)?;
                    found.lock().unwrap_or_else(PoisonError::into_inner).extend(located);
                }
                Ok(())
            }
        };
        let bytes = fetch_frames(repository, ring, Unit::Map, self.chunk_uses(&secrets.begin)?, place).await?;
        let found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        Ok((found, bytes))
    }

    /// Every chunk once, with the uses of it: small files share chunks.
    fn chunk_uses(&self, begin: &Begin) -> Result<Vec<(FrameRef, Vec<Use>)>> {
        let mut uses: Vec<(ChunkUse, Use)> = Vec::new();
        for (file, (line, _)) in self.files.iter().enumerate() {
            let mut page = 0;
            for chunk in &line.chunks {
                let (first_entry, entries) = chunk.entries();
                let file = u32::try_from(file).unwrap_or(u32::MAX);
                uses.push((*chunk, Use { file, page, first_entry, entries }));
                page += u32::from(entries);
            }
        }
        let frame_of = |chunk: &ChunkUse| (chunk.0, chunk.1, chunk.2);
        uses.sort_by_key(|(chunk, _)| frame_of(chunk));
        let groups = uses.chunk_by(|(a, _), (b, _)| frame_of(a) == frame_of(b));
        let group = |group: &[(ChunkUse, Use)]| {
            let (first, _) = group.first().ok_or_else(|| Error::failed("an empty group of map chunks"))?;
            Ok((first.frame(begin)?, group.iter().map(|(_, wanted)| *wanted).collect()))
        };
        groups.map(group).collect()
    }
}

/// Entries of a chunk that belong to a file.
#[derive(Debug, Clone, Copy)]
struct Use {
    file: u32,
    page: u32,
    first_entry: u16,
    entries: u16,
}

fn targets(chunk: &MapChunk, name: &FrameRef, uses: &[Use]) -> Result<Vec<(FrameRef, Vec<PageTarget>)>> {
    let mut by_frame: Vec<Vec<PageTarget>> = vec![Vec::new(); chunk.frames.len()];
    for Use { file, page, first_entry, entries } in uses.iter().copied() {
        let range = usize::from(first_entry)..usize::from(first_entry) + usize::from(entries);
        let entries = chunk.entries.get(range);
        let entries = entries.ok_or_else(|| Error::damaged(format!("map chunk {} is too short", name.id)))?;
        for (page, entry) in (page..).zip(entries) {
            if let Some((frame, slot)) = entry.place {
                let target = PageTarget { file, page, slot, fingerprint: entry.fingerprint };
                by_frame[usize::from(frame)].push(target);
            }
        }
    }
    let wanted = chunk.frames.iter().cloned().zip(by_frame).filter(|(_, pages)| !pages.is_empty());
    Ok(wanted.collect())
}

struct PageChecker {
    files: Arc<Vec<(FileLine, PathBuf)>>,
    fingerprints: Arc<PageFingerprinter>,
}

impl PageChecker {
    fn check_all(&self, frame: &FrameRef, pages: &[PageTarget], plain: &[u8]) -> Result<()> {
        pages.iter().try_for_each(|page| self.check(frame, page, plain))
    }

    fn check(&self, frame: &FrameRef, page: &PageTarget, plain: &[u8]) -> Result<()> {
        let bytes = slot(plain, page.slot, 1);
        if bytes.is_some_and(|bytes| self.fingerprints.of(bytes) == page.fingerprint) {
            return Ok(());
        }
        let path = self.files.get(page.file as usize).map_or("", |(line, _)| line.path.as_str());
        Err(Error::damaged(format!("block {} of {path} in frame {} is not the one in its map", page.page, frame.id)))
    }
}

struct PageWriter {
    checker: PageChecker,
    pool: Arc<FilePool>,
    progress: Arc<Phase>,
}

impl PageWriter {
    fn write(&self, frames: Vec<Fetched<Vec<PageTarget>>>) -> Result<()> {
        let mut decompressor = Decompressor::new()?;
        for Fetched { frame, note: mut pages, payload } in frames {
            let plain = unpack_frame(&frame, &payload, &mut decompressor)?;
            self.checker.check_all(&frame, &pages, &plain)?;
            pages.sort_by_key(|target| (target.file, target.page));
            let follows = |a: &PageTarget, b: &PageTarget| {
                a.file == b.file && a.page + 1 == b.page && a.slot.checked_add(1) == Some(b.slot)
            };
            for run in pages.chunk_by(follows) {
                self.write_run(run, &plain)?;
            }
        }
        Ok(())
    }

    fn write_run(&self, run: &[PageTarget], plain: &[u8]) -> Result<()> {
        let (Some(first), Some((line, path))) =
            (run.first(), run.first().and_then(|first| self.checker.files.get(first.file as usize)))
        else {
            return Ok(());
        };
        let offset = u64::from(first.page) * PAGE_SIZE as u64;
        let bytes = slot(plain, first.slot, run.len()).unwrap_or_default();
        // The last page of a file may be short; the frame holds it filled up with zeros.
        let length = usize::try_from(line.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        of_file(of_file(self.pool.get(path), path)?.write_all_at(&bytes[..length], offset), path)?;
        self.progress.advance(length as u64);
        Ok(())
    }
}

fn slot(plain: &[u8], slot: u8, pages: usize) -> Option<&[u8]> {
    let start = usize::from(slot) * PAGE_SIZE;
    plain.get(start..start + pages * PAGE_SIZE)
}

async fn checksum_all(files: Arc<Vec<(FileLine, PathBuf)>>, pool: Arc<FilePool>) -> Result<Vec<WrittenFile>> {
    let work = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; 1024 * 1024];
        files.iter().map(|(line, path)| checksum(line, path, &pool, &mut buffer)).collect()
    });
    work.await.map_err(|error| Error::failed("a restore worker died").because(error))?
}

fn checksum(line: &FileLine, path: &Path, pool: &FilePool, buffer: &mut [u8]) -> Result<WrittenFile> {
    let file = of_file(pool.get(path), path)?;
    let (mut crc32c, mut at) = (0, 0);
    while at < line.size {
        let length = usize::try_from(line.size - at).unwrap_or(usize::MAX).min(buffer.len());
        of_file(file.read_exact_at(&mut buffer[..length], at), path)?;
        crc32c = crc32c::crc32c_append(crc32c, &buffer[..length]);
        at += length as u64;
    }
    if line.mode & OWNER_WRITES != OWNER_WRITES {
        of_file(file.set_mode(line.mode & 0o7777), path)?;
    }
    Ok(WrittenFile { path: line.path.clone(), size: line.size, crc32c })
}
