//! PostgreSQL clusters, by page.
//!
//! Two ways lead to the same items: [`local`] reads the data directory beside a server in backup mode, [`stream`] takes
//! the server's own base backup from anywhere. [`rules`] says what belongs in a backup, for both. [`capture`] keeps the
//! settings around the data.
//!
//! With a [`Lender`] the files are those of a standby.
//!
//! # Privileges
//! - local: the operating system's right to read the data directory, and a role with
//!   `GRANT pg_read_all_settings`, `GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean)`
//!   (13 and 14: `pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)`).
//! - stream: a role with `REPLICATION`, and a line for it in `pg_hba.conf` (database `replication`).

use self::local::LocalBackup;
pub use self::options::{Lender, Method, Options};
use self::stream::StreamBackup;
use crate::model::Result;
use crate::source::PhysicalSource;

mod archive;
pub mod capture;
pub mod conffiles;
pub mod error;
pub mod heartbeat;
pub mod listing;
pub mod local;
mod options;
mod pace;
mod packer;
mod pages;
mod reader;
pub mod room;
pub mod rules;
mod session;
mod standby;
mod started;
pub mod stream;

/// Finds the way to a cluster. Nothing changes on the server before [`PhysicalSource::begin`].
///
/// # Errors
/// The server cannot be reached, or not be backed up this way; with [`Method::Auto`], in neither way.
pub async fn open(options: Options) -> Result<Box<dyn PhysicalSource>> {
    let method = options.method;
    if let Some(lender) = &options.standby {
        match LocalBackup::open_standby(options.clone(), lender).await {
            Ok(standby) => return Ok(Box::new(standby)),
            // Preferred, not required: a backup of the primary is better than none.
            Err(error) => tracing::warn!(%error, "no standby can be read here: reading from the primary"),
        }
    }
    if method != Method::Stream {
        match LocalBackup::open(options.clone()).await {
            Ok(local) => return Ok(Box::new(local)),
            Err(error) if method == Method::Local => return Err(error.into()),
            Err(error) => tracing::info!(%error, "data directory not readable here: taking the server's base backup"),
        }
    }
    Ok(Box::new(StreamBackup::open(options).await?))
}
