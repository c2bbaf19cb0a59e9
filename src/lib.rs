//! drctl keeps PostgreSQL recoverable, and proves it.
#![forbid(unsafe_code)]

pub mod model;

pub mod codec;
pub mod disk;
pub mod observe;
pub mod pg;

pub mod keys;
pub mod source;
pub mod store;

pub mod repository;

pub mod jobs;

pub mod app;
pub mod cli;
pub mod config;
pub mod daemon;
