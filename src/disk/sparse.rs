//! Files written piece by piece at offsets, by several threads, with a bound on open handles.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::{At, DiskError};

/// A file that is written at offsets. What is never written reads as zeros and takes no space.
#[derive(Debug)]
pub struct TargetFile {
    file: File,
    path: PathBuf,
    /// The same file past the page cache, once that was asked for; `None` where its file system cannot do that.
    direct: OnceLock<Option<File>>,
}

/// Writes past the page cache want places, lengths and memory that begin at such a multiple: that of the largest sectors.
pub const ALIGNMENT: usize = 4096;
/// Smaller writes go through the page cache, which puts neighbours together.
pub const DIRECT_FROM: usize = 64 * 1024;

/// Memory in which writes past the page cache begin where the disk wants it.
#[derive(Debug, Default)]
pub struct Staging(Vec<u8>);

impl Staging {
    /// A copy of the bytes that begins where the disk wants it.
    pub fn copy(&mut self, bytes: &[u8]) -> &[u8] {
        if self.0.len() < bytes.len() + ALIGNMENT {
            self.0 = vec![0; bytes.len() + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let staged = &mut self.0[start..start + bytes.len()];
        staged.copy_from_slice(bytes);
        staged
    }
}

impl TargetFile {
    /// Creates a file where nothing is, not even a dangling link.
    ///
    /// # Errors
    /// [`DiskError::Exists`] if something is there.
    pub fn create(path: &Path, mode: u32) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        // O_EXCL does not follow a link in the last component.
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).at("create", path)?;
        // After the fact: the umask must not decide whether PostgreSQL can read its files.
        file.set_permissions(Permissions::from_mode(mode)).at("chmod", path)?;
        Ok(Self { file, path: path.to_owned(), direct: OnceLock::new() })
    }

    /// Opens an existing regular file for reading and writing; a link is an error.
    ///
    /// # Errors
    /// [`DiskError::Missing`] if nothing is there.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(path).at("open", path)?;
        Ok(Self { file, path: path.to_owned(), direct: OnceLock::new() })
    }

    /// Sets the permission bits.
    ///
    /// # Errors
    /// The file system refused.
    pub fn set_mode(&self, mode: u32) -> Result<(), DiskError> {
        self.file.set_permissions(Permissions::from_mode(mode)).at("chmod", &self.path)
    }

    /// Sets the size; new bytes are zeros that take no space.
    ///
    /// # Errors
    /// The file system refused.
    pub fn set_len(&self, size: u64) -> Result<(), DiskError> {
        self.file.set_len(size).at("set the size of", &self.path)
    }

    /// The size now.
    ///
    /// # Errors
    /// The file system refused.
    pub fn size(&self) -> Result<u64, DiskError> {
        self.file.metadata().at("stat", &self.path).map(|metadata| metadata.len())
    }

    /// Writes everything at an offset.
    ///
    /// # Errors
    /// [`DiskError::Full`] and others; some of the bytes may have been written.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, offset).at("write", &self.path)
    }

    /// As [`write_all_at`](Self::write_all_at), past the page cache where that can be done: what is written once and not
    /// read soon would push out of it what is, and putting it there costs more than unpacking it.
    ///
    /// # Errors
    /// As there.
    pub fn write_past_cache(&self, bytes: &[u8], offset: u64, staging: &mut Staging) -> Result<(), DiskError> {
        let fits = bytes.len() >= DIRECT_FROM && bytes.len().is_multiple_of(ALIGNMENT);
        if let Some(direct) = self.direct().filter(|_| fits && offset.is_multiple_of(ALIGNMENT as u64)) {
            match direct.write_all_at(staging.copy(bytes), offset) {
                // The file system wants it otherwise.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
                written => return written.at("write", &self.path),
            }
        }
        self.write_all_at(bytes, offset)
    }

    fn direct(&self) -> Option<&File> {
        let open = || {
            let flags = OFlags::NOFOLLOW.union(OFlags::DIRECT).bits().cast_signed();
            OpenOptions::new().write(true).custom_flags(flags).open(&self.path).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// Fills the whole buffer from an offset.
    ///
    /// # Errors
    /// Also if the file ends before the buffer is full.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.file.read_exact_at(buffer, offset).at("read", &self.path)
    }

    /// Fills the whole buffer from an offset; what lies behind the end of the file reads as zeros.
    ///
    /// # Errors
    /// The disk fails.
    pub fn read_or_zeros(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let mut got = 0;
        while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + got as u64) {
                Ok(0) => break,
                Ok(count) => got += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).at("read", &self.path),
            }
        }
        buffer[got..].fill(0);
        Ok(())
    }

    /// Makes bytes zeros, and gives their space back where the file system can.
    ///
    /// # Errors
    /// It can neither do that nor write zeros.
    pub fn clear(&self, offset: u64, length: usize) -> Result<(), DiskError> {
        let hole = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
        match fallocate(&self.file, hole, offset, length as u64) {
            Ok(()) => Ok(()),
            Err(_) => self.write_all_at(&vec![0; length], offset),
        }
    }

    /// Makes contents and size durable; the name needs [`super::place::sync_dir`].
    ///
    /// # Errors
    /// A write that was accepted earlier was lost: the contents must not be trusted.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_all().at("fsync", &self.path)
    }
}

/// Open handles of many files, at most `limit` of them kept; the one unused for longest is closed first.
///
/// A handle in use stays valid after it left the pool. Closing does not flush: the writer ends with
/// [`super::place::sync_filesystem`].
#[derive(Debug)]
pub struct FilePool {
    limit: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    uses: u64,
    files: HashMap<PathBuf, (u64, Arc<TargetFile>)>,
}

impl FilePool {
    /// A pool that keeps up to `limit` handles.
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), open: Mutex::default() }
    }

    /// Creates a file and keeps its handle.
    ///
    /// # Errors
    /// As [`TargetFile::create`].
    pub fn create(&self, path: &Path, mode: u32) -> Result<Arc<TargetFile>, DiskError> {
        TargetFile::create(path, mode).map(|file| self.keep(Arc::new(file)))
    }

    /// The handle of an existing file, opened again if it was closed.
    ///
    /// # Errors
    /// As [`TargetFile::open`].
    pub fn get(&self, path: &Path) -> Result<Arc<TargetFile>, DiskError> {
        if let Some(file) = self.kept(path) {
            return Ok(file);
        }
        // Outside the lock: an open may wait for a slow disk. Two threads may open the same file; both handles are good.
        TargetFile::open(path).map(|file| self.keep(Arc::new(file)))
    }

    fn kept(&self, path: &Path) -> Option<Arc<TargetFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.uses += 1;
        let now = open.uses;
        let (used, file) = open.files.get_mut(path)?;
        *used = now;
        Some(Arc::clone(file))
    }

    fn keep(&self, file: Arc<TargetFile>) -> Arc<TargetFile> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.files.len() >= self.limit {
            let oldest = open.files.iter().min_by_key(|(_, (used, _))| *used).map(|(path, _)| path.clone());
            oldest.and_then(|path| open.files.remove(&path));
        }
        open.uses += 1;
        let now = open.uses;
        open.files.insert(file.path.clone(), (now, Arc::clone(&file)));
        file
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn holes_read_as_zeros_and_offsets_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("16384");
        let file = TargetFile::create(&path, 0o640).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"page", 8192).unwrap();
        let mut read = [1; 6];
        file.read_exact_at(&mut read, 8190).unwrap();
        assert_eq!(&read, b"\0\0page");
        assert!(file.read_exact_at(&mut read, (1 << 20) - 3).is_err());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(file.size().unwrap(), 1 << 20);
    }

    #[test]
    fn what_goes_past_the_cache_and_what_cannot_stand_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("16384");
        let file = TargetFile::create(&path, 0o600).unwrap();
        file.set_len(1 << 20).unwrap();
        let mut staging = Staging::default();
        let mut expected = vec![0; 1 << 20];
        for (number, (offset, length)) in
            (1..).zip([(131_072, 131_072), (0, 65_536), (65_536, 8192), (300_000, 131_072), (1_040_384, 8192)])
        {
            let bytes: Vec<u8> = (0..length).map(|at: u32| number ^ u8::try_from(at % 251).unwrap()).collect();
            file.write_past_cache(&bytes, offset, &mut staging).unwrap();
            let start = usize::try_from(offset).unwrap();
            expected[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        let mut read = vec![0; 1 << 20];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == expected);
        assert_eq!(file.size().unwrap(), 1 << 20);
    }

    #[test]
    fn cleared_bytes_are_zeros_and_the_end_reads_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("16384");
        let file = TargetFile::create(&path, 0o600).unwrap();
        file.write_all_at(&[7; 3 * 8192], 0).unwrap();
        file.clear(8192, 8192).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 3 * 8192);
        for (page, expected) in [(0, 7), (1, 0), (2, 7)] {
            assert!(bytes[page * 8192..][..8192].iter().all(|byte| *byte == expected), "page {page}");
        }
        let mut read = [1; 16];
        file.read_or_zeros(&mut read, 3 * 8192 - 4).unwrap();
        assert_eq!(read, [7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn links_are_never_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, link, dangling) =
            (dir.path().join("victim"), dir.path().join("link"), dir.path().join("dangling"));
        drop(TargetFile::create(&victim, 0o600).unwrap());
        symlink(&victim, &link).unwrap();
        symlink(dir.path().join("absent"), &dangling).unwrap();
        assert!(matches!(TargetFile::create(&link, 0o600), Err(DiskError::Exists { .. })));
        assert!(matches!(TargetFile::create(&dangling, 0o600), Err(DiskError::Exists { .. })));
        assert!(TargetFile::open(&link).is_err());
        assert!(!dir.path().join("absent").exists());
    }

    #[test]
    fn the_pool_stays_within_its_bound_and_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let pool = FilePool::new(3);
        let path = |number: u8| dir.path().join(number.to_string());
        for number in 0..10 {
            pool.create(&path(number), 0o600).unwrap();
        }
        for number in 0..10 {
            pool.get(&path(number)).unwrap().write_all_at(&[number; 4], 2).unwrap();
        }
        assert_eq!(pool.open.lock().unwrap().files.len(), 3);
        for number in 0..10 {
            assert_eq!(fs::read(path(number)).unwrap(), [0, 0, number, number, number, number]);
        }
    }
}
