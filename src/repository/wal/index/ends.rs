//! The ends of runs, as far as they can be read, and numbers that are missing inside.
//!
//! A frame that is nowhere intact at an end of its run costs what is in it and no more: the run ends before it, or begins
//! behind it, and it is told.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join;

use super::WalIndex;
use crate::model::{EpochId, Error, Kind, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, IN_FLIGHT};
use crate::repository::wal::index::runs::Run;

impl WalIndex {
    /// The run of the frames from `first` to `last`, and what is damaged at its ends. Where more than a writer has on its way
    /// at a time is not readable there is no run: that is no accident of a last write.
    pub(super) async fn run(
        &self,
        repository: &Repository,
        epoch: &EpochId,
        (mut first, mut last): (u64, u64),
    ) -> (Option<Run>, Vec<Error>) {
        let mut damaged = Vec::new();
        while first <= last && damaged.len() as u64 <= IN_FLIGHT {
            let ends = match first == last {
                true => self
                    .whole_end(repository, epoch, last)
                    .await
                    .map_or_else(|error| (Err(error.clone()), Err(error)), |only| (Ok(only.clone()), Ok(only))),
                false => join(self.header(repository, epoch, first), self.whole_end(repository, epoch, last)).await,
            };
            let (begin, end) = match ends {
                (Ok(first), Ok(last)) => return (Some(Run { first, last, last_commit: None }), damaged),
                ends => ends,
            };
            if [&begin, &end].into_iter().flat_map(|end| end.as_ref().err()).any(|error| error.kind() != Kind::Damaged)
            {
                damaged.extend(begin.err().or(end.err()));
                break;
            }
            let Some(before) = last.checked_sub(u64::from(end.is_err())) else {
                damaged.extend(end.err());
                break;
            };
            (first, last) = (first + u64::from(begin.is_err()), before);
            damaged.extend(begin.err().into_iter().chain(end.err()));
        }
        (None, damaged)
    }

    /// The head of a frame behind which nothing comes, if its body is there, too. A head is intact in an object that is cut
    /// short behind it.
    async fn whole_end(&self, repository: &Repository, epoch: &EpochId, seq: u64) -> Result<FrameHeader> {
        let header = self.header(repository, epoch, seq).await?;
        let listed = self.size(epoch, seq);
        // In a bundle it has no size of its own.
        if header.kind != FrameKind::Data || listed == 0 || header.object_bytes().is_none_or(|whole| listed >= whole) {
            return Ok(header);
        }
        let place = &header.place;
        let check = |bytes| Frame::decode(&bytes, &repository.id, place, &repository.trust);
        let Err(error) = repository.regions.read(&place.key(), None, check).await else { return Ok(header) };
        let (start, end) = (header.span.start, header.span.end);
        let text = format!("{} bytes of WAL, from {start} to {end}, are lost", end.bytes_since(start));
        Err(Error::new(error.kind(), text).because(format!("{} is cut short in every region", place.key())))
    }

    /// Numbers of an epoch that no region lists between others that it does: frames that were acknowledged. What its writer
    /// may have on its way is left out, and what a SEAL hides.
    pub async fn lost(
        &self,
        repository: &Repository,
        (epoch, seqs): (&EpochId, &BTreeMap<u64, BTreeSet<RegionName>>),
        from: u64,
    ) -> Vec<u64> {
        let (Some((first, _)), Some((last, _))) = (seqs.range(from..).next(), seqs.last_key_value()) else {
            return Vec::new();
        };
        let holes: Vec<_> = (*first..*last).filter(|seq| !seqs.contains_key(seq)).collect();
        if holes.is_empty() {
            return holes;
        }
        let sealed_at = self.sealed_at(repository, epoch, seqs).await;
        let is_ended = self.header(repository, epoch, *last).await.is_ok_and(|header| header.kind == FrameKind::End);
        let settled = match sealed_at {
            Some(seal) => seal,
            None if is_ended => *last,
            None => last.saturating_sub(IN_FLIGHT),
        };
        holes.into_iter().filter(|seq| *seq < settled).collect()
    }
}
