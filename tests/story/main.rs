//! Whole stories through the binary, on real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

#[path = "../support/mod.rs"]
mod support;

mod restore;
