//! Checksums of new files, from the pages as they are written: nothing is read back, and a page that was never written is
//! found out.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Result};
use crate::repository::restore::file::{WindowFile, WrittenFile};

/// A page's checksum is there.
const KNOWN: u64 = 1 << 32;

/// One place for each page of the files of a window.
#[derive(Debug)]
pub(super) struct Sums {
    /// By file: where its pages begin, and its size.
    files: Vec<(usize, u64)>,
    pages: Vec<AtomicU64>,
    zeros: u32,
}

impl Sums {
    /// `None` where something of the files stands already: what is left as it is was summed up by nobody.
    pub(super) fn of(files: &[WindowFile]) -> Option<Self> {
        if files.iter().any(|file| file.held > 0) {
            return None;
        }
        let mut pages = 0;
        let places = files.iter().map(|file| {
            let first = pages;
            pages += usize::try_from(file.line.size.div_ceil(PAGE_SIZE as u64)).unwrap_or(usize::MAX);
            (first, file.line.size)
        });
        let files = places.collect();
        let zeros = crc32c::crc32c(&[0; PAGE_SIZE]);
        Some(Self { files, pages: (0..pages).map(|_| AtomicU64::new(0)).collect(), zeros })
    }

    /// A page was written; of the last page of a file its part in the file.
    pub(super) fn wrote(&self, file: u32, page: u32, bytes: &[u8]) {
        self.note(file, page, crc32c::crc32c(bytes));
    }

    /// A page is a hole.
    pub(super) fn left_out(&self, file: u32, page: u32) {
        let length = self.files.get(file as usize).map_or(0, |(_, size)| in_file(*size, page));
        let sum = if length == PAGE_SIZE { self.zeros } else { crc32c::crc32c(&[0; PAGE_SIZE][..length]) };
        self.note(file, page, sum);
    }

    fn note(&self, file: u32, page: u32, sum: u32) {
        let place = self.files.get(file as usize).and_then(|(first, _)| self.pages.get(first + page as usize));
        if let Some(place) = place {
            place.store(KNOWN | u64::from(sum), Ordering::Relaxed);
        }
    }

    /// The checksums of whole files.
    ///
    /// # Errors
    /// A page was neither written nor left out.
    pub(super) fn finish(&self, files: &[WindowFile]) -> Result<Vec<WrittenFile>> {
        let shift = Shift::by_a_page();
        let of_file = |(file, (first, size)): (&WindowFile, &(usize, u64))| {
            let count = usize::try_from(size.div_ceil(PAGE_SIZE as u64)).unwrap_or(usize::MAX);
            let mut written = file.unwritten();
            for (page, sum) in (0..).zip(&self.pages[*first..first + count]) {
                let sum = sum.load(Ordering::Relaxed);
                if sum & KNOWN == 0 {
                    return Err(Error::failed(format!("block {page} of {} was not written", file.line.path)));
                }
                let sum = u32::try_from(sum & u64::from(u32::MAX)).unwrap_or_default();
                written.crc32c = match in_file(*size, page) {
                    PAGE_SIZE => shift.over(written.crc32c) ^ sum,
                    short => crc32c::crc32c_combine(written.crc32c, sum, short),
                };
            }
            Ok(written)
        };
        files.iter().zip(&self.files).map(of_file).collect()
    }
}

/// Bytes of a page that belong to a file of this size.
fn in_file(size: u64, page: u32) -> usize {
    let from = u64::from(page) * PAGE_SIZE as u64;
    usize::try_from(size.saturating_sub(from)).unwrap_or(usize::MAX).min(PAGE_SIZE)
}

/// What a page of zeros does to a checksum: a linear map, as four tables of bytes. Each page costs four look-ups, where the
/// general way squares matrices.
struct Shift([[u32; 256]; 4]);

impl Shift {
    fn by_a_page() -> Self {
        let mut tables = [[0; 256]; 4];
        for (byte, table) in tables.iter_mut().enumerate() {
            let bit = |bit: usize| crc32c::crc32c_combine(1 << (8 * byte + bit), 0, PAGE_SIZE);
            let bits: [u32; 8] = std::array::from_fn(bit);
            for (value, shifted) in table.iter_mut().enumerate() {
                let set = (0..8).filter(|bit| value >> bit & 1 == 1);
                *shifted = set.fold(0, |sum, bit: usize| sum ^ bits[bit]);
            }
        }
        Self(tables)
    }

    fn over(&self, sum: u32) -> u32 {
        let bytes = sum.to_le_bytes();
        self.0.iter().zip(bytes).fold(0, |shifted, (table, byte)| shifted ^ table[usize::from(byte)])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repository::pages::manifest::FileLine;

    fn file(path: &str, size: u64) -> WindowFile {
        let line = FileLine { path: path.into(), mode: 0o600, size, chunks: vec![], damaged_blocks: vec![] };
        WindowFile { line, path: path.into(), held: 0 }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Pages in any order give the checksum of the whole file, short last page and holes included.
        #[test]
        fn pages_sum_up_to_the_whole(
            contents in prop::collection::vec((prop::collection::vec(any::<Option<u8>>(), 0..5), 1..=PAGE_SIZE), 1..4),
            backwards in any::<bool>(),
        ) {
            let mut bytes: Vec<Vec<u8>> = Vec::new();
            for (pages, last) in &contents {
                let mut whole: Vec<u8> = Vec::new();
                for seed in pages {
                    let page = (0..PAGE_SIZE).map(|at| seed.map_or(0, |seed| seed.wrapping_mul(u8::try_from(at % 256).unwrap()) | 1));
                    whole.extend(page);
                }
                whole.truncate((pages.len() * PAGE_SIZE).saturating_sub(PAGE_SIZE - last));
                bytes.push(whole);
            }
            let files: Vec<_> = bytes.iter().map(|bytes| file("f", bytes.len() as u64)).collect();
            let sums = Sums::of(&files).unwrap();
            let mut pages: Vec<_> = (0..).zip(&bytes).flat_map(|(file, bytes)| {
                (0..).zip(bytes.chunks(PAGE_SIZE)).map(move |(page, bytes)| (file, page, bytes))
            }).collect();
            if backwards {
                pages.reverse();
            }
            for (file, page, bytes) in pages {
                match bytes.iter().all(|byte| *byte == 0) {
                    true => sums.left_out(file, page),
                    false => sums.wrote(file, page, bytes),
                }
            }
            let found: Vec<_> = sums.finish(&files).unwrap().iter().map(|file| file.crc32c).collect();
            prop_assert_eq!(found, bytes.iter().map(|bytes| crc32c::crc32c(bytes)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_page_that_was_not_written_is_an_error() {
        let files = [file("base/1/2", 3 * PAGE_SIZE as u64)];
        let sums = Sums::of(&files).unwrap();
        sums.wrote(0, 0, &[1; PAGE_SIZE]);
        sums.left_out(0, 2);
        let error = sums.finish(&files).unwrap_err();
        assert!(error.message().contains("block 1 of base/1/2"), "{error}");
    }
}
