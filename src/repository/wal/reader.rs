//! Reading WAL back: bytes in order, and where several epochs hold them, compared before they are given out.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use futures::{StreamExt, stream};

use crate::model::{EpochId, Error, Lsn, Result};
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::wal::frame::FrameHeader;
use crate::repository::wal::frames::{Frames, Means};
use crate::repository::wal::index::{BranchId, Run, Stretch, WalIndex, Window, cover, windows};
pub use crate::repository::wal::overlap::Contradiction;
use crate::repository::wal::overlap::{Look, Overlap, Witness, comparable, overlaps};

/// Overlaps that are compared at the same time; each reads two epochs, with the look-ahead of each.
const COMPARED_AT_ONCE: usize = 2;

/// Takes WAL in order; [`ControlFlow::Break`] ends the reading.
pub type Sink<'a> = dyn FnMut(Lsn, &[u8]) -> Result<ControlFlow<()>> + Send + 'a;

/// The WAL of one branch, as all regions hold it together.
#[derive(Debug)]
pub struct BranchLog {
    /// Its frames by region.
    pub index: WalIndex,
    /// Its unbroken runs, ascending.
    pub runs: Vec<Run>,
    /// Frames that broke a run because their header is nowhere intact.
    pub damaged: Vec<Error>,
}

impl BranchLog {
    /// Lists a branch and reads the headers at the ends of its runs.
    pub async fn load(repository: &Repository, branch: BranchId) -> Self {
        let index = WalIndex::load(&repository.regions, branch).await;
        let (runs, damaged) = index.spans(repository).await;
        Self { index, runs, damaged }
    }

    /// The gap-free window that holds the byte at `at`.
    pub fn window(&self, at: Lsn) -> Option<Window> {
        windows(&self.runs).into_iter().find(|window| window.start <= at && at < window.end)
    }

    /// The frames that give `[from, to)`; contiguous, so that reading them one after the other never leaves a hole and
    /// never steps back.
    ///
    /// # Errors
    /// There is a hole, or a header is nowhere intact.
    pub async fn stretches(&self, repository: &Repository, (from, to): (Lsn, Lsn)) -> Result<Vec<Stretch>> {
        if to <= from {
            return Ok(Vec::new());
        }
        let BranchId { timeline, .. } = self.index.branch();
        let hole = |at: Lsn| Error::damaged(format!("the WAL of timeline {timeline} has a hole at {at}"));
        cover(&self.index, repository, &self.runs, (from, to)).await?.map_err(hole)
    }

    /// The header of a frame.
    ///
    /// # Errors
    /// It is nowhere intact.
    pub async fn header(&self, repository: &Repository, epoch: &EpochId, seq: u64) -> Result<FrameHeader> {
        self.index.header(repository, epoch, seq).await
    }

    /// The number of the frame of a stretch that holds the byte at `at`.
    ///
    /// # Errors
    /// A header on the way is nowhere intact, or the stretch does not hold that byte.
    pub async fn locate(&self, repository: &Repository, stretch: &Stretch, at: Lsn) -> Result<u64> {
        let run = self.run_of(stretch).ok_or_else(|| Error::failed(format!("no run of WAL holds {at}")))?;
        self.index.locate(repository, run, at).await
    }

    /// The run that a stretch was cut from.
    pub fn run_of(&self, stretch: &Stretch) -> Option<&Run> {
        self.runs.iter().find(|run| {
            let seqs = run.first.place.seq..=run.last.place.seq;
            run.first.place.epoch == stretch.epoch && seqs.contains(&stretch.first_seq)
        })
    }

    /// Hands the bytes of `[from, to)` to `sink`, in order. Returns how many. Where other epochs hold a part of them, too,
    /// they are read beside and compared; one that cannot be read is told and does not stop what is good.
    ///
    /// # Errors
    /// A hole; a frame that is in no region intact; no key that opens an epoch; two epochs that contradict each other; or
    /// what `sink` said.
    pub async fn read(
        &self,
        repository: &Repository,
        ring: &KeyRing,
        range: (Lsn, Lsn),
        sink: &mut Sink<'_>,
    ) -> Result<u64> {
        self.begin(repository, ring, range).await?.hand_to(sink).await
    }

    /// As [`read`](Self::read), in two steps: from here on the first frames are on their way, before anybody can take them.
    ///
    /// # Errors
    /// As there.
    pub async fn begin<'a>(
        &'a self,
        repository: &'a Repository,
        ring: &'a KeyRing,
        range: (Lsn, Lsn),
    ) -> Result<Reading<'a>> {
        let means = Means { index: &self.index, repository, ring };
        let mut stretches = VecDeque::from(self.stretches(repository, range).await?);
        let first = match stretches.pop_front() {
            Some(first) => Some(Pieces::open(means, first).await?),
            None => None,
        };
        Ok(Reading { log: self, means, first, stretches })
    }

    /// Whoever else holds a part of a stretch.
    fn witnesses<'a>(&'a self, means: Means<'a>, stretch: &Stretch) -> Vec<Witness<'a>> {
        let Some(ours) = self.run_of(stretch) else { return Vec::new() };
        let end = comparable(ours).1.min(stretch.to);
        let both = |run: &'a Run| {
            let (start, complete) = comparable(run);
            let part = (start.max(stretch.from), complete.min(end));
            let other = run.first.place != ours.first.place;
            (other && part.0 < part.1).then(|| Witness::new(means, ours, run, part))
        };
        self.runs.iter().filter_map(both).collect()
    }

    /// Compares what several epochs hold of `[from, to)`, and nothing else. Gives what contradicts, and what could not be
    /// read for it.
    pub async fn compare(
        &self,
        repository: &Repository,
        ring: &KeyRing,
        (from, to): (Lsn, Lsn),
    ) -> (Vec<Contradiction>, Vec<Error>) {
        let means = Means { index: &self.index, repository, ring };
        let within = |run: &Run| {
            let (start, end) = comparable(run);
            (start.max(from), end.min(to).max(start.max(from)))
        };
        let ranges: Vec<_> = self.runs.iter().map(within).collect();
        let (mut contradictions, mut unread) = (Vec::new(), Vec::new());
        let compared = overlaps(&ranges).into_iter().map(|overlap| self.compare_one(means, overlap));
        let compared = stream::iter(compared.collect::<Vec<_>>()).buffered(COMPARED_AT_ONCE);
        for look in compared.collect::<Vec<_>>().await {
            match look {
                Look::Same => {}
                Look::Differs(contradiction) => contradictions.push(*contradiction),
                Look::Unread(error) => unread.push(error),
            }
        }
        (contradictions, unread)
    }

    async fn compare_one(&self, means: Means<'_>, Overlap { ours, theirs, from, to }: Overlap) -> Look {
        let (Some(ours), Some(theirs)) = (self.runs.get(ours), self.runs.get(theirs)) else { return Look::Same };
        let first_seq = match means.index.locate(means.repository, ours, from).await {
            Ok(first_seq) => first_seq,
            Err(error) => return Look::Unread(error),
        };
        let (epoch, last_seq) = (ours.first.place.epoch.clone(), ours.last.place.seq);
        let stretch = Stretch { epoch, first_seq, last_seq, from, to };
        let mut witness = Witness::new(means, ours, theirs, (from, to));
        let mut pieces = match Pieces::open(means, stretch).await {
            Ok(pieces) => pieces,
            Err(error) => return Look::Unread(error),
        };
        loop {
            let looked = match pieces.next().await {
                Ok(Some((at, wal))) => witness.look(at, &wal).await,
                Ok(None) => return Look::Same,
                Err(error) => return Look::Unread(error),
            };
            if !matches!(looked, Look::Same) {
                return looked;
            }
        }
    }
}

/// WAL that is being read.
#[derive(Debug)]
pub struct Reading<'a> {
    log: &'a BranchLog,
    means: Means<'a>,
    first: Option<Pieces<'a>>,
    stretches: VecDeque<Stretch>,
}

impl Reading<'_> {
    /// Hands everything to `sink`, in order. Returns how many bytes.
    ///
    /// # Errors
    /// Those of [`BranchLog::read`].
    pub async fn hand_to(mut self, sink: &mut Sink<'_>) -> Result<u64> {
        let mut bytes = 0;
        while let Some(pieces) = self.next().await? {
            let witnesses = self.log.witnesses(self.means, &pieces.stretch);
            let (read, flow) = read_stretch(pieces, witnesses, sink).await?;
            bytes += read;
            if flow.is_break() {
                break;
            }
        }
        Ok(bytes)
    }
}

impl<'a> Reading<'a> {
    async fn next(&mut self) -> Result<Option<Pieces<'a>>> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        match self.stretches.pop_front() {
            Some(stretch) => Pieces::open(self.means, stretch).await.map(Some),
            None => Ok(None),
        }
    }
}

/// Hands a stretch to `sink`, in order, while every witness agrees.
async fn read_stretch(
    mut pieces: Pieces<'_>,
    mut witnesses: Vec<Witness<'_>>,
    sink: &mut Sink<'_>,
) -> Result<(u64, ControlFlow<()>)> {
    let (from, to) = (pieces.stretch.from, pieces.stretch.to);
    while let Some((at, wal)) = pieces.next().await? {
        let mut heard = Vec::with_capacity(witnesses.len());
        for mut witness in witnesses {
            match witness.look(at, &wal).await {
                Look::Same => heard.push(witness),
                Look::Differs(contradiction) => return Err(Error::from(contradiction.as_ref())),
                Look::Unread(error) => {
                    tracing::warn!(%error, %at, "another epoch that holds this WAL cannot be compared with it");
                }
            }
        }
        witnesses = heard;
        if sink(at, &wal)?.is_break() {
            return Ok((pieces.at.bytes_since(from), ControlFlow::Break(())));
        }
    }
    Ok((to.bytes_since(from), ControlFlow::Continue(())))
}

/// The pieces of a stretch, each the wanted part of a frame.
#[derive(Debug)]
struct Pieces<'a> {
    frames: Frames<'a>,
    stretch: Stretch,
    at: Lsn,
}

impl<'a> Pieces<'a> {
    async fn open(means: Means<'a>, stretch: Stretch) -> Result<Self> {
        let frames = Frames::open(means, &stretch.epoch, stretch.first_seq..=stretch.last_seq).await?;
        let at = stretch.from;
        Ok(Self { frames, stretch, at })
    }

    async fn next(&mut self) -> Result<Option<(Lsn, Vec<u8>)>> {
        let Stretch { epoch, to, .. } = &self.stretch;
        while self.at < *to {
            let at = self.at;
            let ends = || Error::damaged(format!("the WAL of epoch {epoch} ends at {at}, before {to}"));
            let (span, wal) = self.frames.next().await?.ok_or_else(ends)?;
            if span.start > at {
                return Err(Error::damaged(format!("the WAL of epoch {epoch} does not go on at {at}")));
            }
            let mut wanted = wal;
            let offset = |at: Lsn| usize::try_from(at.bytes_since(span.start)).unwrap_or(usize::MAX);
            wanted.truncate(offset(*to));
            wanted.drain(..offset(at).min(wanted.len()));
            if !wanted.is_empty() {
                self.at.0 += wanted.len() as u64;
                return Ok(Some((at, wanted)));
            }
        }
        Ok(None)
    }
}
