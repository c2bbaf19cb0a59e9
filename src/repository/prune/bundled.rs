//! Frames that lie in a bundle as well, in every region: they are stored twice, and nobody needs them under their own names.

use std::collections::BTreeSet;

use bytes::Bytes;
use chrono::TimeDelta;

use crate::model::{Result, TargetName};
use crate::repository::bundle::form::head_bytes;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::facts::{Copy, Facts, list_everywhere};
use crate::repository::wal::frame::{Frame, FramePlace, HEADER_LIMIT};

/// The frames of one bundle.
#[derive(Debug)]
pub struct Doubled {
    /// The bundle.
    pub bundle: String,
    /// Whose WAL.
    pub target: TargetName,
    /// Its frames, under their own names.
    pub frames: Vec<(String, Vec<Copy>)>,
}

/// Finds frames that every region has had in a bundle for longer than `grace`. What is in the bundle is looked at when they
/// are taken, see [`replaces`](super::replaced::replaces); here names, sizes and times decide.
///
/// # Errors
/// A region does not answer.
pub async fn doubled(repository: &Repository, facts: &Facts, grace: TimeDelta) -> Result<Vec<Doubled>> {
    let listing = list_everywhere(&repository.regions, layout::WAL).await?;
    let mut found = Vec::new();
    for (key, copies) in &listing {
        let Some((place, numbers)) = parse(key) else { continue };
        let prefix = place.epoch_prefix();
        let range = layout::wal_frame(&prefix, numbers.0)..=layout::wal_frame(&prefix, numbers.1);
        let frames: Vec<_> = listing.range(range).filter(|(name, _)| is_frame(name)).collect();
        let old = copies.iter().all(|copy| copy.modified.is_some_and(|modified| modified <= facts.now - grace));
        if frames.is_empty() || !old || !is_everywhere(repository, copies) || !fits(&frames, numbers, copies) {
            continue;
        }
        // Without its header nobody knows whose it is, and it stays.
        let Some(target) = target(repository, &place).await else { continue };
        let frames = frames.into_iter().map(|(name, copies)| (name.clone(), copies.clone())).collect();
        found.push(Doubled { bundle: key.clone(), target, frames });
    }
    Ok(found)
}

fn is_frame(key: &str) -> bool {
    key.rsplit('/').next().and_then(layout::parse_seq).is_some()
}

fn is_everywhere(repository: &Repository, copies: &[Copy]) -> bool {
    repository.regions.all().iter().all(|region| copies.iter().any(|copy| copy.region == region.name))
}

/// Where all frames are still there, the bundle is as long as they are together. Of those that a sweep began to take, only
/// some are. Each is of one size everywhere: a SEAL in one region, and in another the frame that it came too late for, are two things
/// under one name.
fn fits(frames: &[(&String, &Vec<Copy>)], numbers: (u64, u64), bundle: &[Copy]) -> bool {
    let Some(sizes) = frames.iter().map(|(_, copies)| size(copies)).collect::<Option<Vec<_>>>() else { return false };
    let least = head_bytes(numbers) + sizes.iter().sum::<u64>();
    let all = sizes.len() as u64 == numbers.1 - numbers.0 + 1;
    size(bundle).is_some_and(|size| if all { size == least } else { size > least })
}

/// The one size of an object that each region holds one version of: what is under another version was not compared.
fn size(copies: &[Copy]) -> Option<u64> {
    let regions: BTreeSet<_> = copies.iter().map(|copy| &copy.region).collect();
    let sizes: BTreeSet<_> = copies.iter().map(|copy| copy.size).collect();
    sizes
        .into_iter()
        .next()
        .filter(|_| regions.len() == copies.len())
        .filter(|first| copies.iter().all(|copy| copy.size == *first))
}

async fn target(repository: &Repository, place: &FramePlace) -> Option<TargetName> {
    let check = |bytes: Bytes| Frame::header(&bytes, &repository.id, place, &repository.trust);
    let head = repository.regions.read(&place.key(), Some(0..HEADER_LIMIT), &check).await;
    let head = match head {
        Ok(head) => Ok(head),
        // Smaller than that, and a store refuses a range that ends behind the object.
        Err(_) => repository.regions.read(&place.key(), None, &check).await,
    };
    head.ok().map(|(header, _)| header.target)
}

/// The place of the first frame of a bundle, and its numbers.
pub(super) fn parse(key: &str) -> Option<(FramePlace, (u64, u64))> {
    let mut parts = key.strip_prefix(layout::WAL)?.split('/');
    let system_id = parts.next()?.parse().ok()?;
    let (timeline, branch) = layout::parse_branch(parts.next()?)?;
    let epoch = parts.next()?.parse().ok()?;
    let numbers = layout::parse_bundle(parts.next()?)?;
    Some((FramePlace { system_id, timeline, branch, epoch, seq: numbers.0 }, numbers))
}
