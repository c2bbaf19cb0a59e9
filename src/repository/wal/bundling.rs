//! Putting the frames of epochs that are long closed into bundles. Needs no key.
//!
//! What goes into which bundle is decided by the sizes of the frames alone, so whoever bundles the same epoch again, here or
//! elsewhere, makes the same objects. The frames stay until prune finds every one of them in a bundle in every region.
//! The first frame of an epoch and the last ones are never bundled: they tell whose it is and how it was closed.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt, stream};

use crate::model::{EpochId, Error, Kind, Result, ResultExt, TargetName};
use crate::repository::bundle::form;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::closing::Closing;
use crate::repository::wal::frame::{Frame, FrameKind, FramePlace, IN_FLIGHT};
use crate::repository::wal::frames::fetch_object;
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::repository::wal::seal::Ending;
use crate::store::Digest;

/// Frames that are fetched at the same time.
const READS: usize = 8;

/// Checks a whole bundle: every byte of it belongs to a frame with WAL that is signed and stands in its place.
///
/// # Errors
/// What is wrong with it.
pub fn check_bundle(bytes: &Bytes, numbers: (u64, u64), repository: &Repository, place: &FramePlace) -> Result<()> {
    let contents = form::Contents::parse(bytes, numbers)?;
    if contents.end() != bytes.len() as u64 {
        return Err(Error::damaged(format!("{} of {} bytes of a bundle are there", bytes.len(), contents.end())));
    }
    for seq in numbers.0..=numbers.1 {
        let range = contents.range(seq).unwrap_or_default();
        let usize = |at| usize::try_from(at).unwrap_or(usize::MAX);
        let frame = bytes.slice(usize(range.start)..usize(range.end));
        let place = FramePlace { seq, ..place.clone() };
        let frame = Frame::decode(&frame, &repository.id, &place, &repository.trust)?;
        // A SEAL may stand in one region under the name of WAL that others hold.
        if frame.header.kind != FrameKind::Data {
            return Err(Error::damaged(format!("a bundle has something else than WAL as frame {seq}")));
        }
    }
    Ok(())
}

/// What of an epoch is to be bundled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundling {
    /// Where it is.
    pub branch: BranchId,
    /// Which.
    pub epoch: EpochId,
    /// Whose keys sealed it.
    pub target: TargetName,
    /// The first and the last frame of each bundle, and the bytes of all its frames.
    pub bundles: Vec<((u64, u64), u64)>,
}

/// Epochs of a branch that were closed before `before` and hold frames that too few regions have in a bundle; and what was
/// left alone, and why.
///
/// # Errors
/// A region does not answer: what it holds is not known.
pub async fn find(
    repository: &Repository,
    branch: &BranchId,
    before: DateTime<Utc>,
) -> Result<(Vec<Bundling>, Vec<String>)> {
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    if let Some((region, why)) = index.unreadable().first() {
        let error = Error::new(Kind::Unavailable, format!("the WAL of region {region} is not readable")).because(why);
        return Err(error.hint("bundle when every region answers; nothing is lost by waiting"));
    }
    let (mut found, mut notes) = (Vec::new(), Vec::new());
    for epoch in index.epochs().keys() {
        match of_epoch(repository, &index, epoch, before).await {
            Ok(bundling) => found.extend(bundling.filter(|bundling| !bundling.bundles.is_empty())),
            Err(error) => notes.push(format!("WAL epoch {epoch} stays as it is: {error}")),
        }
    }
    Ok((found, notes))
}

async fn of_epoch(
    repository: &Repository,
    index: &WalIndex,
    epoch: &EpochId,
    before: DateTime<Utc>,
) -> Result<Option<Bundling>> {
    let Some(seqs) = index.epochs().get(epoch) else { return Ok(None) };
    let (Some((0, _)), Some((last, _))) = (seqs.first_key_value(), seqs.last_key_value()) else { return Ok(None) };
    // Fewer are not worth a bundle, and the headers of a writer at work are not read again and again.
    if *last <= IN_FLIGHT + 1 || index.header(repository, epoch, *last).await?.written_at > before {
        return Ok(None);
    }
    let end = match Ending::look(repository, (index, epoch), repository.regions.read_quorum()).await?.closing {
        Closing::Ended => *last,
        Closing::Sealed(at) => at,
        Closing::Open(_) => return Ok(None),
    };
    let end = end.saturating_sub(IN_FLIGHT);
    if seqs.range(..end).count() as u64 != end {
        return Err(Error::damaged("it has a hole"));
    }
    let quorum = repository.regions.quorum();
    let of_it = index.bundles().iter().filter(|((of, _), held)| of == epoch && held.len() >= quorum);
    let bundled: Vec<_> = of_it.map(|((_, numbers), _)| *numbers).collect();
    let is_bundled = |seq: u64| bundled.iter().any(|(first, last)| (*first..=*last).contains(&seq));
    let frames: Vec<_> = (1..end).filter(|seq| !is_bundled(*seq)).map(|seq| (seq, index.size(epoch, seq))).collect();
    if let Some((seq, _)) = frames.iter().find(|(_, size)| *size == 0) {
        return Err(Error::damaged(format!("frame {seq} is in a bundle of too few regions; drctl repair")));
    }
    let bytes = |(first, last): (u64, u64)| (first..=last).map(|seq| index.size(epoch, seq)).sum();
    let bundles = form::cut(frames).into_iter().map(|numbers| (numbers, bytes(numbers))).collect();
    let target = index.header(repository, epoch, 0).await?.target;
    Ok(Some(Bundling { branch: index.branch().clone(), epoch: epoch.clone(), target, bundles }))
}

/// Makes one bundle and brings it to the write quorum. Each frame is checked before it goes in.
///
/// # Errors
/// A frame is in no region intact, or the quorum was not reached.
pub async fn make(repository: &Repository, out: &FanOut, bundling: &Bundling, (first, last): (u64, u64)) -> Result<()> {
    let BranchId { system_id, timeline, branch } = bundling.branch.clone();
    let place = FramePlace { system_id, timeline, branch, epoch: bundling.epoch.clone(), seq: first };
    let fetch = |seq| {
        let place = FramePlace { seq, ..place.clone() };
        async move { fetch_object(repository, &place).await }
    };
    let frames: Vec<_> = stream::iter(first..=last).map(fetch).buffered(READS).try_collect().await?;
    let body = Bytes::from(form::pack(&frames));
    check_bundle(&body, (first, last), repository, &place)?;
    let (key, digest) = (layout::wal_bundle(&place.epoch_prefix(), first, last), Digest::of(&body));
    out.put(key.clone(), body, digest).await.during(|| format!("store {key}"))
}
