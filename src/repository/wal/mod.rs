//! The WAL of a target: frames in epochs, one owner after the other, and what is missing between them.

pub mod adopt;
#[cfg(test)]
mod beside_tests;
#[cfg(test)]
mod bundle_tests;
pub mod bundling;
pub mod claim;
pub mod closing;
pub mod frame;
pub mod frames;
pub mod gaps;
pub mod index;
pub mod left;
pub mod log;
#[cfg(test)]
mod model;
mod overlap;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod overlap_tests;
pub mod reader;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made-up data is small")]
mod replay;
pub mod seal;
