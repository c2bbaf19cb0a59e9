//! How to take a physical backup.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::model::Clock;
use crate::pg::conninfo::ConnInfo;

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

/// A standby on this host whose files are read in place of the primary's.
#[derive(Debug, Clone)]
pub struct Lender {
    /// How to reach it.
    pub conninfo: ConnInfo,
    /// How long a backup waits for it to reach its start.
    pub patience: Duration,
}

/// How to take a physical backup.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server.
    pub conninfo: ConnInfo,
    /// Which way.
    pub method: Method,
    /// Where the data directory (a standby's, with one) is on this host, if not where its server says (a container's mount).
    pub data_directory: Option<PathBuf>,
    /// An immediate checkpoint instead of one spread over minutes.
    pub fast: bool,
    /// For `backup_label`.
    pub label: String,
    /// Bytes per second, of all readers together.
    pub max_read_rate: Option<u64>,
    /// Reader threads of the local method; half of the cores if not given.
    pub reader_threads: Option<usize>,
    /// The standby whose files are read instead, if it can be.
    pub standby: Option<Lender>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

impl Options {
    /// How many threads read.
    pub(super) fn threads(&self) -> usize {
        let half = || thread::available_parallelism().map_or(1, NonZero::get) / 2;
        self.reader_threads.unwrap_or_else(half).max(1)
    }
}
