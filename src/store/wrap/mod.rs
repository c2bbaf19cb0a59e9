//! Care that every store needs alike, stacked around an adapter: the meter and the limit inside, the retry outside, so that
//! every attempt is measured and a call that waits for its next attempt holds no permit.

pub mod limit;
pub mod meter;
pub mod retry;

pub use limit::Limit;
pub use meter::Meter;
pub use retry::{Retry, RetryPolicy};
