//! Pages of a physical backup on their way from a source to the repository.

use std::ops::Range;

/// PostgreSQL's page size; servers built with another one are refused.
pub const PAGE_SIZE: usize = 8192;

/// Pages covered by one map chunk, and the most that one batch carries: 8 MiB.
pub const BATCH_PAGES: usize = 1024;

/// A file of one backup, numbered by the source from 0 without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// Up to [`BATCH_PAGES`] pages. A large file sends batches of one piece, aligned to [`BATCH_PAGES`]; small files share one.
#[derive(Debug, Default)]
pub struct Batch {
    /// What the pages are, in order.
    pub pieces: Vec<Piece>,
    /// The pages back to back; a short last page of a file is filled up with zeros. Pages that were not read are not here.
    pub data: Vec<u8>,
    /// Pages that are those of the parent, as change detection says.
    pub claims: Claims,
}

/// Pages of a batch that did not change since the parent.
#[derive(Debug, Default)]
pub struct Claims {
    /// Which, ascending and apart; the first page of the batch has number 0.
    pub same: Vec<Range<u32>>,
    /// Whether they were read all the same, so that the claim is proved.
    pub read: bool,
}

impl Claims {
    /// How many pages were not read.
    pub fn unread(&self) -> u32 {
        if self.read { 0 } else { self.same.iter().map(|range| range.end - range.start).sum() }
    }

    /// Whether it says that a page did not change.
    pub fn has(&self, page: u32) -> bool {
        let after = self.same.partition_point(|range| range.start <= page);
        after.checked_sub(1).and_then(|index| self.same.get(index)).is_some_and(|range| range.contains(&page))
    }
}

/// A run of pages of one file inside a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The file.
    pub file: FileId,
    /// Its first page.
    pub first_page: u32,
    /// How many.
    pub pages: u32,
}
