//! What drctl is for, told from outside: the built binary, real clusters, real regions, and what is left when they fail.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and runs on real time and real files"
)]

#[path = "../support/mod.rs"]
mod support;

mod archive;
mod bank;
mod bundles;
mod check;
mod clocks;
mod compact;
mod contradiction;
mod daemon;
mod delta;
mod detection;
mod documents;
mod drill;
mod escape;
mod feed;
mod full_disk;
mod gaps;
mod golden;
mod incremental;
mod inert;
mod keyholders;
mod lend;
mod lies;
mod locks;
mod majors;
mod memory;
mod metrics;
mod notify;
mod ownership;
mod patience;
mod platforms;
mod power_cut;
mod pressure;
mod prune;
mod prune_beside;
mod recovery_point;
mod regions;
mod reports;
mod restore;
mod rig3;
mod runbooks;
mod sabotage;
mod soak;
mod soak_base;
mod soak_wal;
mod staged;
mod standby;
mod streams;
mod switchover;
mod sync;
mod systemd;
mod tail;
mod timelines;
mod verify;
mod wal;
