//! A file on its way.

use std::path::PathBuf;

use crate::repository::pages::manifest::FileLine;

/// What restore needs of a file's mode while it writes it.
pub(super) const OWNER_WRITES: u32 = 0o600;
/// A file of a window.
#[derive(Debug)]
pub(super) struct WindowFile {
    pub(super) line: FileLine,
    pub(super) path: PathBuf,
    /// Bytes that stood there already; 0 for a new file.
    pub(super) held: u64,
}

impl WindowFile {
    /// Before any of its bytes is summed up.
    pub(super) fn unwritten(&self) -> WrittenFile {
        WrittenFile { path: self.line.path.clone(), size: self.line.size, crc32c: 0 }
    }
}

/// A file that was written completely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// As in the manifest, relative.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// CRC-32C of its bytes.
    pub crc32c: u32,
}
