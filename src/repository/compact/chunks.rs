//! Map chunks, fetched and opened.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::codec::compress::Decompressor;
use crate::codec::seal::Unit;
use crate::model::{Error, Result};
use crate::repository::compact::Hands;
use crate::repository::pages::map::{FrameRef, MapChunk, PackId};
use crate::repository::pages::pack::unpack_frame;
use crate::repository::restore::{Fetched, Flight, Memory, fetch_frames};

/// Chunks that are held in memory at once, of some 40 KiB each.
pub(super) const AT_ONCE: usize = 128;

/// Where a frame is: pack and offset.
pub(super) type Place = (PackId, u32);

pub(super) fn place(frame: &FrameRef) -> Place {
    (frame.pack.clone(), frame.offset)
}

/// A part of a chunk: first entry, entries.
pub(super) type Entries = (u16, u16);

/// The frames that a part of a chunk names.
pub(super) fn used(chunk: &MapChunk, (first, count): Entries) -> Result<Vec<&FrameRef>> {
    let range = usize::from(first)..usize::from(first) + usize::from(count);
    let entries = chunk.entries.get(range).ok_or_else(|| Error::damaged("a map chunk is shorter than its use"))?;
    let numbers: BTreeSet<_> = entries.iter().filter_map(|entry| entry.place).map(|(frame, _)| frame).collect();
    Ok(numbers.into_iter().filter_map(|number| chunk.frames.get(usize::from(number))).collect())
}

/// The chunks that these frames are; the caller keeps them to [`AT_ONCE`].
pub(super) async fn fetch(hands: Hands<'_>, frames: Vec<FrameRef>) -> Result<Vec<(FrameRef, MapChunk)>> {
    let found = Arc::new(Mutex::new(Vec::with_capacity(frames.len())));
    let keep = {
        let found = Arc::clone(&found);
        move |chunks: Vec<Fetched<()>>| {
            let mut decompressor = Decompressor::new()?;
            for Fetched { frame, payload, .. } in chunks {
                let chunk = MapChunk::decode(&unpack_frame(&frame, &payload, &mut decompressor)?)?;
                found.lock().unwrap_or_else(PoisonError::into_inner).push((frame, chunk));
            }
            Ok(())
        }
    };
    let flight = Flight { repository: hands.repository, ring: hands.ring, unit: Unit::Map, memory: Memory::default() };
    fetch_frames(flight, frames.into_iter().map(|frame| (frame, ())).collect(), keep).await?;
    Ok(std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner)))
}
