//! Gathers pages into batches.

use tokio::sync::mpsc;

use super::error::SourceError;
use crate::source::{BATCH_PAGES, Batch, Claims, FileId, Item, PAGE_SIZE, Piece};

/// Files of up to this many pages share batches.
pub const SMALL_PAGES: usize = 64;

/// Sends the items of one reader, in order; for threads, because sending blocks.
#[derive(Debug)]
pub struct Packer {
    items: mpsc::Sender<Item>,
    batch: Batch,
    /// Pages in it, read or not.
    pages: u32,
    /// Held back until the pages that they follow are sent.
    after: Vec<Item>,
}

impl Packer {
    /// A packer with nothing in it.
    pub fn new(items: mpsc::Sender<Item>) -> Self {
        Self { items, batch: Batch::default(), pages: 0, after: Vec::new() }
    }

    /// Sends an item at once.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn send(&self, item: Item) -> Result<(), SourceError> {
        self.items.blocking_send(item).map_err(|_| SourceError::ReceiverGone)
    }

    /// Sends the pages of a large file, at most [`BATCH_PAGES`], as a batch of their own.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn send_pages(&mut self, file: FileId, first_page: u32, part: Part) -> Result<(), SourceError> {
        let (pages, Part { mut data, claims }) = (part.pages(), part);
        pad(&mut data, 0);
        if pages == 0 {
            return Ok(());
        }
        self.send(Item::Batch(Batch { pieces: vec![Piece { file, first_page, pages }], data, claims }))
    }

    /// Adds a whole small file to the shared batch.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn add_file(&mut self, file: FileId, contents: &Part) -> Result<(), SourceError> {
        let pages = contents.pages();
        if (self.pages + pages) as usize > BATCH_PAGES {
            self.flush()?;
        }
        let start = self.batch.data.len();
        self.batch.data.extend_from_slice(&contents.data);
        pad(&mut self.batch.data, start);
        if pages > 0 {
            self.batch.pieces.push(Piece { file, first_page: 0, pages });
            let same = contents.claims.same.iter().map(|range| range.start + self.pages..range.end + self.pages);
            self.batch.claims.same.extend(same);
            self.batch.claims.read = contents.claims.read;
            self.pages += pages;
        }
        Ok(())
    }

    /// Sends an item once everything added so far is sent.
    pub fn send_after(&mut self, item: Item) {
        self.after.push(item);
    }

    /// Sends what is gathered.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn flush(&mut self) -> Result<(), SourceError> {
        if !self.batch.pieces.is_empty() {
            let batch = Batch { data: Vec::with_capacity(self.batch.data.len()), ..Batch::default() };
            self.pages = 0;
            let full = std::mem::replace(&mut self.batch, batch);
            self.send(Item::Batch(full))?;
        }
        for item in std::mem::take(&mut self.after) {
            self.send(item)?;
        }
        Ok(())
    }
}

/// What was read of a run of pages. All parts of one packer were read for the same purpose: to prove their claims or not.
#[derive(Debug, Default)]
pub struct Part {
    /// The pages that were read, back to back; the last one may be short.
    pub data: Vec<u8>,
    /// The others, and how they are counted: from the first page of the run.
    pub claims: Claims,
}

impl Part {
    /// All of it was read.
    pub fn whole(data: Vec<u8>) -> Self {
        Self { data, claims: Claims::default() }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u32 {
        // A batch has at most BATCH_PAGES pages.
        u32::try_from(self.data.len().div_ceil(PAGE_SIZE)).unwrap_or(u32::MAX).saturating_add(self.claims.unread())
    }

    /// How many bytes of the file that is.
    pub fn length(&self) -> u64 {
        self.data.len() as u64 + u64::from(self.claims.unread()) * PAGE_SIZE as u64
    }
}

/// Fills the last page after `start` up with zeros.
fn pad(data: &mut Vec<u8>, start: usize) {
    let length = (data.len() - start).next_multiple_of(PAGE_SIZE);
    data.resize(start + length, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mut items: mpsc::Receiver<Item>) -> Vec<Item> {
        std::iter::from_fn(|| items.try_recv().ok()).collect()
    }

    #[test]
    fn pages_that_were_not_read_take_their_place_in_a_batch() {
        let (sender, receiver) = mpsc::channel(100);
        let mut packer = Packer::new(sender);
        let part = |same| Part { data: vec![1; 2 * PAGE_SIZE], claims: Claims { same, read: false } };
        for file in 0..2 {
            packer.add_file(FileId(file), &part(vec![0..3, 4..30])).unwrap();
        }
        for file in 2..40 {
            packer.add_file(FileId(file), &part(std::iter::once(0..30).collect())).unwrap();
        }
        packer.flush().unwrap();
        drop(packer);
        let items = drain(receiver);
        let [Item::Batch(first), Item::Batch(second)] = items.as_slice() else { panic!("{items:?}") };
        assert_eq!(first.claims.same[..4], [0..3, 4..30, 31..34, 35..61]);
        assert!(first.claims.has(60) && !first.claims.has(61) && !first.claims.has(34));
        for batch in [first, second] {
            let pages: u32 = batch.pieces.iter().map(|piece| piece.pages).sum();
            let read = u32::try_from(batch.data.len() / PAGE_SIZE).unwrap();
            assert_eq!(pages, read + batch.claims.unread());
            assert!(pages as usize <= BATCH_PAGES);
        }
        assert_eq!((first.pieces.len(), second.pieces.len()), (32, 8));
    }

    #[test]
    fn small_files_share_batches_within_the_bound_and_are_done_after_their_pages() {
        let (sender, receiver) = mpsc::channel(100);
        let mut packer = Packer::new(sender);
        for number in 0..40 {
            let file = FileId(number);
            packer.add_file(file, &Part::whole(vec![1; SMALL_PAGES * PAGE_SIZE - 100])).unwrap();
            packer.send_after(Item::FileVanished { id: file });
        }
        packer.flush().unwrap();
        drop(packer);
        let (mut pages_of, mut batches) = (std::collections::HashMap::new(), 0);
        for item in drain(receiver) {
            match item {
                Item::Batch(batch) => {
                    batches += 1;
                    let pages: u32 = batch.pieces.iter().map(|piece| piece.pages).sum();
                    assert_eq!(batch.data.len(), usize::try_from(pages).unwrap() * PAGE_SIZE);
                    assert!(batch.data.len() <= BATCH_PAGES * PAGE_SIZE);
                    pages_of.extend(batch.pieces.iter().map(|piece| (piece.file, piece.pages)));
                }
                Item::FileVanished { id } => assert_eq!(pages_of.get(&id), Some(&64)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((pages_of.len(), batches), (40, 3));
    }

    #[test]
    fn an_empty_file_has_no_pages_and_a_short_page_is_filled_up() {
        let (sender, receiver) = mpsc::channel(100);
        let mut packer = Packer::new(sender);
        packer.add_file(FileId(0), &Part::whole(Vec::new())).unwrap();
        packer.flush().unwrap();
        packer.send_pages(FileId(1), 1024, Part::whole(vec![7; PAGE_SIZE + 1])).unwrap();
        drop(packer);
        let items = drain(receiver);
        let [Item::Batch(batch)] = items.as_slice() else { panic!("{items:?}") };
        assert_eq!(batch.pieces, [Piece { file: FileId(1), first_page: 1024, pages: 2 }]);
        assert_eq!((batch.data.len(), batch.data[PAGE_SIZE], batch.data[PAGE_SIZE + 1]), (2 * PAGE_SIZE, 7, 0));
    }
}
