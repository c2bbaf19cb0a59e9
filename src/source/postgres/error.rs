//! What can go wrong while a cluster is read.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::disk::DiskError;
use crate::model::{Error, Kind, Lsn, Timeline};
use crate::pg::PgError;

/// Meanings of failure of a physical source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file that is there cannot be read.
    #[error("{path} of the data directory cannot be read")]
    Read {
        /// Relative to the data directory.
        path: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The data directory itself is not there.
    #[error("data directory {} does not exist here", .0.display())]
    NoDataDirectory(PathBuf),
    /// The directory on this host belongs to another cluster than the server that answered.
    #[error("{} is not the data directory of the server that was asked: {reason}", path.display())]
    NotThisServer {
        /// The directory.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// A link in `pg_tblspc` that no restore could recreate.
    #[error("tablespace link {link} points to {}, which is not an absolute path in UTF-8", location.display())]
    BadTablespace {
        /// Relative to the data directory.
        link: String,
        /// What it says.
        location: PathBuf,
    },
    /// The role lacks a privilege.
    #[error("not granted: {message}")]
    NotGranted {
        /// What the server said.
        message: String,
        /// The statement that a superuser must run.
        grant: String,
    },
    /// This server cannot be backed up this way.
    #[error("{0}")]
    Unsupported(String),
    /// The session that holds backup mode is gone, and backup mode with it.
    #[error("the session that holds backup mode was lost: {0}")]
    SessionLost(String),
    /// The server changed history during the backup.
    #[error("the timeline was {start} at the start of the backup and is {stop} now")]
    TimelineChanged {
        /// Before.
        start: Timeline,
        /// After.
        stop: Timeline,
    },
    /// The standby that lends its files is no standby any more.
    #[error("the standby was promoted during the backup")]
    Promoted,
    /// The standby that lends its files did not come to the start of the backup.
    #[error(
        "the standby is behind: it has replayed to {replayed}, its newest restartpoint is at {redo}, and the backup began at {start}, \
         {} s ago",
        waited.as_secs()
    )]
    StandbyBehind {
        /// Where the backup began.
        start: Lsn,
        /// Where the standby's newest restartpoint begins.
        redo: Lsn,
        /// How far it has replayed.
        replayed: Lsn,
        /// How long it was waited for.
        waited: Duration,
        /// Why it would not make a restartpoint when it was asked to.
        hint: Option<String>,
    },
    /// `global/pg_control` never read as valid.
    #[error("global/pg_control is not valid: {0}")]
    ControlFile(String),
    /// The server's archive stream or one of its answers makes no sense.
    #[error("the server's answer makes no sense: {0}")]
    Answer(String),
    /// The server counted checksum failures, and the pages received show none.
    #[error("the server found wrong page checksums that the received pages do not show: {0}")]
    UnlocatedDamage(String),
    /// The methods of a source were called out of order.
    #[error("a physical backup is begun, copied and finished once, in this order")]
    OutOfOrder,
    /// Nobody takes the items any more.
    #[error("the receiver of the backup is gone")]
    ReceiverGone,
    /// A thread ended without a result.
    #[error("a reader of the data directory died: {0}")]
    ReaderDied(String),
    /// The server or the connection to it.
    #[error(transparent)]
    Pg(#[from] PgError),
    /// The local disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl SourceError {
    /// Whether the role lacks a privilege.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Pg(error) if error.sqlstate() == Some("42501"))
    }

    /// Whether a new backup may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::SessionLost(_) | Self::Promoted | Self::StandbyBehind { .. } => true,
            Self::Pg(error) => error.is_transient(),
            Self::Disk(error) => error.is_transient(),
            _ => false,
        }
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        let transient = error.is_transient();
        let text = error.to_string();
        let public = match error {
            SourceError::Pg(error) => return error.into(),
            SourceError::Disk(error) => return error.into(),
            SourceError::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Self::failed(text)
                .because(source)
                .hint("run as the owner of the data directory, or initialise it with group access (initdb -g)"),
            SourceError::Read { source, .. } => Self::failed(text).because(source),
            SourceError::Unsupported(_) => Self::refused(text),
            SourceError::NotGranted { grant, .. } => Self::refused(text).hint(grant),
            SourceError::StandbyBehind { hint: Some(hint), .. } => Self::new(Kind::Unavailable, text)
                .because(hint)
                .hint("let the role ask for restartpoints on the standby: GRANT pg_checkpoint TO <role>; (15 and later), or raise standby_patience"),
            SourceError::Promoted | SourceError::StandbyBehind { .. } => Self::new(Kind::Unavailable, text),
            SourceError::NoDataDirectory(_) | SourceError::NotThisServer { .. } => {
                Self::refused(text).hint("run on the server's own host, or use method = \"stream\"")
            }
            SourceError::ControlFile(_) | SourceError::UnlocatedDamage(_) => Self::damaged(text),
            SourceError::SessionLost(_) => Self::new(Kind::Unavailable, text),
            SourceError::ReceiverGone => Self::new(Kind::Cancelled, text),
            _ => Self::failed(text),
        };
        public.transient(transient)
    }
}
