//! The stories as a user lives them: the built binary, real servers, and what remains when they are gone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

#[path = "../support/mod.rs"]
mod support;

mod wal;
