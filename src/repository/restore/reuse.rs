//! What stands in the data directory already: it stays, page by page, where it is what the map says.
//!
//! A page counts as the one of the backup if its keyed fingerprint is that of the map. What is not the same is fetched;
//! what is to be zeros is made so here.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::fingerprint::PageFingerprinter;
use crate::disk::DiskError;
use crate::disk::sparse::FilePool;
use crate::model::Result;
use crate::model::pages::PAGE_SIZE;
use crate::observe::progress::Phase;
use crate::repository::pages::manifest::FileLine;
use crate::repository::pages::map::PageEntry;
use crate::repository::restore::file::{OWNER_WRITES, WindowFile};
use crate::repository::restore::of_file;

/// Pages read from the disk at a time.
const PAGES: usize = 128;

/// Makes the place of a file ready: what stands there stays if it is a plain file of its own, anything else goes. Answers
/// how many of its bytes may be of use.
///
/// # Errors
/// The disk refuses.
pub(super) fn take_over(path: &Path, line: &FileLine, pool: &FilePool) -> Result<u64> {
    let mode = line.mode & 0o7777 | OWNER_WRITES;
    let held = match fs::symlink_metadata(path) {
        // A second name of the same file belongs to somebody else, who would see every byte change.
        Ok(found) if found.is_file() && found.nlink() == 1 => found.len().min(line.size),
        found => {
            clear_away(path, found)?;
            let handle = of_file(pool.create(path, mode), path)?;
            of_file(handle.set_len(line.size), path)?;
            return Ok(0);
        }
    };
    // Before it is opened: its owner may not be allowed to write it.
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|error| DiskError::new("chmod", path, error))?;
    of_file(of_file(pool.get(path), path)?.set_len(line.size), path)?;
    Ok(held)
}

/// Removes whatever is in the way, links as links.
pub(super) fn clear_away(path: &Path, found: std::io::Result<fs::Metadata>) -> Result<()> {
    let removed = match found {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    Ok(removed.map_err(|error| DiskError::new("remove", path, error))?)
}

/// The files of a window as they stand.
pub(super) struct Local {
    pub(super) files: Arc<Vec<WindowFile>>,
    pub(super) fingerprints: Arc<PageFingerprinter>,
    pub(super) pool: Arc<FilePool>,
    pub(super) progress: Arc<Phase>,
    pub(super) reused: AtomicU64,
}

impl Local {
    /// Which of a file's pages, from `first` on, are what the entries say; `None` if there was nothing to look at.
    pub(super) fn same(&self, file: u32, first: u32, entries: &[PageEntry]) -> Result<Option<Vec<bool>>> {
        let Some(WindowFile { path, held, .. }) = self.files.get(file as usize) else { return Ok(None) };
        if u64::from(first) * PAGE_SIZE as u64 >= *held {
            return Ok(None);
        }
        let handle = of_file(self.pool.get(path), path)?;
        let (mut same, mut page) = (Vec::with_capacity(entries.len()), u64::from(first));
        let mut buffer = vec![0; PAGES.min(entries.len()) * PAGE_SIZE];
        for entries in entries.chunks(PAGES) {
            let bytes = &mut buffer[..entries.len() * PAGE_SIZE];
            of_file(handle.read_or_zeros(bytes, page * PAGE_SIZE as u64), path)?;
            for (bytes, entry) in bytes.chunks_exact(PAGE_SIZE).zip(entries) {
                let is_same = self.fingerprints.of(bytes) == entry.fingerprint;
                if !is_same && entry.place.is_none() {
                    of_file(handle.clear(page * PAGE_SIZE as u64, self.length(file, page)), path)?;
                }
                same.push(is_same);
                page += 1;
            }
        }
        self.count(file, first, (entries, &same));
        Ok(Some(same))
    }

    fn count(&self, file: u32, first: u32, (entries, same): (&[PageEntry], &[bool])) {
        let pages = (u64::from(first)..).zip(entries).zip(same);
        // Pages of zeros cost nothing either way.
        let kept = pages.filter(|((_, entry), same)| **same && entry.place.is_some());
        let bytes: u64 = kept.map(|((page, _), _)| self.length(file, page) as u64).sum();
        self.reused.fetch_add(bytes, Ordering::Relaxed);
        self.progress.advance(bytes);
    }

    /// Bytes of a page; the last one of a file may be short.
    fn length(&self, file: u32, page: u64) -> usize {
        let size = self.files.get(file as usize).map_or(0, |file| file.line.size);
        usize::try_from(size.saturating_sub(page * PAGE_SIZE as u64)).unwrap_or(usize::MAX).min(PAGE_SIZE)
    }
}
