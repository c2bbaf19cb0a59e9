//! The one real source of chance.

use aws_lc_rs::rand::{SecureRandom, SystemRandom};

use crate::model::{Error, Result, Rng};

/// The cryptographically secure generator of aws-lc, seeded by the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRng;

impl Rng for SystemRng {
    fn fill(&self, buffer: &mut [u8]) -> Result<()> {
        SystemRandom::new().fill(buffer).map_err(|_| Error::failed("the operating system provides no randomness"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ() {
        let (mut first, mut second) = ([0; 32], [0; 32]);
        SystemRng.fill(&mut first).unwrap();
        SystemRng.fill(&mut second).unwrap();
        assert_ne!(first, second);
        assert_ne!(first, [0; 32]);
    }
}
