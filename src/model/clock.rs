//! Time and chance as seams.

use std::time::Duration;

use chrono::{DateTime, Utc};

/// Where every timestamp comes from.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall-clock time. It may jump in either direction: fit for people and for retention, never for ordering.
    fn now(&self) -> DateTime<Utc>;
    /// Time since an arbitrary fixed start; never goes backwards. For deadlines and measured durations.
    fn monotonic(&self) -> Duration;
}

/// Where every random byte comes from. Implementations outside of tests must be cryptographically secure: ids and keys
/// are drawn from it.
pub trait Rng: Send + Sync + std::fmt::Debug {
    /// Fills the whole buffer.
    ///
    /// # Errors
    /// The operating system could not provide randomness; nothing may be written with a predictable key, so the job
    /// must stop.
    fn fill(&self, buffer: &mut [u8]) -> crate::model::Result<()>;
}
