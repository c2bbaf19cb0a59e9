//! Commands that answer with a row or with nothing.

use crate::model::{Lsn, SystemId, Timeline};
use crate::pg::PgError;
use crate::pg::replication::client::ReplicationClient;
use crate::pg::replication::rows::Row;

/// Who the server is and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdentifySystem {
    /// The cluster.
    pub system_id: SystemId,
    /// Its current timeline.
    pub timeline: Timeline,
    /// The end of durable WAL; on a standby, of received WAL.
    pub flush_lsn: Lsn,
}

impl ReplicationClient {
    /// `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// The connection, or the server.
    pub async fn identify_system(&mut self) -> Result<IdentifySystem, PgError> {
        let row = self.one_row("IDENTIFY_SYSTEM").await?;
        Ok(IdentifySystem { system_id: row.value(0)?, timeline: row.timeline(1)?, flush_lsn: row.value(2)? })
    }

    /// The value of a server setting, in the server's own units (`wal_segment_size` is `16MB`).
    ///
    /// # Errors
    /// Not a name, no such setting, or not visible to this role.
    pub async fn show(&mut self, name: &str) -> Result<String, PgError> {
        let word = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if !name.split('.').all(word) {
            return Err(PgError::Config(format!("{name:?} is not the name of a setting")));
        }
        let row = self.one_row(&format!("SHOW {name}")).await?;
        row.text(0).map(str::to_owned)
    }

    /// The contents of a timeline's history file; timeline 1 has none.
    ///
    /// # Errors
    /// The server has no such file, or sends another one.
    pub async fn timeline_history(&mut self, timeline: Timeline) -> Result<Vec<u8>, PgError> {
        let row = self.one_row(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let name = row.text(0)?;
        if name != timeline.history_file_name() {
            return Err(PgError::Protocol(format!("history file {name:?} for timeline {timeline}")));
        }
        let contents = row.bytes(1)?.ok_or_else(|| PgError::Protocol(format!("{name} is NULL")))?;
        Ok(contents.to_vec())
    }

    /// Creates a physical slot. A temporary one lives as long as this connection; `reserve_wal` holds WAL from now on
    /// rather than from the first use.
    ///
    /// # Errors
    /// Not a slot name, a slot of that name exists (SQLSTATE 42710), or none is free (53400).
    pub async fn create_physical_slot(
        &mut self,
        name: &str,
        temporary: bool,
        reserve_wal: bool,
    ) -> Result<(), PgError> {
        let name = slot_name(name)?;
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let reserve = if reserve_wal { " RESERVE_WAL" } else { "" };
        // The syntax without parentheses is accepted by every version.
        self.one_row(&format!("CREATE_REPLICATION_SLOT {name}{temporary} PHYSICAL{reserve}")).await.map(|_| ())
    }

    /// Drops a slot; `wait` waits until whoever uses it is gone.
    ///
    /// # Errors
    /// No such slot (42704), or [`PgError::SlotInUse`].
    pub async fn drop_slot(&mut self, name: &str, wait: bool) -> Result<(), PgError> {
        let name = slot_name(name)?;
        let wait = if wait { " WAIT" } else { "" };
        self.run(&format!("DROP_REPLICATION_SLOT {name}{wait}")).await.map(|_| ())
    }

    async fn one_row(&mut self, command: &str) -> Result<Row, PgError> {
        let mut rows = self.run(command).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(row),
            (last, before) => {
                let count = before + usize::from(last.is_some());
                Err(PgError::Protocol(format!("{count} rows in answer to {command}, expected one")))
            }
        }
    }
}

/// A slot name in quotes. PostgreSQL allows nothing that would need escaping, and ends names at 63 bytes.
pub(super) fn slot_name(name: &str) -> Result<String, PgError> {
    let fits = (1..=63).contains(&name.len());
    if fits && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
        return Ok(format!("\"{name}\""));
    }
    Err(PgError::Config(format!("{name:?} is not a slot name: 1 to 63 of a-z, 0-9 and _")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_that_need_quoting_are_refused() {
        assert_eq!(slot_name("drctl_1").unwrap(), "\"drctl_1\"");
        for name in ["", "A", "a-b", "a b", "a\"", "ä", &"a".repeat(64)] {
            assert!(slot_name(name).is_err(), "{name:?}");
        }
    }
}
