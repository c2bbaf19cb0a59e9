//! A standby that recovers all the time from what the regions hold: its data directory is restored from a backup, and a
//! [feed] of this process gives its server WAL as it is stored. Whoever kills that process stops nothing
//! but the feed: the server waits, and the next `start` goes on.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::disk::lock::Lock;
use crate::jobs::context::Context;
use crate::jobs::feed::{self, Feed};
use crate::jobs::restore;
use crate::jobs::socket::Served;
use crate::jobs::standby::control::{Desk, Order};
use crate::jobs::standby::finish::{forsake, part};
use crate::jobs::standby::record::LOCK;
use crate::jobs::standby::report::Report;
use crate::jobs::standby::server::Server;
use crate::model::commit::WalNeed;
use crate::model::{Error, Lsn, Result, ResultExt};
use crate::pg::instance::User;
use crate::repository::handle::Repository;
use crate::repository::regions::nearest::nearest;
use crate::repository::wal::log::branch_of;

pub mod ask;
mod control;
mod drain;
mod finish;
mod promote;
mod record;
mod report;
mod server;
mod start;
mod status;
mod words;

pub use promote::{Plan as PromotionPlan, plan as plan_promotion};
pub use record::{RECORD, Record, known, known_in, the_one};
pub use start::{Begin, Start};
pub use status::{State, Status};
pub use words::{Overrides, Promoted, Wish};

/// How often the server is looked at.
const TURN: Duration = Duration::from_millis(500);
/// Before a server that ended is started again.
const AGAIN: Duration = Duration::from_secs(5);
/// For answers that are on their way when everything ends.
const FAREWELL: Duration = Duration::from_secs(5);
/// Turns between two looks at what the primary's WAL demands.
const LIMITS: u32 = 10;

/// How a standby ended.
#[derive(Debug)]
pub enum Ended {
    /// It was told to; its server is stopped.
    Stopped,
    /// Its server goes on, as a primary.
    Promoted(Box<Promoted>),
}

/// A standby that is fed.
#[derive(Debug)]
pub struct Standby {
    context: Context,
    desk: Arc<Desk>,
    server: Server,
    orders: mpsc::Receiver<Order>,
    started_at: Duration,
    control: Served,
    _lock: Lock,
}

impl Standby {
    /// Feeds a standby whose directory is there, and starts its server unless it runs.
    ///
    /// # Errors
    /// Another process feeds it, no region answers, PostgreSQL does not start, or it is no standby any more.
    pub async fn open(context: &Context, mut record: Record) -> Result<Self> {
        let owner = record.run_as.as_deref().map(User::named).transpose()?;
        let lock = Lock::acquire(&record.directory.join(LOCK)).during(|| "another drctl feeds this standby")?;
        restore::give(&record.directory.join(LOCK), owner)?;
        if let Err(promoted) = server::must_be_standby(&record.directory).await {
            return Err(forsake(context, &record, promoted).await);
        }
        let mut server = Server::of(&record).await?;
        if record.promotion.is_some() {
            // Whatever wakes the server up would promote it with this.
            server::withdraw_promotion(&record.directory)?;
        }
        if !server.is_running()? && record.promotion.take().is_some() {
            // One that runs may have taken the order, and follows it under whoever feeds it by then.
            record.note_promotion(None, owner)?;
        }
        if let Err(error) = record.remember(context) {
            tracing::warn!(%error, "the state directory does not know this standby: name it with --dir");
        }
        let region = match &record.region {
            Some(region) => Some(region.clone()),
            None => nearest(&context.repository.regions, context.clock.as_ref()).await,
        };
        let regions = match &region {
            Some(region) => context.repository.regions.preferring(region)?,
            None => context.repository.regions.clone(),
        };
        let repository = Repository { regions, ..context.repository.clone() };
        let context = Context { repository, ..context.clone() };
        let options =
            feed::Options { socket_dir: record.socket_dir.clone(), owner, origin: origin(&record).await?, way: None };
        let feed = Feed::open(&context, options).await?;
        let (sender, orders) = mpsc::channel(1);
        let desk = Desk {
            record,
            feed,
            region,
            server: std::sync::Mutex::default(),
            clock: Arc::clone(&context.clock),
            orders: sender,
        };
        let desk = Arc::new(desk);
        let control = control::serve(Arc::clone(&desk)).await?;
        if !server.is_running()? {
            server.start().await?;
        }
        let started_at = context.clock.monotonic();
        Ok(Self { context, desk, server, orders, started_at, control, _lock: lock })
    }

    /// What tells how it is, whatever it does.
    pub fn watch(&self) -> impl Fn() -> Status + Send + Sync + use<> {
        let desk = Arc::clone(&self.desk);
        move || desk.status()
    }

    /// Feeds until it is stopped or promoted.
    ///
    /// # Errors
    /// The server cannot be stopped in order.
    pub async fn run(mut self, stop: &CancellationToken) -> Result<Ended> {
        let mut turn: u32 = 0;
        let mut turns = tokio::time::interval(TURN);
        loop {
            tokio::select! {
                () = stop.cancelled() => return self.stop().await,
                order = self.orders.recv() => match order {
                    Some(Order::Promote(wish, answer)) => {
                        if let Some(promoted) = self.promote(wish, answer).await {
                            self.end().await;
                            return Ok(Ended::Promoted(Box::new(promoted)));
                        }
                    }
                    Some(Order::Stop(answer)) => {
                        // Nobody who waits for it needs to wait for the server here: the lock tells.
                        let _ = answer.send(());
                        return self.stop().await;
                    }
                    None => return Err(Error::failed("the standby lost its orders")),
                },
                _ = turns.tick() => {
                    if let Err(promoted) = server::must_be_standby(&self.desk.record.directory).await {
                        return self.leave(promoted).await;
                    }
                    turn += 1;
                    self.tend(turn.is_multiple_of(LIMITS)).await;
                }
            }
        }
    }

    /// Starts a server that ended, or that needs to be larger.
    async fn tend(&mut self, limits: bool) {
        let running = self.server.is_running();
        if limits && matches!(running, Ok(true)) && self.server.is_outgrown().await {
            tracing::info!("the primary was made larger: the standby's server is started again with its limits");
            if let Err(error) = self.server.stop().await {
                tracing::warn!(%error, "the standby's server does not stop");
                return;
            }
            self.start_again().await;
        }
        match running {
            Ok(true) => self.desk.note(|view| (view.pid, view.down) = (self.server.pid(), None)),
            ended => {
                let why = ended.err().map_or_else(|| "PostgreSQL does not run".to_owned(), |error| error.to_string());
                self.desk.note(|view| {
                    view.pid = None;
                    view.down.get_or_insert(why);
                });
                if self.context.clock.monotonic() - self.started_at >= AGAIN {
                    self.start_again().await;
                }
            }
        }
    }

    async fn start_again(&mut self) {
        self.started_at = self.context.clock.monotonic();
        let record = &self.desk.record;
        // A server that starts knows of no order.
        let started = match self.server.start().await {
            Ok(()) if record.promotion.is_some() => record.note_promotion(None, self.server.owner()),
            started => started,
        };
        if let Err(error) = started {
            tracing::warn!(%error, "the standby's server does not start");
            self.desk.note(|view| view.down = Some(error.to_string()));
        }
    }

    async fn promote(&mut self, wish: Wish, answer: oneshot::Sender<Result<Promoted>>) -> Option<Promoted> {
        self.desk.note(|view| view.promoting = true);
        let report = Report::begin(&self.context, &self.desk.record, wish);
        let subject = (&self.desk.record, &self.desk.feed, &mut self.server);
        let mut told = promote::run(&self.context, subject, wish).await;
        self.desk.note(|view| view.promoting = false);
        if let Ok(promoted) = &mut told {
            promoted.warnings.extend(self.part().err().map(|error| format!("not tidied up: {error}")));
        }
        report.end(&self.context, &mut told).await;
        let kept = told.as_ref().ok().cloned();
        // Whoever asked may have gone; what was done is done, and told by this process, too.
        let _ = answer.send(told);
        kept
    }

    /// The server is a primary: nothing of the standby stays.
    fn part(&mut self) -> Result<()> {
        let Desk { record, .. } = self.desk.as_ref();
        let owner = self.server.owner();
        self.server.leave();
        part(&self.context, record, owner)?;
        self.server.reload()
    }

    /// Its server is no standby any more: it goes on without this process.
    async fn leave(mut self, promoted: Error) -> Result<Ended> {
        self.server.leave();
        // An order that an earlier process gave, or this one without seeing its end, stands in the file.
        let told = match Record::read(&self.desk.record.directory) {
            Ok(Some(record)) => forsake(&self.context, &record, promoted).await,
            _ => promoted,
        };
        self.end().await;
        Err(told)
    }

    async fn stop(mut self) -> Result<Ended> {
        if let Err(promoted) = server::must_be_standby(&self.desk.record.directory).await {
            return self.leave(promoted).await;
        }
        let stopped = self.server.stop().await.during(|| "stop the standby's server");
        self.end().await;
        stopped.map(|()| Ended::Stopped)
    }

    /// Whoever asked hears the answer; then nothing of the feed stays.
    async fn end(self) {
        let Self { desk, control, .. } = self;
        control.stop(FAREWELL).await;
        feed::remove(&desk.record.socket_dir);
    }
}

/// Where a standby stands, by its own files.
async fn origin(record: &Record) -> Result<WalNeed> {
    let control = server::read_control(&record.directory).await?;
    let (timeline, at) = match control.min_recovery_end {
        Lsn::INVALID => (control.timeline, control.checkpoint),
        end => (control.min_recovery_timeline, end),
    };
    let origin = record.origin.clone();
    if control.system_id != origin.system_id {
        let text = format!("{} is of system {}", record.directory.display(), control.system_id);
        return Err(Error::refused(text).because(format!("its record says {}", origin.system_id)));
    }
    if timeline == origin.timeline {
        return Ok(WalNeed { stop_lsn: at.max(origin.stop_lsn), ..origin });
    }
    let path = record.directory.join("pg_wal").join(timeline.history_file_name());
    let history = std::fs::read(&path).map_err(|error| crate::disk::DiskError::new("read", &path, error))?;
    Ok(WalNeed { timeline, branch: branch_of(&history), stop_lsn: at, ..origin })
}
