//! Map chunks, fetched and opened.

use std::sync::{Arc, Mutex, PoisonError};

use crate::codec::compress::Decompressor;
use crate::codec::seal::Unit;
use crate::model::Result;
use crate::repository::compact::Hands;
use crate::repository::pack::unpack_frame;
use crate::repository::page_map::{FrameRef, MapChunk, PackId};
use crate::repository::restore::{Fetched, Flight, Memory, fetch_frames};

/// Chunks that are held in memory at once, of some 40 KiB each.
pub(super) const AT_ONCE: usize = 128;

/// Where a frame is: pack and offset.
pub(super) type Place = (PackId, u32);

pub(super) fn place(frame: &FrameRef) -> Place {
    (frame.pack.clone(), frame.offset)
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
