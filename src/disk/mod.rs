//! Floor 1a, the local disk: durable writes, locks, free space, and files written page by page.
//!
//! Everything here blocks; async callers go through `spawn_blocking`. Every error names the path.

use std::io;
use std::path::{Path, PathBuf};

use crate::model::{Error, Kind};

pub mod empty;
pub mod lock;
pub mod place;
pub mod space;
pub mod sparse;

/// What a disk can answer.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system is full, or a quota is.
    #[error("no space left to {operation} {}", path.display())]
    Full {
        /// What was tried, as a verb.
        operation: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// Something is already where a new file should be.
    #[error("{} exists", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// Nothing is there.
    #[error("{} does not exist", path.display())]
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("{} is locked by {}", path.display(), holder.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}")))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, as far as the file says.
        holder: Option<u32>,
    },
    /// A directory that must be empty is not.
    #[error("{} is not empty: it contains {example}", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the names in it.
        example: String,
    },
    /// Anything else.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl DiskError {
    /// Gives an error of the operating system its meaning and its place.
    pub fn new(operation: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { operation, path },
            io::ErrorKind::AlreadyExists => Self::Exists { path },
            io::ErrorKind::NotFound => Self::Missing { path },
            _ => Self::Io { operation, path, source },
        }
    }

    /// Whether a retry may help without anybody freeing or repairing something.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Locked { .. } => true,
            Self::Io { source, .. } => {
                matches!(
                    source.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                )
            }
            _ => false,
        }
    }

    const fn kind(&self) -> Kind {
        match self {
            Self::Exists { .. } | Self::Locked { .. } | Self::NotEmpty { .. } => Kind::Refused,
            Self::Missing { .. } => Kind::NotFound,
            Self::Full { .. } | Self::Io { .. } => Kind::Failed,
        }
    }
}

impl From<DiskError> for Error {
    fn from(error: DiskError) -> Self {
        let public = Self::new(error.kind(), error.to_string()).transient(error.is_transient());
        match error {
            DiskError::Full { .. } => public.hint("free space on that file system, or name another directory"),
            DiskError::NotEmpty { example, .. } if example == empty::LOST_AND_FOUND => {
                public.hint("this is the root of a file system: use a subdirectory of it")
            }
            DiskError::NotEmpty { .. } => public.hint("name a directory that is empty or does not exist"),
            DiskError::Io { source, .. } => public.because(source),
            _ => public,
        }
    }
}

/// Adds operation and path to an error of the operating system.
pub(crate) trait At<T> {
    fn at(self, operation: &'static str, path: &Path) -> Result<T, DiskError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, operation: &'static str, path: &Path) -> Result<T, DiskError> {
        self.map_err(|error| DiskError::new(operation, path, error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised() {
        let error = DiskError::new("write", Path::new("/x"), io::Error::from_raw_os_error(28));
        assert!(matches!(error, DiskError::Full { .. }));
        let public = Error::from(error);
        assert_eq!(public.message(), "no space left to write /x");
        assert!(public.hint_text().is_some());
    }

    #[test]
    fn the_cause_is_told_once() {
        let error = DiskError::new("read", Path::new("/x"), io::Error::from_raw_os_error(5));
        assert!(Error::from(error).to_string().starts_with("cannot read /x: "));
    }
}
