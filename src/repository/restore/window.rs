//! A bounded part of a restore: create files, read their maps, write their pages, checksum them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
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
use crate::repository::pages::manifest::{Begin, ChunkUse, FileLine};
use crate::repository::pages::map::{FrameRef, MapChunk};
use crate::repository::pages::pack::unpack_frame;
use crate::repository::restore::checksum::{checksum_all, finish_all};
use crate::repository::restore::file::{OWNER_WRITES, WindowFile, WrittenFile};
use crate::repository::restore::frames::{Fetched, Flight, fetch_frames};
use crate::repository::restore::memory::Memory;
use crate::repository::restore::pages::{PageChecker, PageTarget, PageWriter, slot};
use crate::repository::restore::reuse::{self, Local};
use crate::repository::restore::sums::Sums;
use crate::repository::restore::{of_file, page_count};

/// Files handled together.
const WINDOW_FILES: usize = 20_000;

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

/// Where pages come from, and what may be held of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) repository: &'a Repository,
    pub(super) ring: &'a KeyRing,
    pub(super) secrets: &'a Secrets,
    pub(super) memory: Memory,
}

impl Origin<'_> {
    const fn flight(&self, unit: Unit) -> Flight<'_> {
        Flight { repository: self.repository, ring: self.ring, unit, memory: self.memory }
    }
}

#[derive(Debug, Default)]
pub(super) struct Window {
    files: Vec<WindowFile>,
    pages: u64,
}

/// Bytes of a window: fetched from the regions, and left as they stood on the disk.
pub(super) type Moved = (u64, u64);

type Sink<'a> = (&'a Arc<FilePool>, &'a Arc<Phase>, &'a mut (dyn FnMut(WrittenFile) -> Result<()> + Send));

impl Window {
    /// Adds a file where nothing is.
    pub(super) fn create(&mut self, line: FileLine, path: PathBuf, pool: &FilePool) -> Result<()> {
        // A file that its owner may not write gets its mode when it is complete: it may be opened more than once before.
        let handle = of_file(pool.create(&path, line.mode & 0o7777 | OWNER_WRITES), &path)?;
        of_file(handle.set_len(line.size), &path)?;
        self.add(WindowFile { line, path, held: 0 })
    }

    /// Adds a file of which something may stand there already.
    pub(super) fn take_over(&mut self, line: FileLine, path: PathBuf, pool: &FilePool) -> Result<()> {
        let held = reuse::take_over(&path, &line, pool)?;
        self.add(WindowFile { line, path, held })
    }

    /// Adds a file that is only looked at.
    pub(super) fn add_known(&mut self, line: FileLine, path: PathBuf) -> Result<()> {
        self.add(WindowFile { line, path, held: 0 })
    }

    fn add(&mut self, file: WindowFile) -> Result<()> {
        let line = &file.line;
        let pages: u64 = line.chunks.iter().map(|chunk| u64::from(chunk.entries().1)).sum();
        if pages != page_count(line.size) {
            let text = format!("the manifest maps {pages} pages of {}, which has {} bytes", line.path, line.size);
            return Err(Error::damaged(text));
        }
        self.pages += pages;
        self.files.push(file);
        Ok(())
    }

    pub(super) fn is_full(&self, memory: Memory) -> bool {
        self.pages >= memory.window_pages() || self.files.len() >= WINDOW_FILES
    }

    /// Writes all files of the window and empties it.
    pub(super) async fn write(&mut self, origin: Origin<'_>, (pool, progress, written): Sink<'_>) -> Result<Moved> {
        let files = Arc::new(std::mem::take(self).files);
        let fingerprints = &origin.secrets.fingerprints;
        let local = Arc::new(Local {
            files: Arc::clone(&files),
            fingerprints: Arc::clone(fingerprints),
            pool: Arc::clone(pool),
            progress: Arc::clone(progress),
            reused: AtomicU64::new(0),
        });
        let sums = Sums::of(&files).map(Arc::new);
        let here = Here { local: Some(Arc::clone(&local)), sums: sums.clone() };
        let (frames, map_bytes) = locate_pages(&files, origin, here).await?;
        let checker = PageChecker { files: Arc::clone(&files), fingerprints: Arc::clone(fingerprints) };
        let (pool, progress) = (Arc::clone(pool), Arc::clone(progress));
        let writer = PageWriter { checker, pool: Arc::clone(&pool), progress, sums: sums.clone() };
        let bytes = fetch_frames(origin.flight(Unit::Frame), frames, move |frames| writer.write(frames)).await?;
        let files = match sums {
            Some(sums) => {
                finish_all(&files, &pool)?;
                sums.finish(&files)?
            }
            None => checksum_all(files, pool).await?,
        };
        files.into_iter().try_for_each(written)?;
        Ok((map_bytes + bytes, local.reused.load(Ordering::Relaxed)))
    }

    /// Reads everything that [`write`](Self::write) would write, and writes nothing.
    pub(super) async fn check(&mut self, origin: Origin<'_>, progress: &Arc<Phase>) -> Result<()> {
        let files = Arc::new(std::mem::take(self).files);
        let (frames, _) = locate_pages(&files, origin, Here::default()).await?;
        let checker = PageChecker { files, fingerprints: Arc::clone(&origin.secrets.fingerprints) };
        let progress = Arc::clone(progress);
        let look = move |frames: Vec<Fetched<Vec<PageTarget>>>| {
            let mut decompressor = Decompressor::new()?;
            for Fetched { frame, note: pages, payload } in frames {
                checker.check_all(&frame, &pages, &unpack_frame(&frame, &payload, &mut decompressor)?)?;
                progress.advance((pages.len() * PAGE_SIZE) as u64);
            }
            Ok(())
        };
        fetch_frames(origin.flight(Unit::Frame), frames, look).await.map(|_| ())
    }

    /// Reads the one file of the window into memory. Returns it and the bytes fetched.
    pub(super) async fn read(self, origin: Origin<'_>) -> Result<(Vec<u8>, u64)> {
        let files = Arc::new(self.files);
        let (frames, map_bytes) = locate_pages(&files, origin, Here::default()).await?;
        let size = files.first().map_or(0, |file| file.line.size);
        let pages = usize::try_from(page_count(size)).unwrap_or(usize::MAX);
        // Pages that are stored nowhere are of zeros.
        let memory = Arc::new(Mutex::new(vec![0; pages * PAGE_SIZE]));
        let checker = PageChecker { files, fingerprints: Arc::clone(&origin.secrets.fingerprints) };
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
        let bytes = fetch_frames(origin.flight(Unit::Frame), frames, fill).await?;
        let mut memory = std::mem::take(&mut *memory.lock().unwrap_or_else(PoisonError::into_inner));
        memory.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok((memory, map_bytes + bytes))
    }
}

/// Frames and the pages wanted of each.
type Located = Vec<(FrameRef, Vec<PageTarget>)>;

/// Reads the map chunks: which frame holds which pages, without those that stand on the disk already. Returns them and the
/// bytes fetched.
async fn locate_pages(files: &[WindowFile], origin: Origin<'_>, here: Here) -> Result<(Located, u64)> {
    let found = Arc::new(Mutex::new(Vec::new()));
    // A page without a place is one of zeros, which stays a hole; its fingerprint must say the same.
    let zero = origin.secrets.fingerprints.of(&[0; PAGE_SIZE]);
    let place = {
        let found = Arc::clone(&found);
        move |chunks: Vec<Fetched<Vec<Use>>>| {
            let mut decompressor = Decompressor::new()?;
            for Fetched { frame, note, payload } in chunks {
                let chunk = MapChunk::decode(&unpack_frame(&frame, &payload, &mut decompressor)?)?;
                if chunk.entries.iter().any(|entry| entry.place.is_none() && entry.fingerprint != zero) {
                    return Err(Error::damaged(format!("map chunk {} says nothing is stored of a page", frame.id)));
                }
                let located = targets(&chunk, &frame, &note, &here)?;
                found.lock().unwrap_or_else(PoisonError::into_inner).extend(located);
            }
            Ok(())
        }
    };
    let uses = chunk_uses(files, &origin.secrets.begin)?;
    let bytes = fetch_frames(origin.flight(Unit::Map), uses, place).await?;
    let found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((found, bytes))
}

/// Every chunk once, with the uses of it: small files share chunks.
fn chunk_uses(files: &[WindowFile], begin: &Begin) -> Result<Vec<(FrameRef, Vec<Use>)>> {
    let mut uses: Vec<(ChunkUse, Use)> = Vec::new();
    for (file, WindowFile { line, .. }) in files.iter().enumerate() {
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

/// What is done on this machine about the pages that are located: nothing, when they are only looked at.
#[derive(Default)]
struct Here {
    local: Option<Arc<Local>>,
    sums: Option<Arc<Sums>>,
}

/// Entries of a chunk that belong to a file.
#[derive(Debug, Clone, Copy)]
struct Use {
    file: u32,
    page: u32,
    first_entry: u16,
    entries: u16,
}

fn targets(chunk: &MapChunk, name: &FrameRef, uses: &[Use], here: &Here) -> Result<Located> {
    let mut by_frame: Vec<Vec<PageTarget>> = vec![Vec::new(); chunk.frames.len()];
    for Use { file, page: first, first_entry, entries } in uses.iter().copied() {
        let range = usize::from(first_entry)..usize::from(first_entry) + usize::from(entries);
        let entries = chunk.entries.get(range);
        let entries = entries.ok_or_else(|| Error::damaged(format!("map chunk {} is too short", name.id)))?;
        let same = here.local.as_ref().map_or(Ok(None), |local| local.same(file, first, entries))?;
        let stands = |at: usize| same.as_ref().is_some_and(|same| same.get(at).is_some_and(|same| *same));
        for (at, (page, entry)) in (first..).zip(entries).enumerate() {
            if let (Some(sums), None) = (&here.sums, entry.place) {
                sums.left_out(file, page);
            }
            if let Some((frame, slot)) = entry.place.filter(|_| !stands(at)) {
                let target = PageTarget { file, page, slot, fingerprint: entry.fingerprint };
                by_frame[usize::from(frame)].push(target);
            }
        }
    }
    let wanted = chunk.frames.iter().cloned().zip(by_frame).filter(|(_, pages)| !pages.is_empty());
    Ok(wanted.collect())
}
