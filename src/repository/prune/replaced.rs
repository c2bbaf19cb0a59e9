//! The last look before frames go: whether their bundle has the very same ones.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::model::{Error, Result};
use crate::repository::bundle::form::Contents;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::prune::bundled::parse;
use crate::repository::prune::garbage::Item;
use crate::repository::wal::bundling::check_bundle;
use crate::repository::wal::frame::{Frame, FramePlace, HEADER_LIMIT};
use crate::store::Digest;

/// Heads of frames that are read at the same time.
const READS: usize = 16;

/// Whether a bundle may take the place of `frames`, which lie under their own names still: every region gives it back, the same bytes
/// in each, every frame in it holds WAL and is signed, and is the very one that goes.
///
/// The last is not implied by the others. Whoever may write could sign other WAL as those frames, and put it where a bundle is
/// read; as long as the frames themselves are there, they are what was acknowledged.
///
/// # Errors
/// Where it may not, and why.
pub async fn replaces(repository: &Repository, key: &str, frames: &[&Item]) -> Result<()> {
    let (place, numbers) = parse(key).ok_or_else(|| Error::failed(format!("{key} is no bundle")))?;
    let mut bundle: Option<(Bytes, Digest)> = None;
    for region in repository.regions.all() {
        let told = |error: Error| error.during(format!("read {key} from {}", region.name));
        let bytes = region.store.get(key, None).await.map_err(|error| told(error.into()))?;
        let digest = Digest::of(&bytes);
        match &bundle {
            Some((_, first)) if *first == digest => {}
            Some(_) => return Err(told(Error::damaged("it is another one than in the regions before"))),
            None => {
                check_bundle(&bytes, numbers, repository, &place).map_err(told)?;
                bundle = Some((bytes, digest));
            }
        }
    }
    let (bundle, _) = bundle.ok_or_else(|| Error::failed("there is no region"))?;
    let contents = Contents::parse(&bundle, numbers)?;
    let compared = stream::iter(frames).map(|frame| is_in(repository, (&place, frame), (&bundle, &contents)));
    compared.buffer_unordered(READS).try_collect::<()>().await
}

/// Whether a frame under its own name is the one in the bundle. Its signed head holds the digest of the rest.
async fn is_in(
    repository: &Repository,
    (place, item): (&FramePlace, &Item),
    (bundle, contents): (&Bytes, &Contents),
) -> Result<()> {
    let seq = item.key.rsplit('/').next().and_then(layout::parse_seq);
    let seq = seq.ok_or_else(|| Error::failed(format!("{} is no frame", item.key)))?;
    let place = FramePlace { seq, ..place.clone() };
    let range = contents.range(seq).ok_or_else(|| Error::damaged(format!("{} is not in it", item.key)))?;
    let usize = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bundle.len());
    let head = |bytes: &[u8]| Frame::header(bytes, &repository.id, &place, &repository.trust);
    let ours = head(&bundle.slice(usize(range.start)..usize(range.end)))?;
    let told = |error: Error| error.during(format!("read {} from {}", item.key, item.region));
    let store = &repository.regions.named(&item.region)?.store;
    let own = store.get(&item.key, Some(0..HEADER_LIMIT.min(item.size))).await;
    let own = own.map_err(|error| told(error.into())).and_then(|own| head(&own).map_err(told))?;
    if item.size != range.end - range.start || own != ours {
        let error = Error::damaged(format!("{} in region {} is another one than in the bundle", item.key, item.region));
        return Err(error.hint("somebody wrote WAL that was not received: which signers are known? drctl status"));
    }
    Ok(())
}
