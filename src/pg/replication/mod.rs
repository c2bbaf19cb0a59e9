//! The physical replication protocol: drctl's own small client over `postgres-protocol`.
//!
//! A [`ReplicationClient`] runs one command at a time; [`ReplicationClient::start_physical`] turns it into a
//! [`WalStream`], [`ReplicationClient::base_backup`] into a [`BaseBackupStream`], and both give it back at their end.
//! Dropping any of them closes the connection, which ends the command and any temporary slot at the server.

mod backup;
mod client;
mod commands;
mod rows;
mod startup;
mod wal;
mod wire;

pub use self::backup::{BaseBackupEvent, BaseBackupOptions, BaseBackupStream, TablespaceRow};
pub use self::client::ReplicationClient;
pub use self::commands::IdentifySystem;
pub use self::wal::{StandbyStatus, WalEvent, WalStream};
pub(in crate::pg) use self::wal::{decode_status, encode_keepalive, encode_wal};
#[cfg(test)]
pub(in crate::pg) use self::wire::report as server_report;
