//! Which pages of a file did not change, as WAL and the parent know together.

use std::ops::Range;
use std::sync::Arc;

use crate::pg::wal::ChangedBlocks;
use crate::repository::backup::state::KnownPages;
use crate::source::Unread;
use crate::source::postgres::rules;

/// Pages that need not be read.
///
/// # Invariant
/// Of a main fork alone, and of that only what the parent holds as a whole, sound page that was written to before. So a
/// file that it does not have, the pages behind its end then, and those of zeros there are read, whatever WAL says: a new
/// page may be put there past shared buffers, by a writer that had logged it before the parent began.
#[derive(Debug)]
pub(super) struct Quiet {
    parent: Arc<KnownPages>,
    changed: ChangedBlocks,
}

impl Quiet {
    pub(super) fn new(parent: Arc<KnownPages>, changed: ChangedBlocks) -> Self {
        Self { parent, changed }
    }
}

impl Unread for Quiet {
    fn unchanged(&self, path: &str, whole_pages: u32, range: Range<u32>) -> Vec<Range<u32>> {
        let Some((relation, first_block)) = rules::main_fork(path) else { return Vec::new() };
        let Some(known) = self.parent.file(path).filter(|known| whole_pages >= known.sound_pages()) else {
            return Vec::new();
        };
        let range = range.start..range.end.min(known.sound_pages());
        let Some(end) = first_block.checked_add(range.end) else { return Vec::new() };
        if range.is_empty() {
            return Vec::new();
        }
        let quiet = self.changed.unchanged(&relation, first_block + range.start..end);
        if quiet.is_empty() {
            return Vec::new();
        }
        let written = self.parent.written(&known, range);
        let written = written.inspect_err(|error| tracing::warn!(%error, path, "every page of it is read"));
        let quiet: Vec<_> = quiet.into_iter().map(|part| part.start - first_block..part.end - first_block).collect();
        written.map_or_else(|_| Vec::new(), |written| common(&quiet, &written))
    }
}

/// What is in both; each is ascending and apart.
fn common(one: &[Range<u32>], two: &[Range<u32>]) -> Vec<Range<u32>> {
    let (mut left, mut right, mut both) = (0, 0, Vec::new());
    while let (Some(a), Some(b)) = (one.get(left), two.get(right)) {
        let part = a.start.max(b.start)..a.end.min(b.end);
        if !part.is_empty() {
            both.push(part);
        }
        if a.end < b.end { left += 1 } else { right += 1 }
    }
    both
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(pages: &[bool]) -> Vec<Range<u32>> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for (page, _) in (0..).zip(pages).filter(|(_, is_in)| **is_in) {
            match ranges.last_mut().filter(|last| last.end == page) {
                Some(last) => last.end += 1,
                None => ranges.push(page..page + 1),
            }
        }
        ranges
    }

    proptest! {
        #[test]
        fn what_is_in_both_is_in_common(pages in proptest::collection::vec(any::<(bool, bool)>(), 0..80)) {
            let (one, two): (Vec<_>, Vec<_>) = pages.iter().copied().unzip();
            let both: Vec<_> = pages.iter().map(|(one, two)| *one && *two).collect();
            prop_assert_eq!(common(&ranges(&one), &ranges(&two)), ranges(&both));
        }
    }
}
