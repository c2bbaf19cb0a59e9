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

/// Finds frames that every region has had in a bundle for longer than `grace`; and tells of those that stay because it is not
/// the only one that has them. What is in the bundle is looked at when they are taken, see
/// [`replaces`](super::replaced::replaces); here names, sizes and times decide.
///
/// # Errors
/// A region does not answer.
pub async fn doubled(repository: &Repository, facts: &Facts, grace: TimeDelta) -> Result<(Vec<Doubled>, Vec<String>)> {
    let listing = list_everywhere(&repository.regions, layout::WAL).await?;
    let crowded = crowded(listing.keys());
    let (mut found, mut notes) = (Vec::new(), Vec::new());
    for (key, copies) in &listing {
        let Some((place, numbers)) = parse(key) else { continue };
        let prefix = place.epoch_prefix();
        let range = layout::wal_frame(&prefix, numbers.0)..=layout::wal_frame(&prefix, numbers.1);
        let frames: Vec<_> = listing.range(range).filter(|(name, _)| is_frame(name)).collect();
        let old = copies.iter().all(|copy| copy.modified.is_some_and(|modified| modified <= facts.now - grace));
        if frames.is_empty() || !old || !is_everywhere(repository, copies) || !fits(&frames, numbers, copies) {
            continue;
        }
        // Readers would have to guess. Whoever has put it there can do so no more once the frames are gone: then it is younger.
        if crowded.contains(key) {
            notes.push(format!("the WAL frames of {key} stay: another bundle claims some of them"));
            continue;
        }
        // Without its header nobody knows whose it is, and it stays.
        let Some(target) = target(repository, &place).await else { continue };
        let frames = frames.into_iter().map(|(name, copies)| (name.clone(), copies.clone())).collect();
        found.push(Doubled { bundle: key.clone(), target, frames });
    }
    Ok((found, notes))
}

/// Bundles that share a number with another one of their epoch.
fn crowded<'k>(keys: impl Iterator<Item = &'k String>) -> BTreeSet<&'k String> {
    let mut bundles: Vec<_> =
        keys.filter_map(|key| parse(key).map(|(place, numbers)| (place.epoch_prefix(), numbers, key))).collect();
    bundles.sort_unstable();
    let mut crowded = BTreeSet::new();
    // The one that reaches furthest so far.
    let mut reach: Option<&(String, (u64, u64), &String)> = None;
    for bundle in &bundles {
        let before = reach.filter(|(prefix, ..)| *prefix == bundle.0);
        if let Some((.., key)) = before.filter(|(_, (_, last), _)| bundle.1.0 <= *last) {
            crowded.extend([*key, bundle.2]);
        }
        if before.is_none_or(|(_, (_, last), _)| *last < bundle.1.1) {
            reach = Some(bundle);
        }
    }
    crowded
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
