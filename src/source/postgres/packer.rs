//! Gathers pages into batches.

use tokio::sync::mpsc;

use super::error::SourceError;
use crate::source::{BATCH_PAGES, Batch, FileId, Item, PAGE_SIZE, Piece};

/// Files of up to this many pages share batches.
pub const SMALL_PAGES: usize = 64;

/// Sends the items of one reader, in order; for threads, because sending blocks.
#[derive(Debug)]
pub struct Packer {
    items: mpsc::Sender<Item>,
    batch: Batch,
    /// Held back until the pages that they follow are sent.
    after: Vec<Item>,
}

impl Packer {
    /// A packer with nothing in it.
    pub fn new(items: mpsc::Sender<Item>) -> Self {
        Self { items, batch: Batch { pieces: Vec::new(), data: Vec::new() }, after: Vec::new() }
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
    pub fn send_pages(&mut self, file: FileId, first_page: u32, mut data: Vec<u8>) -> Result<(), SourceError> {
        let pages = pad(&mut data, 0);
        if pages == 0 {
            return Ok(());
        }
        self.send(Item::Batch(Batch { pieces: vec![Piece { file, first_page, pages }], data }))
    }

    /// Adds a whole small file to the shared batch.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn add_file(&mut self, file: FileId, contents: &[u8]) -> Result<(), SourceError> {
        if self.batch.data.len() + contents.len().next_multiple_of(PAGE_SIZE) > BATCH_PAGES * PAGE_SIZE {
            self.flush()?;
        }
        let start = self.batch.data.len();
        self.batch.data.extend_from_slice(contents);
        let pages = pad(&mut self.batch.data, start);
        if pages > 0 {
            self.batch.pieces.push(Piece { file, first_page: 0, pages });
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
            let batch = Batch { pieces: Vec::new(), data: Vec::with_capacity(self.batch.data.len()) };
            let full = std::mem::replace(&mut self.batch, batch);
            self.send(Item::Batch(full))?;
        }
        for item in std::mem::take(&mut self.after) {
            self.send(item)?;
        }
        Ok(())
    }
}

/// Fills the last page after `start` up with zeros; answers how many pages there are.
fn pad(data: &mut Vec<u8>, start: usize) -> u32 {
    let length = (data.len() - start).next_multiple_of(PAGE_SIZE);
    data.resize(start + length, 0);
    // A batch has at most BATCH_PAGES pages.
    u32::try_from(length / PAGE_SIZE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mut items: mpsc::Receiver<Item>) -> Vec<Item> {
        std::iter::from_fn(|| items.try_recv().ok()).collect()
    }

    #[test]
    fn small_files_share_batches_within_the_bound_and_are_done_after_their_pages() {
        let (sender, receiver) = mpsc::channel(100);
        let mut packer = Packer::new(sender);
        for number in 0..40 {
            let file = FileId(number);
            packer.add_file(file, &vec![1; SMALL_PAGES * PAGE_SIZE - 100]).unwrap();
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
        packer.add_file(FileId(0), b"").unwrap();
        packer.flush().unwrap();
        packer.send_pages(FileId(1), 1024, vec![7; PAGE_SIZE + 1]).unwrap();
        drop(packer);
        let items = drain(receiver);
        let [Item::Batch(batch)] = items.as_slice() else { panic!("{items:?}") };
        assert_eq!(batch.pieces, [Piece { file: FileId(1), first_page: 1024, pages: 2 }]);
        assert_eq!((batch.data.len(), batch.data[PAGE_SIZE], batch.data[PAGE_SIZE + 1]), (2 * PAGE_SIZE, 7, 0));
    }
}
