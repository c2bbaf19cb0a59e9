//! Figures for Prometheus: what is declared, what a page of samples is, and the meters that this process keeps.
//!
//! Gauges are rebuilt from what is stored whenever they are read, so that a restart forgets nothing and nothing outlives
//! what it is about. Counters count events of this process alone: what is rebuilt from records would count them again.

pub mod meters;
pub mod page;
#[cfg(test)]
mod published;
pub mod table;

pub use meters::Meters;
pub use page::Page;
