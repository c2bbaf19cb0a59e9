//! The seams' contracts, each proven on every real implementation.

mod floe;
mod keys;
