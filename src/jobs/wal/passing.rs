//! Digests of whole segments, made of what is streamed as it passes by.

use crate::codec::fingerprint::RunningFingerprint;
use crate::jobs::wal::segments::{Digester, SegmentDigest, SegmentKey};
use crate::model::Lsn;
use crate::repository::wal::log::Log;

/// Digests of segments as their bytes pass in pieces. A segment whose beginning did not pass stays unknown.
#[derive(Debug)]
pub(super) struct PassingSegments {
    digester: Digester,
    open: Option<Passing>,
}

#[derive(Debug)]
struct Passing {
    log: Log,
    start: Lsn,
    at: Lsn,
    running: RunningFingerprint,
    mark: u64,
}

/// A segment that passed whole.
#[derive(Debug, Clone)]
pub(super) struct Passed {
    pub(super) key: SegmentKey,
    pub(super) digest: SegmentDigest,
    /// What was noted when its first byte passed.
    pub(super) mark: u64,
}

impl PassingSegments {
    /// None yet.
    pub(super) const fn new(digester: Digester) -> Self {
        Self { digester, open: None }
    }

    /// Takes bytes, and gives the segments that end in them; `mark` is kept of those that begin in them.
    pub(super) fn pass(&mut self, log: &Log, (mut at, mut wal): (Lsn, &[u8]), mark: u64) -> Vec<Passed> {
        let mut complete = Vec::new();
        let size = log.wal_segment_size;
        if self.open.as_ref().is_some_and(|open| open.at != at || open.log != *log) {
            self.open = None;
        }
        while !wal.is_empty() {
            let start = size.segment_start(at);
            let left = usize::try_from(size.bytes() - at.bytes_since(start)).unwrap_or(usize::MAX);
            let (now, later) = wal.split_at(left.min(wal.len()));
            if at == start {
                let running = self.digester.running();
                self.open = Some(Passing { log: log.clone(), start, at, running, mark });
            }
            at.0 += now.len() as u64;
            wal = later;
            let Some(open) = &mut self.open else { continue };
            open.running.update(now);
            open.at = at;
            if at == Lsn(start.0 + size.bytes())
                && let Some(Passing { log, start, running, mark, .. }) = self.open.take()
            {
                complete.push(Passed { key: SegmentKey::of(&log, start), digest: running.finish(), mark });
            }
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::SystemRng;
    use crate::jobs::wal::segments::SegmentBook;
    use crate::model::WalSegmentSize;
    use crate::repository::testing;

    fn log() -> Log {
        Log { wal_segment_size: WalSegmentSize::try_from(1 << 20).unwrap(), ..testing::log() }
    }

    fn digester() -> Digester {
        let (dir, repository) = (tempfile::tempdir().unwrap(), hex::encode([1; 16]).parse().unwrap());
        SegmentBook::open(dir.path(), "ledger", &repository, &SystemRng).unwrap().digester()
    }

    proptest! {
        /// However WAL is cut, exactly the segments that passed whole are known, each with the digest of its bytes.
        #[test]
        fn segments_have_one_digest_however_they_pass(
            from in 0u64..3 << 20,
            cuts in prop::collection::vec(1usize..900_000, 1..12),
            lost in 0usize..12,
        ) {
            let (log, byte) = (log(), |at: u64| (at / 4093).to_le_bytes()[0]);
            let digester = digester();
            let (mut passing, mut at, mut known) = (PassingSegments::new(digester.clone()), from, HashMap::new());
            let mut gap = None;
            for (index, cut) in cuts.iter().enumerate() {
                if index == lost {
                    gap = Some(at);
                    at += *cut as u64;
                    continue;
                }
                let wal: Vec<u8> = (at..at + *cut as u64).map(byte).collect();
                let passed = passing.pass(&log, (Lsn(at), &wal), at);
                for Passed { key, digest, mark } in passed {
                    prop_assert!(mark <= key.start.0 && key.start.0 - mark < 900_000, "noted when it began");
                    known.insert(key, digest);
                }
                at += *cut as u64;
            }
            let size = 1u64 << 20;
            for start in (0..at).step_by(1 << 20) {
                let whole = start >= from && start + size <= at;
                let gap_end = gap.map_or(0, |gap| gap + cuts[lost] as u64);
                let broken = gap.is_some_and(|gap| gap < start + size && gap_end > start);
                let expected = (whole && !broken).then(|| {
                    digester.of((start..start + size).map(byte).collect::<Vec<_>>().as_slice()).unwrap()
                });
                prop_assert_eq!(known.get(&SegmentKey::of(&log, Lsn(start))).copied(), expected);
            }
        }
    }
}
