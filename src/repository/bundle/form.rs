//! Bundles: old WAL frames back to back in one object, as they are. Written and read here, without any key.
//!
//! A frame proves itself by its own signature and its own place, so a bundle adds nothing that would have to be signed:
//! whoever takes a frame out of one checks it as if it stood alone.

use std::ops::Range;

use bytes::Bytes;

use crate::model::{Error, Result};
use crate::repository::layout::MOST_FRAMES;
use crate::repository::pages::pack::OBJECT_LIMIT;

const MAGIC: &[u8; 8] = b"DRCTLB1\n";
const BEFORE_LENGTHS: u64 = 12;

/// Puts frames that follow each other into one object.
pub fn pack(frames: &[Bytes]) -> Vec<u8> {
    let lengths = frames.iter().map(|frame| u32::try_from(frame.len()).unwrap_or(u32::MAX).to_le_bytes());
    let count = u32::try_from(frames.len()).unwrap_or(u32::MAX).to_le_bytes();
    let head = MAGIC.iter().copied().chain(count).chain(lengths.flatten());
    head.chain(frames.iter().flatten().copied()).collect()
}

/// The bytes in front of the first frame.
pub const fn head_bytes((first, last): (u64, u64)) -> u64 {
    BEFORE_LENGTHS + 4 * (last - first + 1)
}

/// Where the frames of a bundle are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    first: u64,
    frames: Vec<Range<u64>>,
}

impl Contents {
    /// Reads the bytes in front of the first frame, or more.
    ///
    /// # Errors
    /// It is not the head of a bundle of these frames.
    pub fn parse(bytes: &[u8], (first, last): (u64, u64)) -> Result<Self> {
        let wrong = || Error::damaged(format!("not a bundle of the frames {first} to {last}"));
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(wrong)?;
        let (count, rest) = rest.split_first_chunk::<4>().ok_or_else(wrong)?;
        let count = u64::from(u32::from_le_bytes(*count));
        if first.checked_add(count) != last.checked_add(1) || count > MOST_FRAMES {
            return Err(wrong());
        }
        let mut at = head_bytes((first, last));
        let lengths = rest.chunks_exact(4).take(usize::try_from(count).unwrap_or(usize::MAX));
        let frames = lengths.filter_map(|length| {
            let from = at;
            at += u64::from(u32::from_le_bytes(length.try_into().ok()?));
            Some(from..at)
        });
        let frames: Vec<_> = frames.collect();
        if frames.len() as u64 == count { Ok(Self { first, frames }) } else { Err(wrong()) }
    }

    /// Where a frame lies in the object.
    pub fn range(&self, seq: u64) -> Option<Range<u64>> {
        self.frames.get(usize::try_from(seq.checked_sub(self.first)?).ok()?).cloned()
    }

    /// Where the object ends.
    pub fn end(&self) -> u64 {
        self.frames.last().map_or(BEFORE_LENGTHS, |range| range.end)
    }
}

/// Which frames go into which bundle: as many as fit, from the first on, so that whoever cuts them cuts alike. A frame that
/// fills an object alone stays what it is.
pub fn cut(frames: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    const LIMIT: u64 = OBJECT_LIMIT as u64;
    let mut bundles = Vec::new();
    // The first and the last frame of the one that is being filled, and its bytes.
    let mut open: Option<(u64, u64, u64)> = None;
    for (seq, size) in frames {
        open = match open {
            Some((first, last, bytes))
                if last + 1 == seq && bytes + size + 4 <= LIMIT && seq - first < MOST_FRAMES - 1 =>
            {
                Some((first, seq, bytes + size + 4))
            }
            other => {
                bundles.extend(other.map(|(first, last, _)| (first, last)));
                Some((seq, seq, BEFORE_LENGTHS + size + 4))
            }
        };
    }
    bundles.extend(open.map(|(first, last, _)| (first, last)));
    bundles.retain(|(first, last)| first < last);
    bundles
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_packed_is_found_again(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..20), first in 0u64..1000) {
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            let numbers = (first, first + frames.len() as u64 - 1);
            let object = pack(&frames);
            let head = usize::try_from(head_bytes(numbers)).unwrap();
            let contents = Contents::parse(&object[..head], numbers).unwrap();
            prop_assert_eq!(contents.end(), object.len() as u64);
            for (seq, frame) in (first..).zip(&frames) {
                let range = contents.range(seq).unwrap();
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                prop_assert_eq!(&object[range], &frame[..]);
            }
            prop_assert_eq!(contents.range(numbers.1 + 1), None);
            for other in [(numbers.0, numbers.1 + 1), (numbers.0 + 1, numbers.1 + 2), (0, 1 << 40)] {
                prop_assert_eq!(Contents::parse(&object, other).is_ok(), other.1 - other.0 == numbers.1 - numbers.0);
            }
        }

        #[test]
        fn cuts_fit_and_leave_nothing_out_in_between(sizes in prop::collection::vec(1u64..9_000_000, 0..40)) {
            let frames: Vec<(u64, u64)> = (1u64..).zip(sizes).collect();
            let bundles = cut(frames.iter().copied());
            for (first, last) in &bundles {
                let bytes: u64 = frames.iter().filter(|(seq, _)| (first..=last).contains(&seq)).map(|(_, size)| size).sum();
                prop_assert!(bytes + head_bytes((*first, *last)) <= OBJECT_LIMIT as u64 && first < last);
            }
            prop_assert!(bundles.windows(2).all(|pair| pair[0].1 < pair[1].0));
            // Whoever continues where another stopped cuts alike.
            if let Some((_, last)) = bundles.first() {
                prop_assert_eq!(&cut(frames.iter().copied().filter(|(seq, _)| seq > last))[..], &bundles[1..]);
            }
        }
    }
}
