//! Pages of a physical backup on their way from a source to the repository.

/// PostgreSQL's page size; servers built with another one are refused.
pub const PAGE_SIZE: usize = 8192;

/// Pages covered by one map chunk, and the most that one batch carries: 8 MiB.
pub const BATCH_PAGES: usize = 1024;

/// A file of one backup, numbered by the source from 0 without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// Up to [`BATCH_PAGES`] pages. A large file sends batches of one piece, aligned to [`BATCH_PAGES`]; small files share one.
#[derive(Debug)]
pub struct Batch {
    /// What the pages are, in order.
    pub pieces: Vec<Piece>,
    /// The pages back to back; a short last page of a file is filled up with zeros.
    pub data: Vec<u8>,
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
