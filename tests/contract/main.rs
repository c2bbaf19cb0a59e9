//! The seams' contracts, each proven on every real implementation and against real servers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

#[path = "../support/mod.rs"]
mod support;

mod floe;
mod iam;
mod keys;
mod pg_source;
mod pg_wire;
mod rig;
mod store;
