//! PostgreSQL clusters, by page.
//!
//! Two ways lead to the same items: [`local`] reads the data directory beside a server in backup mode, [`stream`] takes
//! the server's own base backup from anywhere. [`rules`] says what belongs in a backup, for both. [`capture`] keeps the
//! settings around the data.
//!
//! # Privileges
//! - local: the operating system's right to read the data directory, and a role with
//!   `GRANT pg_read_all_settings`, `GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean)`
//!   (13 and 14: `pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)`).
//! - stream: a role with `REPLICATION`, and a line for it in `pg_hba.conf` (database `replication`).

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use self::local::LocalBackup;
use self::stream::StreamBackup;
use crate::model::{Clock, Result};
use crate::pg::conninfo::ConnInfo;
use crate::source::PhysicalSource;

mod archive;
pub mod error;
pub mod listing;
pub mod local;
mod pace;
mod packer;
mod pages;
mod reader;
pub mod rules;
mod session;
mod started;
pub mod stream;

/// How a cluster is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Method {
    /// Local if the server's data directory is readable here, else streamed.
    #[default]
    Auto,
    /// The data directory of this host.
    Local,
    /// `BASE_BACKUP`.
    Stream,
}

/// How to take a physical backup.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server.
    pub conninfo: ConnInfo,
    /// Which way.
    pub method: Method,
    /// Where the data directory is on this host, if not where the server says (a container's mount).
    pub data_directory: Option<PathBuf>,
    /// An immediate checkpoint instead of one spread over minutes.
    pub fast: bool,
    /// For `backup_label`.
    pub label: String,
    /// Bytes per second, of all readers together.
    pub max_read_rate: Option<u64>,
    /// Reader threads of the local method; half of the cores if not given.
    pub reader_threads: Option<usize>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

impl Options {
    fn threads(&self) -> usize {
        let half = || thread::available_parallelism().map_or(1, NonZero::get) / 2;
        self.reader_threads.unwrap_or_else(half).max(1)
    }
}

/// Finds the way to a cluster. Nothing changes on the server before [`PhysicalSource::begin`].
///
/// # Errors
/// The server cannot be reached, or not be backed up this way; with [`Method::Auto`], in neither way.
pub async fn open(options: Options) -> Result<Box<dyn PhysicalSource>> {
    let method = options.method;
    if method != Method::Stream {
        match LocalBackup::open(options.clone()).await {
            Ok(local) => return Ok(Box::new(local)),
            Err(error) if method == Method::Local => return Err(error.into()),
            Err(error) => tracing::info!(%error, "data directory not readable here: taking the server's base backup"),
        }
    }
    Ok(Box::new(StreamBackup::open(options).await?))
}
