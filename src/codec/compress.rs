//! zstd, and the payload inside a sealed frame.
//!
//! A payload is a tag (0 raw, 1 zstd), the plain length as u32 little-endian, and the data. It is sealed as a whole, so
//! the plain length is authenticated before anything is allocated for it.

use std::fmt;
use std::io::Cursor;

use zstd::zstd_safe::{compress_bound, find_frame_compressed_size, get_frame_content_size};

use crate::model::Error;

/// Plain bytes in one payload at most. Objects hold at most 16 MiB; this leaves room for text that shrinks well, and
/// bounds what a reader allocates.
pub const MAX_PLAIN: usize = 64 * 1024 * 1024;
/// Tag and plain length in front of a payload's data.
pub const PAYLOAD_OVERHEAD: usize = 5;

const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// What went wrong, by meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompressError {
    /// The bytes are not a payload or not one zstd frame.
    #[error("compressed bytes are malformed: {reason}")]
    Malformed {
        /// What does not fit.
        reason: String,
    },
    /// More plain bytes than allowed or promised.
    #[error("{what} of {len} bytes where at most {max} are allowed")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The bound.
        max: usize,
    },
    /// zstd refused: a bad level or no memory.
    #[error("zstd: {reason}")]
    Zstd {
        /// Its words.
        reason: String,
    },
}

impl From<CompressError> for Error {
    fn from(error: CompressError) -> Self {
        match error {
            CompressError::Malformed { .. } | CompressError::TooLong { .. } => Self::damaged(error.to_string()),
            CompressError::Zstd { .. } => Self::failed(error.to_string()),
        }
    }
}

fn malformed(reason: impl fmt::Display) -> CompressError {
    CompressError::Malformed { reason: reason.to_string() }
}

fn refused(reason: impl fmt::Display) -> CompressError {
    CompressError::Zstd { reason: reason.to_string() }
}

/// A reusable compression context; one per worker.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
}

impl Compressor {
    /// A context for one level (negative is faster, 0 is zstd's default).
    ///
    /// # Errors
    /// [`CompressError::Zstd`] for want of memory.
    pub fn new(level: i32) -> Result<Self, CompressError> {
        Ok(Self { context: zstd::bulk::Compressor::new(level).map_err(refused)? })
    }

    /// One zstd frame that names its plain length.
    ///
    /// # Errors
    /// [`CompressError::Zstd`] for want of memory.
    pub fn compress(&mut self, bytes: &[u8]) -> Result<Vec<u8>, CompressError> {
        self.context.compress(bytes).map_err(refused)
    }

    /// A payload with `bytes` inside, stored raw when zstd would not make it shorter.
    ///
    /// # Errors
    /// [`CompressError::TooLong`] for more than [`MAX_PLAIN`] bytes.
    pub fn pack_payload(&mut self, bytes: &[u8]) -> Result<Vec<u8>, CompressError> {
        let len = plain_len(bytes)?;
        // Most of the room stays untouched: memory that nobody writes costs nothing.
        let mut payload = Vec::with_capacity(PAYLOAD_OVERHEAD + compress_bound(bytes.len()));
        payload.push(ZSTD);
        payload.extend_from_slice(&len.to_le_bytes());
        let mut behind_head = Cursor::new(payload);
        behind_head.set_position(PAYLOAD_OVERHEAD as u64);
        let shrunk = self.context.compress_to_buffer(bytes, &mut behind_head).map_err(refused)?;
        let mut payload = behind_head.into_inner();
        if shrunk >= bytes.len() {
            payload[0] = RAW;
            payload.truncate(PAYLOAD_OVERHEAD);
            payload.extend_from_slice(bytes);
        }
        Ok(payload)
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compressor")
    }
}

fn plain_len(bytes: &[u8]) -> Result<u32, CompressError> {
    let too_long = || CompressError::TooLong { what: "a payload", len: bytes.len() as u64, max: MAX_PLAIN };
    u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MAX_PLAIN).ok_or_else(too_long)
}

/// A reusable decompression context; one per worker.
pub struct Decompressor {
    context: zstd::bulk::Decompressor<'static>,
}

impl Decompressor {
    /// A context.
    ///
    /// # Errors
    /// [`CompressError::Zstd`] for want of memory.
    pub fn new() -> Result<Self, CompressError> {
        Ok(Self { context: zstd::bulk::Decompressor::new().map_err(refused)? })
    }

    /// The plain bytes of exactly one zstd frame that names its length, as [`Compressor::compress`] writes it. The
    /// length is compared with `max_len` before anything is allocated.
    ///
    /// # Errors
    /// [`CompressError::TooLong`] beyond `max_len`, [`CompressError::Malformed`] for anything else.
    pub fn decompress(&mut self, bytes: &[u8], max_len: usize) -> Result<Vec<u8>, CompressError> {
        let named = get_frame_content_size(bytes).map_err(|_| malformed("no zstd frame"))?;
        let named = named.ok_or_else(|| malformed("the zstd frame does not name its length"))?;
        let too_long = || CompressError::TooLong { what: "a zstd frame", len: named, max: max_len };
        let len = usize::try_from(named).ok().filter(|len| *len <= max_len).ok_or_else(too_long)?;
        if find_frame_compressed_size(bytes) != Ok(bytes.len()) {
            return Err(malformed("not exactly one zstd frame"));
        }
        let plain = self.context.decompress(bytes, len).map_err(malformed)?;
        if plain.len() != len {
            return Err(malformed(format!("{} bytes where the zstd frame names {len}", plain.len())));
        }
        Ok(plain)
    }

    /// The bytes inside a payload. `expected` is the length that the map or the manifest promises, if one does.
    ///
    /// # Errors
    /// [`CompressError::Malformed`] for anything that [`Compressor::pack_payload`] does not write or that has another
    /// length; [`CompressError::TooLong`] beyond [`MAX_PLAIN`].
    pub fn unpack_payload(&mut self, payload: &[u8], expected: Option<usize>) -> Result<Vec<u8>, CompressError> {
        let (head, data) = payload.split_first_chunk::<PAYLOAD_OVERHEAD>().ok_or_else(|| malformed("cut short"))?;
        let [tag, length @ ..] = *head;
        let named = u32::from_le_bytes(length);
        let too_long = || CompressError::TooLong { what: "a payload", len: named.into(), max: MAX_PLAIN };
        let len = usize::try_from(named).ok().filter(|len| *len <= MAX_PLAIN).ok_or_else(too_long)?;
        if let Some(expected) = expected.filter(|expected| *expected != len) {
            return Err(malformed(format!("{len} plain bytes where {expected} were promised")));
        }
        let plain = match tag {
            RAW => data.to_vec(),
            ZSTD => self.decompress(data, len)?,
            _ => return Err(malformed(format!("unknown tag {tag}"))),
        };
        if plain.len() != len {
            return Err(malformed(format!("{} plain bytes where the payload names {len}", plain.len())));
        }
        Ok(plain)
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

/// As [`Compressor::compress`], with a context of its own.
///
/// # Errors
/// As there.
pub fn compress(level: i32, bytes: &[u8]) -> Result<Vec<u8>, CompressError> {
    Compressor::new(level)?.compress(bytes)
}

/// As [`Decompressor::decompress`], with a context of its own.
///
/// # Errors
/// As there.
pub fn decompress(bytes: &[u8], max_len: usize) -> Result<Vec<u8>, CompressError> {
    Decompressor::new()?.decompress(bytes, max_len)
}

/// As [`Compressor::pack_payload`], with a context of its own.
///
/// # Errors
/// As there.
pub fn pack_payload(level: i32, bytes: &[u8]) -> Result<Vec<u8>, CompressError> {
    Compressor::new(level)?.pack_payload(bytes)
}

/// As [`Decompressor::unpack_payload`], with a context of its own.
///
/// # Errors
/// As there.
pub fn unpack_payload(payload: &[u8], expected: Option<usize>) -> Result<Vec<u8>, CompressError> {
    Decompressor::new()?.unpack_payload(payload, expected)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    proptest! {
        #[test]
        fn what_was_packed_unpacks(bytes in proptest::collection::vec(0u8..4, 0..3000), level in -5i32..7) {
            let packed = pack_payload(level, &bytes).unwrap();
            prop_assert!(packed.len() <= PAYLOAD_OVERHEAD + bytes.len());
            prop_assert_eq!(&unpack_payload(&packed, Some(bytes.len())).unwrap(), &bytes);
            prop_assert_eq!(&unpack_payload(&packed, None).unwrap(), &bytes);
            prop_assert!(unpack_payload(&packed, Some(bytes.len() + 1)).is_err());
            let shrunk = compress(level, &bytes).unwrap();
            prop_assert_eq!(decompress(&shrunk, bytes.len()).unwrap(), bytes);
        }

        #[test]
        fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in 0u8..3) {
            let _ = unpack_payload(&bytes, None);
            let _ = unpack_payload(&[&[tag, 100, 0, 0, 0], bytes.as_slice()].concat(), None);
            let _ = decompress(&bytes, 1 << 20);
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored_raw() {
        for bytes in [noise(8192), noise(1), Vec::new()] {
            let packed = pack_payload(3, &bytes).unwrap();
            assert_eq!(packed[0], RAW);
            assert_eq!(&packed[PAYLOAD_OVERHEAD..], bytes);
            assert_eq!(unpack_payload(&packed, Some(bytes.len())).unwrap(), bytes);
        }
        let zeros = pack_payload(3, &[0; 8192]).unwrap();
        assert_eq!((zeros[0], &zeros[1..5]), (ZSTD, &8192u32.to_le_bytes()[..]));
    }

    #[test]
    fn a_bomb_is_refused_before_it_unpacks() {
        let bomb = compress(19, &vec![0; 1 << 20]).unwrap();
        let refusal = CompressError::TooLong { what: "a zstd frame", len: 1 << 20, max: (1 << 20) - 1 };
        assert_eq!(decompress(&bomb, (1 << 20) - 1), Err(refusal));
        let lying = [&[ZSTD, 10, 0, 0, 0], bomb.as_slice()].concat();
        assert!(matches!(unpack_payload(&lying, None), Err(CompressError::TooLong { max: 10, .. })));
        let huge = [&[ZSTD, 255, 255, 255, 255], bomb.as_slice()].concat();
        assert!(matches!(unpack_payload(&huge, None), Err(CompressError::TooLong { max: MAX_PLAIN, .. })));
        assert!(matches!(pack_payload(1, &vec![0; MAX_PLAIN + 1]), Err(CompressError::TooLong { .. })));
    }

    #[test]
    fn every_cut_and_extension_is_an_error() {
        for bytes in [vec![7; 3000], noise(50)] {
            let packed = pack_payload(3, &bytes).unwrap();
            for cut in 0..packed.len() {
                assert!(unpack_payload(&packed[..cut], None).is_err(), "cut {cut}");
            }
            let skippable = [&packed, &b"\x50\x2a\x4d\x18\0\0\0\0"[..]].concat();
            assert!(unpack_payload(&skippable, None).is_err());
            assert!(unpack_payload(&[&packed, &b"\0"[..]].concat(), None).is_err());
        }
        assert!(unpack_payload(&[2, 1, 0, 0, 0, 9], None).is_err());
    }

    #[test]
    fn contexts_are_reusable_also_after_errors() {
        let (mut compressor, mut decompressor) = (Compressor::new(1).unwrap(), Decompressor::new().unwrap());
        for len in [100, 0, 9000] {
            let packed = compressor.pack_payload(&vec![1; len]).unwrap();
            let mut broken = packed.clone();
            broken.truncate(packed.len().saturating_sub(1));
            assert!(decompressor.unpack_payload(&broken, None).is_err());
            assert_eq!(decompressor.unpack_payload(&packed, Some(len)).unwrap(), vec![1; len]);
        }
    }
}
