//! What is on its way to regions while connections come and go: it has landed before another history begins.

use crate::jobs::wal::position::State;
use crate::jobs::wal::run::{Run, Trouble};
use crate::jobs::wal::server::Start;
use crate::jobs::wal::shipped::Shipped;
use crate::jobs::wal::shipper;
use crate::model::{Error, Kind, Lsn, Result};

impl Run {
    /// What is durable of the history that begins at `start`. What is on its way of another one must have landed before:
    /// it may be the beginning of this one, and it may go further than this one has come. `anew`: whose it is has yet to
    /// be seen.
    pub(in crate::jobs::wal) async fn settle(&mut self, start: &Start, anew: bool) -> Result<Lsn, Trouble> {
        let known = self.shared.shipped.borrow().on(&start.branch);
        if let Some(durable) = known.filter(|durable| !anew && *durable <= start.lsn) {
            return Ok(durable);
        }
        self.ship_pending().await?;
        self.shared.stand_at(start);
        Ok(start.lsn)
    }

    /// Ships what earlier sessions left, and waits until it is durable.
    pub(in crate::jobs::wal) async fn ship_pending(&mut self) -> Result<(), Trouble> {
        // A frame leaves the queue when there is room for it: whoever stops waiting loses none.
        while let Some(frame) = self.pending.front() {
            let permit = self.shipper.room(frame.chunk.wal.len()).await?;
            if let Some(frame) = self.pending.pop_front() {
                self.shipper.ship(frame, permit);
            }
        }
        self.shipper.landed().await.map_err(|_| Trouble::ShipperGone)
    }

    /// What was on its way may be stored or not: the regions are asked, as after a crash.
    pub(in crate::jobs::wal) async fn restart_shipper(&mut self) -> Result<()> {
        let fresh = shipper::start(&self.context, self.kind, self.means.clone())?;
        let error = match std::mem::replace(&mut self.shipper, fresh).finish().await {
            Ok(()) => Error::failed("the WAL shipper has ended"),
            // Sealed out. To take over in turn would be a fight: whoever runs this decides who goes on.
            Err(error) if error.kind() == Kind::Refused => return Err(error),
            Err(error) => error,
        };
        tracing::error!(%error, "the epoch cannot be continued; another one is begun");
        self.shared.trouble(State::Reconnecting, &error);
        self.shared.shipped.send_modify(Shipped::lose);
        self.pending.clear();
        self.stored_histories.clear();
        self.means.known.clear();
        self.cursor = None;
        Ok(())
    }
}
