//! Floor 1a, what every room may use to be seen: named tasks, the one real clock, the log, and progress.
//!
//! Nothing here prints except the log, and that goes to stderr alone: stdout belongs to the command line.

pub mod clock;
pub mod log;
pub mod metrics;
pub mod progress;
pub mod task;

pub use clock::SystemClock;
pub use progress::Progress;
