//! Streaming WAL: `START_REPLICATION PHYSICAL`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use chrono::{DateTime, Utc};
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend::{self, CopyData};

use crate::model::{Lsn, Timeline};
use crate::pg::PgError;
use crate::pg::error::ServerReport;
use crate::pg::replication::client::ReplicationClient;
use crate::pg::replication::commands::slot_name;
use crate::pg::replication::rows::Row;
use crate::pg::replication::wire::{Frame, malformed, report, unexpected};

/// 2000-01-01, from which PostgreSQL counts its microseconds.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// What arrives on a WAL stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// WAL bytes, contiguous from one event to the next.
    Wal {
        /// The position of the first byte.
        start: Lsn,
        /// The end of WAL at the server, as far as it is being sent.
        server_end: Lsn,
        /// The server's clock when it sent this.
        server_time: DateTime<Utc>,
        /// The bytes; cut anywhere, never empty.
        data: Bytes,
    },
    /// The server is alive.
    KeepAlive {
        /// What it has sent up to.
        server_end: Lsn,
        /// The server's clock.
        server_time: DateTime<Utc>,
        /// It will hang up unless a status arrives soon.
        reply_requested: bool,
    },
    /// The timeline ends here: the server continued on another one. All WAL up to `switch_lsn` has been delivered.
    TimelineEnd {
        /// Where the history continues.
        next_timeline: Timeline,
        /// The first position that belongs to it.
        switch_lsn: Lsn,
    },
}

/// How far the receiver is. The server frees WAL up to `flush` and, if it waits for this receiver, lets commits return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Received.
    pub write: Lsn,
    /// Durable, by whatever the receiver means by it.
    pub flush: Lsn,
    /// Applied.
    pub apply: Lsn,
    /// Asks the server for a keepalive.
    pub reply_requested: bool,
}

/// A running stream. [`Self::next`] and [`Self::send_status`] are cancel-safe.
#[derive(Debug)]
pub struct WalStream {
    client: ReplicationClient,
    timeline: Timeline,
    /// The position that the next byte must have.
    expected: Lsn,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Streaming,
    /// CopyDone was received and answered; the next timeline follows as a row.
    Ending(Option<(Timeline, Lsn)>),
    Ended(Timeline, Lsn),
    Failed,
}

impl ReplicationClient {
    /// Streams WAL of `timeline` from `start`.
    ///
    /// # Errors
    /// [`PgError::WalRemoved`], [`PgError::SlotInUse`], or the server does not know the timeline or the position. The
    /// first may also come from [`WalStream::next`]: the server looks for the segment only after it has agreed to stream.
    pub async fn start_physical(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: Timeline,
    ) -> Result<WalStream, PgError> {
        let slot =
            slot.map(|name| slot_name(name).map(|name| format!("SLOT {name} "))).transpose()?.unwrap_or_default();
        self.send(&format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}")).await?;
        let state = loop {
            match self.wire.receive().await? {
                Frame::CopyBoth => break State::Streaming,
                // Exactly at the end of a finished timeline there is nothing to copy, only the name of the next one.
                Frame::Message(Message::RowDescription(_)) => break State::Ending(None),
                Frame::Message(Message::NoticeResponse(_) | Message::ParameterStatus(_)) => {}
                Frame::Message(Message::ErrorResponse(body)) => return Err(stream_error(&body, start)),
                Frame::Message(other) => return Err(unexpected(&other, "the beginning of the stream")),
            }
        };
        Ok(WalStream { client: self, timeline, expected: start, state })
    }
}

impl WalStream {
    /// Waits for the next event. After [`WalEvent::TimelineEnd`] it returns the same again; after an error, errors.
    ///
    /// # Errors
    /// The connection, [`PgError::WalRemoved`], or [`PgError::Protocol`] if a byte is missing or repeated. The stream is
    /// of no further use.
    pub async fn next(&mut self) -> Result<WalEvent, PgError> {
        loop {
            let step = match self.state {
                State::Ended(next_timeline, switch_lsn) => {
                    return Ok(WalEvent::TimelineEnd { next_timeline, switch_lsn });
                }
                State::Failed => return Err(PgError::Closed("the stream failed before".to_owned())),
                State::Streaming | State::Ending(_) => match self.client.wire.message().await {
                    Ok(message) => self.step(message),
                    Err(error) => Err(error),
                },
            };
            match step {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => {}
                Err(error) => {
                    self.state = State::Failed;
                    return Err(error);
                }
            }
        }
    }

    /// Reports progress; `now` is this side's clock. Does nothing once the timeline has ended.
    ///
    /// # Errors
    /// The connection.
    pub async fn send_status(&mut self, status: StandbyStatus, now: DateTime<Utc>) -> Result<(), PgError> {
        if self.state != State::Streaming {
            return Ok(());
        }
        let message = CopyData::new(encode_status(status, now)).map_err(|error| malformed(&error))?;
        message.write(&mut self.client.wire.output);
        self.client.wire.flush().await
    }

    /// The position of the next byte.
    pub fn position(&self) -> Lsn {
        self.expected
    }

    /// The timeline that is being streamed.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Ends the stream and gives the connection back; WAL still on its way is thrown away.
    ///
    /// # Errors
    /// The connection, or the stream had failed.
    pub async fn stop(mut self) -> Result<ReplicationClient, PgError> {
        if self.state == State::Streaming {
            frontend::copy_done(&mut self.client.wire.output);
        }
        while !matches!(self.state, State::Ended(..)) {
            if self.state == State::Failed {
                return Err(PgError::Closed("the stream failed before".to_owned()));
            }
            match self.client.wire.message().await? {
                Message::ReadyForQuery(_) => break,
                Message::ErrorResponse(body) => return Err(stream_error(&body, self.expected)),
                _ => {}
            }
        }
        self.client.busy = false;
        Ok(self.client)
    }

    fn step(&mut self, message: Message) -> Result<Option<WalEvent>, PgError> {
        match (self.state, message) {
            (_, Message::ErrorResponse(body)) => Err(stream_error(&body, self.expected)),
            (_, Message::NoticeResponse(_) | Message::ParameterStatus(_)) => Ok(None),
            (State::Streaming, Message::CopyData(body)) => self.decode(body.into_bytes()),
            (State::Streaming, Message::CopyDone) => {
                // The row with the next timeline comes only after our own end of the copy.
                frontend::copy_done(&mut self.client.wire.output);
                self.state = State::Ending(None);
                Ok(None)
            }
            (State::Streaming, Message::CommandComplete(_)) => Err(PgError::Closed("the server shuts down".to_owned())),
            (State::Ending(None), Message::DataRow(body)) => {
                self.state = State::Ending(Some(self.next_timeline(&Row::read(&body)?)?));
                Ok(None)
            }
            (State::Ending(_), Message::RowDescription(_) | Message::CommandComplete(_)) => Ok(None),
            (State::Ending(Some((next_timeline, switch_lsn))), Message::ReadyForQuery(_)) => {
                self.state = State::Ended(next_timeline, switch_lsn);
                self.client.busy = false;
                Ok(Some(WalEvent::TimelineEnd { next_timeline, switch_lsn }))
            }
            (State::Ending(None), Message::ReadyForQuery(_)) => {
                Err(PgError::Closed("the server ended the stream without naming the next timeline".to_owned()))
            }
            (_, other) => Err(unexpected(&other, "WAL")),
        }
    }

    fn next_timeline(&self, row: &Row) -> Result<(Timeline, Lsn), PgError> {
        let (next, switch): (Timeline, Lsn) = (row.timeline(0)?, row.value(1)?);
        // All of the old timeline must be here before the new one is believed: a hole at the switch would be silent.
        if next <= self.timeline || switch != self.expected {
            let (timeline, expected) = (self.timeline, self.expected);
            let text = format!("timeline {timeline} ends at {expected} and continues as {next} from {switch}");
            return Err(PgError::Protocol(text));
        }
        Ok((next, switch))
    }

    fn decode(&mut self, payload: Bytes) -> Result<Option<WalEvent>, PgError> {
        let event = decode(payload)?;
        if let Some(WalEvent::Wal { start, data, .. }) = &event {
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            let end = start
                .checked_add(length)
                .filter(|_| *start == self.expected)
                .ok_or_else(|| PgError::Protocol(format!("WAL at {start} where {} was expected", self.expected)))?;
            self.expected = end;
        }
        Ok(event)
    }
}

/// Reads the payload of one CopyData; `None` for one that carries nothing.
fn decode(mut payload: Bytes) -> Result<Option<WalEvent>, PgError> {
    let short = |_| PgError::Protocol("truncated message on the WAL stream".to_owned());
    if payload.is_empty() {
        return Ok(None);
    }
    match payload.get_u8() {
        b'w' => {
            let start = Lsn(payload.try_get_u64().map_err(short)?);
            let server_end = Lsn(payload.try_get_u64().map_err(short)?);
            let server_time = time(payload.try_get_i64().map_err(short)?)?;
            let event = WalEvent::Wal { start, server_end, server_time, data: payload.clone() };
            Ok((!payload.is_empty()).then_some(event))
        }
        b'k' => {
            let server_end = Lsn(payload.try_get_u64().map_err(short)?);
            let server_time = time(payload.try_get_i64().map_err(short)?)?;
            let reply_requested = payload.try_get_u8().map_err(short)? != 0;
            Ok(Some(WalEvent::KeepAlive { server_end, server_time, reply_requested }))
        }
        tag => Err(PgError::Protocol(format!("unknown message {:?} on the WAL stream", char::from(tag)))),
    }
}

/// The payload that [`decode`] reads as WAL.
pub(in crate::pg) fn encode_wal((start, server_end): (Lsn, Lsn), now: DateTime<Utc>, data: &[u8]) -> BytesMut {
    let mut message = BytesMut::with_capacity(25 + data.len());
    message.put_u8(b'w');
    message.put_u64(start.0);
    message.put_u64(server_end.0);
    message.put_i64(micros(now));
    message.put_slice(data);
    message
}

/// The payload that [`decode`] reads as a sign of life.
pub(in crate::pg) fn encode_keepalive(server_end: Lsn, now: DateTime<Utc>, reply_requested: bool) -> BytesMut {
    let mut message = BytesMut::with_capacity(18);
    message.put_u8(b'k');
    message.put_u64(server_end.0);
    message.put_i64(micros(now));
    message.put_u8(u8::from(reply_requested));
    message
}

/// Reads what [`encode_status`] wrote; `None` for hot standby feedback, which asks for nothing here.
pub(in crate::pg) fn decode_status(mut payload: Bytes) -> Result<Option<StandbyStatus>, PgError> {
    let short = |_| PgError::Protocol("truncated status of a standby".to_owned());
    match payload.try_get_u8().map_err(short)? {
        b'r' => {
            let mut lsn = || payload.try_get_u64().map(Lsn).map_err(short);
            let (write, flush, apply) = (lsn()?, lsn()?, lsn()?);
            time(payload.try_get_i64().map_err(short)?)?;
            let reply_requested = payload.try_get_u8().map_err(short)? != 0;
            Ok(Some(StandbyStatus { write, flush, apply, reply_requested }))
        }
        b'h' => Ok(None),
        tag => Err(PgError::Protocol(format!("unknown message {:?} of a standby", char::from(tag)))),
    }
}

/// `'r'`, write, flush, apply, clock, reply: 34 bytes.
fn encode_status(status: StandbyStatus, now: DateTime<Utc>) -> BytesMut {
    let mut message = BytesMut::with_capacity(34);
    message.put_u8(b'r');
    message.put_u64(status.write.0);
    message.put_u64(status.flush.0);
    message.put_u64(status.apply.0);
    message.put_i64(micros(now));
    message.put_u8(u8::from(status.reply_requested));
    message
}

fn micros(time: DateTime<Utc>) -> i64 {
    time.timestamp_micros().saturating_sub(POSTGRES_EPOCH_MICROS)
}

fn time(micros: i64) -> Result<DateTime<Utc>, PgError> {
    let time = micros.checked_add(POSTGRES_EPOCH_MICROS).and_then(DateTime::from_timestamp_micros);
    time.ok_or_else(|| PgError::Protocol(format!("server clock of {micros} us")))
}

/// 58P01 (undefined_file) is how a walsender says that the segment is gone.
fn stream_error(body: &ErrorResponseBody, start: Lsn) -> PgError {
    match report(body.fields()) {
        Ok(ServerReport { sqlstate, message, .. }) if is_removed(&sqlstate, &message) => {
            PgError::WalRemoved { start, message }
        }
        Ok(report) => PgError::from_server(report),
        Err(error) => error,
    }
}

/// A file that is missing has a code of its own. A segment whose number was removed while its file is there, which is so
/// for one that waits for `archive_command`, or was put back, is an internal error to the server, and lost to us as much.
fn is_removed(sqlstate: &str, message: &str) -> bool {
    sqlstate == "58P01" || sqlstate == "XX000" && message.contains("has already been removed")
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;
    use proptest::{collection::vec, prop_assert, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn the_status_has_its_34_bytes() {
        let status =
            StandbyStatus { write: Lsn(0x0102), flush: Lsn(0x16_B374_D848), apply: Lsn(3), reply_requested: true };
        let now = Utc.with_ymd_and_hms(2000, 1, 1, 0, 0, 1).unwrap();
        let expected = b"r\
            \0\0\0\0\0\0\x01\x02\
            \0\0\0\x16\xB3\x74\xD8\x48\
            \0\0\0\0\0\0\0\x03\
            \0\0\0\0\0\x0f\x42\x40\
            \x01";
        assert_eq!(encode_status(status, now).as_ref(), expected);
        assert_eq!(expected.len(), 34);
    }

    #[test]
    fn wal_and_keepalives_are_read() {
        let wal = b"w\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x0f\x42\x40abc";
        let server_time = Utc.with_ymd_and_hms(2000, 1, 1, 0, 0, 1).unwrap();
        let (start, server_end) = (Lsn(0x100_0000), Lsn(0x200_0000));
        let data = Bytes::from_static(b"abc");
        assert_eq!(
            decode(Bytes::from_static(wal)).unwrap(),
            Some(WalEvent::Wal { start, server_end, server_time, data })
        );
        let alive = b"k\0\0\0\0\x02\0\0\0\0\0\0\0\0\x0f\x42\x40\x01";
        assert_eq!(
            decode(Bytes::from_static(alive)).unwrap(),
            Some(WalEvent::KeepAlive { server_end, server_time, reply_requested: true })
        );
        for cut in 1..25 {
            assert!(decode(Bytes::copy_from_slice(&wal[..cut])).is_err(), "{cut}");
        }
        assert_eq!(decode(Bytes::new()).unwrap(), None);
        assert!(decode(Bytes::from_static(b"x")).is_err());
    }

    proptest! {
        #[test]
        fn clocks_survive_both_ways(micros in -10_000_000_000_000_000i64..10_000_000_000_000_000) {
            let at = time(micros).unwrap();
            let status = StandbyStatus { write: Lsn(0), flush: Lsn(0), apply: Lsn(0), reply_requested: false };
            prop_assert_eq!((&encode_status(status, at)[25..33]).get_i64(), micros);
        }

        #[test]
        fn what_one_side_writes_the_other_reads(
            lsns in (0u64.., 0u64.., 0u64..), micros in -1_000_000_000_000_000i64..1_000_000_000_000_000,
            data in vec(0u8.., 1..50), reply_requested: bool
        ) {
            let (start, server_end, server_time) = (Lsn(lsns.0), Lsn(lsns.1), time(micros).unwrap());
            let wal = encode_wal((start, server_end), server_time, &data).freeze();
            let data = Bytes::from(data);
            prop_assert_eq!(decode(wal).unwrap(), Some(WalEvent::Wal { start, server_end, server_time, data }));
            let alive = encode_keepalive(server_end, server_time, reply_requested).freeze();
            let event = WalEvent::KeepAlive { server_end, server_time, reply_requested };
            prop_assert_eq!(decode(alive).unwrap(), Some(event));
            let status = StandbyStatus { write: start, flush: server_end, apply: Lsn(lsns.2), reply_requested };
            let bytes = encode_status(status, server_time).freeze();
            prop_assert_eq!(decode_status(bytes.clone()).unwrap(), Some(status));
            for cut in 0..bytes.len() {
                prop_assert!(decode_status(bytes.slice(..cut)).is_err());
            }
        }

        #[test]
        fn no_payload_panics(bytes in vec(0u8.., 0..40), tag in "[wkrh]") {
            let payload = Bytes::from([tag.as_bytes(), &bytes].concat());
            let _ = decode(payload.clone());
            let _ = decode_status(payload);
        }
    }
}
