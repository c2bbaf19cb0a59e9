//! From directories to one tar archive, while others go on writing to them.
//!
//! The head of an entry says how many bytes follow, so that many follow whatever becomes of the file meanwhile. Small files
//! are read whole before their head is written, and again if they changed under the reader.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom, seek};
use rustix::io::Errno;

use super::entry::{BLOCK, Entry, Kind, MAP_LIMIT, padding, write_end};
use super::names::Names;
use super::{Contents, Options, Told, shown};
use crate::model::{Error, Result};

/// Files up to this are read whole, and again while they change.
const SMALL: u64 = 1024 * 1024;
/// How often.
const READINGS: usize = 3;
const BUFFER: usize = 256 * 1024;

/// Packs everything that the options name.
///
/// # Errors
/// A root cannot be read, or the writer fails. What happens to single files below a root is told instead.
pub(super) fn pack(options: &Options, out: &mut impl Write) -> Result<(Contents, Told)> {
    let mut packer = Packer {
        options,
        out,
        users: Names::of_users(),
        groups: Names::of_groups(),
        links: HashMap::new(),
        pending: Vec::new(),
        contents: Contents::of(options),
        told: Told::default(),
        buffer: vec![0; BUFFER],
    };
    for root in &options.roots {
        packer.root(root)?;
    }
    packer.contents.refuse_nothing()?;
    write_end(packer.out).and_then(|()| packer.out.flush()).map_err(gone)?;
    Ok((packer.contents, packer.told))
}

struct Packer<'a, W> {
    options: &'a Options,
    out: &'a mut W,
    users: Names,
    groups: Names,
    /// Entries that may come again under another name: (device, inode) and the first name.
    links: HashMap<(u64, u64), (Vec<u8>, Look)>,
    /// Directories that are written once something in them is: with `include`, not every one of them is wanted.
    pending: Vec<Entry>,
    contents: Contents,
    told: Told,
    buffer: Vec<u8>,
}

/// What an entry of a directory came to.
type Done = Result<()>;

impl<W: Write> Packer<'_, W> {
    /// A root is followed if it is a link: who names it means what is there.
    fn root(&mut self, root: &Path) -> Done {
        let unread = |error| Error::failed(format!("read {}", root.display())).because(error);
        let found = fs::metadata(root).map_err(unread)?;
        if found.is_dir() {
            fs::read_dir(root).map_err(unread)?;
        } else if found.is_file() {
            File::open(root).map_err(unread)?;
        }
        let before = self.contents.entries();
        self.any(root, &found)?;
        // With nothing in it but itself: a file system that is not mounted looks so, and a tree that was wiped.
        let empty = found.is_dir() && fs::read_dir(root).map_err(unread)?.next().is_none();
        if empty && self.contents.entries() <= before + 1 {
            self.told.left_out(format!("{} is empty; is it mounted?", shown(root.as_os_str().as_bytes())));
        }
        Ok(())
    }

    fn any(&mut self, path: &Path, found: &Metadata) -> Done {
        if self.options.exclude.iter().any(|pattern| pattern.covers(path)) {
            return Ok(());
        }
        let wanted = self.options.include.is_empty() || self.options.include.iter().any(|pattern| pattern.covers(path));
        let kind = found.file_type();
        if kind.is_dir() {
            return self.directory(path, found, wanted);
        }
        if !wanted {
            return Ok(());
        }
        if kind.is_file() {
            return self.file(path);
        }
        let special = match () {
            () if kind.is_symlink() => match fs::read_link(path) {
                Ok(link) => Kind::Symlink(link.as_os_str().as_bytes().to_vec()),
                Err(error) => return self.lost(path, &error),
            },
            () if kind.is_fifo() => Kind::Fifo,
            () if kind.is_char_device() || kind.is_block_device() => {
                let numbers = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
                Kind::Device { character: kind.is_char_device(), numbers }
            }
            () => {
                self.told.note(format!(
                    "{} is a socket: there is nothing in it to keep",
                    shown(path.as_os_str().as_bytes())
                ));
                return Ok(());
            }
        };
        let entry = self.entry(path, found, special);
        self.other_name(found, entry)
    }

    fn directory(&mut self, path: &Path, found: &Metadata, wanted: bool) -> Done {
        let entry = self.entry(path, found, Kind::Directory);
        let depth = self.pending.len();
        self.pending.push(entry);
        if wanted {
            self.write_pending()?;
        }
        let names = match names(path) {
            Ok(names) => names,
            Err(error) => {
                self.lost(path, &error)?;
                Vec::new()
            }
        };
        for name in names {
            let path = path.join(name);
            match fs::symlink_metadata(&path) {
                Ok(found) => self.any(&path, &found)?,
                Err(error) => self.lost(&path, &error)?,
            }
        }
        self.pending.truncate(depth);
        Ok(())
    }

    fn write_pending(&mut self) -> Done {
        for entry in std::mem::take(&mut self.pending) {
            self.contents.directories += 1;
            entry.write_head(self.out).map_err(gone)?;
        }
        Ok(())
    }

    /// What may have several names; a later one refers to the first.
    fn other_name(&mut self, found: &Metadata, mut entry: Entry) -> Done {
        match self.first_name(found) {
            Some(first) => (entry.kind, entry.attributes) = (Kind::Hardlink(first), Vec::new()),
            None => self.remember(found, &entry),
        }
        self.head(&entry)
    }

    /// The name under which the same contents are in the archive already. A number that was given to another file since
    /// then is no proof: size and time tell them apart.
    fn first_name(&self, found: &Metadata) -> Option<Vec<u8>> {
        let (first, look) = self.links.get(&(found.dev(), found.ino())).filter(|_| found.nlink() > 1)?;
        (*look == look_of(found)).then(|| first.clone())
    }

    fn remember(&mut self, found: &Metadata, entry: &Entry) {
        if found.nlink() > 1 {
            self.links.insert((found.dev(), found.ino()), (entry.path.clone(), look_of(found)));
        }
    }

    fn head(&mut self, entry: &Entry) -> Done {
        self.write_pending()?;
        match &entry.kind {
            Kind::File { size, .. } => {
                self.contents.files += 1;
                self.contents.bytes += size;
            }
            _ => self.contents.others += 1,
        }
        entry.write_head(self.out).map_err(gone)
    }

    fn file(&mut self, path: &Path) -> Done {
        // Not followed and not waited for: the name may have become a link or a pipe meanwhile.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME).bits();
        let plain = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        let open = |flags: u32| File::options().read(true).custom_flags(flags.cast_signed()).open(path);
        // Reading without a trace is for the owner alone.
        let opened = open(flags).or_else(|_| open(plain)).or_else(|error| match error.raw_os_error() {
            // A root that is a link to a file.
            Some(code) if code == Errno::LOOP.raw_os_error() && self.options.roots.iter().any(|root| root == path) => {
                File::open(path)
            }
            _ => Err(error),
        });
        let found = opened.and_then(|file| Ok((file.metadata()?, file)));
        let (found, file) = match found {
            Ok((found, file)) if found.is_file() => (found, file),
            Ok(_) => return self.lost(path, &ErrorKind::NotFound.into()),
            Err(error) => return self.lost(path, &error),
        };
        // Decided once: what follows a head must be what the head says, whatever the file becomes meanwhile.
        if self.first_name(&found).is_some() {
            let entry = self.entry(path, &found, Kind::File { size: 0, data: None });
            return self.other_name(&found, entry);
        }
        let runs = runs(&file, found.len());
        // One that is cut short just now looks like a hole.
        let steady = file.metadata().is_ok_and(|after| same(&found, &after));
        match runs {
            runs if found.len() <= SMALL && (runs.is_none() || !steady) => self.small(path, &file, found),
            runs => self.large(path, &file, (&found, runs)),
        }
    }

    fn small(&mut self, path: &Path, file: &File, mut found: Metadata) -> Done {
        let mut steady = false;
        let mut bytes = Vec::new();
        for _ in 0..READINGS {
            bytes.clear();
            // A file that grows without end is cut where it is not small any more.
            let read = read_from_start(file, &mut bytes, SMALL * 4).and_then(|()| file.metadata());
            let after = match read {
                Ok(after) => after,
                Err(error) => return self.lost(path, &error),
            };
            steady = same(&found, &after) && bytes.len() as u64 == found.len();
            found = after;
            if steady {
                break;
            }
        }
        if !steady {
            self.told.note(format!("{} changed while it was read", shown(path.as_os_str().as_bytes())));
        }
        let entry = self.entry(path, &found, Kind::File { size: bytes.len() as u64, data: None });
        self.remember(&found, &entry);
        self.head(&entry)?;
        self.out.write_all(&bytes).and_then(|()| self.pad(bytes.len() as u64)).map_err(gone)
    }

    fn large(&mut self, path: &Path, file: &File, (found, data): (&Metadata, Option<Vec<(u64, u64)>>)) -> Done {
        let size = found.len();
        let entry = self.entry(path, found, Kind::File { size, data: data.clone() });
        self.remember(found, &entry);
        self.head(&entry)?;
        let (name, mut ended) = (shown(path.as_os_str().as_bytes()), false);
        for (offset, length) in data.unwrap_or_else(|| vec![(0, size)]) {
            match self.copy(file, (offset, length))? {
                Copied::Whole => {}
                Copied::EndedAt(at) => {
                    ended = true;
                    self.told
                        .note(format!("{name} shrank from {size} to {at} bytes while it was read; zeros stand behind"));
                }
                Copied::Failed(error) => {
                    let why = format!("{name} cannot be read to its end, and zeros stand there: {error}");
                    self.told.left_out(why);
                }
            }
        }
        if let Ok(after) = file.metadata()
            && !same(found, &after)
            && !ended
        {
            self.told.note(match after.len().checked_sub(size) {
                Some(0) => format!("{name} changed while it was read"),
                Some(more) => format!("{name} grew by {more} bytes while it was read; they are not kept"),
                None => format!("{name} shrank to {} bytes while it was read", after.len()),
            });
        }
        self.pad(entry.contents()).map_err(gone)
    }

    /// Exactly `length` bytes, whatever the file gives.
    fn copy(&mut self, file: &File, (offset, length): (u64, u64)) -> Result<Copied> {
        let (mut at, end, mut came) = (offset, offset + length, Copied::Whole);
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(BUFFER);
            let got = match came {
                Copied::Whole => match file.read_at(&mut self.buffer[..wanted], at) {
                    Ok(0) => {
                        came = Copied::EndedAt(at);
                        0
                    }
                    Ok(got) => got,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => {
                        came = Copied::Failed(error);
                        0
                    }
                },
                Copied::EndedAt(_) | Copied::Failed(_) => 0,
            };
            let got = if got == 0 {
                self.buffer[..wanted].fill(0);
                wanted
            } else {
                got
            };
            self.out.write_all(&self.buffer[..got]).map_err(gone)?;
            at += got as u64;
        }
        Ok(came)
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        self.out.write_all(&[0; BLOCK][..padding(written)])
    }

    fn entry(&mut self, path: &Path, found: &Metadata, kind: Kind) -> Entry {
        let attributes = match attributes(path) {
            Ok(attributes) => attributes,
            Err(error) => {
                let name = shown(path.as_os_str().as_bytes());
                self.told.left_out(format!("the extended attributes of {name}: {error}"));
                Vec::new()
            }
        };
        Entry {
            path: stored_name(path),
            kind,
            mode: found.mode() & 0o7777,
            owner: (found.uid(), found.gid()),
            owner_names: (self.users.name(found.uid()), self.groups.name(found.gid())),
            modified: (found.mtime(), u32::try_from(found.mtime_nsec()).unwrap_or(0)),
            attributes,
        }
    }

    /// What is gone has been removed by its owner; anything else is something that should be in the archive and is not.
    fn lost(&mut self, path: &Path, error: &io::Error) -> Done {
        let name = shown(path.as_os_str().as_bytes());
        match error.kind() {
            ErrorKind::NotFound => self.told.note(format!("{name} vanished before it was read")),
            _ => self.told.left_out(format!("{name}: {error}")),
        }
        Ok(())
    }
}

enum Copied {
    Whole,
    EndedAt(u64),
    Failed(io::Error),
}

/// The absolute path without its first `/`.
pub(super) fn stored_name(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    let start = bytes.iter().position(|byte| *byte != b'/').unwrap_or(bytes.len());
    bytes[start..].to_vec()
}

/// The names in a directory in the order of their bytes, so that one tree gives one archive.
fn names(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let names = fs::read_dir(directory)?.map(|entry| entry.map(|entry| PathBuf::from(entry.file_name())));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    Ok(names)
}

/// Size and time of the last change, which differ when a number is given to another file.
type Look = (u64, i64, i64);

fn look_of(found: &Metadata) -> Look {
    (found.len(), found.mtime(), found.mtime_nsec())
}

fn same(before: &Metadata, after: &Metadata) -> bool {
    let look = |found: &Metadata| (found.len(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec());
    look(before) == look(after)
}

fn read_from_start(mut file: &File, bytes: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    seek(file, SeekFrom::Start(0))?;
    Read::by_ref(&mut file).take(limit).read_to_end(bytes).map(drop)
}

/// Runs of data, widened to whole blocks because GNU tar fills each run up to one; `None` for a file without holes.
fn runs(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    let (mut runs, mut at): (Vec<(u64, u64)>, u64) = (Vec::new(), 0);
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        let end = seek(file, SeekFrom::Hole(start)).ok()?.min(size);
        if start >= end {
            break;
        }
        let block = BLOCK as u64;
        let (start, widened) = (start / block * block, end.div_ceil(block).saturating_mul(block).min(size));
        match runs.last_mut() {
            Some((first, length)) if *first + *length >= start => *length = widened - *first,
            _ => runs.push((start, widened - start)),
        }
        at = end;
    }
    let data: u64 = runs.iter().map(|(_, length)| length).sum();
    // A file of more holes than a reader accepts is stored whole.
    (data < size && (runs.len() as u64) < MAP_LIMIT - 1).then_some(runs)
}

fn attributes(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let listed = grown(|buffer| rustix::fs::llistxattr(path, buffer));
    let listed = match listed {
        // A file system without any, or a file that is gone: whoever reads it says so.
        Err(Errno::NOTSUP | Errno::NOENT) => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut attributes = Vec::new();
    for name in listed.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match grown(|buffer| rustix::fs::lgetxattr(path, name, buffer)) {
            Ok(value) => attributes.push((name.to_vec(), value)),
            // Removed meanwhile.
            Err(Errno::NODATA | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    attributes.sort();
    Ok(attributes)
}

/// Most attributes are tiny; the kernel allows 64 KiB.
fn grown(get: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    loop {
        match get(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < 64 * 1024 => buffer.resize(64 * 1024, 0),
            Err(error) => return Err(error),
        }
    }
}

fn gone(error: io::Error) -> Error {
    Error::failed("hand on the archive").because(error)
}
