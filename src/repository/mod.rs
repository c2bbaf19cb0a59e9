//! Floor 2, the vault: what is stored, where, and how it is read back.
//!
//! Writer and reader of the same bytes live in the same file. Nothing here knows what a PostgreSQL server is beyond the
//! positions in its WAL, and nothing decides when to run: jobs do.

pub mod fan_out;
pub mod layout;
pub mod page_map;
pub mod regions;
