//! What the backups that may be written anew refer to, told by their maps: every frame and every chunk once, by its place.
//!
//! A file may use a part of a chunk: what the other entries name need not even exist any more. So frames are told by uses, and
//! not by chunks. It is kept for all backups together, some 20 bytes a frame and 100 a use; names are numbered.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::model::{BackupId, Error, KeysetId, Result};
use crate::repository::compact::chunks::{self, AT_ONCE, Entries, Place, place, used};
use crate::repository::compact::numbers::Numbers;
use crate::repository::compact::{Hands, Original};
use crate::repository::pages::manifest::Line;
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::restore::ManifestParts;

/// A chunk: the number of its pack, and its offset there.
type ChunkAt = (u32, u32);
/// Chunks that are to be looked at, and the entries of each.
type Wanted = BTreeMap<ChunkAt, (FrameRef, BTreeSet<Entries>)>;

/// What is referred to.
#[derive(Debug, Default)]
pub(super) struct Live {
    packs: Numbers<PackId>,
    keysets: Numbers<KeysetId>,
    /// Of each pack: offset and length of the frames of pages in it.
    frames: HashMap<u32, BTreeMap<u32, u32>>,
    chunks: HashMap<ChunkAt, Chunk>,
    uses: HashMap<(ChunkAt, Entries), Named>,
    /// The chunks of each backup.
    of: BTreeMap<BackupId, BTreeSet<ChunkAt>>,
}

/// A map chunk.
#[derive(Debug, Default)]
struct Chunk {
    length: u32,
    /// The packs that hold what any use of it names.
    packs: BTreeSet<u32>,
}

/// What a use of a chunk names.
#[derive(Debug, Default)]
struct Named {
    packs: BTreeSet<u32>,
    keysets: BTreeSet<u32>,
}

impl Live {
    /// Reads the maps of a backup, as far as their uses are new here.
    pub(super) async fn add(&mut self, hands: Hands<'_>, original: &Original) -> Result<()> {
        let (commit, inventory) = (&original.commit, &original.inventory);
        let mut parts = ManifestParts::new(hands.repository, hands.ring, commit, inventory).await?;
        let (mut begin, mut all, mut wanted) = (None, BTreeSet::new(), Wanted::new());
        while let Some(lines) = parts.next().await? {
            for line in lines {
                match line {
                    Line::Begin(first) => begin = Some(first),
                    Line::File(file) => {
                        let begin = begin.as_ref().ok_or_else(|| Error::damaged("a manifest has no beginning"))?;
                        for chunk in &file.chunks {
                            let (frame, entries) = (chunk.frame(begin)?, chunk.entries());
                            let at = (self.packs.of(&frame.pack), frame.offset);
                            all.insert(at);
                            if !self.uses.contains_key(&(at, entries)) {
                                wanted.entry(at).or_insert_with(|| (frame, BTreeSet::new())).1.insert(entries);
                            }
                        }
                    }
                    _ => {}
                }
                if wanted.len() >= AT_ONCE {
                    self.look(hands, std::mem::take(&mut wanted)).await?;
                }
            }
        }
        self.look(hands, wanted).await?;
        self.of.insert(commit.id.clone(), all);
        Ok(())
    }

    async fn look(&mut self, hands: Hands<'_>, wanted: Wanted) -> Result<()> {
        let frames = wanted.values().map(|(frame, _)| frame.clone()).collect();
        for (frame, chunk) in chunks::fetch(hands, frames).await? {
            let at = (self.packs.of(&frame.pack), frame.offset);
            for entries in wanted.get(&at).into_iter().flat_map(|(_, uses)| uses) {
                self.learn((at, &frame), &chunk, *entries)?;
            }
        }
        Ok(())
    }

    fn learn(&mut self, (at, frame): (ChunkAt, &FrameRef), chunk: &MapChunk, entries: Entries) -> Result<()> {
        let mut named = Named::default();
        for frame in used(chunk, entries)? {
            let pack = self.packs.of(&frame.pack);
            named.packs.insert(pack);
            named.keysets.insert(self.keysets.of(&frame.keyset));
            self.frames.entry(pack).or_default().insert(frame.offset, frame.length);
        }
        let known = self.chunks.entry(at).or_default();
        known.length = frame.length;
        known.packs.extend(&named.packs);
        self.uses.insert((at, entries), named);
        Ok(())
    }

    /// Bytes that are referred to, by the pack that holds them.
    pub(super) fn bytes(&self) -> BTreeMap<&PackId, u64> {
        let mut bytes: BTreeMap<&PackId, u64> = BTreeMap::new();
        let frames = self.frames.iter().flat_map(|(pack, of)| of.values().map(move |length| (*pack, *length)));
        let chunks = self.chunks.iter().map(|((pack, _), chunk)| (*pack, chunk.length));
        for (pack, length) in frames.chain(chunks) {
            if let Some(pack) = self.packs.name(pack) {
                *bytes.entry(pack).or_default() += u64::from(length);
            }
        }
        bytes
    }

    /// What of `left` moves: frames of pages, and chunks that need not be written anew.
    pub(super) fn moving(&self, left: &PackId, all: &BTreeSet<PackId>) -> Vec<(u32, u32)> {
        let Some(number) = self.packs.known(left) else { return Vec::new() };
        let frames = self.frames.get(&number).into_iter().flatten().map(|(offset, length)| (*offset, *length));
        let chunks = self.chunks.iter().filter(|((pack, _), chunk)| *pack == number && !self.names(chunk, all));
        let mut moving: Vec<_> = frames.chain(chunks.map(|((_, offset), chunk)| (*offset, chunk.length))).collect();
        moving.sort_unstable();
        moving
    }

    /// Bytes of the chunks of `backups` that are written anew when `left` are left.
    pub(super) fn renewed<'b>(&self, backups: impl Iterator<Item = &'b BackupId>, left: &BTreeSet<PackId>) -> u64 {
        let used: BTreeSet<_> = backups.filter_map(|id| self.of.get(id)).flatten().collect();
        let chunks = used.into_iter().filter_map(|at| self.chunks.get(at));
        chunks.filter(|chunk| self.names(chunk, left)).map(|chunk| u64::from(chunk.length)).sum()
    }

    /// Whether any use of a chunk names a frame in one of these packs.
    pub(super) fn must_renew(&self, (pack, offset): &Place, left: &BTreeSet<PackId>) -> bool {
        let chunk = self.packs.known(pack).and_then(|pack| self.chunks.get(&(pack, *offset)));
        chunk.is_some_and(|chunk| self.names(chunk, left))
    }

    /// The packs and keysets that a use of a chunk names.
    pub(super) fn named(&self, frame: &FrameRef, entries: Entries) -> Option<(Vec<&PackId>, Vec<&KeysetId>)> {
        let (pack, offset) = place(frame);
        let named = self.uses.get(&((self.packs.known(&pack)?, offset), entries))?;
        Some((self.packs.names(&named.packs).collect(), self.keysets.names(&named.keysets).collect()))
    }

    fn names(&self, chunk: &Chunk, packs: &BTreeSet<PackId>) -> bool {
        self.packs.names(&chunk.packs).any(|pack| packs.contains(pack))
    }
}
