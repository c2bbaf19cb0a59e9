//! Following a branch: what was stored since it was listed, without listing all of it again.
//!
//! Frames of an epoch are numbered without a hole, so whether one more came is a look at one name. New epochs show in a
//! listing of one level.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use futures::future::join_all;

use super::WalIndex;
use crate::model::{EpochId, Lsn, RegionName, Result};
use crate::repository::layout;
use crate::repository::regions::{Region, list_all, list_prefixes};
use crate::repository::wal_frame::{FrameHeader, FrameKind, IN_FLIGHT};
use crate::store::StoreError;

/// So many new frames are asked for by name; beyond them the epoch is listed.
const BY_NAME: u64 = 32;

/// A frame that was not in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    region: RegionName,
    epoch: EpochId,
    seq: u64,
    size: u64,
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
        for (epoch, last) in self.growing() {
            let prefix = layout::wal_epoch(self.branch.system_id, self.branch.timeline, &self.branch.branch, &epoch);
            for seq in self.missing(&epoch) {
                arrivals.extend(named(region, &prefix, (&epoch, seq)).await?);
            }
            let mut seq = last + 1;
            while seq <= last + BY_NAME {
                let Some(found) = named(region, &prefix, (&epoch, seq)).await? else { break };
                arrivals.push(found);
                seq += 1;
            }
            if seq > last + BY_NAME {
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

    /// Epochs that nobody closed, as far as their last header is known, and the last frame of each.
    fn growing(&self) -> BTreeMap<EpochId, u64> {
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        let last = self.frames.iter().filter_map(|(epoch, seqs)| Some((epoch, *seqs.last_key_value()?.0)));
        let is_open = |(epoch, seq): &(&EpochId, u64)| {
            let header = headers.get(&((*epoch).clone(), *seq));
            header.is_none_or(|header| !matches!(header.kind, FrameKind::End | FrameKind::Seal))
        };
        last.filter(is_open).map(|(epoch, seq)| (epoch.clone(), seq)).collect()
    }

    /// Takes arrivals in. Returns whether any of them is a new frame.
    pub fn take_in(&mut self, arrivals: impl IntoIterator<Item = Arrival>) -> bool {
        let mut grown = false;
        for Arrival { region, epoch, seq, size } in arrivals {
            grown |= self.add_frame((epoch, seq), &region, size);
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
        Ok(info) => Ok(Some(Arrival { region: region.name.clone(), epoch: epoch.clone(), seq, size: info.size })),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn listed(region: &Region, prefix: &str, epoch: &EpochId) -> Result<Vec<Arrival>> {
    let objects = list_all(region.store.as_ref(), prefix).await?;
    let arrival = |object: crate::store::ListedObject| {
        let seq = layout::parse_seq(object.key.strip_prefix(prefix)?)?;
        Some(Arrival { region: region.name.clone(), epoch: epoch.clone(), seq, size: object.size })
    };
    Ok(objects.into_iter().filter_map(arrival).collect())
}

#[cfg(test)]
mod tests;
