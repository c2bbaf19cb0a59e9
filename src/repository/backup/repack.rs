//! Repacking: where most of a pack is dead, its live frames move, as they are, into a pack of the new backup.
//!
//! What is dead is told by the parent's map, which the writer remembers: the new backup's own is complete only at its end. A
//! frame keeps its birth, under which it is sealed, so nobody needs a key; the map chunks that name it are written anew with
//! its new place. The old pack stays where it is, for the backups that refer to it. A pack is read whole, because its digest
//! alone tells the writer that what it copies is what was stored.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use crate::model::{BackupId, Error, Result, TargetName};
use crate::repository::backup::state::KnownPages;
use crate::repository::backup::uploads::put_object;
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::pages::map::{FrameRef, PackId};
use crate::repository::pages::pack::PackBuilder;
use crate::repository::pages::relocation::Relocation;
use crate::repository::regions::fan_out::FanOut;

/// A pack with a smaller share of live bytes is left.
pub(in crate::repository) const LIVE_PERCENT: u64 = 50;
/// Bytes that one backup moves: as many as this, or this share of all that the parent refers to. The emptiest packs go
/// first, the others with the next backups.
const LEAST_MOVED: u64 = 256 * 1024 * 1024;
const SHARE_MOVED: u64 = 16;

/// What a backup moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Packs that it does not refer to any more.
    pub packs: u64,
    /// Bytes of frames that it took along.
    pub bytes: u64,
}

/// What was done before the first page is read.
#[derive(Debug, Default)]
pub(in crate::repository) struct Repacked {
    pub(in crate::repository) moved: Moved,
    /// The packs that were written, numbered from 0.
    pub(in crate::repository) lines: Vec<InventoryLine>,
}

/// The frames and chunks that the packs to be left hold.
#[derive(Debug, Default)]
struct Found {
    /// Pack → offset → frame.
    frames: BTreeMap<PackId, BTreeMap<u32, FrameRef>>,
    /// Chunks that lie in such packs or name frames there.
    chunks: Vec<(u32, PackId)>,
}

/// Moves what lives in the emptiest packs of `parent`, and tells it. A pack that no region holds intact is left as it is:
/// the backup goes on, as it would have without this.
///
/// # Errors
/// A new pack did not reach the quorum.
pub(in crate::repository) async fn repack(
    repository: &Repository,
    out: &FanOut,
    (target, id): (&TargetName, &BackupId),
    (parent, pack_size): (&Arc<KnownPages>, usize),
) -> Result<Repacked> {
    let thin = thin(parent, target);
    if thin.is_empty() {
        return Ok(Repacked::default());
    }
    let found = {
        let (parent, packs) = (Arc::clone(parent), thin.keys().cloned().collect());
        let search = tokio::task::spawn_blocking(move || search(&parent, &packs));
        search.await.map_err(|error| Error::failed("read the page map").because(error))??
    };
    let mut copy = Copy::new(out, (target, id), pack_size);
    let (mut frames, mut left) = (HashMap::new(), HashSet::new());
    for (pack, line) in thin {
        let read = repository.regions.read_exact(&line.key, line.size, line.digest()).await;
        let bytes = match read {
            Ok((bytes, _)) => bytes,
            Err(error) => {
                tracing::warn!(%error, "a pack that is mostly dead is not repacked");
                continue;
            }
        };
        for frame in found.frames.get(&pack).into_iter().flat_map(BTreeMap::values) {
            let place = copy.frame((&pack, frame.offset, frame.length), &bytes).await?;
            frames.insert((pack.clone(), frame.offset), place);
        }
        copy.repacked.moved.packs += 1;
        left.insert(pack);
    }
    let chunks = found.chunks.into_iter().filter(|(_, pack)| left.contains(pack)).map(|(chunk, _)| chunk).collect();
    let repacked = copy.end().await?;
    parent.relocate(Relocation::new(frames, chunks));
    Ok(repacked)
}

/// The packs to be left, and their objects.
fn thin(parent: &KnownPages, target: &TargetName) -> BTreeMap<PackId, InventoryLine> {
    let objects: HashMap<&str, &InventoryLine> =
        parent.objects().iter().map(|line| (line.key.as_str(), line)).collect();
    let total: u64 = parent.live().values().sum();
    let line = |pack: &PackId| objects.get(layout::pack(target, &pack.backup, pack.ordinal).as_str()).copied();
    let thin = parent.live().iter().filter_map(|(pack, live)| Some((pack, *live, line(pack)?)));
    let mut thin: Vec<_> = thin.filter(|(_, live, line)| live * 100 < line.size * LIVE_PERCENT).collect();
    thin.sort_by_key(|(pack, live, line)| (live * 1000 / line.size.max(1), (*pack).clone()));
    let mut room = LEAST_MOVED.max(total / SHARE_MOVED);
    let fitting = thin.into_iter().take_while(|(_, live, _)| {
        room = room.saturating_sub(*live);
        room > 0
    });
    fitting.map(|(pack, _, line)| (pack.clone(), line.clone())).collect()
}

fn search(parent: &KnownPages, packs: &HashSet<PackId>) -> Result<Found> {
    let mut found = Found::default();
    for number in 0..parent.chunk_count() {
        let (chunk, map) = parent.chunk(number)?;
        if packs.contains(&chunk.pack) {
            found.chunks.push((number, chunk.pack));
        }
        for frame in map.frames.into_iter().filter(|frame| packs.contains(&frame.pack)) {
            found.chunks.push((number, frame.pack.clone()));
            found.frames.entry(frame.pack.clone()).or_default().insert(frame.offset, frame);
        }
    }
    Ok(found)
}

/// Fills packs with frames of others.
pub(in crate::repository) struct Copy<'a> {
    out: &'a FanOut,
    target: &'a TargetName,
    id: &'a BackupId,
    pack_size: usize,
    open: Option<PackBuilder>,
    repacked: Repacked,
}

impl<'a> Copy<'a> {
    /// Into packs of backup `id`, numbered from 0.
    pub(in crate::repository) fn new(
        out: &'a FanOut,
        (target, id): (&'a TargetName, &'a BackupId),
        pack_size: usize,
    ) -> Self {
        Self { out, target, id, pack_size, open: None, repacked: Repacked::default() }
    }

    /// Takes along the frame at an offset of a pack, whose bytes are at hand; answers its new place.
    pub(in crate::repository) async fn frame(
        &mut self,
        (from, offset, length): (&PackId, u32, u32),
        pack: &[u8],
    ) -> Result<(PackId, u32)> {
        let start = offset as usize;
        let sealed = pack.get(start..start.saturating_add(length as usize));
        let sealed = sealed.ok_or_else(|| Error::damaged(format!("pack {from} ends inside a frame at {offset}")))?;
        if self.open.as_ref().is_some_and(|open| !open.has_room(sealed.len())) {
            self.put().await?;
        }
        let ordinal = u32::try_from(self.repacked.lines.len()).unwrap_or(u32::MAX);
        let id = PackId { backup: self.id.clone(), ordinal };
        let open = self.open.get_or_insert_with(|| PackBuilder::new(id.clone(), self.pack_size));
        self.repacked.moved.bytes += sealed.len() as u64;
        Ok((id, open.copy(sealed)))
    }

    async fn put(&mut self) -> Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let pack = open.finish();
        let key = layout::pack(self.target, &pack.id.backup, pack.id.ordinal);
        self.repacked.lines.push(put_object(self.out, key, pack.bytes.into()).await?);
        Ok(())
    }

    /// Stores the last pack.
    pub(in crate::repository) async fn end(mut self) -> Result<Repacked> {
        self.put().await?;
        Ok(self.repacked)
    }
}
