//! What a PostgreSQL server says about itself, as far as our role may know.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_postgres::SimpleQueryMessage;

use crate::model::Clock;
use crate::pg::PgError;
use crate::pg::sql::SqlClient;

/// Settings that decide something here.
const SETTINGS: &str = "SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN (
    'server_version_num', 'block_size', 'wal_block_size', 'wal_level', 'max_wal_senders', 'max_replication_slots',
    'full_page_writes', 'fsync', 'data_checksums', 'max_slot_wal_keep_size', 'archive_mode', 'archive_command',
    'archive_library', 'synchronous_standby_names', 'synchronous_commit', 'data_directory')";

/// `pg_control_system` is open to everyone; the WAL directory to pg_monitor.
const STATE: &str = "SELECT pg_catalog.pg_is_in_recovery(), s.system_identifier,
    (SELECT count(*) FROM pg_catalog.pg_stat_replication),
    (SELECT count(*) FROM pg_catalog.pg_replication_slots),
    (SELECT count(*) FROM pg_catalog.pg_db_role_setting r, unnest(r.setconfig) c
      WHERE c = 'synchronous_commit=remote_apply')
  FROM pg_catalog.pg_control_system() s";

const ROLE: &str = "SELECT rolname, pg_catalog.quote_ident(rolname), rolsuper, rolreplication,
    pg_catalog.pg_has_role(rolname, 'pg_monitor', 'USAGE'), pg_catalog.pg_has_role(rolname, 'pg_read_all_settings', 'USAGE')
  FROM pg_catalog.pg_roles WHERE rolname = current_user";

/// Names changed with 15; the ones that a server does not have are null.
const FUNCTIONS: &str = "SELECT f, pg_catalog.has_function_privilege(pg_catalog.to_regprocedure(f)::oid, 'EXECUTE')
  FROM unnest(ARRAY['pg_catalog.pg_backup_start(text,boolean)', 'pg_catalog.pg_backup_stop(boolean)',
    'pg_catalog.pg_start_backup(text,boolean,boolean)', 'pg_catalog.pg_stop_backup(boolean,boolean)']) f
  WHERE pg_catalog.to_regprocedure(f) IS NOT NULL";

/// The answers.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) settings: BTreeMap<String, String>,
    pub(super) in_recovery: bool,
    pub(super) system_id: Option<u64>,
    pub(super) walsenders: u64,
    pub(super) slots: u64,
    /// Roles or databases that commit with remote_apply.
    pub(super) remote_apply_elsewhere: bool,
    pub(super) role: Role,
    /// Functions of backup mode that our role may not call.
    pub(super) forbidden: Vec<String>,
    pub(super) slot: Option<Slot>,
    /// Bytes in pg_wal, if we may know.
    pub(super) wal_bytes: Option<u64>,
    /// How far its clock is ahead of ours (negative: behind), beyond what the measurement cannot tell.
    pub(super) clock_ahead: Option<TimeDelta>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Role {
    /// As it stands in SQL.
    pub(super) quoted: String,
    pub(super) superuser: bool,
    pub(super) replication: bool,
    pub(super) monitor: bool,
    pub(super) reads_settings: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Slot {
    pub(super) physical: bool,
    pub(super) active: bool,
    /// `reserved`, `extended`, `unreserved`, `lost`; none before its first use.
    pub(super) wal_status: Option<String>,
    pub(super) retained_bytes: Option<u64>,
}

impl Facts {
    pub(super) fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// A setting that is a number; `None` also for one that we may not see.
    pub(super) fn number(&self, name: &str) -> Option<i64> {
        self.setting(name).parse().ok()
    }

    pub(super) fn major(&self) -> u32 {
        self.setting("server_version_num").parse::<u32>().unwrap_or_default() / 10_000
    }
}

/// Asks the server everything.
pub(super) async fn gather(client: &SqlClient, slot: &str) -> Result<Facts, PgError> {
    let pairs = rows(client, SETTINGS).await?;
    let mut facts = Facts { settings: pairs.into_iter().filter_map(pair).collect(), ..Facts::default() };
    if let Some(row) = rows(client, STATE).await?.pop() {
        facts.in_recovery = flag(&row, 0);
        // SQL has no unsigned numbers.
        facts.system_id = row.get(1).cloned().flatten().and_then(|id| id.parse().ok()).map(i64::cast_unsigned);
        facts.walsenders = number(&row, 2).unwrap_or(0);
        facts.slots = number(&row, 3).unwrap_or(0);
        facts.remote_apply_elsewhere = number(&row, 4).unwrap_or(0) > 0;
    }
    if let Some(row) = rows(client, ROLE).await?.pop() {
        facts.role = Role {
            quoted: row.get(1).cloned().flatten().unwrap_or_default(),
            superuser: flag(&row, 2),
            replication: flag(&row, 3),
            monitor: flag(&row, 4),
            reads_settings: flag(&row, 5),
        };
    }
    let functions = rows(client, FUNCTIONS).await?;
    facts.forbidden =
        functions.into_iter().filter(|row| !flag(row, 1)).filter_map(|row| row.first()?.clone()).collect();
    facts.slot = find_slot(client, slot, facts.in_recovery).await?;
    facts.wal_bytes = wal_bytes(client).await?;
    Ok(facts)
}

/// The server reads its clock somewhere between question and answer.
pub(super) async fn clock_ahead(client: &SqlClient, clock: &dyn Clock) -> Result<Option<TimeDelta>, PgError> {
    let before = clock.now();
    let row = rows(client, "SELECT (1000 * extract(epoch FROM pg_catalog.clock_timestamp()))::bigint").await?.pop();
    let after = clock.now();
    let milliseconds = row.and_then(|row| number(&row, 0)).and_then(|number| i64::try_from(number).ok());
    let server = milliseconds.and_then(DateTime::from_timestamp_millis);
    let apart =
        |server: DateTime<Utc>| (server - after).max(TimeDelta::zero()) + (server - before).min(TimeDelta::zero());
    Ok(server.map(apart))
}

async fn find_slot(client: &SqlClient, name: &str, in_recovery: bool) -> Result<Option<Slot>, PgError> {
    // A standby has no current position to compare with.
    let retained = match in_recovery {
        true => "NULL",
        false => "pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::bigint",
    };
    let name = name.replace('\'', "''");
    let query = format!(
        "SELECT slot_type, active, wal_status, {retained} FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
    );
    let row = rows(client, &query).await?.pop();
    Ok(row.map(|row| Slot {
        physical: row.first().cloned().flatten().as_deref() == Some("physical"),
        active: flag(&row, 1),
        wal_status: row.get(2).cloned().flatten(),
        retained_bytes: number(&row, 3),
    }))
}

async fn wal_bytes(client: &SqlClient) -> Result<Option<u64>, PgError> {
    match rows(client, "SELECT sum(size)::bigint FROM pg_catalog.pg_ls_waldir()").await {
        Ok(rows) => Ok(rows.first().and_then(|row| number(row, 0))),
        // Without pg_monitor it stays unknown; the missing grant is told elsewhere.
        Err(error) if error.sqlstate() == Some("42501") => Ok(None),
        Err(error) => Err(error),
    }
}

type Row = Vec<Option<String>>;

/// The simple protocol gives text, the same in every version, and works through poolers that do not prepare statements.
async fn rows(client: &SqlClient, query: &str) -> Result<Vec<Row>, PgError> {
    let messages = client.simple_query(query).await?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
        _ => None,
    });
    Ok(rows.collect())
}

fn pair(row: Row) -> Option<(String, String)> {
    let mut cells = row.into_iter();
    Some((cells.next()??, cells.next()??))
}

fn flag(row: &Row, column: usize) -> bool {
    row.get(column).and_then(Option::as_deref) == Some("t")
}

fn number(row: &Row, column: usize) -> Option<u64> {
    row.get(column)?.as_deref()?.parse().ok()
}
