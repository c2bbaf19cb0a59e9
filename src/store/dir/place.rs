//! Writing: whole under a temporary name, durable, then linked to the final name, which is atomic and create-only.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, RenameFlags, chmodat, fchmod, fstat, fsync, linkat, mkdirat, openat, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;

use super::error::Call;
use super::tree::{DIRECTORY_MODE, Tree, descend, modified, read_at, refusal, size};
use crate::store::{Digest, Put, StoreError, name};

/// Holds unfinished writes; `+` stands in no object name.
pub(super) const UNFINISHED: &str = "+tmp";
const OBJECT_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// No write of one object takes this long, so an older file has lost its writer.
const ABANDONED_AFTER: chrono::TimeDelta = chrono::TimeDelta::days(1);

/// A file without its final name; gone when dropped.
struct Unfinished {
    directory: OwnedFd,
    name: String,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename there is nothing to remove; anything else is swept when it is a day old.
        let _ = unlinkat(&self.directory, &self.name, AtFlags::empty());
    }
}

impl Tree {
    pub(super) fn put(&self, key: &str, body: &[u8], digest: Digest) -> Result<Put, StoreError> {
        let call = self.call("put", key);
        let (parents, leaf) = name::split(key);
        let directory = self.make_directory(call, parents)?;
        if let Some(put) = settle(call, &directory, leaf, digest, body.len())? {
            return Ok(put);
        }
        let unfinished = self.write_unfinished(body).map_err(|errno| call.failed(errno))?;
        match give_name(&unfinished, &directory, leaf) {
            Ok(()) => {
                fsync(&directory).map_err(|errno| call.failed(errno))?;
                Ok(Put::Created)
            }
            Err(Errno::EXIST) => settle(call, &directory, leaf, digest, body.len())?
                .ok_or_else(|| call.unavailable("the name was taken and is free again")),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                Err(call.invalid("this file system can neither link nor rename without replacing"))
            }
            Err(Errno::XDEV) => Err(call.invalid("another file system is mounted below the root")),
            Err(errno) => Err(call.failed(errno)),
        }
    }

    /// Opens a directory, making what is missing, with every entry on the way durable.
    fn make_directory(&self, call: Call<'_>, path: &str) -> Result<OwnedFd, StoreError> {
        let mut directory = self.directory(call, "")?;
        let mut reached = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let (next, made) = make_and_descend(&directory, part).map_err(|errno| match errno {
                Errno::NOTDIR | Errno::LOOP => {
                    let refused = refusal(call, directory.as_fd(), part, errno);
                    if refused.is_not_found() { call.invalid(&format!("{part} is no directory")) } else { refused }
                }
                errno => call.failed(errno),
            })?;
            reached.push('/');
            reached.push_str(part);
            if made || !self.durable.lock().unwrap_or_else(PoisonError::into_inner).contains(&reached) {
                fsync(&directory).map_err(|errno| call.failed(errno))?;
                self.durable.lock().unwrap_or_else(PoisonError::into_inner).insert(reached.clone());
            }
            directory = next;
        }
        Ok(directory)
    }

    fn write_unfinished(&self, body: &[u8]) -> Result<Unfinished, Errno> {
        let (directory, _) = make_and_descend(&self.root, UNFINISHED)?;
        let (file, unfinished) = self.begin(directory)?;
        // The umask may have taken our own bits too.
        fchmod(&file, OBJECT_MODE)?;
        let file = File::from(file);
        self.write_body(&file, body).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        fsync(&file)?;
        if !self.swept.swap(true, Ordering::Relaxed) {
            sweep(&unfinished.directory, &file);
        }
        Ok(unfinished)
    }

    /// Creates a file of a new name. `EXCL` makes it ours alone, also against another host with the same process id.
    fn begin(&self, directory: OwnedFd) -> Result<(OwnedFd, Unfinished), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let serial = self.serial.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}-{serial}", std::process::id());
            match openat(&directory, &name, flags, OBJECT_MODE) {
                Ok(file) => return Ok((file, Unfinished { directory, name })),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// The final name, if it is free. Some file systems have no hard links, others (NFS) no exclusive rename.
fn give_name(from: &Unfinished, directory: &OwnedFd, leaf: &str) -> rustix::io::Result<()> {
    match linkat(&from.directory, &from.name, directory, leaf, AtFlags::empty()) {
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
            renameat_with(&from.directory, &from.name, directory, leaf, RenameFlags::NOREPLACE)
        }
        done => done,
    }
}

/// What stands under the final name, as the outcome of a put; `None` if nothing does.
fn settle(
    call: Call<'_>,
    directory: &OwnedFd,
    leaf: &str,
    digest: Digest,
    length: usize,
) -> Result<Option<Put>, StoreError> {
    let (file, stat) = match statat(directory, leaf, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() => {
            return Err(call.invalid("a directory has this name"));
        }
        Ok(_) => Tree::object(call, directory, leaf)?,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(call.failed(errno)),
    };
    let same_size = size(&stat) == length as u64;
    let stored = if same_size { read_at(&file, 0, length as u64) } else { Ok(Vec::new()) };
    let stored = stored.map_err(|error| call.unavailable(&error.to_string()))?;
    if !same_size || Digest::of(&stored) != digest {
        return Err(StoreError::Conflict { key: call.key.to_owned(), address: call.address.to_owned() });
    }
    // Whoever wrote it may have died before its own fsync, and this reply says "durable" too.
    fsync(&file).and_then(|()| fsync(directory)).map_err(|errno| call.failed(errno))?;
    Ok(Some(Put::AlreadyThere))
}

/// Opens a directory in another, and says whether it had to be made.
fn make_and_descend(directory: &OwnedFd, part: &str) -> rustix::io::Result<(OwnedFd, bool)> {
    match descend(directory, part) {
        Err(Errno::NOENT) => {}
        found => return Ok((found?, false)),
    }
    match mkdirat(directory, part, DIRECTORY_MODE) {
        Ok(()) => chmodat(directory, part, DIRECTORY_MODE, AtFlags::empty())?,
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    Ok((descend(directory, part)?, true))
}

/// Removes abandoned files. Their age is told by the file system's own clock, on a file written just now: a remote one
/// may differ from this host's. Nothing depends on the outcome.
fn sweep(directory: &OwnedFd, written_now: &File) {
    let Some(now) = fstat(written_now).ok().and_then(|stat| modified(&stat)) else { return };
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let written =
            statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).ok().and_then(|stat| modified(&stat));
        if written.is_some_and(|written| now - written > ABANDONED_AFTER) {
            let _ = unlinkat(directory, entry.file_name(), AtFlags::empty());
        }
    }
}
