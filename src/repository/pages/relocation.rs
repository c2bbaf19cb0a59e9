//! Frames that were moved from one pack to another after the parent's map was written.

use std::collections::{HashMap, HashSet};

use crate::repository::pages::map::{MapChunk, PackId};

/// Where frames of the parent are now, and which of its map chunks do not say so.
#[derive(Debug, Default)]
pub struct Relocation {
    /// Pack and offset, before and now.
    frames: HashMap<(PackId, u32), (PackId, u32)>,
    chunks: HashSet<u32>,
}

impl Relocation {
    /// `frames` by where they were; `chunks` that name them, or lie where they lay.
    pub const fn new(frames: HashMap<(PackId, u32), (PackId, u32)>, chunks: HashSet<u32>) -> Self {
        Self { frames, chunks }
    }

    /// Where the frame at an offset of a pack is now, if it was moved.
    pub fn place(&self, pack: &PackId, offset: u32) -> Option<&(PackId, u32)> {
        self.frames.get(&(pack.clone(), offset))
    }

    /// Whether a chunk of the parent must be written anew.
    pub fn renews(&self, chunk: u32) -> bool {
        self.chunks.contains(&chunk)
    }

    /// Lets a map name the places of today.
    pub fn apply(&self, map: &mut MapChunk) {
        for frame in &mut map.frames {
            if let Some((pack, offset)) = self.frames.get(&(frame.pack.clone(), frame.offset)) {
                (frame.pack, frame.offset) = (pack.clone(), *offset);
            }
        }
    }
}
