//! Messages of the server: postgres-protocol has them for reading only.

use bytes::{BufMut, BytesMut};

use crate::pg::error::ServerReport;

/// `text` in `pg_type`.
const TEXT: i32 = 25;
const INT8: i32 = 20;

/// A column of a result: only what a replication command returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    Text(&'static str),
    Int8(&'static str),
}

/// Appends one message; its length is filled in behind its body.
fn message(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_u32(0);
    body(out);
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(at..at + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// A zero ends it; one inside would end it early.
fn text(out: &mut BytesMut, text: &str) {
    out.extend(text.bytes().filter(|byte| *byte != 0));
    out.put_u8(0);
}

pub(super) fn authentication_ok(out: &mut BytesMut) {
    message(out, b'R', |out| out.put_i32(0));
}

pub(super) fn parameter(out: &mut BytesMut, name: &str, value: &str) {
    message(out, b'S', |out| {
        text(out, name);
        text(out, value);
    });
}

/// Nothing is ever cancelled here, so the key opens nothing.
pub(super) fn backend_key(out: &mut BytesMut) {
    message(out, b'K', |out| {
        out.put_u32(std::process::id());
        out.put_i32(0);
    });
}

/// Version 3.0 is spoken, and none of the options is known.
pub(super) fn negotiate(out: &mut BytesMut, options: &[String]) {
    message(out, b'v', |out| {
        out.put_u32(3 << 16);
        out.put_u32(u32::try_from(options.len()).unwrap_or(u32::MAX));
        options.iter().for_each(|option| text(out, option));
    });
}

pub(super) fn ready(out: &mut BytesMut) {
    message(out, b'Z', |out| out.put_u8(b'I'));
}

pub(super) fn complete(out: &mut BytesMut, tag: &str) {
    message(out, b'C', |out| text(out, tag));
}

/// A result of one row.
pub(super) fn row(out: &mut BytesMut, columns: &[Column], values: &[Option<&[u8]>]) {
    message(out, b'T', |out| {
        out.put_u16(u16::try_from(columns.len()).unwrap_or(u16::MAX));
        for column in columns {
            let (name, kind, size) = match column {
                Column::Text(name) => (name, TEXT, -1),
                Column::Int8(name) => (name, INT8, 8),
            };
            text(out, name);
            out.put_i32(0);
            out.put_i16(0);
            out.put_i32(kind);
            out.put_i16(size);
            out.put_i32(-1);
            out.put_i16(0);
        }
    });
    message(out, b'D', |out| {
        out.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
        for value in values {
            match value {
                None => out.put_i32(-1),
                Some(bytes) => {
                    out.put_i32(i32::try_from(bytes.len()).unwrap_or(i32::MAX));
                    out.put_slice(bytes);
                }
            }
        }
    });
}

pub(super) fn error(out: &mut BytesMut, severity: &str, report: &ServerReport) {
    message(out, b'E', |out| {
        let ServerReport { sqlstate, message, detail, hint } = report;
        let mut field = |kind: u8, value: &str| {
            out.put_u8(kind);
            text(out, value);
        };
        field(b'S', severity);
        field(b'V', severity);
        field(b'C', sqlstate);
        field(b'M', message);
        detail.iter().for_each(|detail| field(b'D', detail));
        hint.iter().for_each(|hint| field(b'H', hint));
        out.put_u8(0);
    });
}

pub(super) fn copy_both(out: &mut BytesMut) {
    message(out, b'W', |out| {
        out.put_u8(0);
        out.put_u16(0);
    });
}

pub(super) fn copy_data(out: &mut BytesMut, payload: &[u8]) {
    message(out, b'd', |out| out.put_slice(payload));
}

pub(super) fn copy_done(out: &mut BytesMut) {
    message(out, b'c', |_| ());
}

#[cfg(test)]
mod tests {
    use fallible_iterator::FallibleIterator;
    use postgres_protocol::message::backend::Message;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn read(out: &mut BytesMut) -> Message {
        Message::parse(out).unwrap().unwrap()
    }

    proptest! {
        #[test]
        fn a_row_is_read_back(values in vec(option::of(vec(0u8.., 0..20)), 1..5)) {
            let columns = vec![Column::Text("x"); values.len()];
            let given: Vec<Option<&[u8]>> = values.iter().map(|value| value.as_deref()).collect();
            let mut out = BytesMut::new();
            row(&mut out, &columns, &given);
            let Message::RowDescription(described) = read(&mut out) else { panic!("no description") };
            prop_assert_eq!(described.fields().count().unwrap(), values.len());
            let Message::DataRow(body) = read(&mut out) else { panic!("no row") };
            let found: Vec<_> = body
                .ranges()
                .map(|range| Ok(range.map(|range| body.buffer()[range].to_vec())))
                .collect()
                .unwrap();
            prop_assert_eq!(found, values);
            prop_assert!(out.is_empty());
        }

        #[test]
        fn an_error_is_read_back(
            sqlstate in "[0-9A-Z]{5}", message in "[^\0]{0,30}",
            detail in option::of("[^\0]{0,30}"), hint in option::of("[^\0]{0,30}")
        ) {
            let report = ServerReport { sqlstate, message, detail, hint };
            let mut out = BytesMut::new();
            error(&mut out, "FATAL", &report);
            let Message::ErrorResponse(body) = read(&mut out) else { panic!("no error") };
            prop_assert_eq!(crate::pg::replication::server_report(body.fields()).unwrap(), report);
            prop_assert!(out.is_empty());
        }

        #[test]
        fn copied_bytes_are_read_back(payload in vec(0u8.., 0..99), tag in "[A-Z_ ]{0,20}", name in "[a-z]{1,9}") {
            let mut out = BytesMut::new();
            copy_data(&mut out, &payload);
            copy_done(&mut out);
            complete(&mut out, &tag);
            parameter(&mut out, &name, &tag);
            ready(&mut out);
            let Message::CopyData(body) = read(&mut out) else { panic!("no data") };
            prop_assert_eq!(body.data(), payload);
            prop_assert!(matches!(read(&mut out), Message::CopyDone));
            let Message::CommandComplete(body) = read(&mut out) else { panic!("no tag") };
            prop_assert_eq!(body.tag().unwrap(), tag.as_str());
            let Message::ParameterStatus(body) = read(&mut out) else { panic!("no parameter") };
            prop_assert_eq!((body.name().unwrap(), body.value().unwrap()), (name.as_str(), tag.as_str()));
            prop_assert!(matches!(read(&mut out), Message::ReadyForQuery(_)) && out.is_empty());
        }
    }

    #[test]
    fn a_zero_inside_of_a_text_ends_nothing() {
        let mut out = BytesMut::new();
        complete(&mut out, "a\0b");
        let Message::CommandComplete(body) = read(&mut out) else { panic!("no tag") };
        assert_eq!(body.tag().unwrap(), "ab");
    }
}
