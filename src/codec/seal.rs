//! Sealing: one stored unit is one FLOE message (C2SP FLOE: AES-256-GCM, HKDF-SHA-384, key-committing, segmented).
//!
//! The associated data binds a message to what it is, never to where it lies: units are copied between packs, bundles
//! and regions verbatim. `docs/escape/floe.py` is a second, independent reader of the same bytes.

use std::fmt;

use fast_floe::online::{Encryptor, FinalEncryptError};
use fast_floe::{Header, Key, Parameters, decrypt_with_parameters};
use zeroize::Zeroizing;

use crate::model::{Error, KeysetId, RepositoryId, Result as ModelResult, Rng};

/// Every message has segments of 1 MiB; the last one is as short as its plaintext allows. Messages with other segments
/// are refused, so that a header cannot choose how much memory a reader takes.
const PARAMETERS: Parameters = Parameters::SEGMENT_1_MIB;
/// A segment's length prefix, nonce and tag.
const SEGMENT_OVERHEAD: usize = 32;

/// A 256-bit secret that seals units. Its bytes are wiped on drop and never printed.
#[derive(Clone)]
pub struct SealingKey(Key);

impl SealingKey {
    /// Bytes of a key.
    pub const LEN: usize = Key::LEN;

    /// Draws a new key.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate(rng: &dyn Rng) -> ModelResult<Self> {
        let mut bytes = Zeroizing::new([0; Self::LEN]);
        rng.fill(bytes.as_mut_slice())?;
        Ok(Self::from_bytes(&bytes))
    }

    /// From bytes that were unwrapped; the caller wipes its own copy.
    pub const fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        Self(Key::from_bytes(*bytes))
    }

    /// The secret itself, for wrapping.
    pub const fn expose(&self) -> &[u8; Self::LEN] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey(…)")
    }
}

/// The kinds of sealed units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// A run of pages or small files.
    Frame,
    /// A chunk of a page map.
    Map,
    /// A part of a backup's manifest.
    Manifest,
    /// A run of WAL.
    Wal,
    /// A part of a dump or of a document.
    Part,
    /// The body of a report.
    Report,
}

impl Unit {
    /// The word in the associated data and in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Frame => "frame",
            Self::Map => "map",
            Self::Manifest => "manifest",
            Self::Wal => "wal",
            Self::Part => "part",
            Self::Report => "report",
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a sealed unit is bound to.
#[derive(Debug, Clone, Copy)]
pub struct Aad<'a> {
    /// The repository.
    pub repository: &'a RepositoryId,
    /// The keyset whose key seals it.
    pub keyset: &'a KeysetId,
    /// What it is.
    pub kind: Unit,
    /// Its logical id: the place of its birth, unique within kind and keyset. Never a bucket, a prefix or an object key.
    pub id: &'a str,
}

impl Aad<'_> {
    /// The bytes that FLOE authenticates. The id comes last and is the only field of free form, so no two bindings have
    /// the same encoding.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { repository, keyset, kind, id } = self;
        format!("drctl 1\n{repository}\n{keyset}\n{kind}\n{id}").into_bytes()
    }
}

/// What went wrong, by meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The bytes are not what was sealed under this key and this binding.
    #[error("{kind} {id} does not authenticate")]
    DoesNotAuthenticate {
        /// What it was to be.
        kind: Unit,
        /// Which one.
        id: String,
    },
    /// The library could not seal; nothing was appended.
    #[error("{kind} {id} cannot be sealed: {reason}")]
    CannotSeal {
        /// What it was to be.
        kind: Unit,
        /// Which one.
        id: String,
        /// The library's words.
        reason: String,
    },
}

impl From<SealError> for Error {
    fn from(error: SealError) -> Self {
        match error {
            SealError::DoesNotAuthenticate { .. } => Self::damaged(error.to_string()),
            SealError::CannotSeal { .. } => Self::failed(error.to_string()),
        }
    }
}

/// The length of a sealed unit with `plain` bytes inside.
pub fn sealed_len(plain: usize) -> usize {
    let segments = plain.div_ceil(PARAMETERS.plaintext_segment_length()).max(1);
    Header::LEN + plain + segments * SEGMENT_OVERHEAD
}

/// Seals one unit.
///
/// # Errors
/// [`SealError::CannotSeal`] without randomness.
pub fn seal(key: &SealingKey, aad: &Aad<'_>, plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut sealed = Vec::with_capacity(sealed_len(plaintext.len()));
    seal_into(key, aad, plaintext, &mut sealed)?;
    Ok(sealed)
}

/// Seals one unit and appends it to `out`; returns the bytes appended. After an error `out` is as it was.
///
/// # Errors
/// [`SealError::CannotSeal`] without randomness.
pub fn seal_into(key: &SealingKey, aad: &Aad<'_>, plaintext: &[u8], out: &mut Vec<u8>) -> Result<usize, SealError> {
    let start = out.len();
    append_message(key, aad, plaintext, out).map_err(|error| {
        out.truncate(start);
        SealError::CannotSeal { kind: aad.kind, id: aad.id.to_owned(), reason: error.to_string() }
    })?;
    Ok(out.len() - start)
}

fn append_message(key: &SealingKey, aad: &Aad<'_>, plaintext: &[u8], out: &mut Vec<u8>) -> fast_floe::Result<()> {
    let mut encryptor = Encryptor::new(&key.0, &aad.to_bytes(), PARAMETERS)?;
    out.reserve(sealed_len(plaintext.len()));
    out.extend_from_slice(encryptor.header().as_ref());
    let mut rest = plaintext;
    while let Some((segment, after)) =
        rest.split_at_checked(PARAMETERS.plaintext_segment_length()).filter(|(_, after)| !after.is_empty())
    {
        encryptor.encrypt_non_final_segment_into(segment, grow(out, segment.len()))?;
        rest = after;
    }
    encryptor.encrypt_final_segment_into(rest, grow(out, rest.len())).map_err(FinalEncryptError::into_error)?;
    Ok(())
}

/// Room for one more segment at the end of `out`.
fn grow(out: &mut Vec<u8>, plain: usize) -> &mut [u8] {
    let start = out.len();
    out.resize(start + plain + SEGMENT_OVERHEAD, 0);
    &mut out[start..]
}

/// Opens one unit: all of `sealed`, no byte more or less. Nothing is returned before everything is authenticated.
///
/// # Errors
/// [`SealError::DoesNotAuthenticate`], whatever the cause: an attacker learns nothing from the difference.
pub fn open(key: &SealingKey, aad: &Aad<'_>, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
    decrypt_with_parameters(&key.0, &aad.to_bytes(), PARAMETERS, sealed)
        .map_err(|_| SealError::DoesNotAuthenticate { kind: aad.kind, id: aad.id.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::SystemRng;

    const SEGMENT: usize = 1024 * 1024 - SEGMENT_OVERHEAD;

    fn ids() -> (RepositoryId, KeysetId) {
        (RepositoryId::new(&SystemRng).unwrap(), KeysetId::new(&SystemRng).unwrap())
    }

    fn aad<'a>(ids: &'a (RepositoryId, KeysetId), id: &'a str) -> Aad<'a> {
        Aad { repository: &ids.0, keyset: &ids.1, kind: Unit::Frame, id }
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens(plain in proptest::collection::vec(any::<u8>(), 0..5000), id in ".{0,60}") {
            let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
            let sealed = seal(&key, &aad(&ids, &id), &plain).unwrap();
            prop_assert_eq!(sealed.len(), sealed_len(plain.len()));
            prop_assert_eq!(open(&key, &aad(&ids, &id), &sealed).unwrap(), plain);
        }

        #[test]
        fn no_bytes_make_open_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
            prop_assert!(open(&key, &aad(&ids, "x"), &bytes).is_err());
        }
    }

    #[test]
    fn the_encoding_of_the_binding_is_fixed() {
        let repository = "00112233445566778899aabbccddeeff".parse().unwrap();
        let keyset = "ffeeddccbbaa99887766554433221100".parse().unwrap();
        for (kind, word) in [
            (Unit::Frame, "frame"),
            (Unit::Map, "map"),
            (Unit::Manifest, "manifest"),
            (Unit::Wal, "wal"),
            (Unit::Part, "part"),
            (Unit::Report, "report"),
        ] {
            let aad = Aad { repository: &repository, keyset: &keyset, kind, id: "pack-7/3" };
            let expected = format!(
                "drctl 1\n00112233445566778899aabbccddeeff\nffeeddccbbaa99887766554433221100\n{word}\npack-7/3"
            );
            assert_eq!(aad.to_bytes(), expected.into_bytes());
        }
    }

    #[test]
    fn messages_of_all_lengths_around_a_segment_open() {
        let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
        for len in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 9] {
            let plain: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let sealed = seal(&key, &aad(&ids, "a"), &plain).unwrap();
            assert_eq!(sealed.len(), sealed_len(len), "{len}");
            assert_eq!(open(&key, &aad(&ids, "a"), &sealed).unwrap(), plain, "{len}");
        }
    }

    #[test]
    fn every_flipped_bit_cut_and_extension_is_an_error() {
        let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
        let aad = aad(&ids, "pack/1");
        let expected = SealError::DoesNotAuthenticate { kind: Unit::Frame, id: "pack/1".into() };
        for len in [0, 77] {
            let mut sealed = seal(&key, &aad, &vec![5; len]).unwrap();
            for bit in 0..sealed.len() * 8 {
                sealed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(open(&key, &aad, &sealed), Err(expected.clone()), "bit {bit}");
                sealed[bit / 8] ^= 1 << (bit % 8);
            }
            for cut in 0..sealed.len() {
                assert_eq!(open(&key, &aad, &sealed[..cut]), Err(expected.clone()), "cut {cut}");
            }
            for tail in [&b"\0"[..], &[0; 32], &sealed.clone()] {
                let extended = [&sealed, tail].concat();
                assert_eq!(open(&key, &aad, &extended), Err(expected.clone()));
            }
            assert!(open(&key, &aad, &sealed).is_ok());
        }
    }

    #[test]
    fn segments_that_are_cut_swapped_or_repeated_are_errors() {
        let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
        let aad = aad(&ids, "a");
        let sealed = seal(&key, &aad, &vec![1; 2 * SEGMENT + 5]).unwrap();
        let (header, body) = sealed.split_at(Header::LEN);
        let (first, rest) = body.split_at(1024 * 1024);
        let (second, last) = rest.split_at(1024 * 1024);
        for parts in [
            vec![header, first, second],
            vec![header, first, last],
            vec![header, second, first, last],
            vec![header, first, second, second, last],
            vec![header, last],
            vec![header],
        ] {
            assert!(open(&key, &aad, &parts.concat()).is_err());
        }
    }

    #[test]
    fn another_key_or_binding_does_not_open() {
        let (key, ours) = (SealingKey::generate(&SystemRng).unwrap(), ids());
        let other = ids();
        let aad = aad(&ours, "a");
        let sealed = seal(&key, &aad, b"plain").unwrap();
        assert!(open(&SealingKey::generate(&SystemRng).unwrap(), &aad, &sealed).is_err());
        assert!(open(&key, &Aad { repository: &other.0, ..aad }, &sealed).is_err());
        assert!(open(&key, &Aad { keyset: &other.1, ..aad }, &sealed).is_err());
        assert!(open(&key, &Aad { kind: Unit::Map, ..aad }, &sealed).is_err());
        assert!(open(&key, &Aad { id: "b", ..aad }, &sealed).is_err());
        assert_eq!(open(&key, &aad, &sealed).unwrap(), b"plain");
    }

    #[test]
    fn messages_with_other_segments_are_refused() {
        let (key, ids) = (SealingKey::generate(&SystemRng).unwrap(), ids());
        let aad = aad(&ids, "a");
        for parameters in [Parameters::SEGMENT_4_KIB, Parameters::SEGMENT_16_MIB] {
            let sealed = fast_floe::encrypt(&key.0, &aad.to_bytes(), parameters, b"plain").unwrap();
            assert!(open(&key, &aad, &sealed).is_err());
        }
    }

    #[test]
    fn appending_keeps_what_is_there_and_keys_stay_secret() {
        let (key, ids) = (SealingKey::from_bytes(&[0xab; 32]), ids());
        let mut pack = b"head".to_vec();
        let len = seal_into(&key, &aad(&ids, "1"), b"one", &mut pack).unwrap();
        seal_into(&key, &aad(&ids, "2"), b"two", &mut pack).unwrap();
        assert_eq!(&pack[..4], b"head");
        assert_eq!(open(&key, &aad(&ids, "1"), &pack[4..4 + len]).unwrap(), b"one");
        assert_eq!(open(&key, &aad(&ids, "2"), &pack[4 + len..]).unwrap(), b"two");
        assert_eq!(format!("{key:?}"), "SealingKey(…)");
    }
}
