//! Floor 1a, what happens to bytes on their way to a region and back: compression, sealing, signing.
//!
//! Writer and reader of the same bytes stand in the same file. Nothing here does I/O or knows where an object lies.

pub mod compress;
pub mod fingerprint;
pub mod random;
pub mod seal;
pub mod sign;

pub use compress::{CompressError, Compressor, Decompressor};
pub use fingerprint::PageFingerprinter;
pub use random::SystemRng;
pub use seal::{Aad, SealError, SealingKey, Unit, open, seal, seal_into, sealed_len};
pub use sign::{PublicKey, SignError, SignedText, Signer, sign_text, split_text};
