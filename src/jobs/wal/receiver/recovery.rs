//! What is done about each kind of trouble, and which kind no waiting mends.

use std::sync::Arc;

use crate::jobs::wal::position::State;
use crate::jobs::wal::run::{Past, Run, SlotCare, Trouble};
use crate::jobs::wal::server;
use crate::model::Result;
use crate::pg::PgError;
use crate::repository::wal::frame::EpochKind;

impl Run {
    /// Does what can be done about `trouble`, and says whether to wait before the next attempt.
    pub(super) async fn recover(&mut self, trouble: Trouble) -> Result<bool> {
        if self.kind != EpochKind::Stream {
            return Err(trouble.into());
        }
        match trouble {
            Trouble::Server(PgError::WalRemoved { .. }) if self.past == Past::Comparing => {
                self.past = Past::Trust;
                return Ok(false);
            }
            Trouble::OtherPast(at, error) => self.contradict(at, &error).await?,
            Trouble::Server(PgError::WalRemoved { message, .. }) => return self.meet_gap(&message).await,
            Trouble::Pressure(share) => return self.give_up_slot(share).await,
            Trouble::Server(error) if server::is_missing_slot(&error) && self.slot == SlotCare::Trust => {
                tracing::warn!(slot = self.target.slot, "the replication slot is gone; it is made again");
                self.slot = SlotCare::Ensure;
                return Ok(true);
            }
            Trouble::Server(error) if server::is_invalidated_slot(&error) && self.slot == SlotCare::Trust => {
                tracing::warn!(slot = self.target.slot, %error, "the replication slot was lost; it is made again");
                self.slot = SlotCare::Renew;
                return Ok(true);
            }
            Trouble::Server(error) if self.sessions == 0 && is_hopeless(&error) => return Err(error.into()),
            Trouble::Server(error @ PgError::SlotInUse(_)) => {
                self.tell(&error.to_string());
                self.settle_with_successor().await?;
            }
            Trouble::ShipperGone => self.restart_shipper().await?,
            trouble => self.tell(&trouble_text(&trouble)),
        }
        Ok(true)
    }

    /// The server no longer has the WAL that comes next, as `message` says. Says whether to wait before the next attempt.
    async fn meet_gap(&mut self, message: &str) -> Result<bool> {
        let (stop, slot) = (self.stop.clone(), Arc::clone(&self.shared.slot));
        let closed = tokio::select! {
            closed = stop.run_until_cancelled(self.close_gap(message)) => closed,
            share = slot.over() => return self.give_up_slot(share).await,
        };
        let Some(closed) = closed else { return Ok(false) };
        Ok(closed.inspect_err(|trouble| self.tell(&trouble_text(trouble))).is_err())
    }

    pub(in crate::jobs::wal) fn tell(&self, error: &str) {
        let waiting = self.shared.view.borrow().state == State::WaitingForRegions;
        self.shared.trouble(if waiting { State::WaitingForRegions } else { State::Reconnecting }, &error);
        tracing::info!(target = %self.target.name, error, "streaming is interrupted");
    }
}

fn trouble_text(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Server(error) => error.to_string(),
        Trouble::Pressure(_) => "the replication slot fills the server's disk".to_owned(),
        Trouble::ShipperGone => "the epoch cannot be continued".to_owned(),
        Trouble::OtherPast(_, error) | Trouble::Other(error) => error.to_string(),
    }
}

/// What no waiting mends: the configuration, or what the server allows us.
const fn is_hopeless(error: &PgError) -> bool {
    matches!(error, PgError::Auth(_) | PgError::Config(_) | PgError::Tls { .. } | PgError::Unsupported(_))
}
