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
/// What is gathered at most. Each write past the page cache finds its place on the disk and waits for it: large ones do so
/// seldom.
const GATHERED: usize = 1 << 20;

/// Memory in which writes past the page cache begin where the disk wants it.
#[derive(Debug, Default)]
pub struct Staging(Vec<u8>);

impl Staging {
    /// A copy of the bytes that begins where the disk wants it.
    pub fn copy(&mut self, bytes: &[u8]) -> &[u8] {
        let staged = self.room(bytes.len());
        staged.copy_from_slice(bytes);
        staged
    }

    /// So many bytes; what they were stays, unless more are asked for than before.
    fn room(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length + ALIGNMENT {
            self.0 = vec![0; length + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        &mut self.0[start..start + length]
    }
}

/// Bytes that follow each other in a file, gathered so that few large writes take them there, past the page cache where that
/// can be done: what is written once and not read soon would push out of it what is, and putting it there costs more than
/// unpacking it.
#[derive(Debug, Default)]
pub struct Gathered {
    memory: Staging,
    length: usize,
    place: Option<(Arc<TargetFile>, u64)>,
}

impl Gathered {
    /// Takes bytes that belong at an offset of a file. They are there after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`TargetFile::write_all_at`], of these or of earlier bytes.
    pub fn write(&mut self, file: &Arc<TargetFile>, mut bytes: &[u8], mut offset: u64) -> Result<(), DiskError> {
        while !bytes.is_empty() {
            if self.length == GATHERED || !self.ends_at(file, offset) {
                self.flush()?;
                self.place = Some((Arc::clone(file), offset));
            }
            let (now, later) = bytes.split_at(bytes.len().min(GATHERED - self.length));
            self.memory.room(GATHERED)[self.length..][..now.len()].copy_from_slice(now);
            self.length += now.len();
            offset += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn ends_at(&self, file: &Arc<TargetFile>, offset: u64) -> bool {
        let ends =
            |(held, start): &(Arc<TargetFile>, u64)| Arc::ptr_eq(held, file) && start + self.length as u64 == offset;
        self.place.as_ref().is_some_and(ends)
    }

    /// Writes what was gathered.
    ///
    /// # Errors
    /// As [`TargetFile::write_all_at`]; what was gathered is dropped.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        let length = std::mem::take(&mut self.length);
        let Some((file, offset)) = self.place.take() else { return Ok(()) };
        let bytes = &self.memory.room(GATHERED)[..length];
        let whole = length - length % ALIGNMENT;
        let large = whole >= DIRECT_FROM && offset.is_multiple_of(ALIGNMENT as u64);
        let past = if large && file.write_past_cache(&bytes[..whole], offset)? { whole } else { 0 };
        match &bytes[past..] {
            [] => Ok(()),
            rest => file.write_all_at(rest, offset + past as u64),
        }
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

    /// Whether all of it was written past the page cache; `false` where the file system does not do that.
    fn write_past_cache(&self, bytes: &[u8], offset: u64) -> Result<bool, DiskError> {
        let Some(direct) = self.direct() else { return Ok(false) };
        match direct.write_all_at(bytes, offset) {
            // The file system wants it otherwise.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
            written => written.at("write", &self.path).map(|()| true),
        }
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
        let file = Arc::new(TargetFile::create(&path, 0o600).unwrap());
        file.set_len(1 << 20).unwrap();
        let mut gathered = Gathered::default();
        let mut expected = vec![0; 1 << 20];
        for (number, (offset, length)) in
            (1..).zip([(131_072, 131_072), (0, 65_536), (65_536, 8192), (300_000, 131_072), (1_040_384, 8192)])
        {
            let bytes: Vec<u8> = (0..length).map(|at: u32| number ^ u8::try_from(at % 251).unwrap()).collect();
            gathered.write(&file, &bytes, offset).unwrap();
            let start = usize::try_from(offset).unwrap();
            expected[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        gathered.flush().unwrap();
        let mut read = vec![0; 1 << 20];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == expected);
        assert_eq!(file.size().unwrap(), 1 << 20);
    }

    #[test]
    fn neighbours_are_gathered_and_strangers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| Arc::new(TargetFile::create(&dir.path().join(name), 0o600).unwrap());
        let (one, other) = (file("one"), file("other"));
        let mut gathered = Gathered::default();
        let mut expected = [Vec::new(), Vec::new()];
        for number in 0..700_u32 {
            // Runs of one file, of odd lengths, longer than what is gathered; now and then the other one.
            let which = usize::from(number % 97 == 96);
            let bytes = vec![u8::try_from(number % 251).unwrap(); 4096 + usize::try_from(number % 5).unwrap() * 700];
            let offset = expected[which].len() as u64;
            gathered.write([&one, &other][which], &bytes, offset).unwrap();
            expected[which].extend(bytes);
        }
        gathered.flush().unwrap();
        assert!(expected[0].len() > 2 * GATHERED);
        for (name, expected) in ["one", "other"].into_iter().zip(expected) {
            assert!(fs::read(dir.path().join(name)).unwrap() == expected, "{name}");
        }
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
