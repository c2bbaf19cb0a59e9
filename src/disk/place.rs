//! Whole files that are either all there or not there, also after a power failure.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tempfile::NamedTempFile;

use super::{At, DiskError};

/// Writes a whole file durably, replacing what was there: readers see the old bytes or the new ones, never a mixture.
///
/// # Errors
/// The file could not be written; what was there before is untouched, unless only the last fsync of the directory failed.
pub fn place(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DiskError> {
    let temporary = write_beside(path, bytes, mode)?;
    temporary.persist(path).map_err(|error| error.error).at("rename into", path)?;
    sync_dir(parent(path))
}

/// As [`place`], for a file that belongs to the account and group given by number. Whoever reads it never finds it in other
/// hands.
///
/// # Errors
/// As [`place`], or the file cannot be given away.
pub fn place_for(path: &Path, bytes: &[u8], mode: u32, (uid, gid): (u32, u32)) -> Result<(), DiskError> {
    let temporary = write_beside(path, bytes, mode)?;
    std::os::unix::fs::fchown(temporary.as_file(), Some(uid), Some(gid)).at("chown", path)?;
    temporary.persist(path).map_err(|error| error.error).at("rename into", path)?;
    sync_dir(parent(path))
}

/// Writes a whole file durably where nothing is yet.
///
/// # Errors
/// [`DiskError::Exists`] if something is, also if it appeared meanwhile; it is left as it is.
pub fn place_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DiskError> {
    let temporary = write_beside(path, bytes, mode)?;
    temporary.persist_noclobber(path).map_err(|error| error.error).at("create", path)?;
    sync_dir(parent(path))
}

/// A whole file that is too large for memory: written piece by piece beside its place, and put there at the end. Until then
/// readers see what was there before.
///
/// It is written under one fixed name, so that what a killed process left is replaced by the next one. The caller holds a
/// lock that keeps others from writing the same file.
#[derive(Debug)]
pub struct Draft {
    out: BufWriter<File>,
    path: PathBuf,
    place: PathBuf,
}

impl Draft {
    /// Begins the file that is to stand at `place`.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn begin(place: &Path, mode: u32) -> Result<Self, DiskError> {
        let mut name = place.as_os_str().to_owned();
        name.push(".next");
        let path = PathBuf::from(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).at("remove", &path),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path).at("create", &path)?;
        Ok(Self { out: BufWriter::new(file), path, place: place.to_owned() })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.out.write_all(bytes).at("write", &self.path)
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn flush(&mut self) -> Result<(), DiskError> {
        self.out.flush().at("write", &self.path)
    }

    /// Puts the file in its place, durably.
    ///
    /// # Errors
    /// As [`rename`].
    pub fn place(mut self) -> Result<(), DiskError> {
        self.flush()?;
        rename(&self.path, &self.place)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone already if it was placed; what stays of it costs space alone.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A rename that survives a power failure: the contents first, then the name, then both directories.
///
/// # Errors
/// The file system refused; after an error of the last step the new name may or may not survive a crash.
pub fn rename(from: &Path, to: &Path) -> Result<(), DiskError> {
    File::open(from).and_then(|file| file.sync_all()).at("fsync", from)?;
    rustix::fs::rename(from, to).at("rename", from)?;
    sync_dir(parent(to))?;
    if parent(from) == parent(to) { Ok(()) } else { sync_dir(parent(from)) }
}

/// A rename that a power failure may undo, or leave with a part of the contents: for what is not relied on before it is
/// flushed, or after the machine went down.
///
/// # Errors
/// The file system refused.
pub fn name(from: &Path, to: &Path) -> Result<(), DiskError> {
    rustix::fs::rename(from, to).at("rename", from)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// The directory cannot be opened or flushed.
pub fn sync_dir(path: &Path) -> Result<(), DiskError> {
    File::open(path).and_then(|directory| directory.sync_all()).at("fsync directory", path)
}

/// Makes everything on the file system that holds `path` durable: one call instead of an fsync per file.
///
/// # Errors
/// The file system reported a failed write, perhaps of somebody else's file: nothing written there may be trusted.
pub fn sync_filesystem(path: &Path) -> Result<(), DiskError> {
    let handle = File::open(path).at("open", path)?;
    rustix::fs::syncfs(&handle).at("sync the file system of", path)
}

/// A file system that is written to for a while. From here on no failed write on it goes unseen, whoever else flushes.
#[derive(Debug)]
pub struct Flushed {
    handle: File,
    path: PathBuf,
    /// The kernel tells a handle of each failed write once; whoever asks later must learn of it, too.
    lost: Mutex<bool>,
}

impl Flushed {
    /// The file system that holds `path`.
    ///
    /// # Errors
    /// `path` cannot be opened.
    pub fn holding(path: &Path) -> Result<Self, DiskError> {
        Ok(Self { handle: File::open(path).at("open", path)?, path: path.to_owned(), lost: Mutex::new(false) })
    }

    /// Makes everything durable that was written so far.
    ///
    /// # Errors
    /// The file system has reported a failed write, perhaps of somebody else's file: nothing written there may be trusted.
    pub fn sync(&self) -> Result<(), DiskError> {
        const STEP: &str = "sync the file system of";
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if *lost {
            return Err(DiskError::new(STEP, &self.path, std::io::Error::other("a write was lost before")));
        }
        let synced = rustix::fs::syncfs(&self.handle).at(STEP, &self.path);
        *lost = synced.is_err();
        synced
    }
}

fn write_beside(path: &Path, bytes: &[u8], mode: u32) -> Result<NamedTempFile, DiskError> {
    // The same directory, because a rename across file systems is a copy.
    let mut file =
        tempfile::Builder::new().prefix(".drctl-").suffix(".tmp").tempfile_in(parent(path)).at("create", path)?;
    file.write_all(bytes).at("write", path)?;
    file.as_file().set_permissions(Permissions::from_mode(mode)).at("chmod", path)?;
    file.as_file().sync_all().at("fsync", path)?;
    Ok(file)
}

/// The directory of `path`; a bare name stands in the current one.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        place(&path, b"one", 0o600).unwrap();
        place(&path, b"two", 0o640).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays behind");
    }

    #[test]
    fn a_file_is_in_the_right_hands_when_it_is_seen() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let own = fs::metadata(dir.path()).unwrap();
        place_for(&path, b"one", 0o600, (own.uid(), own.gid())).unwrap();
        let placed = fs::metadata(&path).unwrap();
        assert_eq!((placed.uid(), placed.gid(), placed.mode() & 0o7777), (own.uid(), own.gid(), 0o600));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays behind");
    }

    #[test]
    fn create_only_never_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("once");
        place_new(&path, b"one", 0o600).unwrap();
        assert!(matches!(place_new(&path, b"two", 0o600), Err(DiskError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays behind");
    }

    #[test]
    fn a_rename_moves_between_directories() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("sub/b"));
        place(&from, b"x", 0o600).unwrap();
        rename(&from, &to).unwrap();
        assert!(!from.exists());
        assert_eq!(fs::read(&to).unwrap(), b"x");
        sync_filesystem(&to).unwrap();
    }

    #[test]
    fn a_draft_is_seen_only_once_it_is_placed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        place(&path, b"old", 0o600).unwrap();
        File::create(dir.path().join("state.next")).unwrap().write_all(b"of a killed run").unwrap();
        let mut draft = Draft::begin(&path, 0o600).unwrap();
        draft.write(b"new ").unwrap();
        drop(draft);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let mut draft = Draft::begin(&path, 0o600).unwrap();
        draft.write(b"new ").unwrap();
        draft.write(b"state").unwrap();
        draft.place().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new state");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft stays behind");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("absent/file");
        let error = place(&path, b"", 0o600).unwrap_err();
        assert!(error.to_string().contains("absent/file"), "{error}");
    }
}
