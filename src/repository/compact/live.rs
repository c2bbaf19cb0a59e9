//! What the backups that may be written anew refer to, told by their maps: every frame and every chunk once, by its place.
//!
//! It is kept for all of them together, some 20 bytes a frame and 50 a chunk; names are numbered.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use crate::model::{BackupId, Error, KeysetId, Result};
use crate::repository::compact::chunks::{self, AT_ONCE, Place, place};
use crate::repository::compact::{Hands, Original};
use crate::repository::manifest::Line;
use crate::repository::page_map::{FrameRef, MapChunk, PackId};
use crate::repository::restore::ManifestParts;

/// What is referred to.
#[derive(Debug, Default)]
pub(super) struct Live {
    packs: Numbers<PackId>,
    keysets: Numbers<KeysetId>,
    /// Of each pack: offset and length of the frames of pages in it.
    frames: HashMap<u32, BTreeMap<u32, u32>>,
    chunks: HashMap<(u32, u32), Chunk>,
    uses: BTreeMap<BackupId, BTreeSet<(u32, u32)>>,
}

/// A map chunk.
#[derive(Debug)]
struct Chunk {
    length: u32,
    /// The packs that hold the frames which it names.
    packs: Vec<u32>,
    /// The keysets that open those.
    keysets: Vec<u32>,
}

/// Names and their numbers.
#[derive(Debug)]
struct Numbers<T> {
    list: Vec<T>,
    numbers: HashMap<T, u32>,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { list: Vec::new(), numbers: HashMap::new() }
    }
}

impl<T: Clone + Eq + Hash> Numbers<T> {
    fn of(&mut self, name: &T) -> u32 {
        if let Some(known) = self.numbers.get(name) {
            return *known;
        }
        let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        self.list.push(name.clone());
        self.numbers.insert(name.clone(), number);
        number
    }

    fn known(&self, name: &T) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    fn names<'a>(&'a self, numbers: &'a [u32]) -> impl Iterator<Item = &'a T> {
        numbers.iter().filter_map(|number| self.list.get(*number as usize))
    }
}

impl Live {
    /// Reads the maps of a backup, those of their chunks that are new here.
    pub(super) async fn add(&mut self, hands: Hands<'_>, original: &Original) -> Result<()> {
        let (commit, inventory) = (&original.commit, &original.inventory);
        let mut parts = ManifestParts::new(hands.repository, hands.ring, commit, inventory).await?;
        let (mut begin, mut uses, mut wanted) = (None, BTreeSet::new(), BTreeMap::new());
        while let Some(lines) = parts.next().await? {
            for line in lines {
                match line {
                    Line::Begin(first) => begin = Some(first),
                    Line::File(file) => {
                        let begin = begin.as_ref().ok_or_else(|| Error::damaged("a manifest has no beginning"))?;
                        for chunk in &file.chunks {
                            let frame = chunk.frame(begin)?;
                            let number = (self.packs.of(&frame.pack), frame.offset);
                            uses.insert(number);
                            if !self.chunks.contains_key(&number) {
                                wanted.insert(number, frame);
                            }
                        }
                    }
                    _ => {}
                }
                if wanted.len() >= AT_ONCE {
                    self.look(hands, &mut wanted).await?;
                }
            }
        }
        self.look(hands, &mut wanted).await?;
        self.uses.insert(commit.id.clone(), uses);
        Ok(())
    }

    async fn look(&mut self, hands: Hands<'_>, wanted: &mut BTreeMap<(u32, u32), FrameRef>) -> Result<()> {
        for (frame, chunk) in chunks::fetch(hands, std::mem::take(wanted).into_values().collect()).await? {
            self.learn(&frame, &chunk);
        }
        Ok(())
    }

    fn learn(&mut self, frame: &FrameRef, chunk: &MapChunk) {
        let (mut packs, mut keysets) = (BTreeSet::new(), BTreeSet::new());
        for named in &chunk.frames {
            let pack = self.packs.of(&named.pack);
            packs.insert(pack);
            keysets.insert(self.keysets.of(&named.keyset));
            self.frames.entry(pack).or_default().insert(named.offset, named.length);
        }
        let (packs, keysets) = (packs.into_iter().collect(), keysets.into_iter().collect());
        let place = (self.packs.of(&frame.pack), frame.offset);
        self.chunks.insert(place, Chunk { length: frame.length, packs, keysets });
    }

    /// Bytes that are referred to, by the pack that holds them.
    pub(super) fn bytes(&self) -> BTreeMap<&PackId, u64> {
        let mut bytes: BTreeMap<&PackId, u64> = BTreeMap::new();
        let frames = self.frames.iter().flat_map(|(pack, of)| of.values().map(move |length| (*pack, *length)));
        let chunks = self.chunks.iter().map(|((pack, _), chunk)| (*pack, chunk.length));
        for (pack, length) in frames.chain(chunks) {
            if let Some(pack) = self.packs.list.get(pack as usize) {
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
        let used: BTreeSet<_> = backups.filter_map(|id| self.uses.get(id)).flatten().collect();
        let chunks = used.into_iter().filter_map(|number| self.chunks.get(number));
        chunks.filter(|chunk| self.names(chunk, left)).map(|chunk| u64::from(chunk.length)).sum()
    }

    /// Whether a chunk that is known names a frame in one of these packs.
    pub(super) fn must_renew(&self, at: &Place, left: &BTreeSet<PackId>) -> bool {
        self.chunk(at).is_some_and(|chunk| self.names(chunk, left))
    }

    /// The packs and keysets that a chunk names.
    pub(super) fn named(&self, frame: &FrameRef) -> Option<(Vec<&PackId>, Vec<&KeysetId>)> {
        let chunk = self.chunk(&place(frame))?;
        Some((self.packs.names(&chunk.packs).collect(), self.keysets.names(&chunk.keysets).collect()))
    }

    fn chunk(&self, (pack, offset): &Place) -> Option<&Chunk> {
        self.chunks.get(&(self.packs.known(pack)?, *offset))
    }

    fn names(&self, chunk: &Chunk, packs: &BTreeSet<PackId>) -> bool {
        self.packs.names(&chunk.packs).any(|pack| packs.contains(pack))
    }
}
