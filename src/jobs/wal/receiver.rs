//! The WAL receiver: connects, finds its place, streams, and begins again for as long as it is not told to stop.

mod gap;
mod opening;
mod recovery;
mod settling;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::disk::lock::Lock;
use crate::jobs::context::{Context, Target};
use crate::jobs::wal::changes::{Tracker, journal_path};
use crate::jobs::wal::fill::Filler;
use crate::jobs::wal::position::{Position, State};
use crate::jobs::wal::primary::keep_asking;
use crate::jobs::wal::pulse::keep_beating;
use crate::jobs::wal::run::{Ended, Run, Trouble};
use crate::jobs::wal::segments::SharedBook;
use crate::jobs::wal::shared::Shared;
use crate::jobs::wal::shipper::Means;
use crate::jobs::wal::slot::keep_looking;
use crate::jobs::wal::standbys::keep_slots;
use crate::model::{Error, Kind, Lsn, Result, ResultExt};
use crate::observe::task;
use crate::repository::backup::parent::state_path;
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::wal::frame::EpochKind;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a stop waits for regions. What could not be shipped stays on the server.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A running receiver. Dropping it stops it without shipping the rest; the server keeps that.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<Vec<LaneOutcome>>>>,
    beside: Vec<AbortOnDropHandle<()>>,
}

impl Receiver {
    /// Starts a backup's own receiver: it begins with the segment that the server writes now, and this returns when the
    /// server holds that WAL.
    ///
    /// # Errors
    /// The server does not stream.
    pub async fn for_backup(context: &Context, target: &Target) -> Result<Self> {
        let mut receiver = Self::begin(context, target, EpochKind::Backup, None)?;
        receiver.wait_until(|position| position.state != State::Connecting).await?;
        Ok(receiver)
    }

    /// Starts receiving a target's WAL for good: it continues where stored WAL ends and never gives up. The lock lives as
    /// long as its task.
    pub(super) fn stream(
        context: &Context,
        target: &Target,
        lock: Arc<Lock>,
        (book, filler): (SharedBook, Filler),
    ) -> Result<Self> {
        Self::begin(context, target, EpochKind::Stream, Some((lock, book, filler)))
    }

    fn begin(
        context: &Context,
        target: &Target,
        kind: EpochKind,
        kept: Option<(Arc<Lock>, SharedBook, Filler)>,
    ) -> Result<Self> {
        let (lock, book, filler) =
            kept.map_or((None, None, Filler::default()), |(lock, book, filler)| (Some(lock), Some(book), filler));
        let out = Arc::new(FanOut::new(&context.repository.regions, Patience::WAL));
        let mut shared = Shared::new(target.name.clone(), Arc::clone(&context.clock), &out);
        shared.beats = kind == EpochKind::Stream && target.heartbeat;
        let shared = Arc::new(shared);
        let stop = CancellationToken::new();
        let shipped = Arc::clone(&shared.shipped);
        let means = Means { out, shipped, book, known: Arc::default() };
        let tracker = (kind == EpochKind::Stream && target.detection.reads_wal()).then(|| {
            let (journal, pages) =
                (journal_path(&context.state_dir, &target.name), state_path(&context.state_dir, &target.name));
            Tracker::open(journal, pages, Arc::clone(&context.clock))
        });
        let run = Run::new((context, target), kind, (means, Arc::clone(&shared)), stop.clone())?;
        let run = Run { tracker, filler, _lock: lock, ..run };
        let beside = if kind == EpochKind::Stream { work_beside(target, &shared) } else { Vec::new() };
        Ok(Self { shared, stop, task: Some(task::spawn("wal-receiver", run.until_stopped())), beside })
    }

    /// Every record that ends at or before this position is durable at the write quorum.
    pub fn durable(&self) -> Lsn {
        self.shared.shipped.borrow().durable
    }

    /// Where this run began.
    pub fn start_lsn(&self) -> Option<Lsn> {
        self.shared.view.borrow().start.as_ref().map(|(lsn, _)| *lsn)
    }

    /// What went wrong last; it may have passed.
    pub fn last_error(&self) -> Option<String> {
        self.position().last_error
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.position().state
    }

    /// Everything that is known.
    pub fn position(&self) -> Position {
        self.shared.position()
    }

    /// A way to ask for the position that outlives borrowing.
    pub fn watch(&self) -> impl Fn() -> Position + Clone + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.position()
    }

    /// Whether it has ended by itself, which a stream receiver does only at an error of the configuration.
    pub fn is_over(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until every record up to `lsn` is durable.
    ///
    /// # Errors
    /// Not within `limit`, or the receiver has ended.
    pub async fn wait_durable(&mut self, lsn: Lsn, limit: Duration) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let waited = timeout(limit, self.wait_until(|position| position.reaches(lsn))).await;
        waited.unwrap_or_else(|_| Err(not_durable(&shared.position(), lsn, limit)))
    }

    async fn wait_until(&mut self, reached: impl Fn(&Position) -> bool) -> Result<()> {
        let (mut view, mut shipped) = (self.shared.view.subscribe(), self.shared.shipped.subscribe());
        while !reached(&self.shared.position()) {
            let Some(task) = self.task.as_mut() else { return Err(Error::failed("the WAL receiver has ended")) };
            tokio::select! {
                _ = view.changed() => {}
                _ = shipped.changed() => {}
                ended = task => {
                    self.task = None;
                    let ended = ended.map_err(|error| Error::failed("the WAL receiver died").because(error))?;
                    return Err(ended.err().unwrap_or_else(|| Error::failed("the WAL receiver has ended")));
                }
            }
        }
        Ok(())
    }

    /// Stops: what was received is shipped, the epoch is closed, the server is told. Says what each region lacks.
    ///
    /// # Errors
    /// The receiver had ended with an error, or regions did not take the rest within a minute: the server keeps it.
    pub async fn stop(mut self) -> Result<Vec<LaneOutcome>> {
        self.beside.clear();
        self.stop.cancel();
        let Some(task) = self.task.as_mut() else { return Ok(Vec::new()) };
        match timeout(STOP_LIMIT, task).await {
            Ok(ended) => ended.map_err(|error| Error::failed("the WAL receiver died").because(error))?,
            Err(_) => {
                let position = self.shared.position();
                let text = format!("WAL behind {} could not be shipped; the server keeps it", position.durable_lsn);
                Err(position.last_error.iter().fold(Error::new(Kind::Unavailable, text), Error::because))
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// What a stream receiver has done beside it for as long as it lives.
fn work_beside(target: &Target, shared: &Arc<Shared>) -> Vec<AbortOnDropHandle<()>> {
    let beating =
        shared.beats.then(|| task::spawn("heartbeat", keep_beating(target.clone(), Arc::clone(&shared.pulse))));
    let looking = task::spawn("slot", keep_looking(target.clone(), Arc::clone(&shared.slot)));
    let keeping =
        target.standby_slots.then(|| task::spawn("standby-slots", keep_slots(target.clone(), Arc::clone(shared))));
    let asking = task::spawn("primary", keep_asking(target.clone(), Arc::clone(shared)));
    beating.into_iter().chain([looking]).chain(keeping).chain([asking]).map(AbortOnDropHandle::new).collect()
}

pub(super) fn lock(context: &Context, target: &Target) -> Result<Lock> {
    let path = context.state_dir.join(format!("{}.wal.lock", target.name));
    let lock = Lock::acquire(&path).map_err(Error::from);
    lock.map_err(|error| match error.kind() {
        Kind::Refused => error
            .during(format!("the WAL of {} is already being streamed on this host", target.name))
            .hint("one receiver per target: stop the other one first, or look at it with `drctl wal status`"),
        _ => error,
    })
}

/// The error of whoever waited for `lsn` in vain.
pub(super) fn not_durable(position: &Position, lsn: Lsn, limit: Duration) -> Error {
    let Position { durable_lsn, state, .. } = position;
    let text = format!("WAL up to {lsn} is not durable after {} s: it is up to {durable_lsn}", limit.as_secs());
    let error = Error::new(Kind::Unavailable, text).because(format!("the receiver is {}", state.words()));
    position.last_error.iter().fold(error.transient(true), Error::because)
}

impl Run {
    async fn until_stopped(mut self) -> Result<Vec<LaneOutcome>> {
        let mut pause = FIRST_PAUSE;
        while !self.stop.is_cancelled() {
            let before = self.shared.view.borrow().received;
            let trouble = match self.once().await {
                Ok(Ended::Stopped) => break,
                Ok(Ended::Timeline) => continue,
                Err(trouble) => trouble,
            };
            if self.shared.view.borrow().received > before {
                (pause, self.given_up) = (FIRST_PAUSE, None);
            }
            if self.recover(trouble).await? {
                let stop = self.stop.clone();
                // Interrupted or over: the loop looks again either way.
                let _ = stop.run_until_cancelled(sleep(pause)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        self.finish().await
    }

    /// One connection, from its beginning to its end.
    async fn once(&mut self) -> Result<Ended, Trouble> {
        let (stop, slot) = (self.stop.clone(), Arc::clone(&self.shared.slot));
        let opened = tokio::select! {
            opened = stop.run_until_cancelled(self.open()) => opened,
            share = slot.over() => return Err(Trouble::Pressure(share)),
        };
        let Some(session) = opened else { return Ok(Ended::Stopped) };
        let mut session = session?;
        self.shared.enter(State::Streaming);
        self.stream(&mut session).await
    }

    async fn finish(mut self) -> Result<Vec<LaneOutcome>> {
        let shipped = self.ship_pending().await;
        let Self { shipper, means, shared, .. } = self;
        // Why the shipper ended says more than that it did.
        shipper.finish().await.during(|| "close the epoch")?;
        shipped?;
        shared.enter(State::Stopped);
        Ok(match Arc::into_inner(means.out) {
            Some(out) => out.drain().await,
            None => Vec::new(),
        })
    }
}
