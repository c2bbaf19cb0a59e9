//! What a service manager is told, in systemd's notify protocol: ready, reloading, stopping, and that the loop still turns.
//! Without a service manager nothing is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

use crate::daemon::standing::Standing;
use crate::observe::task;

/// The service manager, if there is one.
pub(super) struct Supervisor {
    stopping: Arc<AtomicBool>,
    watchdog: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Feeds the manager's watchdog from now on, for as long as the loop lives.
    pub(super) fn start(standing: Arc<Standing>) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stopping);
        let watchdog = sd_notify::watchdog_enabled().map(|limit| {
            task::spawn("watchdog", async move {
                loop {
                    // To stop has a time limit of its own.
                    if standing.dead().is_none() || told.load(Ordering::Relaxed) {
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
