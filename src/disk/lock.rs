//! One process at a time.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::{At, DiskError};

/// An exclusive lock, held until it is dropped or the process ends in whatever way.
///
/// The file stays when the lock goes: unlinking it would let two processes lock two files of one name.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock or says who has it; never waits.
    ///
    /// # Errors
    /// [`DiskError::Locked`] if it is taken.
    pub fn acquire(path: &Path) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        // Root locks in directories of others, who could lead it to any file, and the holder's number is written there.
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let mut file = options.open(path).at("open", path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(DiskError::Locked { path: path.to_owned(), holder: read_holder(&mut file) });
            }
            Err(error) => return Err(DiskError::new("lock", path, error.into())),
        }
        // For people and for the message above only; the kernel's lock is what counts. A disk too full for a number is no
        // reason to turn a backup away.
        let _unnamed = note_holder(&mut file);
        Ok(Self { file })
    }

    /// What no other lock has at the same time, anywhere: this boot of this kernel, and which file it is. Whoever holds it and
    /// finds it written down knows that the one who wrote it is gone. A name of a host, or a path, would not say that: hosts and
    /// containers share theirs. `None` where the system does not tell.
    pub fn identity(&self) -> Option<String> {
        let (boot, file) = (boot_id()?, self.file.metadata().ok()?);
        // An inode has no second use as long as somebody holds it open, and no device number as long as it is mounted.
        Some(format!("{boot}:{:x}:{}", file.dev(), file.ino()))
    }
}

/// What names this boot of the machine, where the system does. What was written in another one and not flushed may be torn, and
/// whoever held a lock in it is gone.
pub fn boot_id() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

fn note_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = Lock::acquire(&path).unwrap();
        match Lock::acquire(&path) {
            Err(DiskError::Locked { holder, .. }) => assert_eq!(holder, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(lock);
        Lock::acquire(&path).unwrap();
    }

    #[test]
    fn a_lock_is_known_again_and_never_taken_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        let (first, second) = (Lock::acquire(&one).unwrap(), Lock::acquire(&other).unwrap());
        let identity = first.identity().unwrap();
        assert_ne!(second.identity().unwrap(), identity);
        drop(first);
        assert_eq!(Lock::acquire(&one).unwrap().identity().unwrap(), identity);
        // One that is held although its name is gone stays what it is.
        let unlinked = Lock::acquire(&one).unwrap();
        std::fs::remove_file(&one).unwrap();
        assert_ne!(Lock::acquire(&one).unwrap().identity(), unlinked.identity());
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        crate::disk::place::place(&target, b"kept", 0o600).unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("lock")).unwrap();
        Lock::acquire(&dir.path().join("lock")).unwrap_err();
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
    }
}
