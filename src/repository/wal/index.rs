//! Which WAL there is: the frames of a branch that regions list, and from them runs, recoverable windows and the way
//! through them. Needs no key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use bytes::Bytes;
use futures::future::join_all;

use crate::model::{Branch, EpochId, RegionName, Result, SystemId, Timeline};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::{Regions, list_all};
use crate::repository::wal::frame::{Frame, FrameHeader, FramePlace, HEADER_LIMIT};

mod beside;
mod ends;
mod growth;
mod runs;
mod stretch;
mod window;

pub use beside::Displaced;
pub use growth::Arrival;
pub use runs::Run;
pub use stretch::{Stretch, cover};
pub use window::{Window, windows};

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
                        if let Some(bundle) = parse_bundle(name)
                            && layout::can_be_bundle(bundle.1, object.size)
                        {
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
