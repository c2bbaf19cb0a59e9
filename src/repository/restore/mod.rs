//! The restore engine: from a COMMIT to bytes on disk.
//!
//! The manifest is read part by part. Files are created with their final size, so pages of zeros stay holes; then their
//! map chunks and frames are fetched in the order of packs and offsets, neighbours in one request, each byte once, many
//! requests in flight. Every frame is authenticated before a byte of it is written. Memory is bounded by a budget (see
//! [`Memory`]), whatever the size of the cluster. With [`Destination::reuse`] what stands there already stays, page by page,
//! where it is what the map says.
//!
//! `global/pg_control` is written under another name: a server cannot start without it, so half a restore never starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::sparse::FilePool;
use crate::model::commit::Commit;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Result, ResultExt};
use crate::observe::progress::Phase;
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::pages::manifest::Line;

mod checksum;
mod file;
mod frames;
mod memory;
mod pages;
mod parts;
mod places;
mod reuse;
pub mod streams;
mod sums;
mod window;

pub use file::WrittenFile;
pub use frames::{Fetched, Flight, fetch_frames};
pub use memory::Memory;
pub use parts::{KeptParts, ManifestParts, read_outline};

use parts::decode_small;
use places::{create_directory, link_tablespace, pending_name, place_of, set_directory_mode};
use window::{Origin, Window};

/// The name that `global/pg_control` has until everything else is in place.
pub const CONTROL_FILE_PENDING: &str = "global/pg_control.drctl-pending";
/// The file without which PostgreSQL does not start.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Where to restore to.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The data directory; exists and is empty, unless it is reused.
    pub directory: PathBuf,
    /// Location on the source → directory here. Every tablespace of the backup must be named.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// Whether files that stand there become those of the backup; otherwise one that stands there is an error. What the
    /// backup does not have is the caller's to remove.
    pub reuse: bool,
    /// What may be held in memory.
    pub memory: Memory,
}

impl Destination {
    /// An empty directory.
    pub fn empty(directory: PathBuf, tablespaces: BTreeMap<String, PathBuf>) -> Self {
        Self { directory, tablespaces, reuse: false, memory: Memory::default() }
    }
}

/// What the engine leaves to the job: contents that are written last or interpreted.
#[derive(Debug, Default)]
pub struct Leftover {
    /// `backup_label`, `tablespace_map`.
    pub small_files: Vec<(String, u32, Vec<u8>)>,
    /// Captured configuration.
    pub documents: Vec<(String, serde_json::Value)>,
    /// Tablespaces: oid, location on the source.
    pub tablespaces: Vec<(u32, String)>,
    /// Files with pages that were damaged on the source already.
    pub damaged: Vec<(String, Vec<u32>)>,
    /// Bytes of all files.
    pub bytes: u64,
    /// How many files.
    pub files: u64,
    /// Bytes fetched from the regions for pages and maps.
    pub fetched: u64,
    /// Bytes of pages that stood there already.
    pub reused: u64,
}

/// Restores every file of a backup, except that `pg_control` still has its pending name. `written` is told of each file
/// once all of its bytes are with the operating system.
///
/// # Errors
/// An object is in no region intact, no key opens it, or the disk fails. The directory then holds a part, which cannot be
/// started.
pub async fn restore_files(
    repository: &Repository,
    ring: &KeyRing,
    (commit, inventory, kept): (&Commit, &[InventoryLine], KeptParts),
    destination: &Destination,
    (progress, written): (&Arc<Phase>, &mut (dyn FnMut(WrittenFile) -> Result<()> + Send)),
) -> Result<Leftover> {
    let mut leftover = Leftover::default();
    let pool = Arc::new(FilePool::new(256));
    let (mut begin, mut window, mut closed) = (None, Window::default(), Vec::new());
    let mut parts = ManifestParts::after(repository, ring, (commit, inventory), kept).await?;
    let memory = destination.memory;
    while let Some(lines) = parts.next().await? {
        for line in lines {
            match line {
                Line::Begin(first) => begin = Some(window::Secrets::new(first)?),
                Line::Directory { path, mode } => closed.extend(create_directory(destination, &path, mode)?),
                Line::Tablespace { oid, location } => {
                    link_tablespace(destination, oid, &location)?;
                    leftover.tablespaces.push((oid, location));
                }
                Line::File(file) => {
                    let path = place_of(destination, pending_name(&file.path))?;
                    if !file.damaged_blocks.is_empty() {
                        leftover.damaged.push((file.path.clone(), file.damaged_blocks.clone()));
                    }
                    match destination.reuse {
                        true => window.take_over(file, path, &pool)?,
                        false => window.create(file, path, &pool)?,
                    }
                }
                Line::Small { path, mode, base64 } => leftover.small_files.push(decode_small(path, mode, &base64)?),
                Line::Document { name, content } => leftover.documents.push((name, content)),
                Line::End { files, bytes } => (leftover.files, leftover.bytes) = (files, bytes),
            }
            if let (true, Some(secrets)) = (window.is_full(memory), &begin) {
                let origin = Origin { repository, ring, secrets, memory };
                leftover.add(window.write(origin, (&pool, progress, written)).await?);
            }
        }
    }
    if let Some(secrets) = &begin {
        let origin = Origin { repository, ring, secrets, memory };
        leftover.add(window.write(origin, (&pool, progress, written)).await?);
    }
    closed.into_iter().try_for_each(|(path, mode)| set_directory_mode(&path, mode))?;
    Ok(leftover)
}

impl Leftover {
    const fn add(&mut self, (fetched, reused): window::Moved) {
        self.fetched += fetched;
        self.reused += reused;
    }
}

/// Fetches, opens and compares everything that [`restore_files`] would write, and writes nothing. Returns the bytes of all
/// files.
///
/// # Errors
/// As [`restore_files`], without those of a disk.
pub async fn check_files(
    repository: &Repository,
    ring: &KeyRing,
    (commit, inventory): (&Commit, &[InventoryLine]),
    progress: &Arc<Phase>,
) -> Result<u64> {
    let (mut begin, mut window, mut total, memory) = (None, Window::default(), 0, Memory::default());
    let mut parts = ManifestParts::new(repository, ring, commit, inventory).await?;
    while let Some(lines) = parts.next().await? {
        for line in lines {
            match line {
                Line::Begin(first) => begin = Some(window::Secrets::new(first)?),
                Line::File(file) => {
                    let path = PathBuf::from(&file.path);
                    window.add_known(file, path)?;
                }
                Line::Small { path, mode, base64 } => drop(decode_small(path, mode, &base64)?),
                Line::End { bytes, .. } => total = bytes,
                Line::Directory { .. } | Line::Tablespace { .. } | Line::Document { .. } => {}
            }
            if let (true, Some(secrets)) = (window.is_full(memory), &begin) {
                window.check(Origin { repository, ring, secrets, memory }, progress).await?;
            }
        }
    }
    if let Some(secrets) = &begin {
        window.check(Origin { repository, ring, secrets, memory }, progress).await?;
    }
    Ok(total)
}

/// Pages that a file of this size has.
const fn page_count(size: u64) -> u64 {
    size.div_ceil(PAGE_SIZE as u64)
}

/// Adds the file's name to whatever went wrong with it.
fn of_file<T>(result: std::result::Result<T, crate::disk::DiskError>, path: &Path) -> Result<T> {
    result.during(|| format!("write {}", path.display()))
}
