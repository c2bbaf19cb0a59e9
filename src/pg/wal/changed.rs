//! The pages that a stretch of WAL changes: main forks only, because whatever else a relation has is read whole anyway.
//!
//! It may only ever err on one side: a page that is in it need not have changed, a page that changed must be in it. That
//! is what bounds its memory too: where a relation takes too much, all of it counts as changed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::blocks::{Locator, MAIN_FORK, Touch};
use crate::pg::le::{u32_at, u64_at};

/// Pages that one bitmap covers.
const EXTENT_PAGES: u32 = 1024;
const WORDS: usize = EXTENT_PAGES as usize / 64;
/// Bitmaps kept before whole relations are given up: about 32 MiB.
const EXTENTS_KEPT: usize = 200_000;
/// No relation has a page with this number.
const NOWHERE: u32 = u32::MAX;

type Bitmap = [u64; WORDS];

/// A set of pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChangedBlocks {
    relations: BTreeMap<Locator, Blocks>,
    databases: BTreeSet<u32>,
    extents: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Blocks {
    /// Every page from here on.
    from: u32,
    extents: BTreeMap<u32, Box<Bitmap>>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { from: NOWHERE, extents: BTreeMap::new() }
    }
}

impl ChangedBlocks {
    /// Adds what a record changes; answers why not if that is unknown.
    ///
    /// # Errors
    /// The reason: the set is of no use from there on.
    pub fn add(&mut self, touch: &Touch) -> Result<(), &'static str> {
        match *touch {
            Touch::Block { relation, fork: MAIN_FORK, block } => self.block(relation, block),
            Touch::Block { .. } => {}
            Touch::From { relation, block } => self.from(relation, block),
            Touch::Database(database) => drop(self.databases.insert(database)),
            Touch::Unknown(why) => return Err(why),
        }
        Ok(())
    }

    fn block(&mut self, relation: Locator, block: u32) {
        let (extent, page) = (block / EXTENT_PAGES, block % EXTENT_PAGES);
        let mut bitmap = [0; WORDS];
        bitmap[page as usize / 64] = 1 << (page % 64);
        self.extent(relation, extent, &bitmap);
    }

    fn extent(&mut self, relation: Locator, extent: u32, bitmap: &Bitmap) {
        let blocks = self.relations.entry(relation).or_default();
        if extent.saturating_mul(EXTENT_PAGES) >= blocks.from {
            return;
        }
        let before = blocks.extents.len();
        let words = blocks.extents.entry(extent).or_default();
        words.iter_mut().zip(bitmap).for_each(|(word, added)| *word |= added);
        self.extents += blocks.extents.len() - before;
        if self.extents > EXTENTS_KEPT {
            self.give_up_largest();
        }
    }

    /// Every page of a relation from `block` on.
    fn from(&mut self, relation: Locator, block: u32) {
        let blocks = self.relations.entry(relation).or_default();
        blocks.from = blocks.from.min(block);
        let before = blocks.extents.len();
        let covered = blocks.extents.split_off(&blocks.from.div_ceil(EXTENT_PAGES));
        drop(covered);
        self.extents -= before - blocks.extents.len();
    }

    fn give_up_largest(&mut self) {
        let largest = self.relations.iter().max_by_key(|(_, blocks)| blocks.extents.len());
        if let Some(relation) = largest.map(|(relation, _)| *relation) {
            self.from(relation, 0);
        }
    }

    /// Adds another set.
    pub fn merge(&mut self, other: &Self) {
        self.databases.extend(&other.databases);
        for (relation, blocks) in &other.relations {
            if blocks.from < NOWHERE {
                self.from(*relation, blocks.from);
            }
            blocks.extents.iter().for_each(|(extent, bitmap)| self.extent(*relation, *extent, bitmap));
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.relations.is_empty() && self.databases.is_empty()
    }

    /// About how many bytes it takes.
    pub fn weight(&self) -> usize {
        self.extents * size_of::<Bitmap>() + self.relations.len() * 64
    }

    /// The parts of `range` that are not in the set: the pages of a relation that nothing changed.
    pub fn unchanged(&self, relation: &Locator, range: Range<u32>) -> Vec<Range<u32>> {
        if self.databases.contains(&relation.database) {
            return Vec::new();
        }
        let Some(blocks) = self.relations.get(relation) else {
            return if range.is_empty() { Vec::new() } else { vec![range] };
        };
        let (mut quiet, mut begin) = (Vec::new(), None);
        for block in range.start..range.end.min(blocks.from) {
            match (blocks.has(block), begin) {
                (true, Some(first)) => {
                    quiet.push(first..block);
                    begin = None;
                }
                (false, None) => begin = Some(block),
                _ => {}
            }
        }
        quiet.extend(begin.map(|first| first..range.end.min(blocks.from)));
        quiet
    }
}

impl Blocks {
    fn has(&self, block: u32) -> bool {
        let page = block % EXTENT_PAGES;
        let words = self.extents.get(&(block / EXTENT_PAGES));
        words.and_then(|words| words.get(page as usize / 64)).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }
}

// ---- Bytes ---------------------------------------------------------------------------------------------------------

impl ChangedBlocks {
    /// Its bytes: the databases, then the relations, each with its bitmaps, all counts before what they count.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut put = |value: u32| out.extend_from_slice(&value.to_le_bytes());
        put(count(self.databases.len()));
        self.databases.iter().for_each(|database| put(*database));
        put(count(self.relations.len()));
        for (relation, blocks) in &self.relations {
            for value in [relation.tablespace, relation.database, relation.node, blocks.from] {
                out.extend_from_slice(&value.to_le_bytes());
            }
            out.extend_from_slice(&count(blocks.extents.len()).to_le_bytes());
            for (extent, bitmap) in &blocks.extents {
                out.extend_from_slice(&extent.to_le_bytes());
                bitmap.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
            }
        }
    }

    /// Reads what [`encode`](Self::encode) wrote; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (mut set, mut input) = (Self::default(), Input(bytes));
        for _ in 0..input.number()? {
            set.databases.insert(input.number()?);
        }
        for _ in 0..input.number()? {
            let relation = Locator { tablespace: input.number()?, database: input.number()?, node: input.number()? };
            let (from, extents) = (input.number()?, input.number()?);
            set.relations.entry(relation).or_default();
            for _ in 0..extents {
                let extent = input.number()?;
                let words = input.take(size_of::<Bitmap>())?;
                let mut bitmap = [0; WORDS];
                for (index, word) in bitmap.iter_mut().enumerate() {
                    *word = u64_at(words, 8 * index)?;
                }
                set.extent(relation, extent, &bitmap);
            }
            if from < NOWHERE {
                set.from(relation, from);
            }
        }
        input.0.is_empty().then_some(set)
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn number(&mut self) -> Option<u32> {
        self.take(4).and_then(|bytes| u32_at(bytes, 0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn relation(node: u32) -> Locator {
        Locator { tablespace: 1663, database: 5, node }
    }

    fn one(range: Range<u32>) -> Vec<Range<u32>> {
        std::iter::once(range).collect()
    }

    fn touches() -> impl Strategy<Value = Vec<Touch>> {
        let block = (0u32..3, 0u32..5000).prop_map(|(node, block)| Touch::Block {
            relation: relation(node),
            fork: MAIN_FORK,
            block,
        });
        let from = (0u32..3, 0u32..5000).prop_map(|(node, block)| Touch::From { relation: relation(node), block });
        let other = (0u32..3).prop_map(|node| Touch::Block { relation: relation(node), fork: 2, block: 7 });
        proptest::collection::vec(prop_oneof![20 => block, 1 => from, 1 => other], 0..200)
    }

    fn set(touches: &[Touch]) -> ChangedBlocks {
        let mut set = ChangedBlocks::default();
        touches.iter().for_each(|touch| set.add(touch).unwrap());
        set
    }

    fn changed(touches: &[Touch], node: u32, page: u32) -> bool {
        touches.iter().any(|touch| match touch {
            Touch::Block { relation, fork: MAIN_FORK, block } => relation.node == node && *block == page,
            Touch::From { relation, block } => relation.node == node && *block <= page,
            _ => false,
        })
    }

    proptest! {
        #[test]
        fn exactly_the_touched_pages_are_in_it(touches in touches(), begin in 0u32..5200, length in 0u32..1024) {
            let set = set(&touches);
            for node in 0..4 {
                let quiet = set.unchanged(&relation(node), begin..begin + length);
                prop_assert!(quiet.windows(2).all(|pair| pair[0].end < pair[1].start));
                for page in begin..begin + length {
                    let in_it = !quiet.iter().any(|range| range.contains(&page));
                    prop_assert_eq!(in_it, changed(&touches, node, page), "{} {}", node, page);
                }
            }
        }

        #[test]
        fn it_reads_back_and_parts_of_it_add_up(one in touches(), two in touches()) {
            let mut whole = set(&one);
            whole.merge(&set(&two));
            prop_assert_eq!(&whole, &set(&[one, two].concat()));
            let mut bytes = Vec::new();
            whole.encode(&mut bytes);
            prop_assert_eq!(ChangedBlocks::decode(&bytes), Some(whole));
            bytes.push(0);
            prop_assert_eq!(ChangedBlocks::decode(&bytes), None);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = ChangedBlocks::decode(&bytes);
        }
    }

    #[test]
    fn a_database_is_all_of_its_relations_and_the_unknown_is_an_error() {
        let mut set = ChangedBlocks::default();
        set.add(&Touch::Database(5)).unwrap();
        assert!(set.unchanged(&relation(1), 0..10).is_empty());
        assert_eq!(set.unchanged(&Locator { database: 6, ..relation(1) }, 0..10), one(0..10));
        assert_eq!(set.add(&Touch::Unknown("why")), Err("why"));
    }

    #[test]
    fn what_takes_too_much_memory_counts_as_changed_as_a_whole() {
        let mut set = ChangedBlocks::default();
        for block in (0..EXTENT_PAGES * 1000).step_by(EXTENT_PAGES as usize) {
            set.add(&Touch::Block { relation: relation(0), fork: MAIN_FORK, block }).unwrap();
        }
        let many = u32::try_from(EXTENTS_KEPT).unwrap();
        for extent in 0..many {
            set.block(relation(1), extent * EXTENT_PAGES);
        }
        assert!(set.unchanged(&relation(1), 5..1000).is_empty());
        assert_eq!(set.unchanged(&relation(0), 0..3), one(1..3));
        assert!(set.extents <= 1000);
    }
}
