//! The figures behind `/metrics`: read again and again in the background, served from memory at any time.
//!
//! What the regions say is read every minute and after each run, and never takes more than a tenth of the time, however
//! much they hold; what a region that hangs delays is served as it was read last, with the moment of that reading. What
//! the WAL receivers of this host say is asked every few seconds.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join3;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use crate::app::{self, Role, World};
use crate::config::Settings;
use crate::daemon::pager::Pager;
use crate::daemon::rebase::Rebase;
use crate::daemon::standing::Standing;
use crate::jobs::Target;
use crate::jobs::metrics::receivers::{self, Positions};
use crate::jobs::metrics::{self, slots, standbys};
use crate::jobs::wal::{Position, State};
use crate::model::run::{Outcome, Run};
use crate::model::schedule::{Job, Schedule};
use crate::model::{Clock, Result, TargetName};
use crate::observe::metrics::{Meters, Page, table};
use crate::observe::task;

const READ_EVERY: Duration = Duration::from_secs(60);
/// How often the regions are listed from end to end for their size.
const WEIGH_EVERY: Duration = Duration::from_secs(900);
/// After a run the regions are read at once, but not more often than this.
const SOONEST: Duration = Duration::from_secs(2);
/// Readings rest so many times longer than they work.
const REST: u32 = 9;
/// A reading that takes longer is given up.
const READ_LIMIT: Duration = Duration::from_secs(900);
const ASK_EVERY: Duration = Duration::from_secs(5);

/// What was read.
#[derive(Debug)]
pub(super) struct Figures {
    standing: Arc<Standing>,
    meters: Arc<Meters>,
    read: Mutex<Page>,
    weighed: Mutex<Page>,
    live: Mutex<Live>,
    recorded: Notify,
}

/// What the receivers said last, and when WAL of each target was last seen to flow.
#[derive(Debug, Default)]
struct Live {
    positions: Positions,
    standbys: Page,
    flowed: BTreeMap<TargetName, Duration>,
}

impl Figures {
    pub(super) fn new(standing: Arc<Standing>, meters: Arc<Meters>) -> Self {
        let (read, weighed, live) = Default::default();
        Self { standing, meters, read, weighed, live, recorded: Notify::new() }
    }

    /// Everything, as Prometheus reads it.
    ///
    /// # Errors
    /// A sample is not what was declared.
    pub(super) fn text(&self) -> Result<String> {
        let mut page = lock(&self.read).clone();
        page.extend(lock(&self.weighed).clone());
        page.extend(receivers::page(&lock(&self.live).positions));
        page.extend(lock(&self.live).standbys.clone());
        page.extend(self.meters.page());
        page.extend(self.standing.page());
        page.text(self.meters.histograms())
    }

    /// Begins the counters of schedules, so that their first event is one.
    pub(super) fn begin(&self, schedules: &[Schedule]) {
        for schedule in schedules {
            let [name, target, kind] = slots::labels(schedule);
            Outcome::ALL.into_iter().for_each(|outcome| self.count([name, target, kind], outcome, 0.0));
        }
    }

    /// A slot has ended.
    pub(super) fn recorded(&self, run: &Run) {
        let target = run.target.as_ref().map(TargetName::as_str).unwrap_or_default();
        let slots = u32::try_from(run.slots).map_or(f64::from(u32::MAX), f64::from);
        self.count([run.schedule.as_str(), target, run.job.as_str()], run.outcome, slots);
        self.recorded.notify_one();
    }

    fn count(&self, [schedule, target, kind]: [&str; 3], outcome: Outcome, slots: f64) {
        let outcome = outcome.as_str();
        self.meters.add(&table::SCHEDULE_RUNS, [schedule, target, kind, outcome], slots);
        if [Job::Backup, Job::Dump, Job::Files].iter().any(|job| job.as_str() == kind) {
            self.meters.add(&table::BACKUP_RUNS, [target, outcome], slots);
        }
    }

    /// Targets whose WAL has not flowed for as long as `limit`.
    pub(super) fn stuck(&self, now: Duration, limit: Duration) -> Vec<TargetName> {
        let live = lock(&self.live);
        let stuck = live.flowed.iter().filter(|(_, flowed)| now.saturating_sub(**flowed) >= limit);
        stuck.map(|(target, _)| target.clone()).collect()
    }

    fn asked(&self, positions: Positions, now: Duration) {
        let mut live = lock(&self.live);
        let has_gap = |positions: &Positions, target| {
            positions.get(target).is_some_and(|position: &Position| position.state == State::Gap)
        };
        if positions.keys().any(|target| has_gap(&positions, target) && !has_gap(&live.positions, target)) {
            // What it ends, and what is done about it, the regions say.
            self.recorded.notify_one();
        }
        receivers::count(&live.positions, &positions, &self.meters);
        let flowing = positions.iter().filter(|(_, position)| receivers::flows(position));
        live.flowed.extend(flowing.map(|(target, _)| (target.clone(), now)));
        live.positions = positions;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads until it is dropped.
pub(super) struct Reading {
    task: JoinHandle<()>,
}

impl Reading {
    /// `streams` says whether WAL is to flow here at all.
    pub(super) fn start(
        (settings, role, streams): (&Arc<Settings>, Role, bool),
        world: &World,
        figures: &Arc<Figures>,
        (pager, rebase): (&Arc<Pager>, Rebase),
    ) -> Result<Self> {
        let targets = app::targets(settings)?;
        if streams {
            let now = world.clock.monotonic();
            lock(&figures.live).flowed = targets.iter().map(|target| (target.name.clone(), now)).collect();
        }
        let (settings, world) = (Arc::clone(settings), world.clone());
        let (figures, pager) = (Arc::clone(figures), Arc::clone(pager));
        let task = task::spawn("figures", async move {
            let slow = keep_reading(&settings, role, &world, (&figures, &pager, &rebase));
            let standbys = keep_asking_standbys(&settings.repository.state_dir, &figures);
            join3(slow, keep_asking(&targets, world.clock.as_ref(), &figures, &pager), standbys).await;
        });
        Ok(Self { task })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep_asking(targets: &[Target], clock: &dyn Clock, figures: &Figures, pager: &Pager) {
    loop {
        let positions = receivers::ask(targets).await;
        pager.look(&figures.standing.regions(), &positions, clock.monotonic());
        figures.asked(positions, clock.monotonic());
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn keep_asking_standbys(state_dir: &Path, figures: &Figures) {
    loop {
        let page = standbys::page(state_dir).await;
        lock(&figures.live).standbys = page;
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn keep_reading(
    settings: &Settings,
    role: Role,
    world: &World,
    (figures, pager, rebase): (&Figures, &Pager, &Rebase),
) {
    let (mut weigh_at, mut failing) = (Duration::ZERO, false);
    loop {
        let began = world.clock.monotonic();
        // What a region that is away makes others say would be repeated every minute; its own answer is told above.
        let reading = read(settings, role, world, (figures, began >= weigh_at)).with_subscriber(NoSubscriber::new());
        let ended = tokio::time::timeout(READ_LIMIT, reading).await;
        let took = world.clock.monotonic().saturating_sub(began);
        match ended {
            Ok(Ok(weighed)) => {
                failing = false;
                pager.gaps(&lock(&figures.read));
                let now = world.clock.monotonic();
                rebase.look(&lock(&figures.read), &figures.standing.schedules(), now);
                if weighed {
                    weigh_at = began + WEIGH_EVERY.max(took * 10 * REST);
                }
            }
            Ok(Err(error)) if !failing => {
                failing = true;
                tracing::info!(%error, "the figures from the regions are not renewed");
            }
            Ok(Err(_)) => {}
            Err(_) => tracing::info!("the regions take too long for their figures to be renewed"),
        }
        let rest = took * REST;
        tokio::time::sleep(SOONEST.max(rest)).await;
        let _ = tokio::time::timeout(READ_EVERY.saturating_sub(rest), figures.recorded.notified()).await;
    }
}

/// Opened anew each time, as for a job. Says whether the regions were weighed.
async fn read(settings: &Settings, role: Role, world: &World, (figures, weigh): (&Figures, bool)) -> Result<bool> {
    let context = app::context(settings, role, world).await?;
    let page = metrics::read(&context, &figures.standing.schedules()).await?;
    *lock(&figures.read) = page;
    if weigh {
        let weighed = metrics::stored(&context.repository).await;
        *lock(&figures.weighed) = weighed;
    }
    Ok(weigh)
}
