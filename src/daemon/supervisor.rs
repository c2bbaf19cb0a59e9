//! What a service manager is told, in systemd's notify protocol: ready, reloading, stopping, and that the loop still turns.
//! Without a service manager nothing is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

use crate::model::Clock;
use crate::observe::task;

/// The loop turns at least every 20 s, or waits for the state directory and says so. One that did neither for this long
/// hangs.
const STALE: Duration = Duration::from_secs(90);

/// When the loop turned last.
#[derive(Debug)]
pub(super) struct Pulse {
    clock: Arc<dyn Clock>,
    beaten: AtomicU64,
}

impl Pulse {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let pulse = Self { clock, beaten: AtomicU64::new(0) };
        pulse.beat();
        Arc::new(pulse)
    }

    /// The loop turns.
    pub(super) fn beat(&self) {
        self.beaten.store(self.now(), Ordering::Relaxed);
    }

    /// Whether it turned lately.
    pub(super) fn is_fresh(&self) -> bool {
        let quiet = self.now().saturating_sub(self.beaten.load(Ordering::Relaxed));
        Duration::from_millis(quiet) <= STALE
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The service manager, if there is one.
pub(super) struct Supervisor {
    stopping: Arc<AtomicBool>,
    watchdog: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Feeds the manager's watchdog from now on, for as long as the pulse is fresh.
    pub(super) fn start(pulse: Arc<Pulse>) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stopping);
        let watchdog = sd_notify::watchdog_enabled().map(|limit| {
            task::spawn("watchdog", async move {
                loop {
                    // To stop has a time limit of its own.
                    if pulse.is_fresh() || told.load(Ordering::Relaxed) {
                        tell(&[NotifyState::Watchdog]);
                    }
                    tokio::time::sleep(limit / 3).await;
                }
            })
        });
        Self { stopping, watchdog }
    }

    /// The daemon works, or works again after [`Self::reloading`].
    pub(super) fn ready(&self, schedules: usize, streams: usize) {
        let status = format!("{schedules} schedules, {streams} WAL streams");
        tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }

    /// The schedules are read again.
    pub(super) fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => tell(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!(%error, "the service manager is not told of the reload"),
        }
    }

    /// Nothing more is started.
    pub(super) fn stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        tell(&[NotifyState::Stopping, NotifyState::Status("jobs that run may end")]);
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.abort();
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use chrono::{DateTime, Utc};

    use super::*;

    #[derive(Debug, Default)]
    struct Hand(Mutex<Duration>);

    impl Clock for Hand {
        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH
        }
        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    #[test]
    fn a_loop_that_does_not_turn_is_noticed() {
        let hand = Arc::new(Hand::default());
        let pulse = Pulse::new(Arc::<Hand>::clone(&hand));
        assert!(pulse.is_fresh());
        *hand.0.lock().unwrap() = STALE;
        assert!(pulse.is_fresh());
        *hand.0.lock().unwrap() += Duration::from_millis(1);
        assert!(!pulse.is_fresh());
        pulse.beat();
        assert!(pulse.is_fresh());
    }
}
