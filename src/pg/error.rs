//! What can go wrong between drctl and a PostgreSQL server.

use std::io;

use crate::model::{Error, Lsn};

/// Meanings of failure on a connection to PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgError {
    /// No connection to the server: refused, unreachable, name not found, or not in the wanted role.
    #[error("server {server} not reached: {reason}")]
    Connect {
        /// `host:port` or the socket.
        server: String,
        /// What the operating system or the server said.
        reason: String,
    },
    /// The TLS handshake failed or the certificate is not acceptable.
    #[error("no TLS with {server}: {reason}")]
    Tls {
        /// `host:port`.
        server: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server does not accept our credentials, or we do not accept its way of asking for them.
    #[error("not authenticated: {0}")]
    Auth(String),
    /// An ERROR or FATAL of the server that has no meaning of its own here.
    #[error("server says {sqlstate}: {message}{}", detail.as_ref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Server {
        /// Five characters.
        sqlstate: String,
        /// The primary message.
        message: String,
        /// More of it.
        detail: Option<String>,
        /// The server's advice.
        hint: Option<String>,
    },
    /// The server no longer has the WAL that was asked for: a gap, which no retry closes.
    #[error("WAL from {start} is no longer on the server: {message}")]
    WalRemoved {
        /// Where streaming was to continue.
        start: Lsn,
        /// The server's message, which names the segment.
        message: String,
    },
    /// Another receiver holds the slot.
    #[error("replication slot in use: {0}")]
    SlotInUse(String),
    /// The server sent what the protocol does not allow; the connection is useless from here on.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The connection ended.
    #[error("connection closed: {0}")]
    Closed(String),
    /// No answer in time.
    #[error("timeout: {0}")]
    Timeout(String),
    /// This server cannot do it.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The connection settings or an argument are wrong; nothing was sent.
    #[error("{0}")]
    Config(String),
}

impl PgError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::SlotInUse(_) | Self::Closed(_) | Self::Timeout(_) => true,
            Self::Server { sqlstate, .. } => {
                let class = ["08", "53"].iter().any(|class| sqlstate.starts_with(class));
                // Shutdown, crash, starting up, idle timeout; serialisation, deadlock, lock timeout.
                let one = ["57P01", "57P02", "57P03", "57P05", "40001", "40P01", "55P03"];
                class || one.contains(&sqlstate.as_str())
            }
            Self::Tls { .. }
            | Self::Auth(_)
            | Self::WalRemoved { .. }
            | Self::Protocol(_)
            | Self::Unsupported(_)
            | Self::Config(_) => false,
        }
    }

    /// The SQLSTATE, if the server sent an error that is kept as such.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server { sqlstate, .. } => Some(sqlstate),
            _ => None,
        }
    }

    /// Gives meanings to the states that have one wherever they appear.
    pub(crate) fn from_server(report: ServerReport) -> Self {
        let ServerReport { sqlstate, message, detail, hint } = report;
        match sqlstate.as_str() {
            "55006" if message.contains("replication slot") => Self::SlotInUse(message),
            // invalid_authorization_specification covers "no pg_hba.conf entry", which is 28000.
            state if state.starts_with("28") => Self::Auth(message),
            _ => Self::Server { sqlstate, message, detail, hint },
        }
    }

    pub(crate) fn from_read(error: &io::Error) -> Self {
        Self::Closed(error.to_string())
    }
}

/// The fields of an ErrorResponse or NoticeResponse that drctl uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ServerReport {
    pub(crate) sqlstate: String,
    pub(crate) message: String,
    pub(crate) detail: Option<String>,
    pub(crate) hint: Option<String>,
}

impl From<PgError> for Error {
    fn from(error: PgError) -> Self {
        let transient = error.is_transient();
        let text = error.to_string();
        let public = match error {
            PgError::Connect { .. } | PgError::Closed(_) | PgError::Timeout(_) | PgError::SlotInUse(_) => {
                Self::new(crate::model::Kind::Unavailable, text)
            }
            PgError::Tls { .. } => Self::failed(text)
                .hint("the certificate must name the host and be signed by sslrootcert or a system authority"),
            PgError::Auth(_) => Self::failed(text).hint("check user, password and pg_hba.conf of the server"),
            PgError::Server { hint, .. } => match hint {
                Some(hint) => Self::failed(text).hint(hint),
                None => Self::failed(text),
            },
            PgError::WalRemoved { .. } => Self::refused(text).hint("take a new base backup: the WAL before has a gap"),
            PgError::Protocol(_) => Self::failed(text),
            PgError::Unsupported(_) => Self::refused(text),
            PgError::Config(_) => Self::usage(text),
        };
        public.transient(transient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn server(sqlstate: &str) -> PgError {
        let report = ServerReport {
            sqlstate: sqlstate.to_owned(),
            message: "replication slot x".to_owned(),
            ..Default::default()
        };
        PgError::from_server(report)
    }

    #[test]
    fn states_get_their_meanings() {
        assert!(matches!(server("55006"), PgError::SlotInUse(_)));
        assert!(matches!(server("28P01"), PgError::Auth(_)));
        assert!(matches!(server("28000"), PgError::Auth(_)));
        assert!(server("57P03").is_transient());
        assert!(server("53300").is_transient());
        assert!(!server("42501").is_transient());
    }

    #[test]
    fn a_gap_is_refused_and_never_retried() {
        let error: Error = PgError::WalRemoved { start: Lsn(0x0100_0000), message: "gone".to_owned() }.into();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(!error.is_transient());
    }
}
