//! The bytes of an object on their way to the disk.
//!
//! Large ones go past the page cache where the file system can do that: nobody reads them soon, everything is flushed at
//! once anyway, and copying them into the cache costs more processor time than sealing them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::tree::Tree;
use crate::disk::sparse::{ALIGNMENT, DIRECT_FROM, Staging};

/// What is copied and written at a time: little enough to stay in the processor's own cache in between.
const PIECE: usize = 1024 * 1024;

impl Tree {
    /// Writes the whole body into a new file, which is not durable yet.
    pub(super) fn write_body(&self, file: &File, body: &[u8]) -> io::Result<()> {
        let mut written = 0;
        if body.len() >= DIRECT_FROM {
            let flags = fcntl_getfl(file)?;
            if fcntl_setfl(file, flags | OFlags::DIRECT).is_ok() {
                let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let mut staging = staging.unwrap_or_default();
                let past_cache = write_past_cache(file, body, &mut staging);
                self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
                fcntl_setfl(file, flags)?;
                written = past_cache?;
            }
        }
        file.write_all_at(body.get(written..).unwrap_or_default(), written as u64)
    }
}

/// Writes what can be written past the page cache, and says how much that was: all whole blocks, or less where the file
/// system wants it otherwise.
fn write_past_cache(file: &File, body: &[u8], staging: &mut Staging) -> io::Result<usize> {
    let blocks = body.len() - body.len() % ALIGNMENT;
    let mut written = 0;
    for piece in body.get(..blocks).unwrap_or_default().chunks(PIECE) {
        match file.write_all_at(staging.copy(piece), written as u64) {
            Ok(()) => written += piece.len(),
            Err(error) if error.kind() == ErrorKind::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}
