//! Directories that must be empty before somebody writes a cluster into them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::{At, DiskError};

/// What mkfs leaves in the root of a file system.
pub(super) const LOST_AND_FOUND: &str = "lost+found";

/// What is at a path where a directory is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// Nothing at all.
    Missing,
    /// An empty directory.
    Empty,
    /// A directory with something in it; one name. `lost+found` is named only when there is nothing else: the root of a
    /// file system is not a data directory, because PostgreSQL cannot own what is in it.
    Occupied(String),
}

/// Looks at a directory.
///
/// # Errors
/// The path is no directory, or cannot be read.
pub fn contents(path: &Path) -> Result<Contents, DiskError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::Missing),
        Err(error) => return Err(DiskError::new("read directory", path, error)),
    };
    let mut found = Contents::Empty;
    for entry in entries {
        let name = entry.at("read directory", path)?.file_name().to_string_lossy().into_owned();
        if name != LOST_AND_FOUND {
            return Ok(Contents::Occupied(name));
        }
        found = Contents::Occupied(name);
    }
    Ok(found)
}

/// Makes sure that `path` is an empty directory: creates it (and its parents) with mode 0700, which PostgreSQL demands,
/// or accepts an empty one as it is.
///
/// # Errors
/// [`DiskError::NotEmpty`] if anything is in it.
pub fn create_empty(path: &Path) -> Result<(), DiskError> {
    match contents(path)? {
        Contents::Missing => DirBuilder::new().recursive(true).mode(0o700).create(path).at("create directory", path),
        Contents::Empty => Ok(()),
        Contents::Occupied(example) => Err(DiskError::NotEmpty { path: path.to_owned(), example }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn missing_becomes_private_and_empty_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        assert_eq!(contents(&path).unwrap(), Contents::Missing);
        create_empty(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o700);
        create_empty(&path).unwrap();
        assert_eq!(contents(&path).unwrap(), Contents::Empty);
    }

    #[test]
    fn what_is_there_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(LOST_AND_FOUND)).unwrap();
        let public = crate::model::Error::from(create_empty(dir.path()).unwrap_err());
        assert!(public.hint_text().unwrap().contains("subdirectory"));
        fs::create_dir(dir.path().join("base")).unwrap();
        assert_eq!(contents(dir.path()).unwrap(), Contents::Occupied("base".to_owned()));
        assert!(contents(Path::new("/dev/null")).is_err());
    }
}
