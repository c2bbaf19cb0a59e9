//! Frames whose name a SEAL has in some regions, see [`closing`](crate::repository::wal::closing).

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;

use super::WalIndex;
use crate::model::{EpochId, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::regions::Region;
use crate::repository::wal::closing::{Closing, Enough, Holding, Holdings, closing, header_beside, holding};
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FramePlace, IN_FLIGHT};

/// A frame that counts, and is not to be had from every region that lists its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Displaced {
    /// The frame.
    pub place: FramePlace,
    /// Regions that hold a SEAL under its name, and the frame nowhere.
    pub lacking: BTreeSet<RegionName>,
}

impl WalIndex {
    /// What the regions that listed an epoch hold of its last frames.
    ///
    /// # Errors
    /// A region listed a frame and does not give it.
    pub async fn holdings(&self, repository: &Repository, epoch: &EpochId) -> Result<Holdings<RegionName>> {
        let mut holdings = Holdings::new();
        let Some(seqs) = self.frames.get(epoch) else { return Ok(holdings) };
        let (mut lowest, mut above) = (None, None);
        for (seq, held) in seqs.iter().rev() {
            let is_far_below = |number: Option<u64>| number.is_some_and(|number| seq + IN_FLIGHT < number);
            match is_foreign(&holdings) {
                // No writer is so far ahead of what it has stored: somebody else put that there.
                true if is_far_below(above) => (holdings, lowest) = (Holdings::new(), None),
                // Below are only frames that were acknowledged before the first SEAL was tried.
                false if is_far_below(lowest) => break,
                _ => {}
            }
            above = Some(*seq);
            let regions: Vec<&Region> = held.iter().filter_map(|name| repository.regions.named(name).ok()).collect();
            let place = self.place(epoch, *seq);
            let looks = join_all(regions.iter().map(|region| self.holding_of(repository, region, &place))).await;
            let mut found = BTreeMap::new();
            for (region, look) in regions.into_iter().zip(looks) {
                found.extend(look?.map(|holding| (region.name.clone(), holding)));
            }
            if found.values().any(|holding| *holding == Holding::Seal) {
                lowest = above;
            } else if found.values().any(|holding| *holding != Holding::Damaged) {
                // Bytes that are no frame tell nothing of how far its writer was.
                lowest = lowest.or(above);
            }
            let ended = found.values().any(|holding| *holding == Holding::End);
            holdings.insert(*seq, found);
            if ended {
                break;
            }
        }
        Ok(holdings)
    }

    async fn holding_of(
        &self,
        repository: &Repository,
        region: &Region,
        place: &FramePlace,
    ) -> Result<Option<Holding>> {
        let size = self.size(&place.epoch, place.seq);
        let own = holding(repository, region, place, size).await?.map(|(holding, _)| holding);
        let beside = own == Some(Holding::Seal) && self.lists_beside(place, &region.name);
        if beside && header_beside(repository, region, place).await.is_some() {
            return Ok(Some(Holding::Wal));
        }
        Ok(own)
    }

    fn lists_beside(&self, place: &FramePlace, region: &RegionName) -> bool {
        let bundle = (place.epoch.clone(), (place.seq, place.seq));
        self.bundles.get(&bundle).is_some_and(|held| held.contains_key(region))
    }

    /// Frames that count although a SEAL has their name somewhere. Of an epoch that is not closed yet there are none: as long
    /// as it is open, a SEAL may still win against the frame.
    pub async fn displaced(&self, repository: &Repository) -> Vec<Displaced> {
        let epochs: BTreeSet<_> = self.uneven.iter().map(|(epoch, _)| epoch).collect();
        let quorum = repository.regions.read_quorum();
        let enough = Enough { regions: repository.regions.all().len(), needed: quorum, barrier: quorum };
        let mut found = Vec::new();
        for epoch in epochs {
            let holdings = match self.holdings(repository, epoch).await {
                Ok(holdings) => holdings,
                Err(error) => {
                    tracing::warn!(%error, %epoch, "the end of a WAL epoch is not readable");
                    continue;
                }
            };
            let end = match closing(&holdings, enough) {
                Closing::Ended => u64::MAX,
                Closing::Sealed(at) => at,
                Closing::Open(_) => continue,
            };
            for (seq, held) in holdings.range(..end) {
                let is_seal = |(_, holding): &(_, &Holding)| **holding == Holding::Seal;
                let lacking: BTreeSet<_> = held.iter().filter(is_seal).map(|(region, _)| region.clone()).collect();
                if !lacking.is_empty() && held.values().any(|holding| *holding == Holding::Wal) {
                    found.push(Displaced { place: self.place(epoch, *seq), lacking });
                }
            }
        }
        found
    }

    /// The frame that stands under the name of a SEAL in another region, or beside it: the frame counts. Also says whether
    /// every region that lists the name gave what it has: a SEAL that is remembered ends its epoch for good.
    pub(super) async fn rather_wal(&self, repository: &Repository, header: FrameHeader) -> (FrameHeader, bool) {
        let (place, mut is_sure) = (&header.place, true);
        let held = self.frames.get(&place.epoch).and_then(|seqs| seqs.get(&place.seq));
        let held = held.filter(|_| header.kind == FrameKind::Seal).into_iter().flatten();
        for region in held {
            let Ok(region) = repository.regions.named(region) else { continue };
            match region.store.get(&place.key(), None).await {
                Ok(bytes) => match Frame::header(&bytes, &repository.id, place, &repository.trust) {
                    Ok(other) if other.kind != FrameKind::Seal => return (other, true),
                    _ => {}
                },
                Err(error) => is_sure &= error.is_not_found(),
            }
            if self.lists_beside(place, &region.name)
                && let Some(other) = header_beside(repository, region, place).await
            {
                return (other, true);
            }
        }
        (header, is_sure)
    }
}

/// Whether bytes that are no frame are all that was found.
fn is_foreign(holdings: &Holdings<RegionName>) -> bool {
    let mut held = holdings.values().flat_map(BTreeMap::values).peekable();
    held.peek().is_some() && held.all(|holding| *holding == Holding::Damaged)
}
