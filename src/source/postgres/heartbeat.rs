//! The heartbeat: one row per target whose time, found again in a restored cluster, proves how far it reaches.
//!
//! It lives in the protected cluster itself, in `drctl.heartbeat`, so that it travels the same way as every other row.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::{Error, Lsn, Result, TargetName};
use crate::pg::PgError;
use crate::pg::sql::SqlClient;

/// One beat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Beat {
    /// Counts up by one.
    pub seq: i64,
    /// The server's clock when it was written.
    pub at: DateTime<Utc>,
}

const TABLE: &str = "CREATE SCHEMA IF NOT EXISTS drctl;
    CREATE TABLE IF NOT EXISTS drctl.heartbeat (target text PRIMARY KEY, seq bigint NOT NULL, at timestamptz NOT NULL)";

/// Writes the next beat, durably on this server, and says where its commit ends in the WAL.
///
/// # Errors
/// The server is a standby, or the role may not write; the hint is the statement that allows it.
pub async fn beat(client: &SqlClient, target: &TargetName) -> Result<(Beat, Lsn)> {
    write(client, target).await.map_err(|error| match error {
        PgError::Server { ref sqlstate, .. } if sqlstate == "42501" => Error::from(error).hint(
            "as a superuser, in that database: CREATE SCHEMA drctl AUTHORIZATION <the role of the target's conninfo>",
        ),
        error => error.into(),
    })
}

async fn write(client: &SqlClient, target: &TargetName) -> Result<(Beat, Lsn), PgError> {
    // Flushed here is enough: where drctl itself is the synchronous standby, the wait would be for the very WAL that is
    // measured. And nobody's lock is worth waiting for.
    client
        .batch_execute("SET synchronous_commit = local; SET lock_timeout = '5s'; SET statement_timeout = '10s'")
        .await?;
    let found: bool = client.query_one("SELECT to_regclass('drctl.heartbeat') IS NOT NULL", &[]).await?.get(0);
    if !found {
        client.batch_execute(TABLE).await?;
    }
    let row = client
        .query_one(
            "INSERT INTO drctl.heartbeat AS h (target, seq, at) VALUES ($1, 1, clock_timestamp())
             ON CONFLICT (target) DO UPDATE SET seq = h.seq + 1, at = clock_timestamp() RETURNING seq, at",
            &[&target.as_str()],
        )
        .await?;
    let beat = Beat { seq: row.get(0), at: row.get(1) };
    let end: String = client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?.get(0);
    let end = end.parse().map_err(|error: Error| PgError::Protocol(error.to_string()))?;
    Ok((beat, end))
}

/// The newest beat of `target` in this database; `None` without table or row.
///
/// # Errors
/// The server's.
pub async fn read(client: &SqlClient, target: &TargetName) -> Result<Option<Beat>, PgError> {
    let found: bool = client.query_one("SELECT to_regclass('drctl.heartbeat') IS NOT NULL", &[]).await?.get(0);
    if !found {
        return Ok(None);
    }
    let row = client.query_opt("SELECT seq, at FROM drctl.heartbeat WHERE target = $1", &[&target.as_str()]).await?;
    Ok(row.map(|row| Beat { seq: row.get(0), at: row.get(1) }))
}
