//! How much WAL a server keeps for a replication slot, and how much more it may: a slot that nobody reads from fills the
//! disk of production.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::space;
use crate::pg::PgError;
use crate::pg::control::{self, ControlFile};
use crate::pg::sql::SqlClient;

/// A replication slot, and what the server keeps for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Whether somebody reads from it.
    pub active: bool,
    /// PostgreSQL's word: `reserved`, `extended`, `unreserved`, `lost`; none before its first use.
    pub wal_status: Option<String>,
    /// WAL that stays because of the slot.
    pub retained_bytes: Option<u64>,
    /// How much more it may become before the server gives the slot up or its disk is full, whichever comes first; `null` =
    /// there is no limit that we know of.
    pub room_bytes: Option<u64>,
    /// Free space for WAL on the server's disk, whatever else limits the slot; `null` = unknown.
    #[serde(default)]
    pub free_bytes: Option<u64>,
}

impl Slot {
    /// How much of what it may keep the slot keeps already, in percent: at 100 the server gives it up, or its disk is full.
    pub fn filled_percent(&self) -> Option<u8> {
        percent(self.retained_bytes?, self.room_bytes?)
    }

    /// The same of the disk alone: at 100 the server stops.
    pub fn disk_percent(&self) -> Option<u8> {
        percent(self.retained_bytes?, self.free_bytes?)
    }
}

fn percent(taken: u64, free: u64) -> Option<u8> {
    let share = u128::from(taken) * 100 / (u128::from(taken) + u128::from(free)).max(1);
    u8::try_from(share).ok()
}

/// What is known of the disk without asking the server.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// The data directory, if it is not the one that the server names.
    pub data_directory: Option<PathBuf>,
    /// The size of the WAL disk, if it is configured.
    pub bytes: Option<u64>,
}

/// A standby has no current position; the end of what it received is where its WAL ends. `safe_wal_size` is null where
/// `max_slot_wal_keep_size` sets no limit, and below zero when the slot may be lost at the next checkpoint.
const HELD: &str = "SELECT active, wal_status, pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery()
      THEN COALESCE(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())
      ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn)::bigint, safe_wal_size::bigint,
    (SELECT system_identifier FROM pg_catalog.pg_control_system()),
    (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory')
  FROM pg_catalog.pg_replication_slots WHERE slot_name = $1 AND slot_type = 'physical'";

/// What the server keeps for `slot`; `None` if there is no such slot. A logical slot of that name is somebody else's.
///
/// # Errors
/// The server's.
pub async fn held(client: &SqlClient, slot: &str, disk: &Disk) -> Result<Option<Slot>, PgError> {
    let Some(row) = client.query_opt(HELD, &[&slot]).await? else { return Ok(None) };
    let bytes = |column| row.get::<_, Option<i64>>(column).map(|bytes| u64::try_from(bytes).unwrap_or_default());
    let (retained_bytes, safe_bytes) = (bytes(2), bytes(3));
    let system_id = row.get::<_, Option<i64>>(4).map(i64::cast_unsigned);
    let directory = disk.data_directory.clone().or_else(|| row.get::<_, Option<String>>(5).map(PathBuf::from));
    let free = match (directory.and_then(|directory| free_bytes(&directory, system_id)), disk.bytes) {
        (Some(free), _) => Some(free),
        (None, Some(size)) => {
            let taken = wal_bytes(client).await?.or(retained_bytes);
            Some(size.saturating_sub(taken.unwrap_or_default()))
        }
        (None, None) => None,
    };
    let room_bytes = free.into_iter().chain(safe_bytes).min();
    let (active, wal_status) = (row.get(0), row.get(1));
    Ok(Some(Slot { name: slot.to_owned(), active, wal_status, retained_bytes, room_bytes, free_bytes: free }))
}

/// The oldest WAL that other slots keep, less what `slot` keeps.
const BEYOND_SLOTS: &str = "SELECT pg_catalog.pg_wal_lsn_diff(other.restart_lsn, ours.restart_lsn)::bigint
  FROM pg_catalog.pg_replication_slots ours, pg_catalog.pg_replication_slots other
  WHERE ours.slot_name = $1 AND other.slot_name <> $1 AND other.restart_lsn IS NOT NULL
    AND other.wal_status IS DISTINCT FROM 'lost'
  ORDER BY 1 LIMIT 1";

/// The same of segments that wait for `archive_command`. Names are compared without their timeline.
const BEYOND_ARCHIVE: &str = "SELECT (
    (('x' || pg_catalog.substr(waiting.name, 9, 8))::bit(32)::bigint::numeric * 4294967296
      + ('x' || pg_catalog.substr(waiting.name, 17, 8))::bit(32)::bigint * segment.setting::bigint)
    - pg_catalog.pg_wal_lsn_diff(ours.restart_lsn, '0/0'))::bigint
  FROM pg_catalog.pg_ls_archive_statusdir() AS waiting, pg_catalog.pg_replication_slots ours,
    pg_catalog.pg_settings segment, pg_catalog.pg_settings mode
  WHERE waiting.name ~ '^[0-9A-F]{24}\\.ready$' AND ours.slot_name = $1
    AND segment.name = 'wal_segment_size' AND mode.name = 'archive_mode' AND mode.setting <> 'off'
  ORDER BY 1 LIMIT 1";

/// Who keeps WAL beside the slot, and how much of what the slot keeps would go if the slot went.
///
/// # Errors
/// The server's.
pub async fn kept_beside(client: &SqlClient, slot: &str) -> Result<Option<(&'static str, u64)>, PgError> {
    let slots = client.query_opt(BEYOND_SLOTS, &[&slot]).await?;
    let archive = match client.query_opt(BEYOND_ARCHIVE, &[&slot]).await.map_err(PgError::from) {
        // Without `pg_monitor` that stays unknown.
        Err(error) if error.sqlstate() == Some("42501") => None,
        other => other?,
    };
    let bytes = |row: tokio_postgres::Row| row.get::<_, Option<i64>>(0).map(|bytes| u64::try_from(bytes).unwrap_or(0));
    let slots = slots.and_then(bytes).map(|bytes| ("another replication slot", bytes));
    let archive = archive.and_then(bytes).map(|bytes| ("archive_command, which does not get rid of it,", bytes));
    Ok(slots.into_iter().chain(archive).min_by_key(|(_, bytes)| *bytes))
}

/// Free space beside `pg_wal`, which may be a link to another file system; `None` if the directory is not here.
fn free_bytes(directory: &Path, system_id: Option<u64>) -> Option<u64> {
    belongs(directory, system_id).ok()?;
    space::free_bytes(&directory.join("pg_wal")).ok()
}

/// Bytes in `pg_wal`. Without `pg_monitor` that stays unknown.
async fn wal_bytes(client: &SqlClient) -> Result<Option<u64>, PgError> {
    let told = client.query_one("SELECT sum(size)::bigint FROM pg_catalog.pg_ls_waldir()", &[]).await;
    match told.map_err(PgError::from) {
        Ok(row) => Ok(row.get::<_, Option<i64>>(0).and_then(|bytes| u64::try_from(bytes).ok())),
        Err(error) if error.sqlstate() == Some("42501") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a data directory on this machine is the one of that cluster: a directory of the same path may belong to another.
///
/// # Errors
/// Why it is not.
pub fn belongs(directory: &Path, system_id: Option<u64>) -> Result<(), String> {
    if directory.as_os_str().is_empty() {
        return Err("the server does not tell where it is".to_owned());
    }
    let path = directory.join(control::PATH);
    let read = |_| {
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        ControlFile::parse(&bytes).map_err(|error| format!("{}: {error}", path.display()))
    };
    // A running server overwrites the file in place: the first read may see half of it.
    let control = (0..3).map(read).find(Result::is_ok).unwrap_or_else(|| read(0))?;
    match Some(control.system_id.0) == system_id {
        true => Ok(()),
        false => Err(format!("{} belongs to another cluster", directory.display())),
    }
}
