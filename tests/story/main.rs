//! Whole stories: the built binary, real servers, and what is left when they go wrong.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

#[path = "../support/mod.rs"]
mod support;

mod keyholders;
mod regions;
mod rig3;
