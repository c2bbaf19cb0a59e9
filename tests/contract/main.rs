//! The seams' contracts, each proven on every real implementation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

mod store;
