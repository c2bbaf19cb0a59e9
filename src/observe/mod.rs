//! To be furnished.

pub mod task;
