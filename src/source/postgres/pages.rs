//! Page checksums in flight.
//!
//! A page that the server writes while it is read may arrive half old, half new. That is harmless if the page was
//! changed after the backup began: its first change after the start checkpoint put a full image into the WAL, and replay
//! overwrites it. The page's own LSN says so, but only while it is believable: an LSN that the server had not reached
//! when the backup ended was never written by PostgreSQL.

use super::rules;
use crate::model::Lsn;
use crate::pg::page::{self, PageState};
use crate::source::{FileId, Item, PAGE_SIZE};

/// How the pages of one backup are judged.
#[derive(Debug, Clone, Copy)]
pub struct PageCheck {
    /// Whether the cluster has checksums.
    pub checksums: bool,
    /// Where the backup began.
    pub start: Lsn,
}

/// The verdict on one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// Right, or never written.
    Fine,
    /// Wrong, and not changed since the start: nothing will repair it.
    Damaged,
    /// Wrong, and by its own account changed up to this position: fine if the server ever got there.
    Torn(Lsn),
}

impl PageCheck {
    /// The number within its relation of page `first_page` of a file; `None` if its pages carry no checksums.
    pub fn first_block(self, path: &str, first_page: u32) -> Option<u32> {
        let relation = rules::relation(path).filter(|_| self.checksums)?;
        relation.first_block()?.checked_add(first_page)
    }

    /// Judges one page.
    pub fn judge(self, bytes: &[u8], block: u32) -> Finding {
        let Some(page) = bytes.first_chunk::<PAGE_SIZE>() else { return Finding::Fine };
        if page::check(page, block) != PageState::Bad {
            return Finding::Fine;
        }
        let lsn = page::lsn(page);
        if lsn < self.start { Finding::Damaged } else { Finding::Torn(lsn) }
    }

    /// Which pages of a run are not fine. A piece of a page at the end has no checksum.
    pub fn wrong_pages(self, bytes: &[u8], first_block: u32) -> Vec<usize> {
        let pages = bytes.chunks_exact(PAGE_SIZE).zip(first_block..).enumerate();
        pages.filter(|(_, (page, block))| self.judge(page, *block) != Finding::Fine).map(|(index, _)| index).collect()
    }
}

/// What was found in one file.
#[derive(Debug, Default)]
pub struct Damage {
    damaged: Vec<u32>,
    torn: Vec<(u32, Lsn)>,
}

impl Damage {
    /// Records the verdict on a page of the file.
    pub fn add(&mut self, page: u32, finding: Finding) {
        match finding {
            Finding::Fine => {}
            Finding::Damaged => self.damaged.push(page),
            Finding::Torn(lsn) => self.torn.push((page, lsn)),
        }
    }

    /// The damaged pages, if no verdict depends on where the server's log ends.
    pub fn certain(&self) -> Option<Vec<u32>> {
        self.torn.is_empty().then(|| self.damaged.clone())
    }

    /// The damaged pages, now that the log had reached `end` after the last page was read.
    pub fn settle(self, end: Lsn) -> Vec<u32> {
        let unreachable = self.torn.into_iter().filter(|(_, lsn)| *lsn > end).map(|(page, _)| page);
        let mut damaged: Vec<u32> = self.damaged.into_iter().chain(unreachable).collect();
        damaged.sort_unstable();
        damaged
    }
}

/// A file that is read, but whose damage is not settled.
#[derive(Debug)]
pub struct Held {
    /// Its number.
    pub id: FileId,
    /// What was read.
    pub size: u64,
    /// What was found.
    pub damage: Damage,
}

impl Held {
    /// The end of the file, now that the log had reached `end`.
    pub fn settle(self, end: Lsn) -> Item {
        Item::FileDone { id: self.id, size: self.size, damaged_blocks: self.damage.settle(end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: PageCheck = PageCheck { checksums: true, start: Lsn(0x2000) };

    fn sealed(lsn: u64, block: u32) -> [u8; PAGE_SIZE] {
        let mut page = [0x55; PAGE_SIZE];
        page[0..4].copy_from_slice(&u32::try_from(lsn >> 32).unwrap().to_le_bytes());
        page[4..8].copy_from_slice(&u32::try_from(lsn & 0xFFFF_FFFF).unwrap().to_le_bytes());
        let sum = page::checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn only_what_replay_overwrites_is_forgiven() {
        assert_eq!(CHECK.judge(&sealed(0x1000, 7), 7), Finding::Fine);
        assert_eq!(CHECK.judge(&[0; PAGE_SIZE], 7), Finding::Fine);
        let old = sealed(0x1000, 8);
        assert_eq!(CHECK.judge(&old, 7), Finding::Damaged);
        assert_eq!(CHECK.judge(&sealed(0x2000, 8), 7), Finding::Torn(Lsn(0x2000)));
    }

    #[test]
    fn an_lsn_that_the_server_never_reached_is_damage() {
        let mut damage = Damage::default();
        damage.add(9, Finding::Damaged);
        damage.add(3, Finding::Torn(Lsn(u64::MAX)));
        damage.add(4, Finding::Torn(Lsn(0x3000)));
        damage.add(5, Finding::Fine);
        assert_eq!(damage.certain(), None);
        assert_eq!(damage.settle(Lsn(0x3000)), [3, 9]);
    }

    #[test]
    fn blocks_count_from_the_start_of_the_relation() {
        assert_eq!(CHECK.first_block("base/5/16384.1", 5), Some(131_077));
        assert_eq!(CHECK.first_block("base/5/16384", 0), Some(0));
        assert_eq!(CHECK.first_block("pg_xact/0000", 0), None);
        assert_eq!(PageCheck { checksums: false, ..CHECK }.first_block("base/5/16384", 0), None);
        let pages = [sealed(1, 131_077), sealed(1, 131_079), sealed(1, 131_079)].concat();
        assert_eq!(CHECK.wrong_pages(&pages, 131_077), [1]);
        assert_eq!(CHECK.wrong_pages(&pages[..PAGE_SIZE * 2 - 1], 131_077), [0; 0]);
    }
}
