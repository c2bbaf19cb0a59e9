//! The WAL of a target: received, stored, and told about.
//!
//! The reading side ([`receiver`], `session`) never waits for a region, the storing side (`shipper`) never for the
//! server; between them is one frame on its way and one that grows.

mod buffer;
pub mod control;
pub mod position;
pub mod receiver;
mod run;
mod server;
mod session;
mod shared;
mod shipper;
pub mod status;

use std::time::Duration;

pub use position::{Position, State};
pub use receiver::Receiver;
pub use status::{WalStatus, wal_status};

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::control::ControlServer;
use crate::model::{Lsn, Result};
use crate::repository::fan_out::LaneOutcome;
use crate::repository::wal_frame::EpochKind;

/// A receiver that answers on the target's control socket.
#[derive(Debug)]
pub struct Stream {
    receiver: Receiver,
    control: ControlServer,
}

impl Stream {
    /// Starts streaming a target's WAL and answering for it.
    ///
    /// # Errors
    /// Another receiver of this target runs here, or the socket cannot be made.
    pub async fn start(context: &Context, target: &Target) -> Result<Self> {
        let receiver = Receiver::start(context, target, EpochKind::Stream).await?;
        let control = ControlServer::start(&target.control_socket, &target.name, receiver.watch()).await?;
        Ok(Self { receiver, control })
    }

    /// The receiver.
    pub const fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    /// Ships what was received and ends; says what each region lacks.
    ///
    /// # Errors
    /// As [`Receiver::stop`].
    pub async fn stop(self) -> Result<Vec<LaneOutcome>> {
        let ended = self.receiver.stop().await;
        self.control.stop().await;
        ended
    }
}

/// Waits until the receiver on the target's control socket has made every record up to `lsn` durable. `None` = nobody
/// answers there.
///
/// # Errors
/// Not within `limit`; or the receiver streams another system.
pub async fn wait_durable_at(target: &Target, lsn: Lsn, limit: Duration) -> Result<Option<Position>> {
    const PAUSE: Duration = Duration::from_millis(100);
    let mut seen = None;
    let reached = async {
        loop {
            let position = control::position(&target.control_socket, &target.name).await?;
            match position {
                None if seen.is_none() => return Ok(None),
                Some(position) if position.reaches(lsn) => return Ok(Some(position)),
                // It may be restarting: whether it comes back in time decides.
                None => {}
                Some(position) => seen = Some(position),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    match tokio::time::timeout(limit, reached).await {
        Ok(reached) => reached,
        Err(_) => match &seen {
            Some(position) => Err(receiver::not_durable(position, lsn, limit)),
            None => Ok(None),
        },
    }
}
