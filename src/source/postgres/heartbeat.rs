//! The heartbeat: one row per target whose time, found again in a restored cluster, proves how far it reaches.
//!
//! It lives in the protected cluster itself, in `drctl.heartbeat`, so that it travels the same way as every other row.

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::Statement;

use crate::model::{Error, Lsn, Result, TargetName};
use crate::pg::PgError;
use crate::pg::conninfo::ConnInfo;
use crate::pg::sql::{self, SqlClient};

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

const UPSERT: &str = "INSERT INTO drctl.heartbeat AS h (target, seq, at) VALUES ($1, 1, clock_timestamp())
    ON CONFLICT (target) DO UPDATE SET seq = h.seq + 1, at = clock_timestamp() RETURNING seq, at";

/// Writes the next beat, durably on this server, and says where its commit ends in the WAL.
///
/// # Errors
/// The server is a standby, or the role may not write; the hint is the statement that allows it.
pub async fn beat(client: &SqlClient, target: &TargetName) -> Result<(Beat, Lsn)> {
    write(client, target).await.map_err(explained)
}

fn explained(error: PgError) -> Error {
    match error {
        PgError::Server { ref sqlstate, .. } if sqlstate == "42501" => Error::from(error).hint(
            "as a superuser, in that database: CREATE SCHEMA drctl AUTHORIZATION <the role of the target's conninfo>",
        ),
        PgError::Server { ref sqlstate, .. } if sqlstate == "25006" => {
            Error::refused("the server is a standby or read-only: it takes no heartbeat").because(error)
        }
        error => error.into(),
    }
}

async fn exists(client: &SqlClient) -> Result<bool, PgError> {
    Ok(client.query_one("SELECT to_regclass('drctl.heartbeat') IS NOT NULL", &[]).await?.get(0))
}

async fn prepare(client: &SqlClient) -> Result<(), PgError> {
    // Flushed here is enough: where drctl itself is the synchronous standby, the wait would be for the very WAL that is
    // measured. And nobody's lock is worth waiting for.
    client
        .batch_execute("SET synchronous_commit = local; SET lock_timeout = '5s'; SET statement_timeout = '10s'")
        .await?;
    if exists(client).await? {
        return Ok(());
    }
    match client.batch_execute(TABLE).await {
        // Two may make it at the same moment, whatever `IF NOT EXISTS` promises.
        Err(_) if exists(client).await? => Ok(()),
        made => Ok(made?),
    }
}

/// A connection that beats again and again.
#[derive(Debug)]
pub struct Pulse {
    client: SqlClient,
    upsert: Statement,
    target: TargetName,
}

impl Pulse {
    /// Connects, and makes the table if it can.
    ///
    /// # Errors
    /// As [`beat`].
    pub async fn connect(info: &ConnInfo, target: &TargetName) -> Result<Self> {
        let open = async {
            let client = sql::connect(info).await?;
            prepare(&client).await?;
            let upsert = format!("{UPSERT}, pg_catalog.txid_current()");
            let upsert = client.prepare(&upsert).await?;
            Ok(Self { client, upsert, target: target.clone() })
        };
        open.await.map_err(explained)
    }

    /// How many beats of all targets this table has ever taken: each is one commit that says nothing of the data.
    ///
    /// # Errors
    /// As [`beat`]; the connection is not to be used again.
    pub async fn beats(&self) -> Result<i64> {
        let row = self.client.query_one("SELECT COALESCE(sum(seq), 0)::bigint FROM drctl.heartbeat", &[]).await;
        Ok(row.map_err(|error| explained(error.into()))?.get(0))
    }

    /// Writes the next beat. `announce` hears of it, with its transaction, before it commits.
    ///
    /// # Errors
    /// As [`beat`]; the connection is not to be used again.
    pub async fn beat(&mut self, announce: impl FnOnce(u32, &Beat) + Send) -> Result<()> {
        let write = async {
            let transaction = self.client.transaction().await?;
            let row = transaction.query_one(&self.upsert, &[&self.target.as_str()]).await?;
            let (beat, xid): (_, i64) = (Beat { seq: row.get(0), at: row.get(1) }, row.get(2));
            // WAL carries the lower half of the number.
            announce(u32::try_from(xid & i64::from(u32::MAX)).unwrap_or_default(), &beat);
            transaction.commit().await
        };
        write.await.map_err(|error| explained(error.into()))
    }
}

async fn write(client: &SqlClient, target: &TargetName) -> Result<(Beat, Lsn), PgError> {
    prepare(client).await?;
    let row = client.query_one(UPSERT, &[&target.as_str()]).await?;
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
    if !exists(client).await? {
        return Ok(None);
    }
    let row = client.query_opt("SELECT seq, at FROM drctl.heartbeat WHERE target = $1", &[&target.as_str()]).await?;
    Ok(row.map(|row| Beat { seq: row.get(0), at: row.get(1) }))
}
