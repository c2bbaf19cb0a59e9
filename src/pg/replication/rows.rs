//! Result rows of replication commands: a few text fields each.

use bytes::Bytes;
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::DataRowBody;

use crate::model::{Lsn, Timeline};
use crate::pg::PgError;
use crate::pg::replication::wire::malformed;

/// The fields of one row; columns are taken by position, which the protocol documentation fixes for each command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row(Vec<Option<Bytes>>);

impl Row {
    pub(super) fn read(body: &DataRowBody) -> Result<Self, PgError> {
        let buffer = body.buffer_bytes();
        let fields = body.ranges().map(|range| Ok(range.map(|range| buffer.slice(range)))).collect();
        fields.map(Self).map_err(|error| malformed(&error))
    }

    /// The bytes of a column; `None` is NULL.
    pub(super) fn bytes(&self, column: usize) -> Result<Option<&Bytes>, PgError> {
        let field = self.0.get(column).map(Option::as_ref);
        field.ok_or_else(|| PgError::Protocol(format!("a row of {} columns, no column {column}", self.0.len())))
    }

    /// A text column that may be NULL.
    pub(super) fn optional(&self, column: usize) -> Result<Option<&str>, PgError> {
        let text = self.bytes(column)?.map(|bytes| std::str::from_utf8(bytes)).transpose();
        text.map_err(|_| PgError::Protocol(format!("column {column} is not UTF-8")))
    }

    /// A text column that may not.
    pub(super) fn text(&self, column: usize) -> Result<&str, PgError> {
        self.optional(column)?.ok_or_else(|| PgError::Protocol(format!("column {column} is NULL")))
    }

    /// Anything that is read from text.
    pub(super) fn value<T: std::str::FromStr>(&self, column: usize) -> Result<T, PgError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| PgError::Protocol(format!("column {column} reads {text:?}")))
    }

    /// An LSN and a timeline side by side: the result of BASE_BACKUP's first and last set.
    pub(super) fn position(&self) -> Result<(Lsn, Timeline), PgError> {
        Ok((self.value(0)?, self.timeline(1)?))
    }

    /// A timeline, which is never 0.
    pub(super) fn timeline(&self, column: usize) -> Result<Timeline, PgError> {
        match self.value(column)? {
            0 => Err(PgError::Protocol("timeline 0".to_owned())),
            timeline => Ok(Timeline(timeline)),
        }
    }
}

#[cfg(test)]
impl Row {
    pub(super) fn of(fields: &[Option<&str>]) -> Self {
        Self(fields.iter().map(|field| field.map(|text| Bytes::copy_from_slice(text.as_bytes()))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_and_nonsense_is_refused() {
        let row = Row::of(&[Some("0/2000028"), Some("3")]);
        assert_eq!(row.position().unwrap(), (Lsn(0x200_0028), Timeline(3)));
        for fields in [[Some("0/2000028"), Some("0")], [Some("x"), Some("1")], [None, Some("1")]] {
            assert!(Row::of(&fields).position().is_err(), "{fields:?}");
        }
        assert!(Row::of(&[Some("0/1")]).position().is_err());
    }
}
