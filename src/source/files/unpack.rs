//! From an archive to a directory, and never beside it.
//!
//! Every name is walked from the directory's own descriptor, one component after the other, and no link is followed on the
//! way: an entry that leads through a link, upwards or away ends the restore. What exists is never written over.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::entry::{Entry, Kind, broken, damaged, padding};
use super::names::Names;
use super::{Contents, TOLD, Told, shown};
use crate::disk::place;
use crate::model::{Error, Result};

const BUFFER: usize = 256 * 1024;
/// What a directory may be while it is filled.
const OURS: u32 = 0o700;

/// What came back.
#[derive(Debug, Clone, Default)]
pub struct Unpacked {
    /// How much of what.
    pub contents: Contents,
    /// What is not as it was, and why.
    pub notes: Vec<String>,
}

/// Writes everything that an archive holds into `directory`, durably.
///
/// # Errors
/// The archive is not whole, or is hostile, or the disk fails. The directory then holds a part.
pub fn unpack(input: &mut impl Read, directory: &Path) -> Result<Unpacked> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty());
    let root = root.map_err(|error| Error::failed(format!("open {}", directory.display())).because(error))?;
    let mut site = Site {
        root,
        parent: None,
        closing: Vec::new(),
        as_root: rustix::process::geteuid().is_root(),
        users: Names::of_users(),
        groups: Names::of_groups(),
        contents: Contents::default(),
        told: Told::default(),
        owners_lost: 0,
        buffer: vec![0; BUFFER],
    };
    while let Some(entry) = Entry::read_head(input)? {
        let of = |error: Error| error.during(format!("restore {}", shown(&entry.path)));
        site.take(&entry, input).map_err(of)?;
    }
    end(input)?;
    site.close()?;
    place::sync_filesystem(directory)?;
    Ok(site.report())
}

/// Behind the end of an archive there may be zeros alone.
fn end(input: &mut impl Read) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match input.read(&mut buffer).map_err(broken)? {
            0 => return Ok(()),
            got if buffer[..got].iter().all(|byte| *byte == 0) => {}
            _ => return Err(damaged("goes on behind its end")),
        }
    }
}

struct Site {
    root: OwnedFd,
    /// The directory of the latest entry, which mostly is that of the next.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Directories get their modes and times when nothing is written into them any more.
    closing: Vec<Entry>,
    as_root: bool,
    users: Names,
    groups: Names,
    contents: Contents,
    told: Told,
    owners_lost: u64,
    buffer: Vec<u8>,
}

impl Site {
    fn take(&mut self, entry: &Entry, input: &mut impl Read) -> Result<()> {
        let (parent, name) = split(&entry.path)?;
        self.enter(parent)?;
        let directory = self.parent.as_ref().map_or(&self.root, |(_, fd)| fd).as_fd().try_clone_to_owned();
        let directory = directory.map_err(|error| Error::failed("open a directory").because(error))?;
        match &entry.kind {
            Kind::File { size, data } => {
                self.contents.files += 1;
                self.contents.bytes += size;
                return self.file(&directory, (name, entry), (*size, data.as_deref()), input);
            }
            Kind::Directory => {
                self.contents.directories += 1;
                make_directory(&directory, name)?;
                self.closing.push(Entry { path: entry.path.clone(), ..entry.clone() });
                return Ok(());
            }
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(target.as_slice(), &directory, name).map_err(|error| refused("link", error))?;
            }
            Kind::Hardlink(first) => {
                self.contents.others += 1;
                return self.hard_link(first, (&directory, name));
            }
            Kind::Fifo => {
                let mode = Mode::from_raw_mode(0o600);
                let made = rustix::fs::mknodat(&directory, name, FileType::Fifo, mode, 0);
                made.map_err(|error| refused("make a pipe", error))?;
            }
            Kind::Device { character, numbers: (major, minor) } => {
                let kind = if *character { FileType::CharacterDevice } else { FileType::BlockDevice };
                let device = rustix::fs::makedev(*major, *minor);
                match rustix::fs::mknodat(&directory, name, kind, Mode::from_raw_mode(0o600), device) {
                    Err(Errno::PERM) => {
                        let what =
                            format!("{} is a device ({major}, {minor}), which only root makes", shown(&entry.path));
                        self.told.note(what);
                        return Ok(());
                    }
                    made => made.map_err(|error| refused("make a device", error))?,
                }
            }
        }
        self.contents.others += 1;
        self.dress(&directory, (name, entry))
    }

    /// Goes to the directory `path` below the root; what is missing of it is made.
    fn enter(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            self.parent = None;
            return Ok(());
        }
        if self.parent.as_ref().is_some_and(|(latest, _)| latest == path) {
            return Ok(());
        }
        let fd = walk(&self.root, path, true)?;
        self.parent = Some((path.to_vec(), fd));
        Ok(())
    }

    fn file(
        &mut self,
        directory: &OwnedFd,
        (name, entry): (&[u8], &Entry),
        (size, data): (u64, Option<&[(u64, u64)]>),
        input: &mut impl Read,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600));
        let file = std::fs::File::from(file.map_err(|error| refused("create", error))?);
        let full = |error| Error::failed("write").because(error);
        match data {
            None => self.pour(input, (&file, 0, size))?,
            Some(runs) => {
                file.set_len(size).map_err(full)?;
                for (offset, length) in runs {
                    self.pour(input, (&file, *offset, *length))?;
                }
            }
        }
        let mut rest = [0; super::entry::BLOCK];
        let rest = &mut rest[..padding(entry.contents())];
        input.read_exact(rest).map_err(broken)?;
        self.owner(entry, |user, group| rustix::fs::fchown(&file, Some(user), Some(group)))?;
        // Before the mode: what may not be written takes no attributes. After the owner: a new one costs capabilities.
        for (attribute, value) in &entry.attributes {
            let set = rustix::fs::fsetxattr(&file, attribute.as_slice(), value, XattrFlags::empty());
            self.attribute(entry, attribute, set);
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(|error| refused("set the mode", error))?;
        rustix::fs::futimens(&file, &times(entry)).map_err(|error| refused("set the time", error))
    }

    fn pour(&mut self, input: &mut impl Read, (file, mut at, length): (&std::fs::File, u64, u64)) -> Result<()> {
        let end = at.checked_add(length).ok_or_else(|| damaged("has a file that is too large"))?;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(BUFFER);
            let got = input.read(&mut self.buffer[..wanted]).map_err(broken)?;
            if got == 0 {
                return Err(damaged("ends inside a file"));
            }
            let written = file.write_all_at(&self.buffer[..got], at);
            written.map_err(|error| Error::failed("write").because(error))?;
            at += got as u64;
        }
        Ok(())
    }

    /// Another name of a file of this archive; never of a link, and never of what stands elsewhere.
    fn hard_link(&mut self, first: &[u8], (directory, name): (&OwnedFd, &[u8])) -> Result<()> {
        let (parent, first_name) = split(first)?;
        let from = walk(&self.root, parent, false)?;
        rustix::fs::linkat(&from, first_name, directory, name, AtFlags::empty()).map_err(|error| refused("link", error))
    }

    /// Owner, mode and times of what is not opened.
    fn dress(&mut self, directory: &OwnedFd, (name, entry): (&[u8], &Entry)) -> Result<()> {
        let itself = AtFlags::SYMLINK_NOFOLLOW;
        self.owner(entry, |user, group| rustix::fs::chownat(directory, name, Some(user), Some(group), itself))?;
        for (attribute, _) in &entry.attributes {
            self.attribute(entry, attribute, Err(Errno::NOTSUP));
        }
        // A link has no mode of its own. Anything else was made just now, so no link is followed.
        if !matches!(entry.kind, Kind::Symlink(_)) {
            let set = rustix::fs::chmodat(directory, name, Mode::from_raw_mode(entry.mode), AtFlags::empty());
            set.map_err(|error| refused("set the mode", error))?;
        }
        rustix::fs::utimensat(directory, name, &times(entry), itself).map_err(|error| refused("set the time", error))
    }

    /// By name where this machine knows it, else by number, as tar does.
    fn owner(&mut self, entry: &Entry, set: impl FnOnce(Uid, Gid) -> rustix::io::Result<()>) -> Result<()> {
        if !self.as_root {
            let ours = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            self.owners_lost += u64::from(entry.owner != ours);
            return Ok(());
        }
        let user = self.users.id(&entry.owner_names.0).unwrap_or(entry.owner.0);
        let group = self.groups.id(&entry.owner_names.1).unwrap_or(entry.owner.1);
        if user == u32::MAX || group == u32::MAX {
            return Err(damaged("names an owner that is none"));
        }
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        set(user, group).map_err(|error| refused("set the owner", error))
    }

    /// The file system decides which attributes it takes.
    fn attribute(&mut self, entry: &Entry, attribute: &[u8], set: rustix::io::Result<()>) {
        if let Err(error) = set {
            let what = format!("attribute {} of {} was not set: {error}", shown(attribute), shown(&entry.path));
            self.told.note(what);
        }
    }

    fn close(&mut self) -> Result<()> {
        self.parent = None;
        // The innermost first: a mode may forbid the way to what is in it.
        for entry in std::mem::take(&mut self.closing).into_iter().rev() {
            let of = |error: Error| error.during(format!("restore {}", shown(&entry.path)));
            let fd = walk(&self.root, &entry.path, false).map_err(of)?;
            self.owner(&entry, |user, group| rustix::fs::fchown(&fd, Some(user), Some(group))).map_err(of)?;
            for (attribute, value) in &entry.attributes {
                let set = rustix::fs::fsetxattr(&fd, attribute.as_slice(), value, XattrFlags::empty());
                self.attribute(&entry, attribute, set);
            }
            let mode = Mode::from_raw_mode(entry.mode);
            rustix::fs::fchmod(&fd, mode).map_err(|error| of(refused("set the mode", error)))?;
            rustix::fs::futimens(&fd, &times(&entry)).map_err(|error| of(refused("set the time", error)))?;
        }
        Ok(())
    }

    fn report(self) -> Unpacked {
        let (mut notes, _) = self.told.end();
        if self.owners_lost > 0 {
            let many = self.owners_lost;
            notes.insert(0, format!("owners were not restored ({many} entries belong to others): drctl is not root"));
        }
        notes.truncate(TOLD);
        Unpacked { contents: self.contents, notes }
    }
}

/// The directory and the last name of a path that stays below its root.
fn split(path: &[u8]) -> Result<(&[u8], &[u8])> {
    let plain = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
    if !path.split(|byte| *byte == b'/').all(plain) {
        return Err(damaged(&format!("names a path that leads elsewhere: {}", shown(path))));
    }
    Ok(match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    })
}

/// Opens a directory below `root` without following any link; makes what is missing if it may.
fn walk(root: &OwnedFd, path: &[u8], make: bool) -> Result<OwnedFd> {
    let clone = root.try_clone().map_err(|error| Error::failed("open a directory").because(error));
    let mut fd = clone?;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        split(name)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = match rustix::fs::openat(&fd, name, flags, Mode::empty()) {
            Err(Errno::NOENT) if make => {
                // Directories above a root are not in the archive.
                let made = rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o755));
                made.and_then(|()| rustix::fs::openat(&fd, name, flags, Mode::empty()))
            }
            opened => opened,
        };
        fd = opened.map_err(|error| match error {
            Errno::LOOP | Errno::NOTDIR => damaged(&format!("leads through {}, which is no directory", shown(name))),
            error => refused("open a directory", error),
        })?;
    }
    Ok(fd)
}

fn make_directory(parent: &OwnedFd, name: &[u8]) -> Result<()> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(OURS)) {
        // Made already, as the way to a root.
        Err(Errno::EXIST) => walk(parent, name, false).map(drop),
        made => made.map_err(|error| refused("create a directory", error)),
    }
}

fn times(entry: &Entry) -> Timestamps {
    let (seconds, nanos) = entry.modified;
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn refused(what: &str, error: Errno) -> Error {
    match error {
        Errno::EXIST => damaged("names it twice"),
        error => Error::failed(what).because(std::io::Error::from(error)),
    }
}
