//! A gap in WAL ends what can be restored until a base backup begins behind it: the daemon takes that backup at once,
//! rather than at the next slot of its schedule.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::daemon::control::Ask;
use crate::model::schedule::{Schedule, Work};
use crate::observe::metrics::{Page, table};
use crate::observe::task;

/// A backup that did not close the gap is asked for again after this.
const AGAIN: Duration = Duration::from_secs(600);

/// Asks for base backups.
#[derive(Debug)]
pub(super) struct Rebase {
    asks: mpsc::Sender<Ask>,
    /// The targets that a backup was asked for, and when.
    asked: Mutex<BTreeMap<String, Duration>>,
}

impl Rebase {
    pub(super) fn new(asks: mpsc::Sender<Ask>) -> Self {
        Self { asks, asked: Mutex::default() }
    }

    /// What the regions say of gaps. Where no backup of the target is scheduled here, whoever is paged takes it.
    pub(super) fn look(&self, page: &Page, schedules: &[Schedule], now: Duration) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        for (labels, gaps) in page.series(&table::WAL_GAPS) {
            let Some(target) = labels.first() else { continue };
            if *gaps <= 0.0 {
                asked.remove(target);
                continue;
            }
            let is_its_backup = |schedule: &&Schedule| matches!(&schedule.work, Work::Backup { target: of, .. } if of.as_str() == target);
            let recently = asked.get(target).is_some_and(|at| now.saturating_sub(*at) < AGAIN);
            if let (Some(schedule), false) = (schedules.iter().find(is_its_backup), recently) {
                asked.insert(target.clone(), now);
                self.ask(schedule, target);
            }
        }
    }

    fn ask(&self, schedule: &Schedule, target: &str) {
        let (asks, name, target) = (self.asks.clone(), schedule.name.clone(), target.to_owned());
        drop(task::spawn("rebase", async move {
            let (answer, answered) = oneshot::channel();
            if asks.send(Ask::Run(name.clone(), answer)).await.is_err() {
                return;
            }
            match answered.await {
                Ok(Ok(_)) => tracing::warn!(%target, schedule = %name, "WAL has a gap: a base backup is taken now"),
                // One that runs already may have begun before the gap; the next look decides.
                Ok(Err(error)) => tracing::info!(%target, %error, "WAL has a gap: the base backup waits"),
                Err(_) => {}
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::schedule::{CatchUp, Overlap, Retry};

    fn base(target: &str) -> Schedule {
        Schedule {
            name: format!("{target}-base").parse().unwrap(),
            description: None,
            enabled: true,
            work: Work::Backup { target: target.parse().unwrap(), fast: false, verify_detection: false },
            cron: "0 3 * * *".parse().unwrap(),
            timezone: chrono_tz::Tz::UTC,
            jitter: Duration::ZERO,
            catch_up: CatchUp::None,
            overlap: Overlap::Skip,
            timeout: Duration::from_secs(3600),
            retry: Retry { max: 0, pause: Duration::from_secs(60) },
            after: None,
            max_age: None,
        }
    }

    #[tokio::test]
    async fn a_backup_is_asked_for_when_a_gap_opens_and_not_again_at_every_look() {
        let (sender, mut asks) = mpsc::channel(8);
        let rebase = Rebase::new(sender);
        let schedules = [base("other"), base("ledger")];
        let look = async |gaps: f64, at: u64| {
            let mut page = Page::default();
            page.set(&table::WAL_GAPS, ["ledger"], gaps);
            page.set(&table::WAL_GAPS, ["unscheduled"], 1.0);
            rebase.look(&page, &schedules, Duration::from_secs(at));
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let mut asked = || match asks.try_recv() {
            Ok(Ask::Run(name, answer)) => {
                let _ = answer.send(Err(crate::model::Error::refused("it runs already")));
                Some(name.to_string())
            }
            Ok(other) => panic!("{other:?}"),
            Err(_) => None,
        };
        look(0.0, 0).await;
        assert_eq!(asked(), None);
        look(1.0, 60).await;
        assert_eq!(asked().as_deref(), Some("ledger-base"));
        look(1.0, 120).await;
        assert_eq!(asked(), None);
        look(1.0, 60 + 600).await;
        assert_eq!(asked().as_deref(), Some("ledger-base"), "the gap is still open");
        look(0.0, 700).await;
        look(1.0, 710).await;
        assert_eq!(asked().as_deref(), Some("ledger-base"), "another gap");
        assert_eq!(asked(), None);
    }
}
