//! Which WAL there is: epochs, runs of frames, recoverable windows. Needs no key.
//!
//! Inside an epoch frames follow each other without a hole, so the two ends of an unbroken run of sequence numbers tell
//! its WAL range, and two header reads describe thousands of frames.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::model::{Branch, EpochId, Error, Lsn, RegionName, Result, SystemId, Timeline};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::{Regions, list_all};
use crate::repository::wal::frame::{BARE_LIMIT, Frame, FrameHeader, FrameKind, FramePlace, HEADER_LIMIT, IN_FLIGHT};

mod beside;
mod ends;
mod growth;

pub use beside::Displaced;
pub use growth::Arrival;

/// One branch of one timeline of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BranchId {
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch.
    pub branch: Branch,
}

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

/// How many frames are looked at for a commit time: END holds none, and neither do the records that an idle server
/// writes for its standbys.
const COMMIT_REACH: u64 = 32;
/// Runs whose ends are read at the same time.
const READS: usize = 32;
/// Headers that one step of a search reads at the same time: where every request waits for a long way, a step costs as much
/// as one.
const PROBES: u64 = 7;

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

/// A range of WAL without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Window {
    /// Position of its first byte.
    pub start: Lsn,
    /// Position after its last byte.
    pub end: Lsn,
    /// Start of its last complete record: what recovery aims at to reach the end.
    pub last_record: Option<Lsn>,
    /// End of that record.
    pub last_record_end: Option<Lsn>,
    /// Newest commit time that its last run is known to hold.
    pub last_commit: Option<DateTime<Utc>>,
    /// When its last frame was written.
    pub written_at: DateTime<Utc>,
}

/// The frames of one branch, by region.
#[derive(Debug)]
pub struct WalIndex {
    branch: BranchId,
    /// Epoch → sequence number → regions that list it.
    frames: BTreeMap<EpochId, BTreeMap<u64, BTreeSet<RegionName>>>,
    /// The largest size that a region lists: what a header read may ask for.
    sizes: BTreeMap<(EpochId, u64), u64>,
    /// Numbers under which regions list objects of different sizes. A SEAL is shorter than any frame with WAL.
    uneven: BTreeSet<(EpochId, u64)>,
    /// Epoch and numbers of its bundles → region → size. Their frames are among the others.
    bundles: BTreeMap<Bundle, BTreeMap<RegionName, u64>>,
    unreadable: Vec<(RegionName, String)>,
    headers: Mutex<BTreeMap<(EpochId, u64), FrameHeader>>,
}

/// The branches of a cluster that any region holds WAL of, oldest timeline first.
///
/// # Errors
/// No region answers.
pub async fn branches(regions: &Regions, system_id: SystemId) -> Result<Vec<BranchId>> {
    let prefix = layout::wal_system(system_id);
    let parts = regions.prefixes_union(&prefix).await?;
    let parse = |key: &String| {
        let (timeline, branch) = layout::parse_branch(key.strip_prefix(&prefix)?)?;
        Some(BranchId { system_id, timeline, branch })
    };
    Ok(parts.iter().filter_map(parse).collect())
}

impl WalIndex {
    /// Lists one branch in every region.
    pub async fn load(regions: &Regions, branch: BranchId) -> Self {
        let prefix = layout::wal_branch(branch.system_id, branch.timeline, &branch.branch);
        let lists = regions
            .all()
            .iter()
            .map(|region| async { (region.name.clone(), list_all(region.store.as_ref(), &prefix).await) });
        let mut index = Self {
            branch,
            frames: BTreeMap::new(),
            sizes: BTreeMap::new(),
            uneven: BTreeSet::new(),
            bundles: BTreeMap::new(),
            unreadable: Vec::new(),
            headers: Mutex::default(),
        };
        for (region, list) in join_all(lists).await {
            match list {
                Ok(objects) => {
                    for object in objects {
                        let Some(name) = object.key.strip_prefix(&prefix) else { continue };
                        if let Some(bundle) = parse_bundle(name) {
                            index.add_bundle(bundle, &region, object.size);
                        }
                        let Some((epoch, seq)) = parse_frame(name) else { continue };
                        index.add_frame((epoch, seq), &region, object.size);
                    }
                }
                Err(error) => index.unreadable.push((region, error.to_string())),
            }
        }
        index
    }

    /// Returns whether no region was known to list it.
    fn add_frame(&mut self, (epoch, seq): (EpochId, u64), region: &RegionName, size: u64) -> bool {
        self.note_size(&(epoch.clone(), seq), size);
        let held = self.frames.entry(epoch).or_default().entry(seq).or_default();
        let is_new = held.is_empty();
        held.insert(region.clone());
        is_new
    }

    fn note_size(&mut self, at: &(EpochId, u64), size: u64) {
        let known = self.sizes.entry(at.clone()).or_insert(size);
        if *known != size {
            self.uneven.insert(at.clone());
        }
        *known = size.max(*known);
    }

    fn add_bundle(&mut self, bundle: Bundle, region: &RegionName, size: u64) {
        let seqs = self.frames.entry(bundle.0.clone()).or_default();
        for seq in bundle.1.0..=bundle.1.1 {
            seqs.entry(seq).or_default().insert(region.clone());
        }
        self.bundles.entry(bundle).or_default().insert(region.clone(), size);
    }

    /// The bundles that any region lists, with their sizes.
    pub const fn bundles(&self) -> &BTreeMap<Bundle, BTreeMap<RegionName, u64>> {
        &self.bundles
    }

    /// The branch.
    pub const fn branch(&self) -> &BranchId {
        &self.branch
    }

    /// Regions that could not be listed.
    pub fn unreadable(&self) -> &[(RegionName, String)] {
        &self.unreadable
    }

    /// Every frame and the regions that list it.
    pub fn frames(&self) -> impl Iterator<Item = (FramePlace, &BTreeSet<RegionName>)> {
        let place = |epoch: &EpochId, seq: u64| self.place(epoch, seq);
        self.frames.iter().flat_map(move |(epoch, seqs)| seqs.iter().map(move |(seq, held)| (place(epoch, *seq), held)))
    }

    /// The epochs and their sequence numbers.
    pub const fn epochs(&self) -> &BTreeMap<EpochId, BTreeMap<u64, BTreeSet<RegionName>>> {
        &self.frames
    }

    /// Forgets the frames of an epoch from a number on.
    pub(in crate::repository) fn cut(&mut self, epoch: &EpochId, from: u64) {
        if let Some(seqs) = self.frames.get_mut(epoch) {
            seqs.split_off(&from);
        }
    }

    /// Where a frame stands.
    pub fn place(&self, epoch: &EpochId, seq: u64) -> FramePlace {
        let BranchId { system_id, timeline, branch } = self.branch.clone();
        FramePlace { system_id, timeline, branch, epoch: epoch.clone(), seq }
    }

    /// A frame's header, from any region that has it intact.
    ///
    /// # Errors
    /// No region has it intact.
    pub async fn header(&self, repository: &Repository, epoch: &EpochId, seq: u64) -> Result<FrameHeader> {
        let cached = |headers: &Mutex<BTreeMap<(EpochId, u64), FrameHeader>>| {
            let headers = headers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            headers.get(&(epoch.clone(), seq)).cloned()
        };
        if let Some(header) = cached(&self.headers) {
            return Ok(header);
        }
        let place = self.place(epoch, seq);
        let check = |bytes: Bytes| Frame::header(&bytes, &repository.id, &place, &repository.trust);
        // A store refuses a range that ends behind the object, and most frames of a quiet server are smaller than that.
        let number = (epoch.clone(), seq);
        let size = self.sizes.get(&number).map_or(HEADER_LIMIT, |size| HEADER_LIMIT.min(*size));
        // Where sizes differ, what is enough for one object is too much for another.
        let range = (!self.uneven.contains(&number)).then_some(0..size);
        let header = match repository.regions.read(&place.key(), range, check).await {
            Ok((header, _)) => header,
            // The only region that lists it may be the damaged one.
            Err(_) => repository.regions.read(&place.key(), None, check).await?.0,
        };
        let (header, is_sure) = self.rather_wal(repository, header).await;
        if is_sure {
            let mut headers = self.headers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            headers.insert((epoch.clone(), seq), header.clone());
        }
        Ok(header)
    }

    /// The largest size that a region lists for a frame.
    pub(in crate::repository) fn size(&self, epoch: &EpochId, seq: u64) -> u64 {
        self.sizes.get(&(epoch.clone(), seq)).copied().unwrap_or_default()
    }

    /// Where another owner sealed an epoch, if it did. What its writer may still have put behind that was never
    /// acknowledged, and between it and the rest there may be a hole that the SEAL hides.
    async fn sealed_at(
        &self,
        repository: &Repository,
        epoch: &EpochId,
        seqs: &BTreeMap<u64, BTreeSet<RegionName>>,
    ) -> Option<u64> {
        let ((first, _), (last, _)) = (seqs.first_key_value()?, seqs.last_key_value()?);
        let small = |seq: &&u64| self.size(epoch, **seq) <= BARE_LIMIT;
        let near = seqs.range(last.saturating_sub(IN_FLIGHT)..).map(|(seq, _)| seq).filter(small);
        // The first one is asked for next.
        let near: BTreeSet<u64> = near.chain([first]).copied().collect();
        let headers = join_all(near.iter().map(|seq| self.header(repository, epoch, *seq))).await;
        let sealed = headers.into_iter().flatten().filter(|header| header.kind == FrameKind::Seal);
        sealed.map(|header| header.place.seq).min()
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
        let (first, last) = (run.first.place.seq, &run.last.place);
        if run.last.span.last_commit.is_some() {
            return Ok(run.last.span.last_commit);
        }
        let reach = first.max(last.seq.saturating_sub(COMMIT_REACH))..last.seq;
        self.newest_commit(repository, &last.epoch, reach).await
    }

    /// The newest commit time in these frames, looked for from their end, more of them at a time the longer it takes.
    async fn newest_commit(
        &self,
        repository: &Repository,
        epoch: &EpochId,
        seqs: Range<u64>,
    ) -> Result<Option<DateTime<Utc>>> {
        let (mut end, mut step) = (seqs.end, 4);
        while end > seqs.start {
            let from = seqs.start.max(end.saturating_sub(step));
            let headers = join_all((from..end).map(|seq| self.header(repository, epoch, seq))).await;
            for header in headers.into_iter().rev() {
                if let Some(time) = header?.span.last_commit {
                    return Ok(Some(time));
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

/// An epoch, and the first and last number of the frames in a bundle of it.
pub type Bundle = (EpochId, (u64, u64));

fn parse_bundle(key: &str) -> Option<Bundle> {
    let (epoch, numbers) = key.split_once('/')?;
    Some((epoch.parse().ok()?, layout::parse_bundle(numbers)?))
}

fn parse_frame(key: &str) -> Option<(EpochId, u64)> {
    let (epoch, seq) = key.split_once('/')?;
    Some((epoch.parse().ok()?, layout::parse_seq(seq)?))
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

/// Joins runs into windows. Where one run ends inside another, or exactly where another starts, there is no hole.
pub fn windows(runs: &[Run]) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for run in runs.iter().filter(|run| run.end() > run.start()) {
        let span = &run.last.span;
        let window = Window {
            start: run.start(),
            end: run.end(),
            last_record: span.last_record,
            last_record_end: span.last_record_end,
            last_commit: run.last_commit,
            written_at: run.last.written_at,
        };
        match windows.last_mut() {
            Some(open) if window.start <= open.end => open.absorb(window),
            _ => windows.push(window),
        }
    }
    windows
}

impl Window {
    fn absorb(&mut self, next: Self) {
        self.last_commit = self.last_commit.max(next.last_commit);
        if next.end > self.end {
            let last_record = next.last_record.or(self.last_record);
            let last_record_end = next.last_record_end.or(self.last_record_end);
            *self = Self { start: self.start, last_record, last_record_end, last_commit: self.last_commit, ..next };
        }
    }

    /// Whether the whole range `[from, to)` lies in it.
    pub fn covers(&self, from: Lsn, to: Lsn) -> bool {
        self.start <= from && to <= self.end
    }
}

/// A step of reading: these frames of one epoch, of which only the bytes in `[from, to)` count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The epoch.
    pub epoch: EpochId,
    /// First frame.
    pub first_seq: u64,
    /// Last frame of the run; reading stops earlier, at `to`.
    pub last_seq: u64,
    /// First byte wanted.
    pub from: Lsn,
    /// Byte after the last one wanted.
    pub to: Lsn,
}

/// Chooses runs that cover `[from, to)` together, as few as possible.
///
/// At the end of a run the next one takes over at the last complete record: what stands behind it is the torso of a
/// record that a crashed server may have written differently afterwards.
///
/// # Errors
/// Where the first hole is.
pub async fn cover(
    index: &WalIndex,
    repository: &Repository,
    runs: &[Run],
    (from, to): (Lsn, Lsn),
) -> Result<std::result::Result<Vec<Stretch>, Lsn>> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut at = from;
    loop {
        let candidates = runs.iter().filter(|run| run.start() <= at && run.end() > at);
        let Some(run) = candidates.max_by_key(|run| run.end()) else { return Ok(Err(at)) };
        let first_seq = index.locate(repository, run, at).await?;
        let reaches = run.end().min(to);
        let (epoch, last_seq) = (run.first.place.epoch.clone(), run.last.place.seq);
        stretches.push(Stretch { epoch, first_seq, last_seq, from: at, to: reaches });
        let safe = run.last.span.last_record_end.filter(|end| *end > at).unwrap_or(run.end());
        let goes_on = |position: Lsn| runs.iter().any(|next| next.start() <= position && next.end() > run.end());
        // A range may end inside the torso, as the end of a segment may.
        if reaches >= to && (to <= safe || !goes_on(safe)) {
            return Ok(Ok(stretches));
        }
        at = match () {
            () if goes_on(safe) => safe,
            () if goes_on(run.end()) => run.end(),
            () => return Ok(Err(run.end())),
        };
        if let Some(last) = stretches.last_mut() {
            last.to = at;
        }
    }
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
