//! Care that every store needs alike, stacked around an adapter: the limit inside, the retry outside, so that a call
//! that waits for its next attempt holds no permit.

pub mod limit;
pub mod retry;

pub use limit::Limit;
pub use retry::{Retry, RetryPolicy};
