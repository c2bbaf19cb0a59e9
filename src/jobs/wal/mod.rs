//! The WAL of a target: received, taken from `archive_command` ([`push`]), stored, and told about.
//!
//! The reading side ([`receiver`], `session`) never waits for a region, the storing side (`shipper`) never for the
//! server; between them are a few frames on their way and one that grows. `takeover` makes a receiver the one owner.

pub mod acceptance;
mod buffer;
pub mod bundle;
pub mod changes;
mod contradiction;
pub mod control;
pub mod fetch;
mod fill;
mod give_up;
mod passing;
pub mod position;
pub mod pressure;
mod primary;
mod pulse;
pub mod push;
pub mod receiver;
mod run;
#[cfg(test)]
mod run_tests;
mod seam;
mod segments;
mod server;
mod session;
mod shared;
mod shipped;
mod shipper;
pub mod slot;
mod standbys;
pub mod status;
pub mod takeover;

use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use position::{Heartbeat, Position, Pushes, State, reaches};
pub use push::Receipt;
pub use receiver::Receiver;
pub use status::{WalStatus, wal_status};

use crate::disk::lock::Lock;
use crate::jobs::context::{Context, Target};
use crate::jobs::socket::Guests;
use crate::jobs::wal::control::{ControlServer, Place};
use crate::jobs::wal::fill::Filler;
use crate::jobs::wal::push::{PushDesk, Streamed};
use crate::jobs::wal::segments::SegmentBook;
use crate::model::{Lsn, Result};
use crate::repository::regions::fan_out::LaneOutcome;

/// Takes the WAL of a target, streamed and handed over, and answers for it on the target's control socket.
#[derive(Debug)]
pub struct Stream {
    target: Target,
    receiver: Option<Receiver>,
    push: Arc<PushDesk>,
    control: ControlServer,
    _lock: Arc<Lock>,
}

impl Stream {
    /// Starts taking a target's WAL and answering for it.
    ///
    /// # Errors
    /// Somebody else takes it on this host already, or the socket cannot be made.
    pub async fn start(context: &Context, target: &Target) -> Result<Self> {
        let lock = Arc::new(receiver::lock(context, target)?);
        let (name, repository) = (target.name.as_str(), &context.repository.id);
        let book = SegmentBook::open(&context.state_dir, name, repository, context.rng.as_ref())?;
        let book = Arc::new(Mutex::new(book));
        let filler = Filler::default();
        let receiver = match target.stream {
            true => {
                Some(Receiver::stream(context, target, Arc::clone(&lock), (Arc::clone(&book), Arc::clone(&filler)))?)
            }
            false => None,
        };
        let streamed = receiver.as_ref().map(|receiver| Streamed(Arc::new(receiver.watch())));
        let push = Arc::new(PushDesk::open(context, target, book, streamed));
        filler.get_or_init(|| Arc::clone(&push));
        let ask = watch(target, receiver.as_ref(), &push);
        let guests = Guests::named(&context.guests)?;
        let place = Place { path: &target.control_socket, guests: &guests, spool: &context.state_dir };
        let control = ControlServer::start(place, &target.name, ask, Arc::clone(&push)).await?;
        Ok(Self { target: target.clone(), receiver, push, control, _lock: lock })
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.watch()()
    }

    /// A way to ask for the position that outlives borrowing.
    pub fn watch(&self) -> impl Fn() -> Position + Clone + Send + Sync + 'static {
        watch(&self.target, self.receiver.as_ref(), &self.push)
    }

    /// Whether it has ended by itself, which it does only at an error of the configuration.
    pub fn is_over(&self) -> bool {
        self.receiver.as_ref().is_some_and(Receiver::is_over)
    }

    /// Ships what was received and ends; says what each region lacks.
    ///
    /// # Errors
    /// As [`Receiver::stop`].
    pub async fn stop(self) -> Result<Vec<LaneOutcome>> {
        let ended = match self.receiver {
            Some(receiver) => receiver.stop().await,
            None => Ok(Vec::new()),
        };
        self.control.stop().await;
        let pushed = self.push.close().await;
        ended.map(|mut lanes| {
            lanes.extend(pushed);
            lanes
        })
    }
}

fn watch(
    target: &Target,
    receiver: Option<&Receiver>,
    push: &Arc<PushDesk>,
) -> impl Fn() -> Position + Clone + Send + Sync + 'static {
    let (target, push, streamed) = (target.clone(), Arc::clone(push), receiver.map(Receiver::watch));
    move || match &streamed {
        Some(streamed) => Position { pushes: push.pushes(), ..streamed() },
        None => push.position(&target),
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
