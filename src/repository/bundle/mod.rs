//! Many frames of WAL in one object, and their own names for whoever lists a region.

pub mod form;
pub mod view;
