//! Page maps: where each page of a file is kept.
//!
//! A map is cut into chunks of up to 1,024 pages, each a sealed frame of its own, so that an incremental backup writes
//! only the chunks that it touched. A frame is named by its birth (the pack and the place in it for which it was sealed)
//! and carries its present location beside that: frames are moved between packs without being opened.

use std::collections::HashMap;

use crate::model::{BackupId, Error, KeysetId, Result};

/// An object of many frames: the backup that wrote it and its number there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId {
    /// The backup that wrote it.
    pub backup: BackupId,
    /// Its number in that backup.
    pub ordinal: u32,
}

impl std::fmt::Display for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{:06}", self.backup, self.ordinal)
    }
}

/// A frame's birth; part of what its seal authenticates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FrameId {
    /// The pack for which it was sealed.
    pub pack: PackId,
    /// Its number in that pack.
    pub ordinal: u32,
}

impl std::fmt::Display for FrameId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}#{}", self.pack, self.ordinal)
    }
}

/// A frame and where it is now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FrameRef {
    /// Its birth.
    pub id: FrameId,
    /// The keyset of the backup that it was born in.
    pub keyset: KeysetId,
    /// The pack that holds it now.
    pub pack: PackId,
    /// Its first byte there.
    pub offset: u32,
    /// Its sealed bytes.
    pub length: u32,
}

/// Where one page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    /// Index into [`MapChunk::frames`] and the page's slot in that frame; `None` for a page of zeros, which is stored
    /// nowhere.
    pub place: Option<(u16, u8)>,
    /// Keyed hash of the page, for change detection only: the seal proves contents.
    pub fingerprint: [u8; 16],
}

/// Up to 1,024 pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapChunk {
    /// The frames that the entries name.
    pub frames: Vec<FrameRef>,
    /// One per page.
    pub entries: Vec<PageEntry>,
}

const MAGIC: &[u8; 4] = b"DM1\n";
const ZERO_PAGE: u16 = u16::MAX;
/// More would make the count collide with [`ZERO_PAGE`]; a chunk has 1,024 pages.
const MAX_ENTRIES: usize = crate::model::pages::BATCH_PAGES;

impl MapChunk {
    /// The bytes of a chunk, column by column, because columns compress better than rows.
    pub fn encode(&self) -> Vec<u8> {
        let mut sources = Sources::default();
        let births: Vec<_> =
            self.frames.iter().map(|frame| sources.index(&frame.id.pack.backup, &frame.keyset)).collect();
        // A pack's own keyset is not needed to find it, so a location borrows the keyset of the frame.
        let places: Vec<_> = self.frames.iter().map(|frame| sources.index(&frame.pack.backup, &frame.keyset)).collect();
        let mut out = Vec::with_capacity(64 + self.frames.len() * 24 + self.entries.len() * 19);
        out.extend_from_slice(MAGIC);
        sources.encode(&mut out);
        put_u16(&mut out, self.frames.len());
        births.iter().for_each(|source| put_u16(&mut out, *source));
        places.iter().for_each(|source| put_u16(&mut out, *source));
        let mut column = |value: fn(&FrameRef) -> u32| {
            self.frames.iter().for_each(|frame| out.extend_from_slice(&value(frame).to_le_bytes()));
        };
        column(|frame| frame.id.pack.ordinal);
        column(|frame| frame.id.ordinal);
        column(|frame| frame.pack.ordinal);
        column(|frame| frame.offset);
        column(|frame| frame.length);
        put_u16(&mut out, self.entries.len());
        for entry in &self.entries {
            out.extend_from_slice(&entry.place.map_or(ZERO_PAGE, |(frame, _)| frame).to_le_bytes());
        }
        out.extend(self.entries.iter().map(|entry| entry.place.map_or(0, |(_, slot)| slot)));
        self.entries.iter().for_each(|entry| out.extend_from_slice(&entry.fingerprint));
        out
    }

    /// Reads the bytes of a chunk; exactly what [`encode`](Self::encode) writes is accepted.
    ///
    /// # Errors
    /// Anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let wrong = || Error::damaged("a page map is not readable");
        let chunk = Self::parse(bytes).ok_or_else(wrong)?;
        // One chunk has one spelling; whatever reads back differently was not written by drctl.
        if chunk.encode() == bytes { Ok(chunk) } else { Err(wrong()) }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes.strip_prefix(MAGIC)?);
        let sources = Sources::parse(&mut input)?;
        let frames = input.u16()?;
        let column = |input: &mut Input<'_>| (0..frames).map(|_| input.u16()).collect::<Option<Vec<_>>>();
        let (births, places) = (column(&mut input)?, column(&mut input)?);
        let column = |input: &mut Input<'_>| (0..frames).map(|_| input.u32()).collect::<Option<Vec<_>>>();
        let (packs, ordinals) = (column(&mut input)?, column(&mut input)?);
        let (places_in, offsets, lengths) = (column(&mut input)?, column(&mut input)?, column(&mut input)?);
        let frames = (0..usize::from(frames)).map(|at| {
            let (born, keyset) = sources.get(births[at])?;
            let (now, _) = sources.get(places[at])?;
            let id = FrameId { pack: PackId { backup: born.clone(), ordinal: packs[at] }, ordinal: ordinals[at] };
            let pack = PackId { backup: now.clone(), ordinal: places_in[at] };
            Some(FrameRef { id, keyset: keyset.clone(), pack, offset: offsets[at], length: lengths[at] })
        });
        let frames = frames.collect::<Option<Vec<_>>>()?;
        let count = usize::from(input.u16()?);
        let places = (0..count).map(|_| input.u16()).collect::<Option<Vec<_>>>()?;
        let slots = input.take(count)?;
        let fingerprints = input.take(count.checked_mul(16)?)?;
        let known = |place: &u16| *place == ZERO_PAGE || usize::from(*place) < frames.len();
        if count > MAX_ENTRIES || !input.0.is_empty() || !places.iter().all(known) {
            return None;
        }
        let entries = places.iter().zip(slots).zip(fingerprints.chunks_exact(16)).map(|((place, slot), print)| {
            let place = (*place != ZERO_PAGE).then_some((*place, *slot));
            Some(PageEntry { place, fingerprint: print.try_into().ok()? })
        });
        Some(Self { entries: entries.collect::<Option<_>>()?, frames })
    }
}

/// The backups that a chunk's frames come from, each named once.
#[derive(Default)]
struct Sources {
    list: Vec<(BackupId, KeysetId)>,
    index: HashMap<(BackupId, KeysetId), usize>,
}

impl Sources {
    fn index(&mut self, backup: &BackupId, keyset: &KeysetId) -> usize {
        let next = self.list.len();
        let entry = (backup.clone(), keyset.clone());
        let index = *self.index.entry(entry.clone()).or_insert(next);
        if index == next {
            self.list.push(entry);
        }
        index
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_u16(out, self.list.len());
        for (backup, keyset) in &self.list {
            for text in [backup.as_str(), keyset.as_str()] {
                put_u16(out, text.len());
                out.extend_from_slice(text.as_bytes());
            }
        }
    }

    fn parse(input: &mut Input<'_>) -> Option<Self> {
        let mut sources = Self::default();
        for _ in 0..input.u16()? {
            let (backup, keyset) = (input.text()?.parse().ok()?, input.text()?.parse().ok()?);
            sources.list.push((backup, keyset));
        }
        Some(sources)
    }

    fn get(&self, index: u16) -> Option<&(BackupId, KeysetId)> {
        self.list.get(usize::from(index))
    }
}

/// Counts here are bounded by [`MAX_ENTRIES`]; a larger one would be a bug, and the clamp then fails decoding loudly.
fn put_u16(out: &mut Vec<u8>, value: usize) {
    out.extend_from_slice(&u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes());
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = self.u16()?;
        std::str::from_utf8(self.take(usize::from(length))?).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Just, Strategy, any};
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    fn pack() -> impl Strategy<Value = PackId> {
        (0u8..3, any::<u32>()).prop_map(|(day, ordinal)| {
            let backup = format!("ledger-26112{day}-010059-k7f").parse().unwrap();
            PackId { backup, ordinal }
        })
    }

    fn frame() -> impl Strategy<Value = FrameRef> {
        (pack(), pack(), any::<[u32; 3]>(), 0u8..2).prop_map(|(born, pack, [ordinal, offset, length], keyset)| {
            let keyset = format!("{keyset:032x}").parse().unwrap();
            FrameRef { id: FrameId { pack: born, ordinal }, keyset, pack, offset, length }
        })
    }

    fn chunk() -> impl Strategy<Value = MapChunk> {
        vec(frame(), 0..5).prop_flat_map(|frames| {
            let place = proptest::option::of((0..u16::try_from(frames.len().max(1)).unwrap(), any::<u8>()));
            let place = if frames.is_empty() { Just(None).boxed() } else { place.boxed() };
            let entry = (place, any::<[u8; 16]>()).prop_map(|(place, fingerprint)| PageEntry { place, fingerprint });
            (Just(frames), vec(entry, 0..40)).prop_map(|(frames, entries)| MapChunk { frames, entries })
        })
    }

    proptest! {
        #[test]
        fn a_chunk_reads_back(chunk in chunk()) {
            prop_assert_eq!(MapChunk::decode(&chunk.encode()).unwrap(), chunk);
        }

        #[test]
        fn a_cut_chunk_is_an_error(chunk in chunk(), cut in 0usize..500) {
            let bytes = chunk.encode();
            if cut < bytes.len() {
                assert!(MapChunk::decode(&bytes[..cut]).is_err());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..300)) {
            let _ = MapChunk::decode(&[MAGIC.as_slice(), &bytes].concat());
        }
    }
}
