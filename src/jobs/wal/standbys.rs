//! Our slot on every server that does not stream, kept where the stored WAL ends: whichever of them is asked next still has
//! what comes next.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::jobs::context::Target;
use crate::jobs::wal::server::Server;
use crate::jobs::wal::shared::Shared;
use crate::model::{Error, Kind, Lsn, Result};
use crate::pg::conninfo::ConnInfo;
use crate::pg::replication::ReplicationClient;
use crate::pg::{PgError, sql};
use crate::repository::wal::index::BranchId;

const EVERY: Duration = Duration::from_secs(5);
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// What a server has of our slot. A primary answers nothing, unless a standby is the source; and so does a slot that is
/// somebody else's or in use.
const SLOT: &str = "SELECT slot.restart_lsn::text FROM (SELECT 1) AS one
  LEFT JOIN pg_catalog.pg_replication_slots slot ON slot.slot_name = $1
  WHERE (pg_catalog.pg_is_in_recovery() OR $2)
    AND (slot.slot_name IS NULL OR slot.slot_type = 'physical' AND NOT slot.active)";

/// Looks after the standbys for as long as nobody drops it. One that does not answer is nobody's trouble but its own.
pub(super) async fn keep_slots(target: Target, shared: Arc<Shared>) {
    let standbys: Vec<_> = target.conninfo.each_server().collect();
    loop {
        for standby in &standbys {
            let is_standby = shared.from_standby.load(Ordering::Relaxed);
            let durable = shared.shipped.borrow().at().map(|(branch, lsn)| (branch.clone(), lsn));
            let late = |_| Err(Error::new(Kind::Unavailable, "it does not answer in time"));
            let kept =
                timeout(ANSWER_TIME, keep_slot(standby, &target, (durable, is_standby))).await.unwrap_or_else(late);
            if let Err(error) = kept {
                tracing::debug!(target = %target.name, %standby, %error, "the slot of a standby is not kept");
            }
        }
        sleep(EVERY).await;
    }
}

/// Makes the slot, or moves it to where the stored WAL ends, as far as this standby has replayed. While a standby is the
/// source the primary is one of the others.
async fn keep_slot(
    standby: &ConnInfo,
    target: &Target,
    (durable, from_standby): (Option<(BranchId, Lsn)>, bool),
) -> Result<()> {
    let name = format!("drctl slot {}", target.name);
    let client = sql::connect(&standby.clone().with_application_name(name)).await?;
    let Some(row) = client.query_opt(SLOT, &[&target.slot, &from_standby]).await.map_err(PgError::from)? else {
        return Ok(());
    };
    let Some(kept) = row.get::<_, Option<String>>(0).and_then(|lsn| lsn.parse::<Lsn>().ok()) else {
        let make = "SELECT pg_catalog.pg_create_physical_replication_slot($1, true)";
        client.execute(make, &[&target.slot]).await.map_err(PgError::from)?;
        tracing::info!(target = %target.name, %standby, slot = target.slot, "the slot is kept on this server from now on");
        return Ok(());
    };
    if let Some((branch, durable)) = durable.filter(|(_, durable)| kept < *durable) {
        let mut walsender = ReplicationClient::connect(standby).await?;
        let server = Server::identify(&mut walsender).await?;
        // A standby on another timeline has other WAL at that position, and what it has may be stored nowhere.
        if server.branches().first() != Some(&branch) {
            return Ok(());
        }
        // Up to here at most it was on this timeline: it may change to another one before it moves the slot.
        let durable = durable.min(server.flush_lsn);
        // The server goes no further than it has replayed.
        let advance = format!("SELECT pg_catalog.pg_replication_slot_advance($1, '{durable}')");
        client.execute(&advance, &[&target.slot]).await.map_err(PgError::from)?;
    }
    Ok(())
}
