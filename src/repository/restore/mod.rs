//! The restore engine: from a COMMIT to bytes on disk.
//!
//! The manifest is read part by part. Files are created with their final size, so pages of zeros stay holes; then their
//! map chunks and frames are fetched in the order of packs and offsets, neighbours in one request, each byte once, many
//! requests in flight. Every frame is authenticated before a byte of it is written. Memory is bounded by the window
//! (see [`WINDOW_PAGES`]) and the requests in flight, whatever the size of the cluster.
//!
//! `global/pg_control` is written under another name: a server cannot start without it, so half a restore never starts.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::disk::sparse::FilePool;
use crate::model::commit::Commit;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Result, ResultExt};
use crate::observe::progress::Phase;
use crate::repository::catalog;
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::manifest::{Begin, FileLine, Line, ManifestReader, ManifestSeal, PartsSummary};

mod frames;
pub mod streams;
mod window;

pub use frames::{Fetched, fetch_frames};
pub use window::{WINDOW_PAGES, WrittenFile};

use window::Window;

/// The name that `global/pg_control` has until everything else is in place.
pub const CONTROL_FILE_PENDING: &str = "global/pg_control.drctl-pending";
/// The file without which PostgreSQL does not start.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Where to restore to.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The data directory; exists and is empty.
    pub directory: PathBuf,
    /// Location on the source → directory here. Every tablespace of the backup must be named.
    pub tablespaces: BTreeMap<String, PathBuf>,
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
    (commit, inventory): (&Commit, &[InventoryLine]),
    destination: &Destination,
    (progress, written): (&Arc<Phase>, &mut (dyn FnMut(WrittenFile) -> Result<()> + Send)),
) -> Result<Leftover> {
    let mut leftover = Leftover::default();
    let pool = Arc::new(FilePool::new(256));
    let mut begin = None;
    let mut window = Window::default();
    let mut closed = Vec::new();
    let mut parts = ManifestParts::new(repository, ring, commit, inventory).await?;
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
                    window.add(file, path, &pool)?;
                }
                Line::Small { path, mode, base64 } => leftover.small_files.push(decode_small(path, mode, &base64)?),
                Line::Document { name, content } => leftover.documents.push((name, content)),
                Line::End { files, bytes } => (leftover.files, leftover.bytes) = (files, bytes),
            }
            if let (true, Some(secrets)) = (window.is_full(), &begin) {
                leftover.fetched += window.write(repository, ring, secrets, (&pool, progress, written)).await?;
            }
        }
    }
    if let Some(secrets) = &begin {
        leftover.fetched += window.write(repository, ring, secrets, (&pool, progress, written)).await?;
    }
    closed.into_iter().try_for_each(|(path, mode)| set_directory_mode(&path, mode))?;
    Ok(leftover)
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
    let (mut begin, mut window, mut total) = (None, Window::default(), 0);
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
            if let (true, Some(secrets)) = (window.is_full(), &begin) {
                window.check(repository, ring, secrets, progress).await?;
            }
        }
    }
    if let Some(secrets) = &begin {
        window.check(repository, ring, secrets, progress).await?;
    }
    Ok(total)
}

/// Reads a manifest part by part, in order, each checked against the inventory.
#[derive(Debug)]
pub struct ManifestParts<'a> {
    repository: &'a Repository,
    commit: &'a Commit,
    keyset: Arc<crate::keys::keyset::Keyset>,
    lines: BTreeMap<&'a str, &'a InventoryLine>,
    reader: Option<ManifestReader>,
    next: u32,
}

impl<'a> ManifestParts<'a> {
    /// Opens the backup's keyset and checks that the inventory names the manifest that COMMIT signed.
    ///
    /// # Errors
    /// No key holder opens the keyset; the inventory contradicts COMMIT.
    pub async fn new(
        repository: &'a Repository,
        ring: &KeyRing,
        commit: &'a Commit,
        inventory: &'a [InventoryLine],
    ) -> Result<Self> {
        let lines: BTreeMap<_, _> = inventory.iter().map(|line| (line.key.as_str(), line)).collect();
        let mut summary = PartsSummary::default();
        for part in 0..commit.manifest.count {
            if let Some(line) = lines.get(layout::manifest(&commit.target, &commit.id, part).as_str()) {
                summary.add(line.size, line.digest());
            }
        }
        if summary.finish() != commit.manifest {
            let text = format!("the inventory of {} does not list the manifest that its COMMIT signed", commit.id);
            return Err(Error::damaged(text));
        }
        let keyset = ring.open(&commit.target, &commit.keyset).await?;
        Ok(Self { repository, commit, keyset, lines, reader: Some(ManifestReader::default()), next: 0 })
    }

    /// The lines of the next part; `None` after the last, once the manifest has proven complete.
    ///
    /// # Errors
    /// A part is in no region intact, or the manifest is not complete.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>> {
        let id = &self.commit.id;
        if self.next == self.commit.manifest.count {
            return self.reader.take().map_or(Ok(()), |reader| reader.finish(id)).map(|()| None);
        }
        let key = layout::manifest(&self.commit.target, id, self.next);
        let line =
            self.lines.get(key.as_str()).ok_or_else(|| Error::damaged(format!("{key} is not in the inventory")))?;
        let (bytes, _) = self.repository.regions.read_exact(&key, line.size, line.digest()).await?;
        let seal = ManifestSeal {
            repository: &self.repository.id,
            keyset: &self.commit.keyset,
            backup: id,
            key: self.keyset.meta(),
        };
        self.next += 1;
        match &mut self.reader {
            Some(reader) => reader.part(&bytes, &seal).map(Some),
            None => Ok(None),
        }
    }
}

/// The first lines of a manifest tell what a plan needs: tablespaces, documents, special files.
///
/// # Errors
/// As [`ManifestParts`].
pub async fn read_outline(repository: &Repository, ring: &KeyRing, commit: &Commit) -> Result<(Begin, Leftover)> {
    let inventory = catalog::inventory(repository, commit).await?;
    let mut parts = ManifestParts::new(repository, ring, commit, &inventory).await?;
    let (mut begin, mut outline) = (None, Leftover::default());
    while let Some(lines) = parts.next().await? {
        for line in lines {
            match line {
                Line::Begin(first) => begin = Some(first),
                Line::Tablespace { oid, location } => outline.tablespaces.push((oid, location)),
                Line::Small { path, mode, base64 } => outline.small_files.push(decode_small(path, mode, &base64)?),
                Line::Document { name, content } => outline.documents.push((name, content)),
                Line::End { files, bytes } => (outline.files, outline.bytes) = (files, bytes),
                Line::File(FileLine { path, damaged_blocks, .. }) if !damaged_blocks.is_empty() => {
                    outline.damaged.push((path, damaged_blocks));
                }
                Line::File(_) | Line::Directory { .. } => {}
            }
        }
    }
    let begin = begin.ok_or_else(|| Error::damaged(format!("the manifest of {} has no beginning", commit.id)))?;
    Ok((begin, outline))
}

fn decode_small(path: String, mode: u32, base64: &str) -> Result<(String, u32, Vec<u8>)> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64);
    let bytes =
        bytes.map_err(|error| Error::damaged(format!("{path} in the manifest is not readable")).because(error))?;
    Ok((path, mode, bytes))
}

fn pending_name(path: &str) -> &str {
    if path == CONTROL_FILE { CONTROL_FILE_PENDING } else { path }
}

/// Where a relative path of the backup lands. The manifest is authenticated, and still no path leaves its directory.
fn place_of(destination: &Destination, path: &str) -> Result<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.is_empty() {
        return Err(Error::damaged(format!("the manifest names a path outside of the data directory: `{path}`")));
    }
    Ok(destination.directory.join(path))
}

/// Creates a directory; gives the mode that it is to have once everything in it is written, if its owner may not write
/// there then.
fn create_directory(destination: &Destination, path: &str, mode: u32) -> Result<Option<(PathBuf, u32)>> {
    use std::os::unix::fs::DirBuilderExt;
    let path = place_of(destination, path)?;
    match std::fs::DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        // A tablespace's directory stands already, as a link.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(Error::failed(format!("create {}", path.display())).because(error)),
    }
    const OWNER_WRITES: u32 = 0o700;
    set_directory_mode(&path, mode | OWNER_WRITES)?;
    Ok((mode & OWNER_WRITES != OWNER_WRITES).then_some((path, mode)))
}

fn set_directory_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(mode & 0o7777);
    std::fs::set_permissions(path, permissions)
        .map_err(|error| Error::failed(format!("set the mode of {}", path.display())).because(error))
}

fn link_tablespace(destination: &Destination, oid: u32, location: &str) -> Result<()> {
    let unmapped = || Error::refused(format!("tablespace {oid} at {location} has no new place"));
    let place = destination.tablespaces.get(location).ok_or_else(unmapped)?;
    let link = destination.directory.join("pg_tblspc").join(oid.to_string());
    let parent = destination.directory.join("pg_tblspc");
    std::fs::create_dir_all(&parent)
        .map_err(|error| Error::failed(format!("create {}", parent.display())).because(error))?;
    std::os::unix::fs::symlink(place, &link)
        .map_err(|error| Error::failed(format!("link {} to {}", link.display(), place.display())).because(error))
}

/// Pages that a file of this size has.
const fn page_count(size: u64) -> u64 {
    size.div_ceil(PAGE_SIZE as u64)
}

/// Adds the file's name to whatever went wrong with it.
fn of_file<T>(result: std::result::Result<T, crate::disk::DiskError>, path: &Path) -> Result<T> {
    result.during(|| format!("write {}", path.display()))
}
