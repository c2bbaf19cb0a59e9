//! What the server keeps for us: its replication slot, as far as the server answers in a moment.

use std::time::Duration;

use futures::future::join_all;

use crate::jobs::Context;
use crate::jobs::context::Target;
use crate::jobs::wal::pressure::TOLD_AT;
use crate::jobs::wal::slot;
use crate::model::TargetName;
use crate::pg::{PgError, sql};
use crate::source::postgres::room::{self, Slot};

/// A status is wanted when servers are down.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// What somebody must know of it.
pub(super) fn problem(slot: &Slot) -> Option<String> {
    let name = &slot.name;
    let filled = slot.filled_percent().max(slot.disk_percent()).unwrap_or_default();
    match slot.wal_status.as_deref() {
        Some("lost") => Some(format!("slot {name} was lost: the server removed WAL that is not stored")),
        Some("unreserved") => Some(format!("slot {name} is about to be lost")),
        _ if filled >= TOLD_AT.into_iter().min().unwrap_or(u8::MAX) => {
            Some(format!("slot {name} takes {filled} % of the space for WAL"))
        }
        _ => None,
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

async fn ask(target: &Target) -> Result<Option<Slot>, PgError> {
    let client = sql::connect(&target.conninfo).await?;
    room::held(&client, &target.slot, &slot::disk(target)).await
}
