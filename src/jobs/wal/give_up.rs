//! Giving the slot up, so that the server lives, and waiting until it can be made again.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::jobs::context::Target;
use crate::jobs::wal::position::State;
use crate::jobs::wal::run::{Run, SlotCare};
use crate::jobs::wal::server;
use crate::jobs::wal::slot::disk;
use crate::model::{Error, Result, ResultExt};
use crate::pg::{PgError, sql};
use crate::source::postgres::room;

/// How long our own connection may take to let go of the slot.
const LET_GO: Duration = Duration::from_secs(10);
const LET_GO_LOOK: Duration = Duration::from_millis(100);
/// Space comes back with a checkpoint. The server makes one by itself, later.
const CHECKPOINT_TIME: Duration = Duration::from_secs(60);

impl Run {
    /// Drops our slot, whose stream has ended by now, and waits until the regions take what was received. Only then is the
    /// slot made again: before, it would fill the disk once more. What the server removed meanwhile is met as a gap.
    pub(super) async fn give_up_slot(&mut self, share: u8) -> Result<bool> {
        match drop_ours(&self.target).await {
            Ok(true) => {}
            Ok(false) => return Ok(true),
            Err(error) => {
                self.tell(&error.to_string());
                return Ok(true);
            }
        }
        let text =
            format!("the slot was dropped: it took {share} % of the space for WAL (on_pressure = \"drop-slot\")");
        tracing::error!(target = %self.target.name, slot = self.target.slot, share, "the replication slot was dropped: it filled the server's disk");
        self.shared.trouble(State::GivenUp, &text);
        self.given_up = Some(text);
        checkpoint(&self.target).await;
        let stop = self.stop.clone();
        let shipped = stop.run_until_cancelled(self.ship_pending()).await;
        match shipped {
            Some(Ok(())) => self.slot = SlotCare::Ensure,
            // The loop asks the regions where stored WAL ends, and meets the missing slot then.
            Some(Err(trouble)) => tracing::debug!(?trouble, "what was received is not shipped"),
            None => {}
        }
        Ok(false)
    }
}

/// Drops the slot that the receiver used, if it fills the disk at this very moment; one that somebody else reads from stays.
/// Says whether it is gone.
async fn drop_ours(target: &Target) -> Result<bool> {
    let client = sql::connect(&target.conninfo).await?;
    let held = room::held(&client, &target.slot, &disk(target)).await?;
    if held.is_none_or(|slot| slot.disk_percent().is_none_or(|percent| percent < target.pressure_percent)) {
        return Ok(false);
    }
    let mut client = server::connect(target).await?;
    let deadline = Instant::now() + LET_GO;
    loop {
        match client.drop_slot(&target.slot, false).await {
            Err(PgError::SlotInUse(_)) if Instant::now() < deadline => sleep(LET_GO_LOOK).await,
            Err(error) if server::is_missing_slot(&error) => return Ok(true),
            other => {
                return other
                    .map(|()| true)
                    .map_err(Error::from)
                    .during(|| "drop the slot that fills the server's disk");
            }
        }
    }
}

/// Without the right to it, the server's own next one does the same.
async fn checkpoint(target: &Target) {
    let asked = async {
        let client = sql::connect(&target.conninfo).await?;
        client.batch_execute("CHECKPOINT").await.map_err(PgError::from)
    };
    match timeout(CHECKPOINT_TIME, asked).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::info!(target = %target.name, %error, "the server frees the space at its next checkpoint")
        }
        Err(_) => tracing::info!(target = %target.name, "the server frees the space when its checkpoint is done"),
    }
}
