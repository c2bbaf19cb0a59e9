//! Keeping the state of a backup while it runs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::Digest as _;

use super::{FILE, FileRecord, KeptUse, StateHead, Writing};
use crate::disk::place::Draft;
use crate::model::commit::StateDigest;
use crate::model::{Error, Result};
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::map::{FrameRef, MapChunk};

/// Keeps the state of a backup under way. A state that cannot be written is given up, not the backup.
#[derive(Debug)]
pub struct Keeper(Mutex<Keeping>);

#[derive(Debug)]
struct Keeping {
    writing: Option<Writing>,
    why_not: Option<String>,
    /// Chunks of the parent that were copied, by their numbers there.
    carried: HashMap<u32, u32>,
}

/// A complete state that waits for its COMMIT.
#[derive(Debug)]
pub struct Kept {
    /// What COMMIT says of it.
    pub digest: StateDigest,
    draft: Draft,
}

impl Kept {
    /// To be called once COMMIT is at the quorum.
    ///
    /// # Errors
    /// The disk refuses; the next backup is then a full one.
    pub fn place(self) -> Result<()> {
        Ok(self.draft.place()?)
    }
}

impl Keeper {
    /// Keeps what the backup writes for `path`, or nothing.
    pub fn begin(path: Option<&Path>, head: &StateHead) -> Self {
        let keeping = Keeping { writing: None, why_not: None, carried: HashMap::new() };
        let keeper = Self(Mutex::new(keeping));
        if let Some(path) = path {
            let begun = Draft::begin(path, 0o600).map_err(Error::from).and_then(|draft| Writing::begin(draft, head));
            let mut keeping = keeper.lock();
            match begun {
                Ok(writing) => keeping.writing = Some(writing),
                Err(error) => keeping.why_not = Some(error.to_string()),
            }
        }
        keeper
    }

    fn lock(&self) -> MutexGuard<'_, Keeping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a chunk and answers its number.
    pub fn chunk(&self, frame: &FrameRef, encoded: &[u8]) -> u32 {
        self.lock().write(|writing| writing.chunk(frame, encoded)).unwrap_or(0)
    }

    /// Keeps a chunk that the parent knew as `number`, once however many files use it.
    pub fn carry(&self, number: u32, frame: &FrameRef, chunk: &MapChunk) -> u32 {
        let mut keeping = self.lock();
        if let Some(known) = keeping.carried.get(&number) {
            return *known;
        }
        let new = keeping.write(|writing| writing.chunk(frame, &chunk.encode())).unwrap_or(0);
        keeping.carried.insert(number, new);
        new
    }

    /// Keeps a file; its chunks are kept already.
    pub fn file(&self, path: &str, (size, damaged): (u64, bool), uses: Vec<KeptUse>) {
        let record = FileRecord { path: path.to_owned(), size: Some(size), damaged, uses };
        self.lock().write(|writing| {
            writing.end.1 += 1;
            writing.json(FILE, &record)
        });
    }

    /// Closes the state; without one, says why if it was wanted.
    pub fn finish<'a>(&self, objects: impl Iterator<Item = &'a InventoryLine>) -> (Option<Kept>, Option<String>) {
        let mut keeping = self.lock();
        keeping.write(|writing| writing.close(objects));
        (keeping.writing.take().map(Writing::into_kept), keeping.why_not.take())
    }
}

impl Keeping {
    fn write<T>(&mut self, write: impl FnOnce(&mut Writing) -> Result<T>) -> Option<T> {
        match write(self.writing.as_mut()?) {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::warn!(%error, "the page map is not kept; the next backup will be a full one");
                self.why_not = Some(error.to_string());
                self.writing = None;
                None
            }
        }
    }
}

impl Writing {
    fn into_kept(self) -> Kept {
        let digest = StateDigest { bytes: self.bytes, sha256: self.hash.finalize().into() };
        Kept { digest, draft: self.draft }
    }
}
