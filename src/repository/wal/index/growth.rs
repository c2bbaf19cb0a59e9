//! Following a branch: what was stored since it was listed, without listing all of it again.
//!
//! Frames of an epoch are numbered without a hole, so whether one more came is a look at one name. New epochs show in a
//! listing of one level.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::PoisonError;

use futures::future::join_all;

use super::WalIndex;
use crate::model::{EpochId, Lsn, RegionName, Result};
use crate::repository::layout;
use crate::repository::regions::{Region, list_all, list_prefixes};
use crate::repository::wal::frame::{EpochKind, FrameHeader, FrameKind, IN_FLIGHT};
use crate::store::StoreError;

/// So many new frames are asked for by name; beyond them the epoch is listed.
const BY_NAME: u64 = 32;

/// A frame that was not in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    region: RegionName,
    epoch: EpochId,
    seq: u64,
    /// Unknown of a frame in a bundle.
    size: Option<u64>,
}

impl WalIndex {
    /// What regions hold behind the last known frame of each epoch that may grow; with `new_epochs` also epochs that are
    /// not known yet, which takes a listing. A region that does not answer is told in its place.
    pub async fn look_on(&self, regions: &[Region], new_epochs: bool) -> Vec<(RegionName, Result<Vec<Arrival>>)> {
        let looks = regions.iter().map(|region| async move {
            let found = self.look_in(region, new_epochs).await;
            (region.name.clone(), found)
        });
        join_all(looks).await
    }

    async fn look_in(&self, region: &Region, new_epochs: bool) -> Result<Vec<Arrival>> {
        let branch = layout::wal_branch(self.branch.system_id, self.branch.timeline, &self.branch.branch);
        let mut arrivals = Vec::new();
        let mut growing = self.growing();
        if new_epochs {
            growing.extend(self.sealed_elsewhere(&region.name));
        }
        for (epoch, next) in growing {
            let prefix = layout::wal_epoch(self.branch.system_id, self.branch.timeline, &self.branch.branch, &epoch);
            for seq in self.missing(&epoch) {
                arrivals.extend(named(region, &prefix, (&epoch, seq)).await?);
            }
            let mut seq = next;
            while seq < next + BY_NAME {
                let Some(found) = named(region, &prefix, (&epoch, seq)).await? else { break };
                arrivals.push(found);
                seq += 1;
            }
            if seq == next + BY_NAME {
                let all = listed(region, &prefix, &epoch).await?;
                arrivals.extend(all.into_iter().filter(|found| found.seq >= seq));
            }
        }
        if new_epochs {
            for prefix in list_prefixes(region.store.as_ref(), &branch).await? {
                let epoch = prefix.strip_prefix(&branch).and_then(|part| part.strip_suffix('/')?.parse().ok());
                if let Some(epoch) = epoch.filter(|epoch| !self.frames.contains_key(epoch)) {
                    arrivals.extend(listed(region, &prefix, &epoch).await?);
                }
            }
        }
        Ok(arrivals)
    }

    /// Numbers between known frames that nobody has: several frames are on their way at once, and the first may be the last
    /// to arrive.
    fn missing(&self, epoch: &EpochId) -> Vec<u64> {
        let Some(seqs) = self.frames.get(epoch) else { return Vec::new() };
        let Some((last, _)) = seqs.last_key_value() else { return Vec::new() };
        let near: Vec<u64> = seqs.range(last.saturating_sub(2 * IN_FLIGHT)..).map(|(seq, _)| *seq).collect();
        near.iter().zip(near.iter().skip(1)).flat_map(|(one, next)| one + 1..*next).collect()
    }

    /// Epochs that nobody closed, as far as their last headers are known, and the number that comes next in each.
    fn growing(&self) -> BTreeMap<EpochId, u64> {
        let open = self.frames.iter().filter(|(epoch, seqs)| self.closing(epoch, seqs).is_none());
        open.filter_map(|(epoch, seqs)| Some((epoch.clone(), seqs.last_key_value()?.0 + 1))).collect()
    }

    /// Epochs whose SEAL a region was not seen to hold, and its number: under that name the region may hold WAL, which counts
    /// for more, and what follows it.
    fn sealed_elsewhere(&self, region: &RegionName) -> BTreeMap<EpochId, u64> {
        let sealed = |(epoch, seqs): (&EpochId, &BTreeMap<u64, BTreeSet<RegionName>>)| {
            let header = self.closing(epoch, seqs).filter(|header| header.kind == FrameKind::Seal)?;
            let seq = header.place.seq;
            let is_held = seqs.get(&seq).is_some_and(|held| held.contains(region));
            (!is_held).then(|| (epoch.clone(), seq))
        };
        self.frames.iter().filter_map(sealed).collect()
    }

    /// What closes an epoch, if anything is known to.
    fn closing(&self, epoch: &EpochId, seqs: &BTreeMap<u64, BTreeSet<RegionName>>) -> Option<FrameHeader> {
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        let ((first, _), (last, _)) = (seqs.first_key_value()?, seqs.last_key_value()?);
        let near = headers.range((epoch.clone(), last.saturating_sub(IN_FLIGHT))..=(epoch.clone(), *last));
        let known = near.map(|(_, header)| header).chain(headers.get(&(epoch.clone(), *first)));
        known
            .filter(|header| matches!(header.kind, FrameKind::End | FrameKind::Seal))
            .min_by_key(|header| header.place.seq)
            .cloned()
    }

    /// The last known frame of each stream that nobody closed.
    pub fn open_streams(&self) -> Vec<FrameHeader> {
        let open: Vec<_> = self.growing().into_keys().collect();
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        let last = |epoch: EpochId| {
            let own = (epoch.clone(), 0)..=(epoch, u64::MAX);
            headers.range(own).next_back().map(|(_, header)| header.clone())
        };
        open.into_iter().filter_map(last).filter(|header| header.epoch_kind == EpochKind::Stream).collect()
    }

    /// Takes arrivals in. Returns whether any of them is a new frame, or may be WAL where a SEAL was known.
    pub fn take_in(&mut self, arrivals: impl IntoIterator<Item = Arrival>) -> bool {
        let mut grown = false;
        for Arrival { region, epoch, seq, size } in arrivals {
            // How long a frame is that only a bundle holds, nobody says.
            if let Some(size) = size {
                self.note_size(&(epoch.clone(), seq), size);
            }
            let held = self.frames.entry(epoch.clone()).or_default().entry(seq).or_default();
            grown |= held.is_empty();
            if held.insert(region) {
                grown |= self.forget_seal((epoch, seq));
            }
        }
        grown
    }

    fn forget_seal(&mut self, at: (EpochId, u64)) -> bool {
        let headers = self.headers.get_mut().unwrap_or_else(PoisonError::into_inner);
        let is_seal = headers.get(&at).is_some_and(|header| header.kind == FrameKind::Seal);
        is_seal && headers.remove(&at).is_some()
    }

    /// Takes a later list of the same branch in. What only a region lists that did not answer then stays known. Returns
    /// whether anything is new.
    pub fn absorb(&mut self, later: Self) -> bool {
        let mut grown = false;
        for (epoch, seqs) in later.frames {
            let own = self.frames.entry(epoch).or_default();
            for (seq, held) in seqs {
                let known = own.entry(seq).or_default();
                grown |= known.is_empty();
                known.extend(held);
            }
        }
        for (at, size) in later.sizes {
            self.note_size(&at, size);
        }
        self.uneven.extend(later.uneven);
        for (bundle, sizes) in later.bundles {
            self.bundles.entry(bundle).or_default().extend(sizes);
        }
        self.unreadable = later.unreadable;
        let headers = self.headers.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (at, header) in later.headers.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let known = headers.get(&at).map(|known| known.kind);
            grown |= known == Some(FrameKind::Seal) && header.kind != FrameKind::Seal;
            if known.is_none_or(|known| known == FrameKind::Seal) {
                headers.insert(at, header);
            }
        }
        grown
    }

    /// Lets go of frames that end at or before `below`, but for the last of them in each epoch: whoever follows a branch for
    /// months must not remember each of them. What is gone is found again by loading the index anew.
    pub fn forget(&mut self, below: Lsn) {
        let mut headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        for (epoch, seqs) in &mut self.frames {
            let own = (epoch.clone(), 0)..=(epoch.clone(), u64::MAX);
            // A SEAL says nothing of the WAL before it.
            let is_past = |header: &FrameHeader| header.kind == FrameKind::Data && header.span.end <= below;
            let mut ended = headers.range(own).filter(|(_, header)| is_past(header)).map(|((_, seq), _)| *seq);
            let Some(last) = ended.next_back() else { continue };
            let kept = seqs.split_off(&last);
            for (seq, _) in std::mem::replace(seqs, kept) {
                headers.remove(&(epoch.clone(), seq));
                self.sizes.remove(&(epoch.clone(), seq));
            }
        }
    }
}

async fn named(region: &Region, prefix: &str, (epoch, seq): (&EpochId, u64)) -> Result<Option<Arrival>> {
    match region.store.head(&layout::wal_frame(prefix, seq)).await {
        Ok(info) => Ok(Some(Arrival { region: region.name.clone(), epoch: epoch.clone(), seq, size: Some(info.size) })),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a region holds of an epoch, frame by frame, those in bundles among them.
async fn listed(region: &Region, prefix: &str, epoch: &EpochId) -> Result<Vec<Arrival>> {
    let objects = list_all(region.store.as_ref(), prefix).await?;
    let numbers = |object: &crate::store::ListedObject| -> Option<(RangeInclusive<u64>, Option<u64>)> {
        let name = object.key.strip_prefix(prefix)?;
        let bundle = layout::parse_bundle(name).filter(|seqs| layout::can_be_bundle(*seqs, object.size));
        let bundle = bundle.map(|(first, last)| (first..=last, None));
        bundle.or_else(|| layout::parse_seq(name).map(|seq| (seq..=seq, Some(object.size))))
    };
    let arrivals = objects.iter().filter_map(numbers).flat_map(|(seqs, size)| seqs.map(move |seq| (seq, size)));
    Ok(arrivals.map(|(seq, size)| Arrival { region: region.name.clone(), epoch: epoch.clone(), seq, size }).collect())
}

#[cfg(test)]
mod tests;
