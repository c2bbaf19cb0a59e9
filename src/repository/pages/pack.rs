//! Packs: objects of many sealed frames.
//!
//! A frame is sealed for its birth, the pack and its number in it, before the pack is complete; so each worker fills a
//! pack of its own. The 8-byte head only tells a person with a hex dump what the object is.

use bytes::Bytes;

use crate::codec::compress::{Compressor, Decompressor};
use crate::codec::seal::{Aad, SealingKey, Unit, open, seal_into};
use crate::model::{BackupId, KeysetId, RepositoryId, Result, ResultExt};
use crate::repository::pages::map::{FrameId, FrameRef, PackId};

/// The most that one object holds.
pub const OBJECT_LIMIT: usize = 16 * 1024 * 1024;
/// The least that a pack may be limited to: room for the largest frame, whatever it compresses to.
pub const SMALLEST_PACK: usize = 256 * 1024;

const MAGIC: &[u8; 8] = b"DRCTLP1\n";

/// A finished pack.
#[derive(Debug)]
pub struct Pack {
    /// Which.
    pub id: PackId,
    /// Its object.
    pub bytes: Bytes,
}

/// What every frame of one backup is sealed under.
#[derive(Debug, Clone)]
pub struct FrameSeal {
    /// The repository.
    pub repository: RepositoryId,
    /// The backup's keyset.
    pub keyset: KeysetId,
    /// The backup.
    pub backup: BackupId,
}

impl FrameSeal {
    /// What binds a frame to its birth.
    fn aad<'a>(&'a self, unit: Unit, id: &'a str) -> Aad<'a> {
        Aad { repository: &self.repository, keyset: &self.keyset, kind: unit, id }
    }
}

/// Fills one pack.
#[derive(Debug)]
pub struct PackBuilder {
    id: PackId,
    bytes: Vec<u8>,
    limit: usize,
    frames: u32,
}

impl PackBuilder {
    /// An empty pack that is to stay within `limit` bytes.
    pub fn new(id: PackId, limit: usize) -> Self {
        let mut bytes = Vec::with_capacity(limit);
        bytes.extend_from_slice(MAGIC);
        Self { id, bytes, limit, frames: 0 }
    }

    /// Whether a frame of `plain` bytes still fits, whatever it compresses to.
    pub fn has_room(&self, plain: usize) -> bool {
        // Header, segment and payload overhead of a seal stay far below 4 KiB at this size.
        self.bytes.len() + plain + 4096 <= self.limit
    }

    /// Compresses, seals and appends one frame.
    ///
    /// # Errors
    /// No randomness for the seal.
    pub fn add(
        &mut self,
        seal: &FrameSeal,
        (unit, key): (Unit, &SealingKey),
        compressor: &mut Compressor,
        plain: &[u8],
    ) -> Result<FrameRef> {
        let id = FrameId { pack: self.id.clone(), ordinal: self.frames };
        let payload = compressor.pack_payload(plain)?;
        let start = self.bytes.len();
        seal_into(key, &seal.aad(unit, &id.to_string()), &payload, &mut self.bytes)?;
        self.frames += 1;
        let offset = u32::try_from(start).unwrap_or(u32::MAX);
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        Ok(FrameRef { id, keyset: seal.keyset.clone(), pack: self.id.clone(), offset, length })
    }

    /// Appends a frame that was born elsewhere, as it is; answers where it stands.
    pub fn copy(&mut self, sealed: &[u8]) -> u32 {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(sealed);
        u32::try_from(start).unwrap_or(u32::MAX)
    }

    /// Whether nothing was added.
    pub const fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// The object.
    pub fn finish(self) -> Pack {
        Pack { id: self.id, bytes: self.bytes.into() }
    }
}

/// Authenticates a frame that was cut out of a pack; what comes back is still compressed.
///
/// # Errors
/// It is not the frame that it is said to be.
pub fn open_frame(
    repository: &RepositoryId,
    frame: &FrameRef,
    (unit, key): (Unit, &SealingKey),
    sealed: &[u8],
) -> Result<Vec<u8>> {
    let id = frame.id.to_string();
    let aad = Aad { repository, keyset: &frame.keyset, kind: unit, id: &id };
    open(key, &aad, sealed).during(|| format!("open frame {id} of pack {}", frame.pack))
}

/// Unpacks what [`open_frame`] gave.
///
/// # Errors
/// It does not unpack.
pub fn unpack_frame(frame: &FrameRef, payload: &[u8], decompressor: &mut Decompressor) -> Result<Vec<u8>> {
    decompressor.unpack_payload(payload, None).during(|| format!("unpack frame {}", frame.id))
}
