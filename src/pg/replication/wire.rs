//! Messages on a stream: buffered, length-checked, cancel-safe.

use std::io;

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{ErrorFields, Header, Message};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::pg::PgError;
use crate::pg::error::ServerReport;

/// The stream under the protocol: TCP, a Unix socket, or TLS.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Duplex for S {}

/// Before authentication anybody may be at the other end; libpq allows as little.
const MAX_BEFORE_AUTHENTICATION: usize = 32 * 1024;
/// Walsenders send at most 16 WAL blocks (1 MiB with the largest block size) in one message, BASE_BACKUP 32 KiB; history
/// files and errors are smaller.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
const READ_SIZE: usize = 256 * 1024;
const COPY_BOTH_TAG: u8 = b'W';

/// One message of the server.
pub(super) enum Frame {
    /// `CopyBothResponse`, which postgres-protocol does not know.
    CopyBoth,
    /// Any other.
    Message(Message),
}

/// A connection in terms of messages. [`Self::receive`] and [`Self::flush`] are cancel-safe: what was read or not yet
/// written stays in the buffers.
pub(super) struct Wire {
    io: Box<dyn Duplex>,
    input: BytesMut,
    /// Append to it with `postgres_protocol::message::frontend`, then [`Wire::flush`].
    pub(super) output: BytesMut,
    limit: usize,
    unflushed: bool,
}

impl Wire {
    pub(super) fn new(io: Box<dyn Duplex>) -> Self {
        let limit = MAX_BEFORE_AUTHENTICATION;
        Self { io, input: BytesMut::new(), output: BytesMut::new(), limit, unflushed: false }
    }

    /// The server has proven itself: messages may have their full size.
    pub(super) fn authenticated(&mut self) {
        self.limit = MAX_MESSAGE;
    }

    pub(super) async fn flush(&mut self) -> Result<(), PgError> {
        while self.output.has_remaining() {
            self.unflushed = true;
            match self.io.write_buf(&mut self.output).await {
                Ok(0) => return Err(PgError::from_read(&io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) => return Err(PgError::from_read(&error)),
            }
        }
        if self.unflushed {
            self.io.flush().await.map_err(|error| PgError::from_read(&error))?;
            self.unflushed = false;
        }
        Ok(())
    }

    /// The next message, after everything in `output` has been sent.
    pub(super) async fn receive(&mut self) -> Result<Frame, PgError> {
        self.flush().await?;
        loop {
            if let Some(frame) = parse(&mut self.input, self.limit)? {
                return Ok(frame);
            }
            self.input.reserve(READ_SIZE);
            match self.io.read_buf(&mut self.input).await {
                Ok(0) => return Err(PgError::Closed("by the server".to_owned())),
                Ok(_) => {}
                Err(error) => return Err(PgError::from_read(&error)),
            }
        }
    }

    /// [`Self::receive`] without `CopyBothResponse`.
    pub(super) async fn message(&mut self) -> Result<Message, PgError> {
        match self.receive().await? {
            Frame::Message(message) => Ok(message),
            Frame::CopyBoth => Err(PgError::Protocol("a copy begins that nobody asked for".to_owned())),
        }
    }
}

fn parse(input: &mut BytesMut, limit: usize) -> Result<Option<Frame>, PgError> {
    let Some(header) = Header::parse(input).map_err(|error| malformed(&error))? else { return Ok(None) };
    let length = usize::try_from(header.len()).unwrap_or(usize::MAX);
    if length > limit {
        return Err(PgError::Protocol(format!("message of {length} bytes, at most {limit} are expected")));
    }
    if header.tag() != COPY_BOTH_TAG {
        let message = Message::parse(input).map_err(|error| malformed(&error))?;
        return Ok(message.map(Frame::Message));
    }
    if input.len() <= length {
        return Ok(None);
    }
    // i8 overall format, i16 columns, i16 format of each: a walsender announces binary-agnostic copying of no column.
    let body = input.split_to(length + 1).split_off(5);
    match *body.as_ref() {
        [0 | 1, high, low, ref formats @ ..] if formats.len() == 2 * usize::from(u16::from_be_bytes([high, low])) => {
            Ok(Some(Frame::CopyBoth))
        }
        _ => Err(PgError::Protocol("malformed CopyBothResponse".to_owned())),
    }
}

pub(super) fn malformed(error: &io::Error) -> PgError {
    PgError::Protocol(error.to_string())
}

/// Names the message that came instead of the expected one, without its contents.
pub(super) fn unexpected(message: &Message, expected: &str) -> PgError {
    let name = match message {
        Message::CommandComplete(_) => "CommandComplete",
        Message::CopyData(_) => "CopyData",
        Message::CopyDone => "CopyDone",
        Message::CopyInResponse(_) => "CopyInResponse",
        Message::CopyOutResponse(_) => "CopyOutResponse",
        Message::DataRow(_) => "DataRow",
        Message::ReadyForQuery(_) => "ReadyForQuery",
        Message::RowDescription(_) => "RowDescription",
        _ => "another message",
    };
    PgError::Protocol(format!("{name} where {expected} was expected"))
}

/// Reads an ErrorResponse or NoticeResponse; text that is not UTF-8 (before the client encoding is in force) is kept
/// readable.
pub(in crate::pg) fn report(mut fields: ErrorFields<'_>) -> Result<ServerReport, PgError> {
    let mut report = ServerReport::default();
    while let Some(field) = fields.next().map_err(|error| malformed(&error))? {
        let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => report.sqlstate = text,
            b'M' => report.message = text,
            b'D' => report.detail = Some(text),
            b'H' => report.hint = Some(text),
            _ => {}
        }
    }
    Ok(report)
}

/// The error inside an ErrorResponse.
pub(super) fn server_error(fields: ErrorFields<'_>) -> PgError {
    match report(fields) {
        Ok(report) => PgError::from_server(report),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prop_assert, proptest};

    use super::*;

    #[test]
    fn copy_both_is_recognised_once_complete() {
        let bytes = b"W\0\0\0\x07\0\0\0";
        for cut in 0..bytes.len() {
            assert!(parse(&mut BytesMut::from(&bytes[..cut]), 64).unwrap().is_none());
        }
        let mut whole = BytesMut::from(&bytes[..]);
        assert!(matches!(parse(&mut whole, 64), Ok(Some(Frame::CopyBoth))));
        assert!(whole.is_empty());
        assert!(parse(&mut BytesMut::from(&b"W\0\0\0\x07\0\0\x01"[..]), 64).is_err());
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_any_memory_is_reserved() {
        let mut input = BytesMut::from(&b"d\x7f\xff\xff\xff"[..]);
        assert!(matches!(parse(&mut input, MAX_MESSAGE), Err(PgError::Protocol(_))));
        assert!(parse(&mut BytesMut::from(&b"d\0\0\0\x03"[..]), MAX_MESSAGE).is_err());
        assert!(parse(&mut BytesMut::from(&b"d\xff\xff\xff\xff"[..]), MAX_MESSAGE).is_err());
        assert!(input.capacity() < 1024);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(tag in "[EWNRSKZCDdHTtAvcn]", body in vec(0u8.., 0..48)) {
            let length = u32::try_from(body.len() + 4).unwrap();
            let mut input = BytesMut::from(tag.as_bytes());
            input.extend_from_slice(&length.to_be_bytes());
            input.extend_from_slice(&body);
            if let Ok(Some(Frame::Message(message))) = parse(&mut input, 64) {
                prop_assert!(input.is_empty());
                match message {
                    Message::ErrorResponse(body) => _ = server_error(body.fields()),
                    Message::NoticeResponse(body) => _ = report(body.fields()),
                    Message::DataRow(body) => _ = super::super::rows::Row::read(&body),
                    _ => {}
                }
            }
        }
    }
}
