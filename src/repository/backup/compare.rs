//! Which pages of a batch are those of the parent, and the map chunk that names old and new ones together.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use serde::Serialize;

use crate::codec::fingerprint::{Fingerprint, PageFingerprinter};
use crate::model::pages::{PAGE_SIZE, Piece};
use crate::model::{KeysetId, Lsn};
use crate::pg::page;
use crate::repository::backup::state::{KnownFile, KnownPages, KnownRun};
use crate::repository::pages::map::{FrameRef, MapChunk, PackId, PageEntry};

/// Pages compressed together. 64 KiB already reach 99 % of the ratio of 1 MiB; more would only make restore read more
/// than it needs.
pub const FRAME_PAGES: usize = 16;

/// Chunks of the parent at hand at the same time; neighbours mostly share one, and one may take 300 KiB.
const RECALLED: usize = 32;

/// What is seen of a page before it is stored.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    fingerprint: Fingerprint,
    zero: bool,
}

impl Look {
    /// Looks at a page.
    pub fn at(page: &[u8], fingerprints: &PageFingerprinter) -> Self {
        Self { fingerprint: fingerprints.of(page), zero: page.iter().all(|byte| *byte == 0) }
    }

    /// A page of zeros.
    pub const fn is_zero(&self) -> bool {
        self.zero
    }

    fn is(&self, entry: &PageEntry) -> bool {
        self.fingerprint == entry.fingerprint && self.zero == entry.place.is_none()
    }
}

/// What a backup did, and what of its parent it refers to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Pages read.
    pub read: u64,
    /// Those of them that the parent does not have at their place.
    pub changed: u64,
    /// Pages that were not read.
    pub unread: u64,
    /// Pages that differ although change detection says that they do not.
    pub missed: Missed,
    /// Packs that hold pages or chunks of this backup and were written for an earlier one.
    pub packs: BTreeSet<PackId>,
    /// The keysets that open what is in them.
    pub keysets: BTreeSet<KeysetId>,
}

impl Tally {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        let Self { read, changed, unread, missed, mut packs, mut keysets } = other;
        self.read += read;
        self.changed += changed;
        self.unread += unread;
        self.missed.add(missed);
        self.packs.append(&mut packs);
        self.keysets.append(&mut keysets);
    }

    /// A chunk of the parent is used as it is, with the frames that these entries of it name.
    pub fn refer_to_chunk(&mut self, chunk: &FrameRef, map: &MapChunk, entries: Range<usize>) {
        self.refer_to(chunk);
        let places = map.entries.get(entries).unwrap_or_default().iter().filter_map(|entry| entry.place);
        let frames: BTreeSet<_> = places.map(|(frame, _)| usize::from(frame)).collect();
        frames.into_iter().filter_map(|frame| map.frames.get(frame)).for_each(|frame| self.refer_to(frame));
    }

    fn refer_to(&mut self, frame: &FrameRef) {
        if !self.packs.contains(&frame.pack) {
            self.packs.insert(frame.pack.clone());
        }
        if !self.keysets.contains(&frame.keyset) {
            self.keysets.insert(frame.keyset.clone());
        }
    }
}

/// What change detection did not see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Missed {
    /// Pages that it should have seen.
    pub pages: u64,
    /// The first of them.
    pub examples: Vec<String>,
    /// Pages that differ in hints alone, as far as their positions tell: hint bits, where pages have no checksums, and what
    /// an SP-GiST index notes in its first page. No WAL says so, a standby does not have them either, and whoever uses the
    /// page sets them again.
    pub hints: u64,
}

impl Missed {
    /// Examples that are told.
    const TOLD: usize = 20;

    fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.hints += other.hints;
        self.examples.extend(other.examples);
        self.examples.truncate(Self::TOLD);
    }
}

/// The stretch of WAL that change detection speaks for, and what a difference that it did not see means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The start of the parent.
    pub from: Lsn,
    /// The start of this backup: what is newer replay brings back.
    pub to: Lsn,
    /// Whether a change of hint bits is in WAL: so it is with checksums.
    pub logged: bool,
}

impl Proof {
    /// A page that differs although it was said not to.
    pub fn judge(&self, look: &Look, page: &[u8], missed: &mut Missed, name: impl FnOnce() -> String) {
        let lsn = page.first_chunk::<PAGE_SIZE>().map_or(Lsn::INVALID, page::lsn);
        if lsn >= self.to {
            return;
        }
        let hint = !self.logged || is_spgist_metapage(page);
        if lsn < self.from && hint && !look.zero {
            missed.hints += 1;
            return;
        }
        missed.pages += 1;
        if missed.examples.len() < Missed::TOLD {
            missed.examples.push(format!("{} ({lsn})", name()));
        }
    }
}

/// The first page of an SP-GiST index remembers which pages had room last. That is written without WAL, even with
/// checksums, because losing it costs nothing.
fn is_spgist_metapage(page: &[u8]) -> bool {
    const META: u8 = 1;
    const PAGE_ID: [u8; 2] = 0xFF82_u16.to_le_bytes();
    // `SpGistPageOpaqueData`: flags (u16), two counts, the id of the access method.
    page.last_chunk::<8>().is_some_and(|special| special[0] & META != 0 && special[6..] == PAGE_ID)
}

/// The parent's map chunks that one batch needs.
#[derive(Debug)]
pub struct Recall<'a> {
    parent: Option<&'a KnownPages>,
    chunks: HashMap<u32, Option<(FrameRef, MapChunk)>>,
}

impl<'a> Recall<'a> {
    /// Nothing is read yet.
    pub fn new(parent: Option<&'a KnownPages>) -> Self {
        Self { parent, chunks: HashMap::new() }
    }

    /// A chunk; `None` if it is not readable any more: what it describes is then stored anew.
    pub fn chunk(&mut self, number: u32) -> Option<&(FrameRef, MapChunk)> {
        let parent = self.parent?;
        if self.chunks.len() >= RECALLED && !self.chunks.contains_key(&number) {
            self.chunks.clear();
        }
        let read = || {
            let read = parent.chunk(number);
            read.inspect_err(|error| tracing::warn!(%error, "pages are stored anew")).ok()
        };
        self.chunks.entry(number).or_insert_with(read).as_ref()
    }

    /// The part of one run of the parent that describes the whole piece, if no page of it changed.
    pub fn unchanged(&mut self, known: &KnownFile, piece: &Piece, looks: &[Look]) -> Option<KnownRun> {
        let run = known.run_of(piece.first_page)?;
        if self.parent?.renews(run.chunk) {
            return None;
        }
        let skipped = u16::try_from(piece.first_page - run.first_page).ok()?;
        let pages = u16::try_from(piece.pages).ok()?;
        let first_entry = run.first_entry.checked_add(skipped)?;
        let part = KnownRun { first_page: piece.first_page, pages, chunk: run.chunk, first_entry };
        if u32::from(skipped) + piece.pages > u32::from(run.pages) {
            return None;
        }
        let (_, map) = self.chunk(run.chunk)?;
        let entries = map.entries.get(part.entries())?;
        let same = entries.len() == looks.len() && entries.iter().zip(looks).all(|(entry, look)| look.is(entry));
        same.then_some(part)
    }

    /// How a page looked to the parent.
    pub fn remembered(&mut self, known: &KnownFile, page: u32) -> Option<Look> {
        let run = known.run_of(page)?;
        let (_, map) = self.chunk(run.chunk)?;
        let entry = map.entries.get(usize::from(run.first_entry) + (page - run.first_page) as usize)?;
        Some(Look { fingerprint: entry.fingerprint, zero: entry.place.is_none() })
    }

    /// Where the parent has a page, if it did not change. `Some(None)` is a page of zeros.
    pub fn same(&mut self, known: &KnownFile, page: u32, look: &Look) -> Option<Option<(FrameRef, u8)>> {
        let run = known.run_of(page)?;
        let (_, map) = self.chunk(run.chunk)?;
        let entry = map.entries.get(usize::from(run.first_entry) + (page - run.first_page) as usize)?;
        if !look.is(entry) {
            return None;
        }
        let Some((frame, slot)) = entry.place else { return Some(None) };
        Some(Some((map.frames.get(usize::from(frame))?.clone(), slot)))
    }
}

/// Fills one map chunk. New pages wait until a frame of them is full.
#[derive(Debug, Default)]
pub struct ChunkBuilder {
    chunk: MapChunk,
    shared: HashMap<FrameRef, u16>,
    plain: Vec<u8>,
    /// Entries of the pages in `plain`.
    waiting: Vec<usize>,
}

impl ChunkBuilder {
    /// Entries so far.
    pub fn entries(&self) -> u16 {
        count(self.chunk.entries.len())
    }

    /// Adds a page where the parent has it.
    pub fn share(&mut self, place: Option<(FrameRef, u8)>, look: &Look, tally: &mut Tally) {
        let place = place.map(|(frame, slot)| {
            tally.refer_to(&frame);
            let next = count(self.chunk.frames.len());
            let number = *self.shared.entry(frame.clone()).or_insert(next);
            if number == next {
                self.chunk.frames.push(frame);
            }
            (number, slot)
        });
        self.chunk.entries.push(PageEntry { place, fingerprint: look.fingerprint });
    }

    /// Adds a page that is to be stored; one of zeros is not.
    pub fn store(&mut self, page: &[u8], look: &Look) {
        if !look.zero {
            self.waiting.push(self.chunk.entries.len());
            self.plain.extend_from_slice(page);
        }
        self.chunk.entries.push(PageEntry { place: None, fingerprint: look.fingerprint });
    }

    /// Whether a frame is full.
    pub fn is_full(&self) -> bool {
        self.plain.len() >= FRAME_PAGES * PAGE_SIZE
    }

    /// The pages that wait for a frame.
    pub fn waiting(&self) -> &[u8] {
        &self.plain
    }

    /// The waiting pages are in `frame` now.
    pub fn stored(&mut self, frame: FrameRef) {
        let number = count(self.chunk.frames.len());
        self.chunk.frames.push(frame);
        for (slot, entry) in (0..).zip(self.waiting.drain(..)) {
            self.chunk.entries[entry].place = Some((number, slot));
        }
        self.plain.clear();
    }

    /// The chunk; nothing may wait any more.
    pub fn finish(self) -> MapChunk {
        self.chunk
    }
}

/// A batch has at most 1,024 pages, and each brings one frame at most.
fn count(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}
