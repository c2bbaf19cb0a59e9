//! Signatures: Ed25519 over clear records that must be believed before any key is opened.
//!
//! A signed text is its body (lines, each ending in `\n`) and one last line
//! `{"signer":"<fingerprint>","signature":"<hex>"}\n`. The signature covers `drctl signed 1\n<context>\n` and the body;
//! the context says which record it is, so that a valid record cannot stand in for another. There is exactly one way to
//! write it: any flipped bit of the object is an error.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::model::{Error, Result as ModelResult, Rng, SignerId};

/// An Ed25519 signature.
pub type Signature = [u8; 64];

const TEXT_DOMAIN: &str = "drctl signed 1\n";
const BYTES_DOMAIN: &str = "drctl signed bytes 1\n";

/// What went wrong, by meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The bytes are not a signed text.
    #[error("a signed record is malformed: {reason}")]
    Malformed {
        /// What does not fit.
        reason: &'static str,
    },
    /// The record names another signer than the key it is checked with.
    #[error("{context} is signed by {found}, not by {expected}")]
    OtherSigner {
        /// Which record.
        context: String,
        /// Who it says signed it.
        found: SignerId,
        /// Whose key was given.
        expected: SignerId,
    },
    /// The signature does not fit the bytes, the context or the key.
    #[error("the signature of {context} by {signer} does not verify")]
    DoesNotVerify {
        /// Which record.
        context: String,
        /// Who was to have signed it.
        signer: SignerId,
    },
    /// A key file or a stored public key cannot be used.
    #[error("signing key: {reason}")]
    BadKey {
        /// What is wrong.
        reason: String,
    },
    /// The library could not sign.
    #[error("{context} cannot be signed")]
    CannotSign {
        /// Which record.
        context: String,
    },
}

impl From<SignError> for Error {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Malformed { .. } | SignError::OtherSigner { .. } | SignError::DoesNotVerify { .. } => {
                Self::damaged(error.to_string())
            }
            SignError::BadKey { .. } | SignError::CannotSign { .. } => Self::failed(error.to_string()),
        }
    }
}

/// A signing key.
pub struct Signer {
    pair: Ed25519KeyPair,
    public: PublicKey,
}

impl Signer {
    /// Draws a new key.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate(rng: &dyn Rng) -> ModelResult<Self> {
        let mut seed = Zeroizing::new([0; 32]);
        rng.fill(seed.as_mut_slice())?;
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.as_slice()).map_err(bad_key)?;
        Ok(Self::from_pair(pair)?)
    }

    /// From the bytes that [`Signer::to_pkcs8`] wrote.
    ///
    /// # Errors
    /// [`SignError::BadKey`] for any others: a damaged key would sign as a stranger.
    pub fn from_pkcs8(bytes: &[u8]) -> Result<Self, SignError> {
        let signer = Self::from_pair(Ed25519KeyPair::from_pkcs8(bytes).map_err(bad_key)?)?;
        if *signer.to_pkcs8()? == bytes { Ok(signer) } else { Err(bad_key("its halves do not belong together")) }
    }

    fn from_pair(pair: Ed25519KeyPair) -> Result<Self, SignError> {
        let public = PublicKey::from_bytes(pair.public_key().as_ref())?;
        Ok(Self { pair, public })
    }

    /// PKCS#8 (version 2, with the public key) for a key file.
    ///
    /// # Errors
    /// [`SignError::BadKey`] for want of memory.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, SignError> {
        let document = self.pair.to_pkcs8().map_err(bad_key)?;
        Ok(Zeroizing::new(document.as_ref().to_vec()))
    }

    /// The fingerprint.
    pub const fn id(&self) -> &SignerId {
        self.public.id()
    }

    /// The half that everybody may know.
    pub const fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// Signs binary bytes, such as the header of a WAL frame. The signature is kept beside them by the caller.
    ///
    /// # Errors
    /// [`SignError::CannotSign`] for want of memory; [`SignError::Malformed`] for a context of several lines.
    pub fn sign_bytes(&self, context: &str, bytes: &[u8]) -> Result<Signature, SignError> {
        self.sign(BYTES_DOMAIN, context, bytes)
    }

    fn sign(&self, domain: &str, context: &str, bytes: &[u8]) -> Result<Signature, SignError> {
        let cannot = || SignError::CannotSign { context: context.to_owned() };
        let signature = self.pair.try_sign(&signed_message(domain, context, bytes)?).map_err(|_| cannot())?;
        signature.as_ref().try_into().map_err(|_| cannot())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.id())
    }
}

fn bad_key(reason: impl fmt::Display) -> SignError {
    SignError::BadKey { reason: reason.to_string() }
}

/// The bytes under a signature. A context is one line, so that its end is known.
fn signed_message(domain: &str, context: &str, bytes: &[u8]) -> Result<Vec<u8>, SignError> {
    if context.contains('\n') {
        return Err(SignError::Malformed { reason: "its context has several lines" });
    }
    Ok([domain.as_bytes(), context.as_bytes(), b"\n", bytes].concat())
}

/// The public half of a signing key. Its text is 64 hex digits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    bytes: [u8; 32],
    id: SignerId,
}

impl PublicKey {
    /// From its 32 bytes.
    ///
    /// # Errors
    /// [`SignError::BadKey`] for another length. Whether the bytes are a point of the curve shows on verification.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignError> {
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| bad_key("a public key has 32 bytes"))?;
        Ok(Self { bytes, id: SignerId::from_digest(&Sha256::digest(bytes).into()) })
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// The fingerprint.
    pub const fn id(&self) -> &SignerId {
        &self.id
    }

    /// Checks a signature made by [`Signer::sign_bytes`].
    ///
    /// # Errors
    /// [`SignError::DoesNotVerify`].
    pub fn verify_bytes(&self, context: &str, bytes: &[u8], signature: &Signature) -> Result<(), SignError> {
        self.verify(BYTES_DOMAIN, context, bytes, signature)
    }

    fn verify(&self, domain: &str, context: &str, bytes: &[u8], signature: &Signature) -> Result<(), SignError> {
        UnparsedPublicKey::new(&ED25519, &self.bytes)
            .verify(&signed_message(domain, context, bytes)?, signature)
            .map_err(|_| SignError::DoesNotVerify { context: context.to_owned(), signer: self.id.clone() })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.bytes))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = SignError;

    fn from_str(text: &str) -> Result<Self, SignError> {
        let bytes: [u8; 32] = decode_hex(text).ok_or_else(|| bad_key("a public key has 64 hex digits, lower case"))?;
        Self::from_bytes(&bytes)
    }
}

/// Lower case only: the hex crate takes both, and a second spelling would be a bit that may flip unnoticed.
fn decode_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    (hex::encode(bytes) == text).then_some(bytes)
}

/// Signs a text whose lines each end in `\n` and returns the whole object.
///
/// # Errors
/// [`SignError::Malformed`] for a body that is empty or does not end in `\n`.
pub fn sign_text(signer: &Signer, context: &str, body: &[u8]) -> Result<Vec<u8>, SignError> {
    check_body(body)?;
    let signature = signer.sign(TEXT_DOMAIN, context, body)?;
    let last = format!("{{\"signer\":\"{}\",\"signature\":\"{}\"}}\n", signer.id(), hex::encode(signature));
    Ok([body, last.as_bytes()].concat())
}

fn check_body(body: &[u8]) -> Result<(), SignError> {
    if body.ends_with(b"\n") { Ok(()) } else { Err(SignError::Malformed { reason: "no body that ends a line" }) }
}

/// Takes a signed text apart. Nothing is verified yet: use no byte of the body before [`SignedText::verify`].
///
/// # Errors
/// [`SignError::Malformed`] for anything that [`sign_text`] does not write.
pub fn split_text(bytes: &[u8]) -> Result<SignedText<'_>, SignError> {
    let lines = bytes.strip_suffix(b"\n").ok_or(SignError::Malformed { reason: "no end of line" })?;
    let start = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let (body, last) = lines.split_at(start);
    check_body(body)?;
    let (signer, signature) =
        parse_last_line(last).ok_or(SignError::Malformed { reason: "its last line is not a signature" })?;
    Ok(SignedText { body, signer, signature })
}

fn parse_last_line(line: &[u8]) -> Option<(SignerId, Signature)> {
    let fields = std::str::from_utf8(line).ok()?.strip_prefix("{\"signer\":\"")?.strip_suffix("\"}")?;
    let (signer, signature) = fields.split_once("\",\"signature\":\"")?;
    Some((signer.parse().ok()?, decode_hex(signature)?))
}

/// A signed text, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedText<'a> {
    /// The lines.
    pub body: &'a [u8],
    /// Who says to have signed them.
    pub signer: SignerId,
    /// The signature.
    pub signature: Signature,
}

impl<'a> SignedText<'a> {
    /// Checks that `key` signed the body as `context`, and returns the body.
    ///
    /// # Errors
    /// [`SignError::OtherSigner`] or [`SignError::DoesNotVerify`].
    pub fn verify(&self, context: &str, key: &PublicKey) -> Result<&'a [u8], SignError> {
        if *key.id() != self.signer {
            let (found, expected) = (self.signer.clone(), key.id().clone());
            return Err(SignError::OtherSigner { context: context.to_owned(), found, expected });
        }
        key.verify(TEXT_DOMAIN, context, self.body, &self.signature)?;
        Ok(self.body)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::SystemRng;

    const CONTEXT: &str = "commit 00112233445566778899aabbccddeeff ledger-261120-010059-k7f";

    fn signer() -> Signer {
        Signer::generate(&SystemRng).unwrap()
    }

    fn read<'a>(bytes: &'a [u8], context: &str, key: &PublicKey) -> Result<&'a [u8], SignError> {
        split_text(bytes)?.verify(context, key)
    }

    proptest! {
        #[test]
        fn what_was_signed_verifies(lines in proptest::collection::vec("[^\n]{0,40}", 1..6)) {
            let (signer, body) = (signer(), lines.join("\n") + "\n");
            let object = sign_text(&signer, CONTEXT, body.as_bytes()).unwrap();
            prop_assert_eq!(read(&object, CONTEXT, signer.public_key()).unwrap(), body.as_bytes());
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = split_text(&bytes);
            let _ = split_text(&[&bytes[..], b"\n{\"signer\":\"\",\"signature\":\"\"}\n"].concat());
        }
    }

    #[test]
    fn every_flipped_bit_cut_and_extension_is_an_error() {
        let signer = signer();
        let mut object = sign_text(&signer, CONTEXT, b"drctl commit 1\nid ledger\n\n").unwrap();
        for bit in 0..object.len() * 8 {
            object[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&object, CONTEXT, signer.public_key()).is_err(), "bit {bit}");
            object[bit / 8] ^= 1 << (bit % 8);
        }
        for cut in 0..object.len() {
            assert!(read(&object[..cut], CONTEXT, signer.public_key()).is_err(), "cut {cut}");
            assert!(read(&object[cut + 1..], CONTEXT, signer.public_key()).is_err(), "start {cut}");
        }
        for tail in ["\n", " ", "x\n", "{}\n"] {
            assert!(read(&[&object, tail.as_bytes()].concat(), CONTEXT, signer.public_key()).is_err());
        }
        let twice = sign_text(&signer, CONTEXT, &object).unwrap();
        assert_eq!(read(&twice, CONTEXT, signer.public_key()).unwrap(), object);
    }

    #[test]
    fn there_is_one_spelling() {
        let signer = signer();
        let object = String::from_utf8(sign_text(&signer, CONTEXT, b"a\n").unwrap()).unwrap();
        let at = object.find("\"signature\":\"").unwrap() + 13;
        for other in [
            object[..at].to_owned() + &object[at..].to_uppercase(),
            object.replace("\":\"", "\": \""),
            object.replace("\"}", "\",\"x\":1}"),
            object.replace("\"}\n", "\"}\r\n"),
            object.replace("{\"signer", " {\"signer"),
        ] {
            assert_ne!(other, object);
            assert!(split_text(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn another_context_key_or_use_does_not_verify() {
        let (ours, other) = (signer(), signer());
        let object = sign_text(&ours, CONTEXT, b"a\n").unwrap();
        assert!(matches!(read(&object, "commit other", ours.public_key()), Err(SignError::DoesNotVerify { .. })));
        assert!(matches!(read(&object, CONTEXT, other.public_key()), Err(SignError::OtherSigner { .. })));
        let forged = split_text(&object).unwrap();
        let forged = SignedText { signer: other.id().clone(), ..forged };
        assert!(matches!(forged.verify(CONTEXT, other.public_key()), Err(SignError::DoesNotVerify { .. })));

        let text = split_text(&object).unwrap();
        assert!(ours.public_key().verify_bytes(CONTEXT, b"a\n", &text.signature).is_err());
        assert!(sign_text(&ours, "a\nb", b"a\n").is_err());
        assert!(sign_text(&ours, CONTEXT, b"").is_err());
        assert!(sign_text(&ours, CONTEXT, b"no end").is_err());
    }

    #[test]
    fn signed_bytes_verify_and_every_flipped_bit_is_an_error() {
        let signer = signer();
        let (mut header, context) = ([7u8; 40], "wal epoch 3");
        let mut signature = signer.sign_bytes(context, &header).unwrap();
        let key = signer.public_key();
        key.verify_bytes(context, &header, &signature).unwrap();
        assert!(key.verify_bytes("wal epoch 4", &header, &signature).is_err());
        for bit in 0..header.len() * 8 {
            header[bit / 8] ^= 1 << (bit % 8);
            assert!(key.verify_bytes(context, &header, &signature).is_err());
            header[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in 0..signature.len() * 8 {
            signature[bit / 8] ^= 1 << (bit % 8);
            assert!(key.verify_bytes(context, &header, &signature).is_err());
            signature[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn keys_read_back_from_their_files() {
        let signer = signer();
        let file = signer.to_pkcs8().unwrap();
        let again = Signer::from_pkcs8(&file).unwrap();
        assert_eq!(again.public_key(), signer.public_key());
        assert_eq!(signer.public_key().to_string().parse::<PublicKey>().unwrap(), *signer.public_key());
        assert!(signer.public_key().to_string().to_uppercase().parse::<PublicKey>().is_err());
        let mut damaged = file.to_vec();
        for bit in 0..damaged.len() * 8 {
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Signer::from_pkcs8(&damaged).is_err(), "bit {bit}");
            damaged[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(Signer::from_pkcs8(&file[1..]).is_err());
        assert!(Signer::from_pkcs8(b"").is_err());
        assert_eq!(format!("{signer:?}"), format!("Signer({})", signer.id()));
    }

    /// RFC 8032, test 1: the fingerprint and the raw signature stay what they are for other readers.
    #[test]
    fn the_key_of_rfc_8032_gives_its_public_key() {
        #[derive(Debug)]
        struct Seed;
        impl crate::model::Rng for Seed {
            fn fill(&self, buffer: &mut [u8]) -> ModelResult<()> {
                let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
                buffer.copy_from_slice(&hex::decode(seed).unwrap());
                Ok(())
            }
        }
        let signer = Signer::generate(&Seed).unwrap();
        let public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        assert_eq!(signer.public_key().to_string(), public);
    }
}
