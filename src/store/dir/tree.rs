//! The open root, and reading below it without following links.

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, fsync, open, openat, statat, unlinkat};
use rustix::io::Errno;

use super::error::Call;
use crate::disk::sparse::Staging;
use crate::store::{ObjectInfo, StoreError, VersionId, name};

pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// Without NONBLOCK, opening a pipe that somebody left in the tree would wait for its writer.
const OBJECT: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);
pub(super) const DIRECTORY_MODE: Mode = Mode::RWXU;

/// An open root and what this process knows of it.
pub(super) struct Tree {
    pub(super) root: OwnedFd,
    pub(super) address: String,
    /// Directories whose entry in their parent this process has made durable: another writer may have made them a
    /// moment ago and died before its own fsync.
    pub(super) durable: Mutex<HashSet<String>>,
    pub(super) swept: AtomicBool,
    pub(super) serial: AtomicU64,
    /// Memory for writes past the page cache, as much as was ever needed at the same time.
    pub(super) staging: Mutex<Vec<Staging>>,
}

impl Tree {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let address = format!("dir:{}", path.display());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let call = Call { operation: "open", key: "the root", address: &address };
        let root = open(path, flags, Mode::empty()).map_err(|errno| call.failed(errno))?;
        let (durable, staging) = (Mutex::default(), Mutex::default());
        Ok(Self { root, address, durable, swept: AtomicBool::new(false), serial: AtomicU64::new(0), staging })
    }

    pub(super) fn create(path: &Path) -> Result<Self, StoreError> {
        let address = format!("dir:{}", path.display());
        let call = Call { operation: "create", key: "the root", address: &address };
        create_all(path).map_err(|errno| call.failed(errno))?;
        Self::open(path)
    }

    pub(super) fn call<'a>(&'a self, operation: &'static str, key: &'a str) -> Call<'a> {
        Call { operation, key, address: &self.address }
    }

    /// Opens a directory part by part; `path` is empty for the root itself.
    pub(super) fn directory(&self, call: Call<'_>, path: &str) -> Result<OwnedFd, StoreError> {
        let root = fstat(&self.root).map_err(|errno| call.failed(errno))?;
        if root.st_nlink == 0 {
            // Everything below a removed root looks absent, and absence must be true.
            return Err(call.unavailable("the root directory was removed"));
        }
        let mut directory = self.root.try_clone().map_err(|error| call.unavailable(&error.to_string()))?;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            directory = descend(&directory, part).map_err(|errno| refusal(call, directory.as_fd(), part, errno))?;
        }
        Ok(directory)
    }

    /// Opens an object in its directory.
    pub(super) fn object(call: Call<'_>, directory: &OwnedFd, leaf: &str) -> Result<(File, Stat), StoreError> {
        let file = openat(directory, leaf, OBJECT, Mode::empty())
            .map_err(|errno| refusal(call, directory.as_fd(), leaf, errno))?;
        let stat = fstat(&file).map_err(|errno| call.failed(errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((File::from(file), stat)),
            // On S3 a directory has no name of its own; neither has it here.
            FileType::Directory => Err(call.failed(Errno::NOENT)),
            _ => Err(call.invalid("not a regular file")),
        }
    }

    fn find(&self, call: Call<'_>) -> Result<(File, Stat), StoreError> {
        let (parents, leaf) = name::split(call.key);
        Self::object(call, &self.directory(call, parents)?, leaf)
    }

    pub(super) fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        let (_, stat) = self.find(self.call("head", key))?;
        Ok(ObjectInfo { size: size(&stat), modified: modified(&stat), digest: None })
    }

    pub(super) fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let call = self.call("get", key);
        let (file, stat) = self.find(call)?;
        let size = size(&stat);
        let range = range.unwrap_or(0..size);
        let expected = range.end - range.start;
        let truncated =
            |got| StoreError::Truncated { key: key.to_owned(), address: self.address.clone(), got, expected };
        if range.end > size {
            return Err(truncated(size.saturating_sub(range.start)));
        }
        let body = read_at(&file, range.start, expected).map_err(|error| call.unavailable(&error.to_string()))?;
        if body.len() as u64 == expected { Ok(Bytes::from(body)) } else { Err(truncated(body.len() as u64)) }
    }

    pub(super) fn delete_version(&self, key: &str, wanted: &VersionId) -> Result<(), StoreError> {
        match self.find(self.call("delete", key)) {
            Ok((_, stat)) if version(size(&stat), modified(&stat)) == *wanted => {}
            Err(error) if !error.is_not_found() => return Err(error),
            _ => return Ok(()),
        }
        match self.delete(key) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    pub(super) fn delete(&self, key: &str) -> Result<(), StoreError> {
        let call = self.call("delete", key);
        let (parents, leaf) = name::split(key);
        let directory = self.directory(call, parents)?;
        // A link or a pipe is not an object of ours: refused as in every other call.
        Self::object(call, &directory, leaf)?;
        unlinkat(&directory, leaf, AtFlags::empty()).map_err(|errno| call.failed(errno))?;
        fsync(&directory).map_err(|errno| call.failed(errno))
    }
}

/// Opens one directory in another.
pub(super) fn descend(directory: impl AsFd, part: &str) -> rustix::io::Result<OwnedFd> {
    openat(directory, part, DIRECTORY, Mode::empty())
}

/// Tells a link (which the open flags report as "not a directory" or "loop") from a name that is absent.
pub(super) fn refusal(call: Call<'_>, directory: BorrowedFd<'_>, part: &str, errno: Errno) -> StoreError {
    let kind = statat(directory, part, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::Symlink) => call.invalid(&format!("{part} is a symbolic link, which is not followed")),
        _ => call.failed(errno),
    }
}

/// Makes missing directories from the top down, each durable in its parent before the next.
fn create_all(path: &Path) -> rustix::io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|at| !at.as_os_str().is_empty() && !at.exists()).collect();
    for directory in missing.into_iter().rev() {
        match rustix::fs::mkdir(directory, DIRECTORY_MODE) {
            Ok(()) => rustix::fs::chmod(directory, DIRECTORY_MODE)?,
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fsync(open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)?;
    }
    Ok(())
}

/// Up to `length` bytes; fewer only at the end of the file.
pub(super) fn read_at(file: &File, start: u64, length: u64) -> std::io::Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| std::io::ErrorKind::FileTooLarge)?;
    let mut body = Vec::new();
    body.try_reserve_exact(length).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    body.resize(length, 0);
    let (mut filled, mut at) = (0, start);
    while let Some(rest) = body.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at) {
            Ok(0) => break,
            Ok(read) => (filled, at) = (filled + read, at + read as u64),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    body.truncate(filled);
    Ok(body)
}

/// A file system keeps one version of a name. Its size and the time of its only write tell it from a later one.
pub(super) fn version(size: u64, modified: Option<DateTime<Utc>>) -> VersionId {
    let nanoseconds = modified.and_then(|modified| modified.timestamp_nanos_opt()).unwrap_or_default();
    VersionId(format!("{nanoseconds:x}-{size:x}"))
}

pub(super) fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

pub(super) fn modified(stat: &Stat) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(stat.st_mtime, u32::try_from(stat.st_mtime_nsec).ok()?)
}
