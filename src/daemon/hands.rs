//! Does what the scheduler decided: notes, runs, stops, records, and brings records into the regions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::app::{self, Role, World};
use crate::config::Settings;
use crate::daemon::figures::Figures;
use crate::daemon::pager::Pager;
use crate::daemon::scheduler::{Action, End, Going};
use crate::daemon::standing::Standing;
use crate::jobs::reports::outbox;
use crate::jobs::runs::RunLog;
use crate::jobs::work::{self, Done};
use crate::model::run::{Open, Outcome, Run};
use crate::model::schedule::Work;
use crate::model::{Error, Kind, Result, ScheduleName};
use crate::observe::progress::{Progress, Snapshot};
use crate::observe::task;

/// How often records are brought to regions that did not answer.
const SPREAD_AGAIN: Duration = Duration::from_secs(30);
/// How often a write into the state directory is repeated that failed.
const WRITE_AGAIN: Duration = Duration::from_secs(5);
/// How often it is looked whether anything can be written there.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How long a daemon that goes still tries.
const LAST_SPREAD: Duration = Duration::from_secs(15);

/// Who hears of what is done.
pub(super) struct Observers {
    pub(super) figures: Arc<Figures>,
    pub(super) pager: Arc<Pager>,
    pub(super) standing: Arc<Standing>,
}

/// The hands.
pub(super) struct Hands {
    settings: Arc<Settings>,
    world: World,
    log: Arc<RunLog>,
    jobs: FuturesUnordered<BoxFuture<'static, (Open, End)>>,
    stops: BTreeMap<(ScheduleName, DateTime<Utc>), CancellationToken>,
    /// How far the jobs that run have come.
    progress: Arc<Mutex<BTreeMap<ScheduleName, Progress>>>,
    recorded: Arc<Notify>,
    spreader: JoinHandle<()>,
    observers: Observers,
    /// Why the state directory takes nothing.
    unwritten: Option<String>,
    /// When it was written last, or could not be.
    written: Option<Duration>,
}

impl Hands {
    pub(super) fn new(settings: Settings, world: World, log: RunLog, observers: Observers) -> Self {
        let (settings, log, recorded) = (Arc::new(settings), Arc::new(log), Arc::new(Notify::new()));
        let spreading = keep_spreading(Arc::clone(&settings), world.clone(), Arc::clone(&log), Arc::clone(&recorded));
        let spreader = task::spawn("run-spreader", spreading);
        Self {
            unwritten: None,
            written: None,
            settings,
            world,
            log,
            jobs: FuturesUnordered::new(),
            stops: BTreeMap::new(),
            progress: Arc::default(),
            recorded,
            spreader,
            observers,
        }
    }

    pub(super) fn figures(&self) -> &Figures {
        &self.observers.figures
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How far the job of a schedule has come, once it has opened the repository.
    pub(super) fn progress(&self, schedule: &ScheduleName) -> Option<Going> {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner).get(schedule).cloned();
        going(&progress?.snapshot())
    }

    pub(super) const fn world(&self) -> &World {
        &self.world
    }

    /// Why what was done last would not outlive this process.
    pub(super) fn unwritten(&self) -> Option<&str> {
        self.unwritten.as_deref()
    }

    /// Finds out whether the state directory can be written, before a slot needs it.
    pub(super) async fn tend(&mut self) -> Result<()> {
        let now = self.world.clock.monotonic();
        if self.written.is_some_and(|written| now.saturating_sub(written) < self.soonest()) {
            return Ok(());
        }
        let log = Arc::clone(&self.log);
        self.durably(move || log.flush()).await
    }

    /// How soon [`Self::tend`] has something to do again.
    pub(super) const fn soonest(&self) -> Duration {
        if self.unwritten.is_some() { WRITE_AGAIN } else { LOOK_AGAIN }
    }

    /// Does all of it, in order.
    pub(super) async fn act(&mut self, actions: Vec<Action>) -> Result<()> {
        for action in actions {
            match action {
                Action::Settle(schedule, until) => {
                    let log = Arc::clone(&self.log);
                    self.durably(move || log.settle(&schedule, until)).await?;
                }
                Action::Rewind { schedule, from, to } => {
                    let warning = "the clock was far ahead once; the schedule begins anew now";
                    tracing::error!(%schedule, %from, %to, "{warning}");
                    let log = Arc::clone(&self.log);
                    self.durably(move || log.rewind(&schedule, to)).await?;
                }
                Action::Pause(schedule, pause) => {
                    let log = Arc::clone(&self.log);
                    self.durably(move || log.pause(&schedule, pause.as_ref())).await?;
                }
                Action::Accept(open) => self.note(open).await?,
                Action::Start(open, work) => {
                    self.note(open.clone()).await?;
                    self.start(open, work);
                }
                Action::Stop(open) => {
                    if let Some(stop) = self.stops.remove(&(open.schedule, open.slot)) {
                        stop.cancel();
                    }
                }
                Action::Record(run) => self.record(run).await?,
            }
        }
        Ok(())
    }

    /// The next job that ends by itself; without any it never comes.
    pub(super) async fn ended(&mut self) -> Option<(Open, End)> {
        if self.jobs.is_empty() {
            std::future::pending::<()>().await;
        }
        let (open, end) = self.jobs.next().await?;
        self.stops.remove(&(open.schedule.clone(), open.slot));
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).remove(&open.schedule);
        Some((open, end))
    }

    /// Brings what is owed to the regions once more, and ends.
    pub(super) async fn rest(&mut self) {
        self.spreader.abort();
        let spread = spread(&self.settings, &self.world, &self.log);
        if tokio::time::timeout(LAST_SPREAD, spread).await.is_err() {
            tracing::warn!("records of runs stay in the state directory until the next start");
        }
    }

    /// Writes into the state directory. It is a cache: one that is full or gone holds up no job, and the outcome goes to
    /// the regions all the same. It is told, because a daemon that is killed meanwhile has forgotten what ran.
    async fn durably(&mut self, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let written = tokio::task::spawn_blocking(write).await;
        let written = written.map_err(|error| Error::failed("a record could not be written").because(error))?;
        self.written = Some(self.world.clock.monotonic());
        let trouble = written.err().map(|error| error.to_string());
        match (&self.unwritten, &trouble) {
            (None, Some(why)) => tracing::error!(why, "the state directory cannot be written; jobs run without it"),
            (Some(_), None) => tracing::info!("the state directory is written again"),
            _ => {}
        }
        self.observers.standing.state_dir(trouble.clone());
        self.observers.pager.state_dir(trouble.as_deref());
        self.unwritten = trouble;
        Ok(())
    }

    async fn note(&mut self, open: Open) -> Result<()> {
        let log = Arc::clone(&self.log);
        self.durably(move || log.note(&open)).await
    }

    async fn record(&mut self, run: Run) -> Result<()> {
        tell(&run);
        let log = Arc::clone(&self.log);
        self.observers.figures.recorded(&run);
        self.observers.pager.recorded(&run);
        self.durably(move || log.record(&run)).await?;
        self.recorded.notify_one();
        Ok(())
    }

    fn start(&mut self, open: Open, work: Work) {
        let Open { schedule, slot, attempts, caught_up, .. } = &open;
        tracing::info!(%schedule, %slot, job = %work.job(), attempt = attempts, caught_up, "starts");
        let (settings, world) = (Arc::clone(&self.settings), self.world.clone());
        let stop = CancellationToken::new();
        self.stops.insert((schedule.clone(), *slot), stop.clone());
        let (progress, name) = (Arc::clone(&self.progress), schedule.clone());
        let going = move |begun: Progress| {
            progress.lock().unwrap_or_else(PoisonError::into_inner).insert(name, begun);
        };
        // A thread of its own: a job that hangs in a system call takes nobody else's.
        let runtime = tokio::runtime::Handle::current();
        let handle = tokio::task::spawn_blocking(move || {
            runtime.block_on(async {
                tokio::select! {
                    done = attempt(&settings, &world, &work, going) => done,
                    () = stop.cancelled() => Err(Error::new(Kind::Cancelled, "it was stopped")),
                }
            })
        });
        self.jobs.push(Box::pin(async move {
            let end = match handle.await {
                Ok(Ok(Done { outcome, detail })) => End::Done(outcome, detail),
                Ok(Err(error)) if error.kind() == Kind::Busy => End::Busy(error.to_string()),
                Ok(Err(error)) => End::Failed(error.to_string()),
                Err(error) => End::Failed(format!("the job stopped at a fault of its own: {error}")),
            };
            (open, end)
        }));
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.spreader.abort();
        self.stops.values().for_each(CancellationToken::cancel);
    }
}

/// One attempt opens everything anew: a region that was away an hour ago is back, and a password that was changed is read.
async fn attempt(settings: &Settings, world: &World, work: &Work, going: impl FnOnce(Progress) + Send) -> Result<Done> {
    let context = match work {
        // A region that is gone is not made anew here: only somebody who looks can tell it from one that is not mounted.
        Work::Backup { .. }
        | Work::Dump { .. }
        | Work::Files { .. }
        | Work::Repair { .. }
        | Work::Compact { .. }
        | Work::Bundle { .. } => app::context(settings, Role::Write, world).await?,
        Work::Verify { .. } => app::context(settings, Role::Restore, world).await?,
        Work::Drill { .. } => app::drill_context(settings, world).await?,
        Work::Prune => app::context(settings, Role::Prune, world).await?,
    };
    going(context.progress.clone());
    work::run(&context, work).await
}

/// The phase that began last of those that go on; between two phases nothing is known.
fn going(snapshot: &Snapshot) -> Option<Going> {
    let phase = snapshot.phases.iter().rfind(|phase| phase.ended.is_none())?;
    Some(Going {
        phase: phase.name.to_owned(),
        seconds: phase.elapsed(snapshot.at).as_secs_f64(),
        done_bytes: phase.done,
        total_bytes: phase.total,
        note: phase.note.clone(),
    })
}

fn tell(run: &Run) {
    let Run { schedule, slot, outcome, caught_up, attempts, slots, .. } = run;
    let detail = run.detail.as_deref().unwrap_or_default();
    let outcome_text = outcome.as_str();
    match outcome {
        Outcome::Success => {
            tracing::info!(%schedule, %slot, outcome = outcome_text, caught_up, attempts, detail, "ended");
        }
        _ => tracing::warn!(%schedule, %slot, outcome = outcome_text, caught_up, attempts, slots, detail, "ended"),
    }
}

async fn keep_spreading(settings: Arc<Settings>, world: World, log: Arc<RunLog>, recorded: Arc<Notify>) {
    loop {
        spread(&settings, &world, &log).await;
        let _ = tokio::time::timeout(SPREAD_AGAIN, recorded.notified()).await;
    }
}

async fn spread(settings: &Settings, world: &World, log: &RunLog) {
    let brought = async {
        let reports = outbox::has_owed(&settings.repository.state_dir);
        if log.owed()?.is_empty() && !reports {
            return Ok(0);
        }
        let context = app::context(settings, Role::Write, world).await?;
        if reports {
            outbox::spread(&context).await?;
        }
        log.spread(&context).await
    };
    match brought.await {
        Ok(0) => {}
        Ok(owed) => tracing::info!(owed, "records of runs are in the state directory and not yet in every region"),
        Err(error) => tracing::warn!(%error, "records of runs cannot be brought to any region yet"),
    }
}
