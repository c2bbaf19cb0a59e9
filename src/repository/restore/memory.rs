//! What a restore may hold in memory, and what follows from it.

use crate::model::{Error, Result};

/// A bound on the memory of a restore, whatever the size of the cluster. Half of it is for where pages go, a quarter for
/// requests in flight; the rest is the process itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(u64);

/// A page of its own frame, the worst that a map can say: the frame's name and place, and where the page goes.
const PAGE_COST: u64 = 400;
/// The largest range that one request asks for.
const LARGEST_RANGE: u64 = 4 * 1024 * 1024;
/// The smallest that is worth a request, and room for any frame.
const SMALLEST_RANGE: u64 = 512 * 1024;
/// A range is held sealed and opened.
const COPIES: u64 = 2;
/// More requests in flight only help where memory is plentiful and the way is long.
const MOST_REQUESTS: u64 = 64;
const FEWEST_REQUESTS: u64 = 8;

impl Default for Memory {
    fn default() -> Self {
        Self(256 * 1024 * 1024)
    }
}

impl Memory {
    /// Less would not hold the requests that keep a region busy.
    pub const LEAST: u64 = 64 * 1024 * 1024;

    /// This many bytes.
    ///
    /// # Errors
    /// Fewer than [`LEAST`](Self::LEAST).
    pub fn of(bytes: u64) -> Result<Self> {
        match bytes {
            Self::LEAST.. => Ok(Self(bytes)),
            _ => Err(Error::usage(format!("a restore needs {} MiB of memory or more", Self::LEAST >> 20))),
        }
    }

    /// How many bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Pages that are handled together.
    pub const fn window_pages(self) -> u64 {
        self.0 / 2 / PAGE_COST
    }

    /// The most that one request asks for.
    pub fn range(self) -> u32 {
        let range = (self.0 / 4 / COPIES / FEWEST_REQUESTS).clamp(SMALLEST_RANGE, LARGEST_RANGE);
        u32::try_from(range).unwrap_or(u32::MAX)
    }

    /// Requests in flight.
    pub fn requests(self) -> usize {
        let requests = (self.0 / 4 / COPIES / u64::from(self.range())).clamp(FEWEST_REQUESTS, MOST_REQUESTS);
        usize::try_from(requests).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_held_stays_within_the_budget(bytes in Memory::LEAST..1 << 40) {
            let memory = Memory::of(bytes).unwrap();
            let in_flight = memory.requests() as u64 * u64::from(memory.range()) * COPIES;
            prop_assert!(in_flight <= bytes / 4);
            prop_assert!(memory.window_pages() * PAGE_COST <= bytes / 2);
            prop_assert!(memory.requests() >= 8 && memory.range() >= 512 * 1024);
        }
    }

    #[test]
    fn too_little_is_refused() {
        assert!(Memory::of(Memory::LEAST - 1).is_err());
        let usual = Memory::default();
        assert_eq!((usual.requests(), usual.range()), (8, 4 << 20));
    }
}
