//! Unbroken runs of frames: found in what regions list, read at their ends, searched for a position.
//!
//! Inside an epoch frames follow each other without a hole, so the two ends of an unbroken run of sequence numbers tell
//! its WAL range, and two header reads describe thousands of frames.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use chrono::{DateTime, Utc};
use futures::future::join_all;
use futures::{StreamExt, stream};

use super::WalIndex;
use crate::model::{EpochId, Error, Kind, Lsn, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::wal::frame::{BARE_LIMIT, FrameHeader, FrameKind, IN_FLIGHT};
use crate::repository::wal::index::beside::Displaced;

/// How many frames are looked at for a commit time: END holds none, and neither do the records that an idle server
/// writes for its standbys.
const COMMIT_REACH: u64 = 32;
/// Runs whose ends are read at the same time.
const READS: usize = 32;
/// Headers that one step of a search reads at the same time: where every request waits for a long way, a step costs as much
/// as one.
const PROBES: u64 = 7;

/// An unbroken run of frames of one epoch.
#[derive(Debug, Clone)]
pub struct Run {
    /// The first frame.
    pub first: FrameHeader,
    /// The last frame; END counts.
    pub last: FrameHeader,
    /// The newest commit time near its end, if it was looked for. Older than `COMMIT_REACH` frames nothing is looked for.
    pub last_commit: Option<DateTime<Utc>>,
}

impl Run {
    /// Position of its first byte.
    pub const fn start(&self) -> Lsn {
        self.first.span.start
    }

    /// Position after its last byte.
    pub const fn end(&self) -> Lsn {
        self.last.span.end
    }
}

impl WalIndex {
    /// Where another owner sealed an epoch, if it did. What its writer may still have put behind that was never
    /// acknowledged, and between it and the rest there may be a hole that the SEAL hides.
    pub(super) async fn sealed_at(
        &self,
        repository: &Repository,
        epoch: &EpochId,
        seqs: &BTreeMap<u64, BTreeSet<RegionName>>,
    ) -> Option<u64> {
        let ((first, _), (last, _)) = (seqs.first_key_value()?, seqs.last_key_value()?);
        // Where the copies differ in size one of them may be a SEAL.
        let small = |seq: &&u64| self.size(epoch, **seq) <= BARE_LIMIT || self.uneven.contains(&(epoch.clone(), **seq));
        let mut last = *last;
        loop {
            let near = seqs.range(last.saturating_sub(IN_FLIGHT)..=last).map(|(seq, _)| seq).filter(small);
            // The ends are asked for next.
            let near: BTreeSet<u64> = near.chain([first, &last]).copied().collect();
            let headers = join_all(near.iter().map(|seq| self.header(repository, epoch, *seq))).await;
            let is_no_frame = matches!(headers.last(), Some(Err(error)) if error.kind() == Kind::Damaged);
            let sealed = headers.into_iter().flatten().filter(|header| header.kind == FrameKind::Seal);
            if let Some(seal) = sealed.map(|header| header.place.seq).min() {
                return Some(seal);
            }
            // Bytes that are no frame may lie as far behind the log as somebody liked.
            match seqs.range(..last).next_back() {
                Some((before, _)) if is_no_frame => last = *before,
                _ => return None,
            }
        }
    }

    /// The unbroken runs in one region, or (`None`) in all of them together, ascending by start. A frame at the end of a run
    /// that is nowhere intact is no part of it and is reported beside it.
    pub async fn runs(&self, repository: &Repository, region: Option<&RegionName>) -> (Vec<Run>, Vec<Error>) {
        match region {
            Some(region) => self.runs_of(repository, |held| held.contains(region)).await,
            None => self.runs_over(repository, &[], |_| true).await,
        }
    }

    /// The unbroken runs of frames that are held by regions which `counts`.
    pub async fn runs_of(
        &self,
        repository: &Repository,
        counts: impl Fn(&BTreeSet<RegionName>) -> bool,
    ) -> (Vec<Run>, Vec<Error>) {
        let displaced = self.displaced(repository).await;
        self.runs_over(repository, &displaced, counts).await
    }

    async fn runs_over(
        &self,
        repository: &Repository,
        displaced: &[Displaced],
        counts: impl Fn(&BTreeSet<RegionName>) -> bool,
    ) -> (Vec<Run>, Vec<Error>) {
        let (mut runs, errors) = self.spans_of(repository, displaced, counts).await;
        let found = runs.iter().map(|run| self.last_commit(repository, run)).collect::<Vec<_>>();
        let found: Vec<_> = stream::iter(found).buffered(READS).collect().await;
        let (mut errors, mut whole) = (errors, Vec::with_capacity(runs.len()));
        for (run, found) in runs.drain(..).zip(found) {
            match found {
                Ok(last_commit) => whole.push(Run { last_commit, ..run }),
                Err(error) => errors.push(error),
            }
        }
        (whole, errors)
    }

    /// As [`runs`](Self::runs) in all regions together, without looking for commit times.
    pub async fn spans(&self, repository: &Repository) -> (Vec<Run>, Vec<Error>) {
        self.spans_of(repository, &[], |_| true).await
    }

    /// The same of frames that are listed by regions which `counts`.
    pub(in crate::repository) async fn spans_of(
        &self,
        repository: &Repository,
        displaced: &[Displaced],
        counts: impl Fn(&BTreeSet<RegionName>) -> bool,
    ) -> (Vec<Run>, Vec<Error>) {
        let seals = self.frames.iter().map(|(epoch, seqs)| self.sealed_at(repository, epoch, seqs)).collect::<Vec<_>>();
        let seals: Vec<_> = stream::iter(seals).buffered(READS).collect().await;
        let mut ends = Vec::new();
        for ((epoch, seqs), sealed_at) in self.frames.iter().zip(seals) {
            let here: Vec<_> = displaced.iter().filter(|displaced| displaced.place.epoch == *epoch).collect();
            let counts = |seq: u64, held: &BTreeSet<RegionName>| match here.iter().find(|lost| lost.place.seq == seq) {
                Some(lost) => counts(&(held - &lost.lacking)),
                None => counts(held),
            };
            let held = seqs.range(..sealed_at.unwrap_or(u64::MAX)).filter(|(seq, held)| counts(**seq, held));
            ends.extend(unbroken(held.map(|(seq, _)| *seq)).into_iter().map(|ends| (epoch, ends)));
        }
        let reads = ends.into_iter().map(|(epoch, ends)| self.run(repository, epoch, ends)).collect::<Vec<_>>();
        let (mut runs, mut errors) = (Vec::new(), Vec::new());
        for (run, damaged) in stream::iter(reads).buffered(READS).collect::<Vec<_>>().await {
            runs.extend(run);
            errors.extend(damaged);
        }
        runs.sort_by_key(|run| (run.start(), run.end()));
        (runs, errors)
    }

    async fn last_commit(&self, repository: &Repository, run: &Run) -> Result<Option<DateTime<Utc>>> {
        Ok(self.newest_with_commits(repository, run).await?.and_then(|header| header.span.last_commit))
    }

    /// The newest frame near the end of a run that holds commits.
    ///
    /// # Errors
    /// A header on the way is nowhere intact.
    pub(in crate::repository) async fn newest_with_commits(
        &self,
        repository: &Repository,
        run: &Run,
    ) -> Result<Option<FrameHeader>> {
        let (first, last) = (run.first.place.seq, &run.last.place);
        if run.last.span.last_commit.is_some() {
            return Ok(Some(run.last.clone()));
        }
        let reach = first.max(last.seq.saturating_sub(COMMIT_REACH))..last.seq;
        self.newest_among(repository, &last.epoch, reach).await
    }

    /// The same among these frames, looked for from their end, more of them at a time the longer it takes.
    async fn newest_among(
        &self,
        repository: &Repository,
        epoch: &EpochId,
        seqs: Range<u64>,
    ) -> Result<Option<FrameHeader>> {
        let (mut end, mut step) = (seqs.end, 4);
        while end > seqs.start {
            let from = seqs.start.max(end.saturating_sub(step));
            let headers = join_all((from..end).map(|seq| self.header(repository, epoch, seq))).await;
            for header in headers.into_iter().rev() {
                let header = header?;
                if header.span.last_commit.is_some() {
                    return Ok(Some(header));
                }
            }
            (end, step) = (from, step * 2);
        }
        Ok(None)
    }

    /// Reads headers at the same time, for whoever is going to ask for them one after the other. What cannot be read fails
    /// when it is asked for.
    pub async fn read_ahead(&self, repository: &Repository, epoch: &EpochId, seqs: Range<u64>) {
        let reads = seqs.map(|seq| self.header(repository, epoch, seq)).collect::<Vec<_>>();
        stream::iter(reads).buffer_unordered(READS).for_each(|_| std::future::ready(())).await;
    }

    /// The frame of a run that holds the byte at `at`.
    ///
    /// # Errors
    /// A header on the way is nowhere intact.
    pub async fn locate(&self, repository: &Repository, run: &Run, at: Lsn) -> Result<u64> {
        let epoch = &run.first.place.epoch;
        let (mut low, mut high) = (run.first.place.seq, run.last.place.seq);
        if run.first.span.end > at {
            return Ok(low);
        }
        if run.last.span.start <= at {
            return Ok(high);
        }
        while low < high {
            let mut probes: Vec<_> = (1..=PROBES).map(|nth| low + (high - low) * nth / (PROBES + 1)).collect();
            probes.dedup();
            let headers = join_all(probes.into_iter().map(|seq| self.header(repository, epoch, seq))).await;
            let (headers, errors): (Vec<_>, Vec<_>) = headers.into_iter().partition(Result::is_ok);
            // One that is damaged is searched around as long as another tells the way.
            if let (true, Some(error)) = (headers.is_empty(), errors.into_iter().find_map(Result::err)) {
                return Err(error);
            }
            for header in headers.into_iter().flatten() {
                if header.span.end > at {
                    high = header.place.seq;
                    break;
                }
                low = header.place.seq + 1;
            }
        }
        Ok(low)
    }
}

/// Cuts ascending numbers into unbroken runs.
fn unbroken(numbers: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_cut_where_one_is_missing() {
        assert_eq!(unbroken([0, 1, 2, 5, 6, 9]), [(0, 2), (5, 6), (9, 9)]);
        assert_eq!(unbroken([]), []);
    }
}
