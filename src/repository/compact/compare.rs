//! A copy is read back before it exists: every page must be named by the same frame, under the same birth, with the same
//! fingerprint, and every frame that was moved must open where it is now. A fault in the writing of copies ends here, and not
//! in a restore.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::codec::seal::Unit;
use crate::model::commit::Commit;
use crate::model::{BackupId, Error, KeysetId, Result};
use crate::repository::compact::chunks::{self, AT_ONCE, Entries, Place, place};
use crate::repository::compact::{Hands, Original, Survey};
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::pages::manifest::{Begin, FileLine, Line};
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::restore::{Flight, ManifestParts, Memory, fetch_frames};

/// What earlier copies of a run have shown already.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Frames that open where they were moved to.
    opened: BTreeSet<Place>,
}

/// A chunk of the original, that of the copy, and the parts of it that are used.
type ChunkPair = (FrameRef, FrameRef, BTreeSet<Entries>);

/// A pair of manifests that is compared.
struct Pair<'a> {
    hands: Hands<'a>,
    survey: &'a Survey,
    copy: &'a BackupId,
    /// The packs that the copy's inventory lists.
    packs: BTreeSet<&'a str>,
    /// The keysets whose wraps it lists.
    keysets: BTreeSet<KeysetId>,
    begins: Option<(Begin, Begin)>,
    /// Chunks that are still to be compared.
    chunks: BTreeMap<Place, ChunkPair>,
}

impl Comparison {
    /// Compares a copy, whose objects are stored and whose COMMIT is not, with its original.
    ///
    /// # Errors
    /// They differ, or something of either cannot be read.
    pub(super) async fn compare(
        &mut self,
        (hands, survey): (Hands<'_>, &Survey),
        original: &Original,
        (commit, inventory): (&Commit, &[InventoryLine]),
    ) -> Result<()> {
        let mut one = Lines::of(hands, &original.commit, &original.inventory).await?;
        let mut other = Lines::of(hands, commit, inventory).await?;
        let packs = inventory.iter().map(|line| line.key.as_str()).collect();
        let wraps = inventory.iter().filter_map(|line| layout::parse_wrap(&line.key));
        let keysets = wraps.map(|(_, keyset, _)| keyset).collect();
        let mut pair = Pair { hands, survey, copy: &commit.id, packs, keysets, begins: None, chunks: BTreeMap::new() };
        pair.opens(&commit.keyset)?;
        loop {
            match (one.next().await?, other.next().await?) {
                (None, None) => break,
                (Some(one), Some(other)) => pair.lines((one, other))?,
                _ => return Err(pair.differ("a line is missing")),
            }
            if pair.chunks.len() >= AT_ONCE / 2 {
                self.chunks(&mut pair).await?;
            }
        }
        self.chunks(&mut pair).await
    }

    async fn chunks(&mut self, pair: &mut Pair<'_>) -> Result<()> {
        let waiting: Vec<_> = std::mem::take(&mut pair.chunks).into_values().collect();
        let (ones, others) = waiting.iter().map(|(one, other, _)| (one.clone(), other.clone())).unzip();
        let mut one = pair.fetch(ones).await?;
        let mut other = pair.fetch(others).await?;
        let mut moved = BTreeMap::new();
        for (was, now, uses) in &waiting {
            let (Some(one), Some(other)) = (one.remove(&place(was)), other.remove(&place(now))) else {
                return Err(pair.differ("a map chunk is named twice"));
            };
            pair.maps((&one, &other), uses)?;
            let new = one.frames.iter().zip(&other.frames).filter(|(one, other)| place(one) != place(other));
            moved.extend(new.map(|(_, frame)| (place(frame), frame.clone())));
        }
        moved.retain(|at, _| !self.opened.contains(at));
        self.opened.extend(moved.keys().cloned());
        pair.open(moved.into_values().collect()).await
    }
}

impl Pair<'_> {
    fn differ(&self, what: impl std::fmt::Display) -> Error {
        Error::damaged(format!("copy {} is not what its original is: {what}", self.copy))
    }

    fn lines(&mut self, lines: (Line, Line)) -> Result<()> {
        match lines {
            (Line::Begin(one), Line::Begin(other)) => {
                let said = |begin: &Begin| {
                    let Begin { format, page_size, fingerprint_secret, page_checksums, .. } = begin.clone();
                    (format, page_size, fingerprint_secret, page_checksums)
                };
                if said(&one) != said(&other) {
                    return Err(self.differ("how it begins"));
                }
                self.begins = Some((one, other));
                Ok(())
            }
            (Line::File(one), Line::File(other)) => self.files(&one, &other),
            (one, other) if one == other => Ok(()),
            (one, _) => Err(self.differ(format!("{one:?}"))),
        }
    }

    fn files(&mut self, one: &FileLine, other: &FileLine) -> Result<()> {
        let bare = |file: &FileLine| FileLine { chunks: Vec::new(), ..file.clone() };
        let uses = |file: &FileLine| file.chunks.iter().map(|chunk| chunk.entries()).collect::<Vec<_>>();
        if bare(one) != bare(other) || uses(one) != uses(other) {
            return Err(self.differ(&one.path));
        }
        let Some((begin, begin_copy)) = &self.begins else { return Err(self.differ("it does not begin")) };
        let frames = one.chunks.iter().zip(&other.chunks);
        let frames = frames.map(|(one, other)| Ok((one.frame(begin)?, other.frame(begin_copy)?, one.entries())));
        for (was, now, entries) in frames.collect::<Result<Vec<_>>>()? {
            self.lists(&now.pack)?;
            self.opens(&now.keyset)?;
            if was == now {
                let named = self.survey.live.named(&was, entries);
                let (packs, keysets) = named.ok_or_else(|| self.differ("a chunk is not known"))?;
                packs.into_iter().try_for_each(|pack| self.lists(pack))?;
                keysets.into_iter().try_for_each(|keyset| self.opens(keyset))?;
                continue;
            }
            let waiting = self.chunks.entry(place(&was)).or_insert_with(|| (was, now.clone(), BTreeSet::new()));
            waiting.2.insert(entries);
            if waiting.1 != now {
                return Err(self.differ("a map chunk is in two places"));
            }
        }
        Ok(())
    }

    fn lists(&self, pack: &PackId) -> Result<()> {
        let key = layout::pack(&self.survey.target, &pack.backup, pack.ordinal);
        if self.packs.contains(key.as_str()) {
            return Ok(());
        }
        Err(self.differ(format!("its inventory does not list {key}")))
    }

    /// What it does not list goes with the original.
    fn opens(&self, keyset: &KeysetId) -> Result<()> {
        match self.keysets.contains(keyset) {
            true => Ok(()),
            false => Err(self.differ(format!("its inventory lists no wrap of keyset {keyset}"))),
        }
    }

    fn maps(&self, (one, other): (&MapChunk, &MapChunk), uses: &BTreeSet<Entries>) -> Result<()> {
        let frames = one.frames.len() == other.frames.len()
            && one.frames.iter().zip(&other.frames).all(|(one, other)| is_verbatim(one, other));
        if !frames || one.entries != other.entries {
            return Err(self.differ("a map chunk says something else"));
        }
        uses.iter().try_for_each(|entries| {
            let frames = chunks::used(other, *entries)?;
            frames.into_iter().try_for_each(|frame| self.lists(&frame.pack).and_then(|()| self.opens(&frame.keyset)))
        })
    }

    async fn fetch(&self, frames: Vec<FrameRef>) -> Result<HashMap<Place, MapChunk>> {
        let chunks = chunks::fetch(self.hands, frames).await?;
        Ok(chunks.into_iter().map(|(frame, chunk)| (place(&frame), chunk)).collect())
    }

    /// Opens frames of pages. Whoever holds `meta` alone cannot; that every byte came out of a pack with the right digest is
    /// then all that is known.
    async fn open(&self, frames: Vec<FrameRef>) -> Result<()> {
        let mut openable = Vec::new();
        for frame in frames {
            let keyset = self.hands.ring.open(&self.survey.target, &frame.keyset).await?;
            openable.extend(keyset.data().is_some().then_some((frame, ())));
        }
        let Hands { repository, ring, .. } = self.hands;
        let flight = Flight { repository, ring, unit: Unit::Frame, memory: Memory::default() };
        fetch_frames(flight, openable, |_| Ok(())).await.map(drop)
    }
}

/// Whether both are one frame, wherever it is: the seal proves that its contents are those of its birth.
fn is_verbatim(one: &FrameRef, other: &FrameRef) -> bool {
    (&one.id, &one.keyset, one.length) == (&other.id, &other.keyset, other.length)
}

/// The lines of a manifest, one by one.
struct Lines<'a> {
    parts: ManifestParts<'a>,
    waiting: VecDeque<Line>,
}

impl<'a> Lines<'a> {
    async fn of(hands: Hands<'a>, commit: &'a Commit, inventory: &'a [InventoryLine]) -> Result<Self> {
        let parts = ManifestParts::new(hands.repository, hands.ring, commit, inventory).await?;
        Ok(Self { parts, waiting: VecDeque::new() })
    }

    async fn next(&mut self) -> Result<Option<Line>> {
        while self.waiting.is_empty() {
            match self.parts.next().await? {
                Some(lines) => self.waiting.extend(lines),
                None => return Ok(None),
            }
        }
        Ok(self.waiting.pop_front())
    }
}
