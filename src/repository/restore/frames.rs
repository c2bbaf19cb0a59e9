//! Fetching frames: neighbours in one request, many requests in flight, every frame authenticated before it is used.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::codec::seal::{SealingKey, Unit};
use crate::keys::keyset::Keyset;
use crate::model::{Error, KeysetId, Kind, Result, TargetName};
use crate::repository::handle::Repository;
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::pages::map::{FrameRef, PackId};
use crate::repository::pages::pack::open_frame;
use crate::repository::restore::memory::Memory;

/// A hole of this size between two frames is read over: cheaper than another request.
const READ_OVER: u32 = 64 * 1024;

/// An authenticated frame, still compressed.
#[derive(Debug)]
pub struct Fetched<T> {
    /// Which.
    pub frame: FrameRef,
    /// What the caller attached to it.
    pub note: T,
    /// Its payload.
    pub payload: Vec<u8>,
}

struct Request<T> {
    pack: PackId,
    range: Range<u64>,
    frames: Vec<(FrameRef, T)>,
}

/// What is fetched from where, and how much at a time.
#[derive(Debug, Clone, Copy)]
pub struct Flight<'a> {
    /// Holds the packs.
    pub repository: &'a Repository,
    /// Opens their frames.
    pub ring: &'a KeyRing,
    /// Of which kind they are.
    pub unit: Unit,
    /// Bounds the requests in flight.
    pub memory: Memory,
}

/// Fetches `frames` and hands them to `use_them` on a blocking thread, a request's worth at a time, in no particular
/// order. Returns the bytes fetched.
///
/// # Errors
/// A frame is in no region intact, no key opens its keyset, or `use_them` failed.
pub async fn fetch_frames<T: Send + 'static>(
    Flight { repository, ring, unit, memory }: Flight<'_>,
    frames: Vec<(FrameRef, T)>,
    use_them: impl Fn(Vec<Fetched<T>>) -> Result<()> + Send + Sync + 'static,
) -> Result<u64> {
    let keys = Arc::new(open_keysets(ring, &frames).await?);
    let use_them = Arc::new(use_them);
    let requests = stream::iter(coalesce(frames, memory.range())).map(|request| {
        let (keys, use_them) = (Arc::clone(&keys), Arc::clone(&use_them));
        async move {
            let (frames, bytes) = fetch(Opener { repository, keys: &keys, unit }, request).await?;
            let used = tokio::task::spawn_blocking(move || use_them(frames)).await;
            used.map_err(|error| Error::failed("a restore worker died").because(error))??;
            Ok::<_, Error>(bytes)
        }
    });
    requests.buffer_unordered(memory.requests()).try_fold(0, |sum, bytes| async move { Ok(sum + bytes) }).await
}

async fn open_keysets<T>(ring: &KeyRing, frames: &[(FrameRef, T)]) -> Result<BTreeMap<KeysetId, Arc<Keyset>>> {
    let mut wanted: BTreeMap<&KeysetId, TargetName> = BTreeMap::new();
    for (frame, _) in frames {
        if !wanted.contains_key(&frame.keyset) {
            wanted.insert(&frame.keyset, frame.id.pack.backup.target()?);
        }
    }
    let wanted = wanted.into_iter().map(|(id, target)| (target, id.clone())).collect();
    ring.open_all(wanted).await.into_iter().map(|(id, opened)| Ok((id, opened?))).collect()
}

fn coalesce<T>(mut frames: Vec<(FrameRef, T)>, limit: u32) -> Vec<Request<T>> {
    frames.sort_by(|(a, _), (b, _)| (&a.pack, a.offset).cmp(&(&b.pack, b.offset)));
    let mut requests: Vec<Request<T>> = Vec::new();
    for (frame, note) in frames {
        let (start, end) = (u64::from(frame.offset), u64::from(frame.offset) + u64::from(frame.length));
        let joins = requests.last().is_some_and(|last| {
            let near = start <= last.range.end + u64::from(READ_OVER);
            let small = end.saturating_sub(last.range.start) <= u64::from(limit);
            last.pack == frame.pack && near && small
        });
        match requests.last_mut() {
            Some(last) if joins => {
                last.range.end = last.range.end.max(end);
                last.frames.push((frame, note));
            }
            _ => requests.push(Request { pack: frame.pack.clone(), range: start..end, frames: vec![(frame, note)] }),
        }
    }
    requests
}

/// Who opens frames, and of which kind.
#[derive(Clone, Copy)]
struct Opener<'a> {
    repository: &'a Repository,
    keys: &'a BTreeMap<KeysetId, Arc<Keyset>>,
    unit: Unit,
}

async fn fetch<T>(opener: Opener<'_>, request: Request<T>) -> Result<(Vec<Fetched<T>>, u64)> {
    let Request { pack, range, frames } = request;
    let (refs, notes): (Vec<_>, Vec<_>) = frames.into_iter().unzip();
    let payloads = match opener.read(&pack, range.clone(), &refs).await {
        // Every region has damage somewhere in this range, and perhaps not the same: each frame is asked for by itself.
        Err(error) if error.kind() == Kind::Damaged && refs.len() > 1 => {
            let mut payloads = Vec::with_capacity(refs.len());
            for frame in &refs {
                let range = u64::from(frame.offset)..u64::from(frame.offset) + u64::from(frame.length);
                payloads.extend(opener.read(&pack, range, std::slice::from_ref(frame)).await?);
            }
            payloads
        }
        read => read?,
    };
    let frames = refs.into_iter().zip(notes).zip(payloads);
    let frames = frames.map(|((frame, note), payload)| Fetched { frame, note, payload }).collect();
    Ok((frames, range.end - range.start))
}

impl Opener<'_> {
    /// The payloads of `frames`, all of which lie in `range`, from one region.
    async fn read(self, pack: &PackId, range: Range<u64>, frames: &[FrameRef]) -> Result<Vec<Vec<u8>>> {
        let key = layout::pack(&pack.backup.target()?, &pack.backup, pack.ordinal);
        let start = range.start;
        let check = |bytes: Bytes| {
            let open = |frame: &FrameRef| {
                let at = usize::try_from(u64::from(frame.offset) - start).unwrap_or(usize::MAX);
                let sealed = bytes.get(at..at.saturating_add(frame.length as usize));
                let short = || Error::damaged(format!("pack {} ends inside frame {}", frame.pack, frame.id));
                let key = secret(self.keys, self.unit, &frame.keyset)?;
                open_frame(&self.repository.id, frame, (self.unit, key), sealed.ok_or_else(short)?)
            };
            frames.iter().map(open).collect::<Result<Vec<_>>>()
        };
        self.repository.regions.read(&key, Some(range), check).await.map(|(payloads, _)| payloads)
    }
}

fn secret<'a>(keys: &'a BTreeMap<KeysetId, Arc<Keyset>>, unit: Unit, id: &KeysetId) -> Result<&'a SealingKey> {
    let keyset = keys.get(id).ok_or_else(|| Error::failed(format!("keyset {id} is not open")))?;
    match unit {
        Unit::Map => Ok(keyset.meta()),
        _ => keyset.data().ok_or_else(|| Error::failed(format!("keyset {id} was opened without its data secret"))),
    }
}
