//! The test rig: real PostgreSQL clusters, real S3 and KMS servers, faults between them, the built binary, and a ledger
//! that knows what was acknowledged. Everything lives below one scratch directory and dies with the test.
//!
//! Shared servers come from `scripts/test` through the environment; a missing one fails the test.
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "each test binary uses a part of the rig, and a rig fails by panicking, on real time and real tasks"
)]

pub mod clock;
pub mod dirs;
pub mod drctl;
pub mod http;
pub mod http_proxy;
pub mod kms;
pub mod ledger;
pub mod pg;
pub mod power_cut;
pub mod process;
pub mod proxy;
pub mod s3;
pub mod schema;
pub mod seed;
pub mod tmpfs;

/// A variable that `scripts/test` sets.
pub fn from_environment(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run the tests with scripts/test"))
}

/// Twelve letters that no other test has.
pub fn unique() -> String {
    format!("{:012x}", rand::random::<u64>() & 0xffff_ffff_ffff)
}
