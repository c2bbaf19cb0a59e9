//! What the server keeps for us: its replication slot, as far as the server answers in a moment.

use std::time::Duration;

use futures::future::join_all;
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::context::Target;
use crate::model::TargetName;
use crate::pg::{PgError, sql};

/// A status is wanted when servers are down.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// A target's replication slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Whether somebody reads from it.
    pub active: bool,
    /// PostgreSQL's word: `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// WAL that the server keeps for it.
    pub retained_bytes: Option<u64>,
}

impl Slot {
    /// What somebody must know of it.
    pub(super) fn problem(&self) -> Option<String> {
        let name = &self.name;
        match self.wal_status.as_deref() {
            Some("lost") => Some(format!("slot {name} was lost: the server removed WAL that is not stored")),
            Some("unreserved") => Some(format!("slot {name} is about to be lost")),
            _ => None,
        }
    }
}

/// The slots of all targets that are streamed and whose server answers.
pub(super) async fn slots(context: &Context) -> Vec<(TargetName, Slot)> {
    let streamed = context.targets.iter().filter(|target| target.stream);
    let asked = streamed.map(|target| async move {
        let slot = tokio::time::timeout(ANSWER_TIME, ask(target)).await;
        match slot {
            Ok(Ok(slot)) => slot.map(|slot| (target.name.clone(), slot)),
            Ok(Err(error)) => {
                tracing::debug!(target = %target.name, %error, "its slot is not known");
                None
            }
            Err(_) => None,
        }
    });
    join_all(asked).await.into_iter().flatten().collect()
}

const QUERY: &str = "SELECT active, wal_status, pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery()
    THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn)::bigint
    FROM pg_catalog.pg_replication_slots WHERE slot_name = $1";

async fn ask(target: &Target) -> Result<Option<Slot>, PgError> {
    let client = sql::connect(&target.conninfo).await?;
    let row = client.query_opt(QUERY, &[&target.slot]).await?;
    Ok(row.map(|row| Slot {
        name: target.slot.clone(),
        active: row.get(0),
        wal_status: row.get(1),
        retained_bytes: row.get::<_, Option<i64>>(2).and_then(|bytes| u64::try_from(bytes).ok()),
    }))
}
