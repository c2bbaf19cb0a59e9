//! Free space.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{At, DiskError};

/// Bytes that an unprivileged writer may still use on the file system that holds `path`.
///
/// # Errors
/// The path does not exist or its file system does not answer.
pub fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    // f_bavail, not f_bfree: the blocks reserved for root are out of reach of PostgreSQL.
    rustix::fs::statvfs(path).at("statvfs", path).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that removing what is in a directory would free: its files and those below it on the same file system, links not
/// followed. Holes take nothing.
///
/// # Errors
/// A directory below it cannot be read.
pub fn taken_bytes(directory: &Path) -> Result<u64, DiskError> {
    const BLOCK: u64 = 512;
    let device = std::fs::symlink_metadata(directory).at("stat", directory)?.dev();
    let (mut bytes, mut open) = (0, vec![directory.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).at("read directory", &directory)? {
            let entry = entry.at("read directory", &directory)?;
            let found = entry.metadata().at("stat", &entry.path())?;
            if found.dev() == device {
                bytes += found.blocks() * BLOCK;
                if found.is_dir() {
                    open.push(entry.path());
                }
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_has_free_space_and_a_missing_path_does_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        assert!(matches!(free_bytes(&dir.path().join("absent")), Err(DiskError::Missing { .. })));
    }

    #[test]
    fn what_is_taken_is_counted_below_and_holes_are_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("base")).unwrap();
        super::super::place::place(&dir.path().join("base/1"), &vec![1; 1 << 20], 0o600).unwrap();
        std::fs::File::create(dir.path().join("base/hole")).unwrap().set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let taken = taken_bytes(dir.path()).unwrap();
        assert!((1 << 20..2 << 20).contains(&taken), "{taken}");
    }
}
