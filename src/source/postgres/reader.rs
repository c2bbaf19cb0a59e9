//! Threads that read a data directory while the server writes to it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, OFlags};
use rustix::io::{Errno, pread};
use tokio::sync::{mpsc, oneshot};

use super::error::SourceError;
use super::listing;
use super::pace::Pace;
use super::packer::{Packer, Part, SMALL_PAGES};
use super::pages::{Damage, Held, PageCheck};
use crate::source::{BATCH_PAGES, Claims, FileId, Item, PAGE_SIZE, Unread};

/// Long enough for the server to finish the write that tore the page.
const SECOND_LOOK: Duration = Duration::from_millis(10);

/// The kernel derives the I/O priority from it: this is the least that puts our reads behind those of PostgreSQL. More
/// would only starve the readers of processor time on a busy host, and a starved reader keeps the server in backup mode.
const NICENESS: i32 = 5;

/// Files that one thread reads together: one large file, or small ones that share a batch.
type Share = Vec<(FileId, listing::File)>;

/// The work and what the threads share.
#[derive(Debug)]
pub struct Reading {
    root: PathBuf,
    check: PageCheck,
    pace: Pace,
    /// Pages that need not be read, and whether they are read all the same.
    unread: Option<(Arc<dyn Unread>, bool)>,
    shares: Mutex<VecDeque<Share>>,
    held: Mutex<Vec<Held>>,
    stop: AtomicBool,
}

impl Reading {
    /// Everything in `files`, numbered by their order.
    pub fn new(root: PathBuf, files: Vec<listing::File>, check: PageCheck, pace: Pace) -> Self {
        let (held, stop) = (Mutex::default(), AtomicBool::new(false));
        Self { root, check, pace, unread: None, shares: Mutex::new(divide(files)), held, stop }
    }

    /// Leaves pages out, or reads them to prove that they may be left out.
    #[must_use]
    pub fn leaving_out(mut self, unread: Option<(Arc<dyn Unread>, bool)>) -> Self {
        self.unread = unread;
        self
    }

    /// Starts the threads; each answers when the work is done or impossible. They also end when `items` is closed.
    pub fn start(
        self: &Arc<Self>,
        threads: usize,
        items: &mpsc::Sender<Item>,
    ) -> Result<Vec<oneshot::Receiver<Result<(), SourceError>>>, SourceError> {
        let start_one = |_| {
            let (reading, items) = (Arc::clone(self), items.clone());
            let (answer, result) = oneshot::channel();
            let body = move || {
                let outcome = reading.run(items);
                if outcome.is_err() {
                    reading.stop();
                }
                // Nobody listens when the backup was given up.
                let _ = answer.send(outcome);
            };
            // A thread of its own, not one of the runtime's: its lowered priority cannot be raised again.
            let thread = thread::Builder::new().name("drctl-read".to_owned()).spawn(body);
            thread.map(|_| result).map_err(|error| SourceError::ReaderDied(error.to_string()))
        };
        (0..threads.max(1)).map(start_one).collect()
    }

    /// Makes the threads end early.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The files whose last word depends on the position of the server's log at the end.
    pub fn take_held(&self) -> Vec<Held> {
        std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn run(&self, items: mpsc::Sender<Item>) -> Result<(), SourceError> {
        // Best effort: a container may forbid it.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        let mut packer = Packer::new(items);
        while let Some(share) = self.next_share() {
            for (id, file) in share {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                self.file(&mut packer, id, &file)?;
            }
            packer.flush()?;
        }
        Ok(())
    }

    fn next_share(&self) -> Option<Share> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn file(&self, packer: &mut Packer, id: FileId, listed: &listing::File) -> Result<(), SourceError> {
        let path = &listed.path;
        packer.send(Item::File { id, path: path.clone(), mode: listed.mode })?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = match options.open(self.root.join(path)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return packer.send(Item::FileVanished { id }),
            Err(source) => return Err(SourceError::Read { path: path.clone(), source }),
        };
        // The size now is the size of the backup: what is appended later is in the WAL.
        let size = file.metadata().map_err(|source| SourceError::Read { path: path.clone(), source })?.len();
        let mut reader = FileReader { reading: self, file, path, damage: Damage::default() };
        let small = size <= (SMALL_PAGES * PAGE_SIZE) as u64;
        let read = if small { reader.small(packer, id, size)? } else { reader.large(packer, id, size)? };
        let damage = reader.damage;
        match damage.certain() {
            Some(damaged_blocks) => packer.send_after(Item::FileDone { id, size: read, damaged_blocks }),
            None => self.held.lock().unwrap_or_else(PoisonError::into_inner).push(Held { id, size: read, damage }),
        }
        if small { Ok(()) } else { packer.flush() }
    }
}

struct FileReader<'a> {
    reading: &'a Reading,
    file: File,
    path: &'a str,
    damage: Damage,
}

impl FileReader<'_> {
    fn small(&mut self, packer: &mut Packer, id: FileId, size: u64) -> Result<u64, SourceError> {
        let part = self.part(0, usize::try_from(size).unwrap_or(usize::MAX), size)?;
        packer.add_file(id, &part)?;
        Ok(part.length())
    }

    fn large(&mut self, packer: &mut Packer, id: FileId, size: u64) -> Result<u64, SourceError> {
        // Only a hint.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Sequential);
        const BATCH: u64 = (BATCH_PAGES * PAGE_SIZE) as u64;
        let mut read = 0;
        while read < size && !self.reading.stop.load(Ordering::Relaxed) {
            let wanted = usize::try_from(BATCH.min(size - read)).unwrap_or(usize::MAX);
            let first_page = u32::try_from(read / PAGE_SIZE as u64).map_err(|_| self.too_large())?;
            let part = self.part(first_page, wanted, size)?;
            let got = part.length();
            packer.send_pages(id, first_page, part)?;
            read += got;
            if got < wanted as u64 {
                break;
            }
        }
        Ok(read)
    }

    /// Reads those of the next `wanted` bytes that must be read, of a file that has `size`.
    fn part(&mut self, first_page: u32, wanted: usize, size: u64) -> Result<Part, SourceError> {
        let Some((unread, proof)) = &self.reading.unread else {
            return Ok(Part::whole(self.pages(first_page, wanted)?));
        };
        // A page that is not whole yet is no page of the parent's.
        let whole = |bytes: u64| u32::try_from(bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        let range = first_page..first_page.saturating_add(whole(wanted as u64));
        let same = unread.unchanged(self.path, whole(size), range);
        let same = same.into_iter().map(|range| range.start - first_page..range.end - first_page).collect();
        let mut claims = Claims { same, read: *proof };
        if !claims.read {
            return self.rest(first_page, wanted, claims);
        }
        let data = self.pages(first_page, wanted)?;
        // Of what is not there any more nothing can be proved.
        let read = whole(data.len() as u64);
        claims.same.retain_mut(|range| {
            range.end = range.end.min(read);
            range.start < range.end
        });
        Ok(Part { data, claims })
    }

    /// Reads what is not claimed. Where the file turns out to end, so does the part: it became shorter after the start of
    /// the backup, and replay cuts it off as well.
    fn rest(&mut self, first_page: u32, wanted: usize, mut claims: Claims) -> Result<Part, SourceError> {
        let (mut data, mut at) = (Vec::new(), 0);
        let end = u32::try_from(wanted.div_ceil(PAGE_SIZE)).map_err(|_| self.too_large())?;
        let claimed = std::mem::take(&mut claims.same);
        if claimed.iter().map(ExactSizeIterator::len).sum::<usize>() * 4 > wanted / PAGE_SIZE {
            // What lies between is not wanted; only a hint.
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Random);
        }
        for next in claimed.into_iter().chain(std::iter::once(end..end)) {
            if next.start > at {
                let bytes = (next.start as usize * PAGE_SIZE).min(wanted) - at as usize * PAGE_SIZE;
                let read = self.pages(first_page + at, bytes)?;
                let got = read.len();
                data.extend(read);
                if got < bytes {
                    break;
                }
            }
            at = next.end;
            if next.start < next.end {
                claims.same.push(next);
            }
        }
        Ok(Part { data, claims })
    }

    /// Reads up to `wanted` bytes and looks at the pages in them; fewer only at the end of the file.
    fn pages(&mut self, first_page: u32, wanted: usize) -> Result<Vec<u8>, SourceError> {
        self.reading.pace.wait(wanted, &self.reading.stop);
        let offset = u64::from(first_page) * PAGE_SIZE as u64;
        let mut bytes = self.read(wanted, offset)?;
        let Some(first_block) = self.reading.check.first_block(self.path, first_page) else { return Ok(bytes) };
        let bad = self.reading.check.wrong_pages(&bytes, first_block);
        if bad.is_empty() {
            return Ok(bytes);
        }
        // A page that the server is writing may be read half old, half new.
        thread::sleep(SECOND_LOOK);
        for index in bad {
            let start = index * PAGE_SIZE;
            let Some(page) = bytes.get_mut(start..start + PAGE_SIZE) else { continue };
            // A file that became shorter lost the page; the WAL has the truncation.
            if self.fill(page, offset + start as u64)? == PAGE_SIZE {
                let index = u32::try_from(index).map_err(|_| self.too_large())?;
                self.damage.add(first_page + index, self.reading.check.judge(page, first_block.wrapping_add(index)));
            }
        }
        Ok(bytes)
    }

    /// Reads `wanted` bytes, fewer only at the end of the file. Nothing is cleared that is about to be overwritten.
    fn read(&self, wanted: usize, offset: u64) -> Result<Vec<u8>, SourceError> {
        let mut bytes = Vec::with_capacity(wanted);
        while bytes.len() < wanted {
            let at = offset + bytes.len() as u64;
            match pread(&self.file, spare_capacity(&mut bytes), at) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(SourceError::Read { path: self.path.to_owned(), source: error.into() }),
            }
        }
        bytes.truncate(wanted);
        Ok(bytes)
    }

    /// Reads until the buffer is full or the file ends.
    fn fill(&self, buffer: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let mut got = 0;
        while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + got as u64) {
                Ok(0) => break,
                Ok(count) => got += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(SourceError::Read { path: self.path.to_owned(), source }),
            }
        }
        Ok(got)
    }

    fn too_large(&self) -> SourceError {
        let source = io::Error::from(io::ErrorKind::FileTooLarge);
        SourceError::Read { path: self.path.to_owned(), source }
    }
}

/// Large files first, the largest first, so that no thread is left alone with one at the end; then the small ones in
/// groups of at most one batch, in the order of their paths.
fn divide(files: Vec<listing::File>) -> VecDeque<Share> {
    let numbered = (0..).map(FileId).zip(files);
    let (mut large, small): (Vec<_>, Vec<_>) = numbered.partition(|(_, file)| pages(file) > SMALL_PAGES as u64);
    large.sort_by_key(|(_, file)| std::cmp::Reverse(file.size));
    let mut shares: VecDeque<Share> = large.into_iter().map(|file| vec![file]).collect();
    let (mut share, mut filled) = (Share::new(), 0);
    for (id, file) in small {
        // An empty file takes no page but some time.
        let weight = pages(&file).max(1);
        if filled + weight > BATCH_PAGES as u64 {
            shares.push_back(std::mem::take(&mut share));
            filled = 0;
        }
        filled += weight;
        share.push((id, file));
    }
    if !share.is_empty() {
        shares.push_back(share);
    }
    shares
}

fn pages(file: &listing::File) -> u64 {
    file.size.div_ceil(PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_in_exactly_one_share() {
        let sizes = [0u64, 1, 8192, 524_288, 524_289, 1 << 30, 9 << 20];
        let file = |size| listing::File { path: String::new(), mode: 0o600, size };
        let files: Vec<_> = sizes.iter().cycle().take(7000).map(|size| file(*size)).collect();
        let shares = divide(files);
        let mut ids: Vec<u32> = shares.iter().flatten().map(|(id, _)| id.0).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..7000));
        assert_eq!(shares[0][0].1.size, 1 << 30);
        for share in shares {
            assert!(share.len() == 1 || share.iter().map(|(_, file)| pages(file)).sum::<u64>() <= BATCH_PAGES as u64);
        }
    }
}
