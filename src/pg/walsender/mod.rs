//! The other side of the replication protocol: a walsender for standbys of this host, on a Unix socket without TLS.
//!
//! A [`Session`] is one connection of a walreceiver. It speaks the protocol and knows no WAL: whoever holds it answers
//! each [`Command`]. [`Session::accept`] does the startup; between [`Session::begin_copy`] and [`Session::end_timeline`] or
//! [`Session::end_copy`] the stream is open in both directions.

mod command;
mod message;

use bytes::{Buf, Bytes, BytesMut};
use chrono::{DateTime, Utc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::model::{Lsn, SystemId, Timeline};
use crate::pg::PgError;
use crate::pg::error::ServerReport;
use crate::pg::replication::{StandbyStatus, decode_status, encode_keepalive, encode_wal};

pub use command::Command;
use message::Column;

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
/// PostgreSQL's own limit of a startup packet.
const MAX_STARTUP: usize = 10_000;
/// The longest command, with a slot's name of 63 bytes, has a tenth of it; feedback is shorter still.
const MAX_MESSAGE: usize = 8 * 1024;
/// What a walsender puts into one message: 16 pages.
const WAL_MESSAGE: usize = 128 * 1024;
const READ_SIZE: usize = 8 * 1024;

/// Why a command is not done, in the words of PostgreSQL's errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The SQLSTATE.
    pub code: &'static str,
    /// What.
    pub message: String,
    /// Why.
    pub detail: Option<String>,
}

impl Refusal {
    /// What is asked for is in no region.
    pub const UNDEFINED_FILE: &'static str = "58P01";
    /// The command is not known here.
    pub const SYNTAX: &'static str = "42601";
    /// No such setting.
    pub const UNDEFINED_OBJECT: &'static str = "42704";
    /// It cannot be done now.
    pub const NOT_NOW: &'static str = "55000";
    /// Nothing is served any more.
    pub const SHUTDOWN: &'static str = "57P01";

    /// A refusal without a reason beside it.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None }
    }

    fn report(&self) -> ServerReport {
        let Self { code, message, detail } = self.clone();
        ServerReport { sqlstate: code.to_owned(), message, detail, hint: None }
    }
}

/// Who serves, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub system_id: SystemId,
    /// The newest timeline.
    pub timeline: Timeline,
    /// The end of its WAL.
    pub end: Lsn,
}

/// What a standby says while WAL is streamed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feedback {
    /// How far it is.
    Status(StandbyStatus),
    /// It wants no more.
    Done,
}

/// A connection of a standby. [`Self::command`] and [`Self::feedback`] are cancel-safe.
#[derive(Debug)]
pub struct Session {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    input: BytesMut,
    output: BytesMut,
}

enum Incoming {
    Query(String),
    Copy(Bytes),
    CopyDone,
    Terminate,
}

impl Session {
    /// Goes through startup; `None` if it was a request to cancel something, which ends here. `server_version` is that of
    /// the cluster whose WAL is served, as `server_version_num` says it.
    ///
    /// # Errors
    /// The connection, or somebody who wants something else than physical replication; that was told already.
    pub async fn accept(stream: UnixStream, server_version: u32) -> Result<Option<Self>, PgError> {
        let (reader, writer) = stream.into_split();
        let mut session = Self { reader, writer, input: BytesMut::new(), output: BytesMut::new() };
        loop {
            let (code, body) = session.startup_packet().await?;
            match code {
                SSL_REQUEST | GSS_REQUEST => {
                    session.output.extend_from_slice(b"N");
                    session.flush().await?;
                }
                CANCEL_REQUEST => return Ok(None),
                _ if code >> 16 == 3 => {
                    session.greet(code & 0xFFFF, &body, server_version).await?;
                    return Ok(Some(session));
                }
                _ => return Err(session.fatal(&Refusal::new("0A000", "unsupported frontend protocol")).await),
            }
        }
    }

    async fn startup_packet(&mut self) -> Result<(u32, Bytes), PgError> {
        loop {
            if let Some(mut length) = self.input.get(..4) {
                let length = usize::try_from(length.get_u32()).unwrap_or(usize::MAX);
                if !(8..=MAX_STARTUP).contains(&length) {
                    return Err(PgError::Protocol(format!("startup packet of {length} bytes")));
                }
                if self.input.len() >= length {
                    let mut packet = self.input.split_to(length).freeze();
                    packet.advance(4);
                    return Ok((packet.get_u32(), packet));
                }
            }
            self.read().await?;
        }
    }

    async fn greet(&mut self, minor: u32, body: &[u8], server_version: u32) -> Result<(), PgError> {
        let mut words = body.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let (mut replication, mut unknown) = (false, Vec::new());
        while let Some(name) = words.next().filter(|name| !name.is_empty()) {
            let value = words.next().unwrap_or_default();
            match name.as_ref() {
                // `database` would be logical replication, which has nothing to say here.
                "replication" => {
                    replication = ["true", "on", "yes", "1"].iter().any(|word| value.eq_ignore_ascii_case(word));
                }
                option if option.starts_with("_pq_.") => unknown.push(option.to_owned()),
                _ => {}
            }
        }
        if !replication {
            let refusal = Refusal::new("28000", "only physical replication is served here");
            return Err(self.fatal(&refusal).await);
        }
        if minor > 0 || !unknown.is_empty() {
            message::negotiate(&mut self.output, &unknown);
        }
        message::authentication_ok(&mut self.output);
        let version = format!("{}.{}", server_version / 10_000, server_version % 10_000);
        for (name, value) in [
            ("server_version", version.as_str()),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
        ] {
            message::parameter(&mut self.output, name, value);
        }
        message::backend_key(&mut self.output);
        message::ready(&mut self.output);
        self.flush().await
    }

    /// The next command; `None` when the standby has gone. What is no command of a physical walsender is refused here.
    ///
    /// # Errors
    /// The connection.
    pub async fn command(&mut self) -> Result<Option<Command>, PgError> {
        loop {
            let text = match self.incoming().await {
                Ok(Incoming::Query(text)) => text,
                Ok(Incoming::Terminate) | Err(PgError::Closed(_)) => return Ok(None),
                // What was on its way when a copy ended.
                Ok(Incoming::Copy(_) | Incoming::CopyDone) => continue,
                Err(error) => return Err(error),
            };
            match Command::parse(&text) {
                Some(command) => return Ok(Some(command)),
                None => self.refuse(&Refusal::new(Refusal::SYNTAX, format!("not known here: {text:.80}"))).await?,
            }
        }
    }

    /// Says no to a command.
    ///
    /// # Errors
    /// The connection.
    pub async fn refuse(&mut self, refusal: &Refusal) -> Result<(), PgError> {
        message::error(&mut self.output, "ERROR", &refusal.report());
        message::ready(&mut self.output);
        self.flush().await
    }

    /// Tells why the connection ends. Gives what ends it.
    pub async fn fatal(&mut self, refusal: &Refusal) -> PgError {
        message::error(&mut self.output, "FATAL", &refusal.report());
        match self.flush().await {
            Ok(()) => PgError::Closed(refusal.message.clone()),
            Err(error) => error,
        }
    }

    /// The answer to [`Command::IdentifySystem`].
    ///
    /// # Errors
    /// The connection.
    pub async fn identify(&mut self, identity: &Identity) -> Result<(), PgError> {
        let Identity { system_id, timeline, end } = identity;
        let columns =
            [Column::Text("systemid"), Column::Int8("timeline"), Column::Text("xlogpos"), Column::Text("dbname")];
        let (system_id, timeline, end) = (system_id.to_string(), timeline.to_string(), end.to_string());
        let values = [Some(system_id.as_bytes()), Some(timeline.as_bytes()), Some(end.as_bytes()), None];
        self.result(&columns, &values, "IDENTIFY_SYSTEM").await
    }

    /// The answer to [`Command::Show`].
    ///
    /// # Errors
    /// The connection.
    pub async fn show(&mut self, value: &str) -> Result<(), PgError> {
        self.result(&[Column::Text("setting")], &[Some(value.as_bytes())], "SHOW").await
    }

    /// The answer to [`Command::TimelineHistory`]: the file as its server wrote it.
    ///
    /// # Errors
    /// The connection.
    pub async fn history(&mut self, timeline: Timeline, content: &[u8]) -> Result<(), PgError> {
        let name = timeline.history_file_name();
        let values = [Some(name.as_bytes()), Some(content)];
        self.result(&[Column::Text("filename"), Column::Text("content")], &values, "TIMELINE_HISTORY").await
    }

    /// The answer to [`Command::ReadSlot`]: nothing keeps a slot here.
    ///
    /// # Errors
    /// The connection.
    pub async fn no_slot(&mut self) -> Result<(), PgError> {
        let columns = [Column::Text("slot_type"), Column::Text("restart_lsn"), Column::Int8("restart_tli")];
        self.result(&columns, &[None, None, None], "READ_REPLICATION_SLOT").await
    }

    /// The answer to [`Command::CreateSlot`]. Nothing is kept for it: WAL goes by the retention of its repository.
    ///
    /// # Errors
    /// The connection.
    pub async fn slot_created(&mut self, name: &str, at: Lsn) -> Result<(), PgError> {
        let columns = [
            Column::Text("slot_name"),
            Column::Text("consistent_point"),
            Column::Text("snapshot_name"),
            Column::Text("output_plugin"),
        ];
        let at = at.to_string();
        let values = [Some(name.as_bytes()), Some(at.as_bytes()), None, None];
        self.result(&columns, &values, "CREATE_REPLICATION_SLOT").await
    }

    async fn result(&mut self, columns: &[Column], values: &[Option<&[u8]>], tag: &str) -> Result<(), PgError> {
        message::row(&mut self.output, columns, values);
        message::complete(&mut self.output, tag);
        message::ready(&mut self.output);
        self.flush().await
    }

    /// The stream is open.
    ///
    /// # Errors
    /// The connection.
    pub async fn begin_copy(&mut self) -> Result<(), PgError> {
        message::copy_both(&mut self.output);
        self.flush().await
    }

    /// Sends WAL that begins at `start`, in messages of a walsender's size.
    ///
    /// # Errors
    /// The connection.
    pub async fn send_wal(&mut self, start: Lsn, wal: &[u8], now: DateTime<Utc>) -> Result<(), PgError> {
        let end = Lsn(start.0 + wal.len() as u64);
        let mut at = start;
        for piece in wal.chunks(WAL_MESSAGE) {
            message::copy_data(&mut self.output, &encode_wal((at, end), now, piece));
            at.0 += piece.len() as u64;
            self.flush().await?;
        }
        Ok(())
    }

    /// Says that this side is alive, and asks how far the standby is.
    ///
    /// # Errors
    /// The connection.
    pub async fn keepalive(&mut self, end: Lsn, now: DateTime<Utc>, reply: bool) -> Result<(), PgError> {
        message::copy_data(&mut self.output, &encode_keepalive(end, now, reply));
        self.flush().await
    }

    /// What the standby says next.
    ///
    /// # Errors
    /// The connection.
    pub async fn feedback(&mut self) -> Result<Feedback, PgError> {
        loop {
            match self.incoming().await? {
                Incoming::Copy(payload) => {
                    if let Some(status) = decode_status(payload)? {
                        return Ok(Feedback::Status(status));
                    }
                }
                Incoming::CopyDone => return Ok(Feedback::Done),
                Incoming::Terminate => return Err(PgError::Closed("by the standby".to_owned())),
                Incoming::Query(_) => return Err(PgError::Protocol("a command inside of a copy".to_owned())),
            }
        }
    }

    /// The timeline ends: tells which one goes on, and from where. All WAL before it has been sent.
    ///
    /// # Errors
    /// The connection.
    pub async fn end_timeline(&mut self, next: (Timeline, Lsn)) -> Result<(), PgError> {
        message::copy_done(&mut self.output);
        self.flush().await?;
        while self.feedback().await? != Feedback::Done {}
        self.next_timeline(next).await
    }

    /// The answer to a start exactly at the end of a timeline: nothing to copy, and which one goes on.
    ///
    /// # Errors
    /// The connection.
    pub async fn next_timeline(&mut self, (timeline, switch): (Timeline, Lsn)) -> Result<(), PgError> {
        let (timeline, switch) = (timeline.to_string(), switch.to_string());
        let columns = [Column::Int8("next_tli"), Column::Text("next_tli_startpos")];
        message::row(&mut self.output, &columns, &[Some(timeline.as_bytes()), Some(switch.as_bytes())]);
        self.streamed().await
    }

    /// The standby wants no more, [`Feedback::Done`] said so.
    ///
    /// # Errors
    /// The connection.
    pub async fn end_copy(&mut self) -> Result<(), PgError> {
        message::copy_done(&mut self.output);
        self.streamed().await
    }

    /// A walsender ends streaming and the command with a tag each, and walreceivers count on both.
    async fn streamed(&mut self) -> Result<(), PgError> {
        message::complete(&mut self.output, "START_STREAMING");
        message::complete(&mut self.output, "START_REPLICATION");
        message::ready(&mut self.output);
        self.flush().await
    }

    async fn incoming(&mut self) -> Result<Incoming, PgError> {
        loop {
            if let Some((tag, body)) = split_message(&mut self.input)? {
                match tag {
                    b'Q' => {
                        let text = body.strip_suffix(&[0]).unwrap_or(&body);
                        return Ok(Incoming::Query(String::from_utf8_lossy(text).into_owned()));
                    }
                    b'd' => return Ok(Incoming::Copy(body)),
                    b'c' => return Ok(Incoming::CopyDone),
                    b'X' => return Ok(Incoming::Terminate),
                    // Flush and Sync ask for nothing that is not done anyway.
                    b'H' | b'S' => {}
                    other => {
                        let what = format!("message {:?} of a standby is not expected", char::from(other));
                        return Err(PgError::Protocol(what));
                    }
                }
                continue;
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), PgError> {
        self.input.reserve(READ_SIZE);
        match self.reader.read_buf(&mut self.input).await {
            Ok(0) => Err(PgError::Closed("by the standby".to_owned())),
            Ok(_) => Ok(()),
            Err(error) => Err(PgError::from_read(&error)),
        }
    }

    /// Reads beside it: two sides that both write and wait would wait for ever.
    async fn flush(&mut self) -> Result<(), PgError> {
        while self.output.has_remaining() {
            let room = self.input.len() < 16 * MAX_MESSAGE;
            self.input.reserve(READ_SIZE);
            tokio::select! {
                written = self.writer.write_buf(&mut self.output) => {
                    written.map_err(|error| PgError::from_read(&error))?;
                }
                read = self.reader.read_buf(&mut self.input), if room => match read {
                    Ok(0) => return Err(PgError::Closed("by the standby".to_owned())),
                    Ok(_) => {}
                    Err(error) => return Err(PgError::from_read(&error)),
                },
            }
        }
        Ok(())
    }
}

/// Cuts the first whole message off: its tag and its body.
fn split_message(input: &mut BytesMut) -> Result<Option<(u8, Bytes)>, PgError> {
    let Some(mut head) = input.get(..5) else { return Ok(None) };
    let (tag, length) = (head.get_u8(), usize::try_from(head.get_u32()).unwrap_or(usize::MAX));
    if !(4..=MAX_MESSAGE).contains(&length) {
        return Err(PgError::Protocol(format!("message of {length} bytes from a standby")));
    }
    if input.len() <= length {
        return Ok(None);
    }
    let mut message = input.split_to(length + 1).freeze();
    message.advance(5);
    Ok(Some((tag, message)))
}

#[cfg(test)]
mod tests;
