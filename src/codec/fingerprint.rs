//! Fingerprints of pages: did this page change since the parent backup? And of WAL segments: is this one stored?
//!
//! XXH3-128 with a random secret, so that nobody who writes rows can prepare two pages that look alike. It detects
//! change and proves nothing: what a page holds is proven by the seal.

use xxhash_rust::xxh3::{Xxh3, xxh3_128, xxh3_128_with_secret};

use crate::model::{Result, Rng};

/// Bytes of the secret; XXH3's own default secret has the same length.
pub const SECRET_LEN: usize = 192;

/// A short stand-in for a name, for telling whether it came before; chance makes two names alike once in 2^64.
pub fn of_name(name: &str) -> u128 {
    xxh3_128(name.as_bytes())
}

/// A fingerprint, big-endian as in XXH128's canonical form.
pub type Fingerprint = [u8; 16];

/// Computes fingerprints under one secret. The secret is kept in the sealed manifest of its generation.
#[derive(Clone)]
pub struct PageFingerprinter {
    secret: [u8; SECRET_LEN],
}

impl PageFingerprinter {
    /// Under a secret that was drawn earlier.
    pub const fn new(secret: [u8; SECRET_LEN]) -> Self {
        Self { secret }
    }

    /// Under a new secret.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate(rng: &dyn Rng) -> Result<Self> {
        let mut secret = [0; SECRET_LEN];
        rng.fill(&mut secret)?;
        Ok(Self { secret })
    }

    /// The secret, to be stored where only holders of `meta` see it.
    pub const fn secret(&self) -> &[u8; SECRET_LEN] {
        &self.secret
    }

    /// The fingerprint of one page.
    pub fn of(&self, page: &[u8]) -> Fingerprint {
        xxh3_128_with_secret(page, &self.secret).to_be_bytes()
    }

    /// The fingerprint of bytes that come in pieces.
    pub const fn running(&self) -> RunningFingerprint {
        RunningFingerprint(Xxh3::with_secret(self.secret))
    }
}

/// A fingerprint on its way: the same as of all pieces together.
pub struct RunningFingerprint(Xxh3);

impl RunningFingerprint {
    /// Takes the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// Of everything so far.
    pub fn finish(&self) -> Fingerprint {
        self.0.digest128().to_be_bytes()
    }
}

impl std::fmt::Debug for RunningFingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RunningFingerprint")
    }
}

impl std::fmt::Debug for PageFingerprinter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageFingerprinter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::SystemRng;

    #[test]
    fn every_bit_of_a_page_and_the_secret_count() {
        let fingerprinter = PageFingerprinter::generate(&SystemRng).unwrap();
        let mut page: Vec<u8> = (0..8192u32).map(|i| (i * 7 % 251) as u8).collect();
        let original = fingerprinter.of(&page);
        assert_eq!(PageFingerprinter::new(*fingerprinter.secret()).of(&page), original);
        assert_ne!(PageFingerprinter::generate(&SystemRng).unwrap().of(&page), original);
        for bit in 0..page.len() * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(fingerprinter.of(&page), original, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn pieces_have_the_fingerprint_of_the_whole() {
        let fingerprinter = PageFingerprinter::generate(&SystemRng).unwrap();
        let whole: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        for size in [1, 7, 63, 64, 255, 256, 1024, 8192, 99_999, 100_000] {
            let mut running = fingerprinter.running();
            whole.chunks(size).for_each(|piece| running.update(piece));
            assert_eq!(running.finish(), fingerprinter.of(&whole), "pieces of {size}");
        }
        assert_eq!(fingerprinter.running().finish(), fingerprinter.of(&[]));
    }

    /// Pins the stored form: a map written today is compared by every later version.
    #[test]
    fn the_stored_form_is_fixed() {
        let fingerprinter = PageFingerprinter::new(std::array::from_fn(|i| u8::try_from(i).unwrap()));
        assert_eq!(hex::encode(fingerprinter.of(&[0; 8192])), "470d9d2f9e752dcb6e1d53078805a163");
    }
}
