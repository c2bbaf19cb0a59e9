//! Free space.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_has_free_space_and_a_missing_path_does_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        assert!(matches!(free_bytes(&dir.path().join("absent")), Err(DiskError::Missing { .. })));
    }
}
