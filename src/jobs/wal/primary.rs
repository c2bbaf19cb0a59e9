//! The end of the primary's WAL, asked for while a standby is the source: a standby that lags or lost its primary knows
//! nothing of what was committed since, and would make exposure look like none.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::jobs::context::Target;
use crate::jobs::wal::shared::Shared;
use crate::model::{Error, Kind, Lsn, Result};
use crate::pg::PgError;
use crate::pg::sql::{self, SqlClient};

const EVERY: Duration = Duration::from_secs(1);
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// A standby refuses to answer it.
const END: &str = "SELECT pg_catalog.pg_current_wal_flush_lsn()::text";

/// Asks for as long as nobody drops it. Without an answer exposure is unknown.
pub(super) async fn keep_asking(target: Target, shared: Arc<Shared>) {
    let mut client = None;
    let mut looks = interval(EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        looks.tick().await;
        if !shared.from_standby.load(Ordering::Relaxed) {
            client = None;
            continue;
        }
        let late = |_| Err(Error::new(Kind::Unavailable, "the primary does not answer in time"));
        let asked = shared.clock.monotonic();
        match timeout(ANSWER_TIME, ask(&target, &mut client)).await.unwrap_or_else(late) {
            Ok(end) => shared.sample_primary(end, asked),
            Err(error) => {
                client = None;
                tracing::debug!(target = %target.name, %error, "the end of the primary's WAL is unknown");
            }
        }
    }
}

async fn ask(target: &Target, client: &mut Option<SqlClient>) -> Result<Lsn> {
    let client = match client {
        Some(client) => client,
        None => {
            let name = format!("drctl primary {}", target.name);
            client.insert(sql::connect(&target.conninfo.primary().with_application_name(name)).await?)
        }
    };
    let end: String = client.query_one(END, &[]).await.map_err(PgError::from)?.get(0);
    end.parse().map_err(|error| Error::failed(format!("`{end}` is no position")).because(error))
}
