//! Floor 1a, PostgreSQL's own words: wire protocol, SQL connections, WAL records, control file, scratch servers.
//!
//! This room knows PostgreSQL and nothing of drctl's repository.

pub mod backup_manifest;
pub mod conninfo;
pub mod control;
pub mod error;
pub mod history;
pub mod instance;
pub mod label;
mod le;
pub mod libpq;
pub mod page;
pub mod replication;
pub mod sql;
pub mod tls;
pub mod wal;
pub mod walsender;

#[cfg(test)]
mod testing;

pub use error::PgError;
