//! The connection and its commands' common course: send, rows, prompt.

use bytes::BytesMut;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use crate::pg::PgError;
use crate::pg::conninfo::{ConnInfo, Server, SessionRole, TargetSessionAttrs};
use crate::pg::replication::rows::Row;
use crate::pg::replication::startup;
use crate::pg::replication::wire::{Wire, report, server_error, unexpected};

/// More rows than any replication command returns: one per tablespace, or one.
pub(super) const MAX_ROWS: usize = 65_536;

/// A connection to a walsender.
pub struct ReplicationClient {
    pub(super) wire: Wire,
    pub(super) server_version: u32,
    /// A command was sent and its end has not been read: after a cancelled call the answers would be taken for those of
    /// the next command.
    pub(super) busy: bool,
}

impl std::fmt::Debug for ReplicationClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationClient").field("server_version", &self.server_version).finish_non_exhaustive()
    }
}

impl ReplicationClient {
    /// Connects to the first server of `info` that is reachable and in the wanted role. The role needs REPLICATION, and
    /// pg_hba.conf a line for the database `replication`.
    ///
    /// # Errors
    /// Of the last server tried; a refused password ends the search at once.
    pub async fn connect(info: &ConnInfo) -> Result<Self, PgError> {
        let mut last = PgError::Config("no host".to_owned());
        for wanted in info.passes() {
            for server in info.servers() {
                last = match Self::connect_server(info, server, wanted).await {
                    Ok(client) => return Ok(client),
                    Err(error @ (PgError::Auth(_) | PgError::Config(_))) => return Err(error),
                    Err(error) => error,
                };
            }
        }
        Err(last)
    }

    async fn connect_server(info: &ConnInfo, server: &Server, wanted: TargetSessionAttrs) -> Result<Self, PgError> {
        let attempt = async {
            let wire = startup::authenticate(info, server).await?;
            let mut client = Self { wire, server_version: 0, busy: true };
            client.until_ready().await?;
            if wanted != TargetSessionAttrs::Any && !wanted.accepts(client.role().await?) {
                let reason = format!("not in the wanted role ({wanted:?})");
                return Err(PgError::Connect { server: server.to_string(), reason });
            }
            Ok(client)
        };
        match info.connect_timeout {
            None => attempt.await,
            Some(limit) => tokio::time::timeout(limit, attempt)
                .await
                .unwrap_or_else(|_| Err(PgError::Timeout(format!("{server} did not let us in within {limit:?}")))),
        }
    }

    /// `server_version_num`, as in 150018.
    pub fn server_version(&self) -> u32 {
        self.server_version
    }

    /// Says goodbye, which keeps "unexpected EOF" out of the server's log.
    pub async fn close(mut self) {
        frontend::terminate(&mut self.wire.output);
        // The connection ends either way.
        _ = self.wire.flush().await;
    }

    /// Whether the server is a standby.
    ///
    /// # Errors
    /// The server's.
    pub async fn role(&mut self) -> Result<SessionRole, PgError> {
        let read_only = self.show("transaction_read_only").await? == "on";
        // Before PostgreSQL 14 a walsender cannot say whether it is in recovery; there only a standby refuses writes of a
        // session that did not ask for it.
        let in_recovery = match self.server_version {
            140_000.. => self.show("in_hot_standby").await? == "on",
            _ => read_only,
        };
        Ok(SessionRole { in_recovery, read_only })
    }

    /// From the end of authentication to the first prompt.
    async fn until_ready(&mut self) -> Result<(), PgError> {
        loop {
            match self.wire.message().await? {
                Message::ReadyForQuery(_) if self.server_version > 0 => {
                    self.busy = false;
                    return Ok(());
                }
                Message::ParameterStatus(body) => {
                    let utf8 = |_| PgError::Protocol("a parameter is not UTF-8".to_owned());
                    if body.name().map_err(utf8)? == "server_version" {
                        self.server_version = version_number(body.value().map_err(utf8)?)?;
                    }
                }
                Message::BackendKeyData(_) | Message::NoticeResponse(_) => {}
                Message::ErrorResponse(body) => return Err(server_error(body.fields())),
                other => return Err(unexpected(&other, "the end of startup")),
            }
        }
    }

    /// Sends a command; the answers are the caller's, up to ReadyForQuery.
    pub(super) async fn send(&mut self, command: &str) -> Result<(), PgError> {
        if self.busy {
            return Err(PgError::Closed("an earlier command was given up half-way".to_owned()));
        }
        let write = |out: &mut BytesMut| frontend::query(command, out);
        write(&mut self.wire.output).map_err(|error| PgError::Config(error.to_string()))?;
        self.busy = true;
        self.wire.flush().await
    }

    /// Runs a command that returns rows or nothing.
    pub(super) async fn run(&mut self, command: &str) -> Result<Vec<Row>, PgError> {
        self.send(command).await?;
        let mut rows = Vec::new();
        let mut outcome = Ok(());
        loop {
            match self.wire.message().await {
                Ok(Message::DataRow(body)) if rows.len() < MAX_ROWS => rows.push(Row::read(&body)?),
                Ok(Message::RowDescription(_) | Message::CommandComplete(_) | Message::ParameterStatus(_)) => {}
                Ok(Message::NoticeResponse(body)) => {
                    let notice = report(body.fields())?;
                    tracing::debug!(message = notice.message, "notice of the server");
                }
                Ok(Message::ErrorResponse(body)) => outcome = Err(server_error(body.fields())),
                Ok(Message::ReadyForQuery(_)) => {
                    self.busy = false;
                    return outcome.map(|()| rows);
                }
                Ok(other) => return Err(unexpected(&other, "a row")),
                // After a FATAL the server hangs up; what it said last is the better reason.
                Err(closed) => return Err(outcome.err().unwrap_or(closed)),
            }
        }
    }
}

/// `15.18 (Debian …)`, `17beta2`, `18devel` as `server_version_num`.
fn version_number(text: &str) -> Result<u32, PgError> {
    let number = |text: &str| {
        let digits = text.find(|c: char| !c.is_ascii_digit()).map_or(text, |end| text.split_at(end).0);
        digits.parse::<u32>().ok().filter(|number| *number < 10_000)
    };
    let (major, rest) = text.split_once('.').unwrap_or((text, "0"));
    // Development versions name no minor: `17beta2`.
    let version = number(major).zip(number(rest)).map(|(major, minor)| major * 10_000 + minor);
    version.filter(|version| *version >= 100_000).ok_or_else(|| PgError::Protocol(format!("server version {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers() {
        assert_eq!(version_number("15.18 (Debian 15.18-0+deb12u1)").unwrap(), 150_018);
        assert_eq!(version_number("17beta2").unwrap(), 170_000);
        assert_eq!(version_number("18devel").unwrap(), 180_000);
        for text in ["", "x", "9.6.24", "99999999.1", "15.x"] {
            assert!(version_number(text).is_err(), "{text:?}");
        }
    }
}
