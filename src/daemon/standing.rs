//! How the daemon stands, for probes and scrapes: they read memory and never wait for a region or for the loop.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::app::{self, Role, World};
use crate::config::Settings;
use crate::jobs::reach;
use crate::model::{Clock, RegionName, Result};
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
    /// On the monotonic clock, in milliseconds.
    turned: AtomicU64,
    started: AtomicBool,
    /// Regions that must answer for every acknowledged write to be seen.
    read_quorum: usize,
    regions: Mutex<BTreeMap<RegionName, std::result::Result<(), String>>>,
}

impl Standing {
    pub(super) fn new(settings: &Settings, clock: Arc<dyn Clock>) -> Self {
        let turned = AtomicU64::new(milliseconds(clock.monotonic()));
        let unasked = |region: &crate::config::Region| (region.name.clone(), Err("not asked yet".to_owned()));
        Self {
            clock,
            turned,
            started: AtomicBool::new(false),
            read_quorum: settings.regions.len() + 1 - settings.repository.lowest_quorum(),
            regions: Mutex::new(settings.regions.iter().map(unasked).collect()),
        }
    }

    /// The loop has turned.
    pub(super) fn turn(&self) {
        self.turned.store(milliseconds(self.clock.monotonic()), Ordering::Relaxed);
        self.started.store(true, Ordering::Relaxed);
    }

    /// Which regions answered when they were asked last, and why the others did not.
    pub(super) fn regions(&self) -> BTreeMap<RegionName, std::result::Result<(), String>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn answered(&self, region: &RegionName, answer: std::result::Result<(), String>) {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner).insert(region.clone(), answer);
    }

    /// Why the process is not worth keeping; nothing = it lives.
    pub(super) fn dead(&self) -> Option<String> {
        let still = milliseconds(self.clock.monotonic()).saturating_sub(self.turned.load(Ordering::Relaxed));
        let stuck = Duration::from_millis(still) > LONGEST_TURN;
        stuck.then(|| format!("the loop has not turned for {} s", still / 1000))
    }

    /// What keeps it from doing its work; nothing = it is ready.
    pub(super) fn unready(&self) -> Vec<String> {
        let mut reasons: Vec<_> = self.dead().into_iter().collect();
        if !self.started.load(Ordering::Relaxed) {
            reasons.push("the scheduler has not started".to_owned());
        }
        let regions = self.regions();
        let answering = regions.values().filter(|answer| answer.is_ok()).count();
        if answering < self.read_quorum {
            reasons.push(format!("{answering} regions answer, {} are needed", self.read_quorum));
            let silent = regions.iter().filter_map(|(name, answer)| Some((name, answer.as_ref().err()?)));
            reasons.extend(silent.map(|(name, why)| format!("{name}: {why}")));
        }
        reasons
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Asks each region again and again, apart from the others: one that hangs says nothing about another.
pub(super) struct Watch {
    tasks: Vec<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start(settings: &Settings, role: Role, world: &World, standing: &Arc<Standing>) -> Self {
        let settings = Arc::new(settings.clone());
        let tasks = settings.regions.iter().map(|region| {
            let (settings, world, standing) = (Arc::clone(&settings), world.clone(), Arc::clone(standing));
            let region = region.clone();
            task::spawn("region-watch", async move {
                loop {
                    let answer = ask(&settings, &region, role, &world).await.map_err(|error| error.to_string());
                    standing.answered(&region.name, answer);
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
async fn ask(settings: &Settings, region: &crate::config::Region, role: Role, world: &World) -> Result<()> {
    let region = app::region(settings, region, role, world).await?;
    reach::run(&region, ASK_LIMIT).await
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use chrono::{DateTime, Utc};

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
        let answer = |name: &str, answer| standing.answered(&name.parse().unwrap(), answer);
        assert_eq!(standing.dead(), None);
        assert_eq!(standing.unready()[..2], ["the scheduler has not started", "0 regions answer, 2 are needed"]);
        answer("a", Ok(()));
        answer("b", Ok(()));
        assert_eq!(standing.unready(), ["the scheduler has not started"]);
        standing.turn();
        assert_eq!(standing.unready(), Vec::<String>::new());
        answer("b", Err("no answer within 10 s".to_owned()));
        assert!(standing.unready().contains(&"b: no answer within 10 s".to_owned()));
        clock.0.store(61, Ordering::Relaxed);
        assert!(standing.dead().is_some_and(|why| why.contains("61 s")));
        standing.turn();
        assert_eq!(standing.dead(), None);
    }
}
