//! How the daemon stands, for probes and scrapes: they read memory and never wait for a region or for the loop.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::task::JoinHandle;

use crate::app::{self, Role, World};
use crate::config::{Region, Settings};
use crate::daemon::scheduler::View;
use crate::jobs::reach;
use crate::model::schedule::{Job, Schedule};
use crate::model::{Clock, RegionName, Result, TargetName};
use crate::observe::metrics::{Page, table};
use crate::observe::task;

/// A loop that did not turn for so long does nothing any more; undisturbed it turns every twenty seconds.
const LONGEST_TURN: Duration = Duration::from_secs(60);
/// How often each region is asked whether it answers.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a region may take for it.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// What is known at this moment.
#[derive(Debug)]
pub(super) struct Standing {
    clock: Arc<dyn Clock>,
    /// Regions that must answer for every acknowledged write to be seen.
    read_quorum: usize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// On the monotonic clock.
    turned: Duration,
    /// When the loop turned last; never before the scheduler has started.
    turned_at: Option<DateTime<Utc>>,
    views: Vec<View>,
    schedules: Vec<Schedule>,
    /// Whether the schedules that were read last are in use, and when those in use were read.
    reload: Option<(bool, DateTime<Utc>)>,
    regions: BTreeMap<RegionName, Answer>,
    /// Why the state directory cannot be written.
    state_dir: Option<String>,
}

/// What a region said when it was asked last.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// Why it did not answer; `None` = it did.
    pub(super) trouble: Option<String>,
    /// For how long it has been so.
    pub(super) since: Duration,
    asked: bool,
}

impl Standing {
    pub(super) fn new(settings: &Settings, clock: Arc<dyn Clock>) -> Self {
        let since = clock.monotonic();
        let unasked = Answer { trouble: Some("not asked yet".to_owned()), since, asked: false };
        let regions = settings.regions.iter().map(|region| (region.name.clone(), unasked.clone())).collect();
        let read_quorum = settings.regions.len() + 1 - settings.repository.lowest_quorum();
        let known = Mutex::new(Known { turned: since, regions, ..Known::default() });
        Self { clock, read_quorum, known }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop has turned, and its schedules stand so.
    pub(super) fn turn(&self, views: Vec<View>) {
        let mut known = self.known();
        (known.turned, known.turned_at) = (self.clock.monotonic(), Some(self.clock.now()));
        known.views = views;
    }

    /// Schedules were read; `None` = they were wrong.
    pub(super) fn reloaded(&self, schedules: Option<&[Schedule]>) {
        let mut known = self.known();
        let now = self.clock.now();
        match schedules {
            Some(schedules) => (known.schedules, known.reload) = (schedules.to_vec(), Some((true, now))),
            None => known.reload = Some((false, known.reload.map_or(now, |(_, at)| at))),
        }
    }

    /// The schedules that are in use.
    pub(super) fn schedules(&self) -> Vec<Schedule> {
        self.known().schedules.clone()
    }

    /// How the regions are.
    pub(super) fn regions(&self) -> BTreeMap<RegionName, Answer> {
        self.known().regions.clone()
    }

    /// Whether the state directory could be written just now; why not.
    pub(super) fn state_dir(&self, trouble: Option<String>) {
        self.known().state_dir = trouble;
    }

    /// Why nothing that happens now would be known to the next process.
    pub(super) fn forgetful(&self) -> Option<String> {
        let why = self.known().state_dir.clone()?;
        Some(format!("the state directory cannot be written: {why}"))
    }

    fn answered(&self, region: &RegionName, trouble: Option<String>) {
        let now = self.clock.monotonic();
        let mut known = self.known();
        let before = known.regions.get(region);
        let same = before.filter(|known| known.trouble.is_some() == trouble.is_some());
        let since = same.map_or(now, |known| known.since);
        if before.is_some_and(|known| known.asked) && same.is_none() {
            tracing::info!(%region, trouble = trouble.as_deref().unwrap_or("none: it answers again"), "a region changed");
        }
        known.regions.insert(region.clone(), Answer { trouble, since, asked: true });
    }

    /// Why the process is not worth keeping; nothing = it lives.
    pub(super) fn dead(&self) -> Option<String> {
        let still = self.clock.monotonic().saturating_sub(self.known().turned);
        (still > LONGEST_TURN).then(|| format!("the loop has not turned for {} s", still.as_secs()))
    }

    /// What keeps it from doing its work; nothing = it is ready.
    pub(super) fn unready(&self) -> Vec<String> {
        let mut reasons: Vec<_> = self.dead().into_iter().chain(self.forgetful()).collect();
        let known = self.known();
        if known.turned_at.is_none() {
            reasons.push("the scheduler has not started".to_owned());
        }
        let silent: Vec<_> =
            known.regions.iter().filter_map(|(name, answer)| Some((name, answer.trouble.as_ref()?))).collect();
        let answering = known.regions.len() - silent.len();
        if answering < self.read_quorum {
            reasons.push(format!("{answering} regions answer, {} are needed", self.read_quorum));
            reasons.extend(silent.into_iter().map(|(name, why)| format!("{name}: {why}")));
        }
        reasons
    }

    /// The same as figures.
    pub(super) fn page(&self) -> Page {
        let mut page = Page::default();
        let known = self.known();
        page.set(&table::BUILD_INFO, [env!("CARGO_PKG_VERSION")], 1.0);
        page.set_time(&table::LOOP_TURNED, [], known.turned_at);
        if let Some((successful, at)) = known.reload {
            page.set(&table::RELOAD_SUCCESSFUL, [], flag(successful));
            page.set_time(&table::RELOAD_TIME, [], Some(at));
        }
        for (region, answer) in known.regions.iter().filter(|(_, answer)| answer.asked) {
            page.set(&table::REGION_UP, [region.as_str()], flag(answer.trouble.is_none()));
        }
        for view in &known.views {
            let target = view.target.as_ref().map(TargetName::as_str).unwrap_or_default();
            let labels = [view.schedule.as_str(), target, view.job.as_str()];
            page.set(&table::SCHEDULE_PAUSED, labels, flag(view.paused.is_some()));
            page.set(&table::SCHEDULE_RUNNING, labels, flag(view.running.is_some()));
            page.set_time(&table::SCHEDULE_NEXT_RUN, labels, view.next);
            if matches!(view.job, Job::Backup | Job::Dump | Job::Files) {
                let other = page.get(&table::BACKUP_IN_PROGRESS, [target]).unwrap_or_default();
                page.set(&table::BACKUP_IN_PROGRESS, [target], flag(view.running.is_some()).max(other));
            }
        }
        page
    }
}

fn flag(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

/// Asks each region again and again, apart from the others: one that hangs says nothing about another.
pub(super) struct Watch {
    tasks: Vec<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start(settings: &Arc<Settings>, role: Role, world: &World, standing: &Arc<Standing>) -> Self {
        let tasks = settings.regions.iter().map(|region| {
            let (settings, world, standing) = (Arc::clone(settings), world.clone(), Arc::clone(standing));
            let region = region.clone();
            task::spawn("region-watch", async move {
                loop {
                    let answer = ask(&settings, &region, role, &world).await;
                    standing.answered(&region.name, answer.err().map(|error| error.to_string()));
                    tokio::time::sleep(ASK_EVERY).await;
                }
            })
        });
        Self { tasks: tasks.collect() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Opened anew each time: a region that was away is back, and changed credentials are read.
async fn ask(settings: &Settings, region: &Region, role: Role, world: &World) -> Result<()> {
    let region = app::region(settings, region, role, world).await?;
    reach::run(&region, ASK_LIMIT).await
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH + self.monotonic()
        }

        fn monotonic(&self) -> Duration {
            Duration::from_secs(self.0.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn ready_is_a_turning_loop_and_as_many_regions_as_see_every_acknowledged_write() {
        let clock = Arc::new(Hand::default());
        let text = "[regions.a]\nurl = \"a\"\n[regions.b]\nurl = \"b\"\n[regions.c]\nurl = \"c\"\n";
        let settings = crate::config::parse(text, "drctl.toml", Path::new("/")).unwrap();
        let standing = Standing::new(&settings, Arc::clone(&clock) as Arc<dyn Clock>);
        let answer = |name: &str, trouble: Option<&str>| {
            standing.answered(&name.parse().unwrap(), trouble.map(str::to_owned));
        };
        let up = |name: &str| standing.page().get(&table::REGION_UP, [name]);
        assert_eq!((standing.dead(), up("a")), (None, None));
        assert_eq!(standing.unready()[..2], ["the scheduler has not started", "0 regions answer, 2 are needed"]);
        answer("a", None);
        answer("b", None);
        assert_eq!(standing.unready(), ["the scheduler has not started"]);
        standing.turn(Vec::new());
        assert_eq!(standing.unready(), Vec::<String>::new());
        clock.0.store(10, Ordering::Relaxed);
        answer("b", Some("no answer within 10 s"));
        assert!(standing.unready().contains(&"b: no answer within 10 s".to_owned()));
        assert_eq!((up("a"), up("b"), up("c")), (Some(1.0), Some(0.0), None));
        clock.0.store(61, Ordering::Relaxed);
        answer("b", Some("still none"));
        let b: RegionName = "b".parse().unwrap();
        assert_eq!(standing.regions()[&b].since, Duration::from_secs(10));
        assert!(standing.dead().is_some_and(|why| why.contains("61 s")));
        standing.turn(Vec::new());
        assert_eq!(standing.dead(), None);
        answer("b", None);
        standing.state_dir(Some("no space left".to_owned()));
        assert_eq!(standing.unready(), ["the state directory cannot be written: no space left"]);
        assert_eq!(standing.dead(), None, "to start it again would not help");
        standing.state_dir(None);
        assert_eq!(standing.unready(), Vec::<String>::new());
    }
}
