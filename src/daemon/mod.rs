//! Floor 4, the daemon: runs jobs to their schedules and streams WAL, until it is told to stop.
//!
//! `scheduler` decides, and is pure; `hands` does what it decides; `streams` keeps one WAL stream per target alive;
//! `control` answers people on this host, `http` probes and Prometheus. `standing` and `figures` are what they are answered
//! from, `pager` and `life` tell people outside, `supervisor` the service manager. What was decided is durable in the state
//! directory before it is done, so that a daemon that is killed leaves every slot with an outcome for the next one to tell.
//! A state directory that cannot be written stops no job; it is a problem that pages.

pub mod control;
mod figures;
mod gate;
mod hands;
mod http;
mod life;
mod listener;
mod pager;
mod rebase;
pub mod scheduler;
#[cfg(test)]
mod simulation;
mod standing;
mod streams;
mod supervisor;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::sync::mpsc;

use crate::app::{self, Role, World};
use crate::config::{Settings, load_schedules};
use crate::daemon::control::{Api, Ask, Control, Triggered};
use crate::daemon::figures::{Figures, Reading};
use crate::daemon::hands::{Hands, Observers};
use crate::daemon::http::Http;
use crate::daemon::life::Life;
use crate::daemon::pager::Pager;
use crate::daemon::rebase::Rebase;
use crate::daemon::scheduler::{Known, Now, Scheduler, is_believable};
use crate::daemon::standing::{Standing, Watch};
use crate::daemon::streams::Streams;
use crate::daemon::supervisor::Supervisor;
use crate::jobs::runs::{self, Memory, RunLog};
use crate::jobs::socket::Guests;
use crate::model::schedule::{Job, Schedule};
use crate::model::{Error, Result, ResultExt};

/// How long a start waits for regions to tell which slots were recorded.
const RECALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a folder of schedules may take to be read.
const SCHEDULES_LIMIT: Duration = Duration::from_secs(10);
/// How long a daemon that goes waits for notices to arrive.
const LAST_NOTICE: Duration = Duration::from_secs(10);

/// What people ask a running daemon for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Read the schedules again.
    Reload,
    /// Start nothing more, let jobs end, go.
    Stop,
}

/// How the daemon works.
#[derive(Debug, Clone)]
pub struct Options {
    /// Only these jobs; none named means all.
    pub only: BTreeSet<Job>,
    /// How long jobs may go on after a wish to stop.
    pub grace: Duration,
}

impl Options {
    fn wants(&self, job: Job) -> bool {
        self.only.is_empty() || self.only.contains(&job)
    }

    /// Whether jobs of this process use the credentials and keys of the role restore.
    fn restores(&self) -> bool {
        [Job::Drill, Job::Verify].into_iter().any(|job| self.wants(job))
    }

    /// On whose behalf regions are asked how they are.
    fn role(&self) -> Role {
        let writes = [Job::Wal, Job::Backup, Job::Repair, Job::Bundle].into_iter().any(|job| self.wants(job));
        if writes { Role::Write } else { Role::Restore }
    }
}

/// Runs until it is told to stop.
///
/// # Errors
/// The schedules are wrong, another daemon has the state directory, or that directory cannot be made or read.
pub async fn run(settings: Settings, options: Options, world: World, wishes: mpsc::Receiver<Wish>) -> Result<()> {
    let schedules = chosen(&settings, &options).await?;
    let guests = Guests::named(&settings.daemon.allow)?;
    let (log, memory) = RunLog::open(&settings.repository.state_dir)?;
    let (sender, asks) = mpsc::channel(16);
    let rebase = Rebase::new(sender.clone());
    let api = Api::new(sender, &settings, (options.role(), options.restores()), &world);
    let observer = Observer::start((&settings, &options), &world, &schedules, (api.clone(), rebase)).await?;
    let streams = Streams::start(&settings, &world, options.wants(Job::Wal));
    let memory = recall(&settings, &world, memory).await;
    tracing::info!(schedules = schedules.len(), streams = streams.count(), "the daemon works");
    let now = now(&world);
    let known = Known { cursors: memory.cursors, pauses: memory.pauses, left: memory.open };
    let (scheduler, actions) = Scheduler::new(app::host_name(), schedules, known, now);
    let control = Control::start(&settings.repository.state_dir, &guests, api).await?;
    let courier = world.courier.clone();
    let standing = Arc::clone(&observer.standing);
    let supervisor = Supervisor::start(Arc::clone(&standing));
    let hands = Hands::new(settings, world, log, observer.of_hands());
    let mut daemon = Daemon { scheduler, hands, options, wishes, asks, standing, supervisor, streams: streams.count() };
    let worked = match daemon.hands.act(actions).await {
        Ok(()) => daemon.work().await,
        Err(error) => Err(error),
    };
    let drained = daemon.drain().await;
    control.stop().await;
    streams.stop().await;
    observer.stop().await;
    if !courier.flush(LAST_NOTICE).await {
        tracing::warn!("not everybody was told of everything before the end");
    }
    worked.and(drained)
}

/// What looks on, and tells: it decides nothing, and whatever becomes of it the work goes on.
struct Observer {
    standing: Arc<Standing>,
    figures: Arc<Figures>,
    pager: Arc<Pager>,
    http: Option<Http>,
    _watch: Watch,
    _reading: Reading,
    _life: Life,
}

impl Observer {
    async fn start(
        (settings, options): (&Settings, &Options),
        world: &World,
        schedules: &[Schedule],
        (api, rebase): (Api, Rebase),
    ) -> Result<Self> {
        let settings = Arc::new(settings.clone());
        let standing = Arc::new(Standing::new(&settings, Arc::clone(&world.clock)));
        let figures = Arc::new(Figures::new(Arc::clone(&standing), Arc::clone(&world.meters)));
        standing.reloaded(Some(schedules));
        figures.begin(schedules);
        world.courier.serve(app::willing_notifiers(&settings));
        let (on, state_dir) = (settings.notify.on.clone(), &settings.repository.state_dir);
        let pager = Arc::new(Pager::new(on, state_dir, world.clone()));
        let known = (Arc::clone(&standing), Arc::clone(&figures));
        let http = listen(&settings, known, api).await.unwrap_or_else(|error| {
            tracing::error!(%error, "nothing answers over TCP until the daemon is started again");
            None
        });
        let role = options.role();
        Ok(Self {
            http,
            _watch: Watch::start(&settings, role, world, &standing),
            _reading: Reading::start((&settings, role, options.wants(Job::Wal)), world, &figures, (&pager, rebase))?,
            _life: Life::start(&settings, world, &standing, &figures),
            standing,
            figures,
            pager,
        })
    }

    fn of_hands(&self) -> Observers {
        let (figures, pager, standing) = (&self.figures, &self.pager, &self.standing);
        Observers { figures: Arc::clone(figures), pager: Arc::clone(pager), standing: Arc::clone(standing) }
    }

    async fn stop(self) {
        if let Some(http) = self.http {
            http.stop().await;
        }
    }
}

/// The TCP listener, where one is wanted. Beside probes and metrics it answers nothing without a token.
async fn listen(settings: &Settings, known: (Arc<Standing>, Arc<Figures>), api: Api) -> Result<Option<Http>> {
    let Some(address) = settings.daemon.listen else { return Ok(None) };
    let guarded = match &settings.daemon.token {
        Some(token) => gate::guarded(control::router(api), &token.read()?),
        None => Router::new(),
    };
    Http::start(address, known, guarded).await.map(Some)
}

struct Daemon {
    scheduler: Scheduler,
    hands: Hands,
    options: Options,
    wishes: mpsc::Receiver<Wish>,
    asks: mpsc::Receiver<Ask>,
    standing: Arc<Standing>,
    supervisor: Supervisor,
    streams: usize,
}

impl Daemon {
    async fn work(&mut self) -> Result<()> {
        self.supervisor.ready(self.scheduler.count(), self.streams);
        loop {
            let actions = self.scheduler.tick(self.now());
            self.hands.act(actions).await?;
            self.hands.tend().await?;
            self.turned();
            let idle = self.scheduler.idle(self.now()).min(self.hands.soonest());
            tokio::select! {
                () = tokio::time::sleep(idle) => {}
                Some((open, end)) = self.hands.ended() => {
                    let actions = self.scheduler.ended(&open.schedule, open.slot, end, self.now());
                    self.hands.act(actions).await?;
                }
                Some(ask) = self.asks.recv() => self.answer(ask).await?,
                wish = self.wishes.recv() => match wish {
                    Some(Wish::Reload) => self.reload().await?,
                    Some(Wish::Stop) | None => return Ok(()),
                },
            }
        }
    }

    /// What was asked for is durable before the answer goes out, or the answer says that it is not. Whoever asked may be
    /// gone, which changes nothing.
    async fn answer(&mut self, ask: Ask) -> Result<()> {
        let now = self.now();
        match ask {
            Ask::Jobs(answer) => {
                let mut views = self.scheduler.view(now);
                for view in views.iter_mut().filter(|view| view.running.is_some()) {
                    view.going = self.hands.progress(&view.schedule);
                }
                let _ = answer.send(views);
            }
            Ask::Run(schedule, answer) => {
                let (slot, actions) = self.scheduler.trigger(&schedule, now);
                self.hands.act(actions).await?;
                let _ = answer.send(slot.map(|slot| Triggered { slot }));
            }
            Ask::Pause(schedule, pause, answer) => {
                let paused = self.scheduler.pause(&schedule, pause, now);
                let answered = match paused {
                    Ok(actions) => {
                        self.hands.act(actions).await?;
                        self.hands.unwritten().map_or(Ok(()), |why| Err(unkept(why)))
                    }
                    Err(error) => Err(error),
                };
                let _ = answer.send(answered);
            }
        }
        Ok(())
    }

    async fn reload(&mut self) -> Result<()> {
        self.supervisor.reloading();
        match chosen(self.hands.settings(), &self.options).await {
            Ok(schedules) => {
                tracing::info!(schedules = schedules.len(), "the schedules were read again");
                self.standing.reloaded(Some(&schedules));
                self.hands.figures().begin(&schedules);
                let actions = self.scheduler.reload(schedules, self.now());
                self.hands.act(actions).await?;
            }
            Err(error) => {
                tracing::error!(%error, "the schedules are wrong; the old ones stay");
                self.standing.reloaded(None);
            }
        }
        self.supervisor.ready(self.scheduler.count(), self.streams);
        Ok(())
    }

    /// Lets jobs end, within the grace; a second wish to stop ends it.
    async fn drain(&mut self) -> Result<()> {
        self.supervisor.stopping();
        let actions = self.scheduler.drain(self.now());
        self.hands.act(actions).await?;
        let end = self.now().monotonic + self.options.grace;
        while self.scheduler.running() > 0 {
            self.turned();
            let left = end.saturating_sub(self.now().monotonic).min(self.scheduler.idle(self.now()));
            if self.now().monotonic >= end {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(left) => {
                    let actions = self.scheduler.tick(self.now());
                    self.hands.act(actions).await?;
                }
                Some((open, end)) = self.hands.ended() => {
                    let actions = self.scheduler.ended(&open.schedule, open.slot, end, self.now());
                    self.hands.act(actions).await?;
                }
                Some(ask) = self.asks.recv() => self.answer(ask).await?,
                Some(Wish::Stop) = self.wishes.recv() => break,
            }
        }
        let actions = self.scheduler.abandon(self.now());
        self.hands.act(actions).await?;
        self.hands.rest().await;
        Ok(())
    }

    fn turned(&self) {
        self.standing.turn(self.scheduler.view(self.now()));
    }

    fn now(&self) -> Now {
        now(self.hands.world())
    }
}

fn unkept(why: &str) -> Error {
    let error = Error::failed("it is done, and a restart of the daemon forgets it").because(why);
    error.hint("make room in [repository] state_dir, and ask again")
}

fn now(world: &World) -> Now {
    Now { wall: world.clock.now(), monotonic: world.clock.monotonic() }
}

/// The schedules of this process. The folder counts as a whole, whichever jobs are wanted here; streaming alone needs
/// none, and no mistake in it can hold it up.
async fn chosen(settings: &Settings, options: &Options) -> Result<Vec<Schedule>> {
    if options.only.iter().eq([&Job::Wal]) {
        return Ok(Vec::new());
    }
    let mut schedules = read_schedules(settings).await?;
    schedules.retain(|schedule| options.wants(schedule.work.job()));
    Ok(schedules)
}

/// Reads the folder beside the loop: a file system that hangs must not stop it.
async fn read_schedules(settings: &Settings) -> Result<Vec<Schedule>> {
    let dir = settings.schedules.dir.display().to_string();
    let copy = settings.clone();
    let reading = tokio::task::spawn_blocking(move || load_schedules(&copy));
    let cannot = || Error::failed(format!("the schedules of {dir} cannot be read"));
    match tokio::time::timeout(SCHEDULES_LIMIT, reading).await {
        Ok(Ok(read)) => Ok(read?),
        Ok(Err(error)) => Err(cannot().because(error)),
        Err(_) => Err(cannot().because(format!("they were not read within {} s", SCHEDULES_LIMIT.as_secs()))),
    }
}

/// What the regions know beyond the state directory, which may be a new one.
async fn recall(settings: &Settings, world: &World, mut memory: Memory) -> Memory {
    let ask = async {
        let context = app::context(settings, Role::Write, world).await?;
        runs::newest_slots(&context).await.during(|| "list what was run")
    };
    let told = match tokio::time::timeout(RECALL_LIMIT, ask).await {
        Ok(Ok(slots)) => slots,
        Ok(Err(error)) => {
            tracing::warn!(%error, "no region tells what was run; the state directory counts alone");
            return memory;
        }
        Err(_) => {
            tracing::warn!("no region tells in time what was run; the state directory counts alone");
            return memory;
        }
    };
    let now = world.clock.now();
    for (name, slot) in told.into_iter().filter(|(_, slot)| is_believable(*slot, now)) {
        memory.cursors.entry(name).and_modify(|known| *known = slot.max(*known)).or_insert(slot);
    }
    memory
}
