//! What the tasks of a receiver tell the outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::jobs::wal::position::{Position, Pushes, RegionPosition, Samples, State};
use crate::jobs::wal::pulse::Pulse;
use crate::jobs::wal::server::Start;
use crate::jobs::wal::shipped::Shipped;
use crate::jobs::wal::slot::SlotWatch;
use crate::model::{Clock, Lsn, SystemId, TargetName};
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::index::BranchId;

/// A frame that is on its way for longer than this waits for regions.
const SLOW: Duration = Duration::from_secs(5);

/// The part of a position that the reading side knows.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) state: State,
    pub(super) gap: bool,
    pub(super) system_id: Option<SystemId>,
    pub(super) branch: Option<BranchId>,
    /// Where this run began.
    pub(super) start: Option<(Lsn, String)>,
    pub(super) received: Lsn,
    pub(super) last_error: Option<String>,
}

/// Read by many, written by the receiver's own tasks.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) target: TargetName,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) view: watch::Sender<View>,
    pub(super) shipped: Arc<watch::Sender<Shipped>>,
    pub(super) samples: Mutex<Samples>,
    pub(super) out: std::sync::Weak<FanOut>,
    pub(super) pulse: Arc<Pulse>,
    pub(super) slot: Arc<SlotWatch>,
    /// Whether somebody beats.
    pub(super) beats: bool,
    /// Whether the server that streams is a standby.
    pub(super) from_standby: AtomicBool,
}

impl Shared {
    pub(super) fn new(target: TargetName, clock: Arc<dyn Clock>, out: &Arc<FanOut>) -> Self {
        let view = View {
            state: State::Connecting,
            gap: false,
            system_id: None,
            branch: None,
            start: None,
            received: Lsn::INVALID,
            last_error: None,
        };
        Self {
            target,
            clock,
            view: watch::channel(view).0,
            shipped: Arc::new(watch::channel(Shipped::default()).0),
            samples: Mutex::default(),
            out: Arc::downgrade(out),
            pulse: Arc::default(),
            slot: Arc::default(),
            beats: false,
            from_standby: AtomicBool::new(false),
        }
    }

    /// All of the history that begins at `start` is durable before it. What was seen of another history beyond that is no
    /// part of this one.
    pub(super) fn stand_at(&self, start: &Start) {
        if self.view.borrow().branch.as_ref().is_some_and(|branch| *branch != start.branch) {
            self.samples().forget_behind(start.lsn);
            self.pulse.forget_behind(start.lsn);
        }
        self.shipped.send_modify(|shipped| shipped.stand_at(&start.branch, start.lsn));
    }

    /// The server that streams has WAL up to `end`. Of a standby that says nothing: what was committed is on its primary.
    pub(super) fn sample(&self, end: Lsn) {
        if !self.from_standby.load(Ordering::Relaxed) {
            self.samples().add(end, self.clock.monotonic());
        }
    }

    /// All that the server had when it was asked has come.
    pub(super) fn saw_all(&self, asked: Duration) {
        if !self.from_standby.load(Ordering::Relaxed) {
            self.samples().saw_all(asked);
        }
    }

    /// The primary had WAL up to `end` when it was asked.
    pub(super) fn sample_primary(&self, end: Lsn, asked: Duration) {
        let mut samples = self.samples();
        samples.add(end, self.clock.monotonic());
        samples.saw_all(asked);
    }

    fn samples(&self) -> std::sync::MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state; the old one's error stays readable.
    pub(super) fn enter(&self, state: State) {
        self.view.send_if_modified(|view| std::mem::replace(&mut view.state, state) != state);
    }

    /// What went wrong last.
    pub(super) fn trouble(&self, state: State, error: &impl ToString) {
        self.view.send_modify(|view| {
            view.state = state;
            view.last_error = Some(error.to_string());
        });
    }

    /// Everything at once.
    pub(super) fn position(&self) -> Position {
        let (view, shipped) = (self.view.borrow().clone(), self.shipped.borrow().clone());
        let now = self.clock.monotonic();
        let exposure = self.samples().exposure(shipped.durable, now);
        let slow = shipped.busy_since.is_some_and(|since| now.saturating_sub(since) > SLOW);
        let state = match view.state {
            State::Streaming if slow || shipped.trouble.is_some() => State::WaitingForRegions,
            State::Streaming if view.gap || shipped.contradiction.is_some() => State::Gap,
            other => other,
        };
        let buffered = view.received.0.saturating_sub(shipped.begun.0);
        let out = self.out.upgrade();
        let degraded_to = out.as_ref().filter(|out| out.is_degraded()).map(|out| out.quorum());
        let lanes = out.map(|out| (out.outcomes(), out.unheld())).unwrap_or_default();
        let regions = lanes.0.into_iter().zip(lanes.1).map(|(lane, unheld)| RegionPosition {
            name: lane.region,
            missing_objects: lane.missing_objects,
            unshipped_bytes: buffered + unheld,
            last_error: lane.last_error,
        });
        let (start_lsn, start_reason) = view.start.unzip();
        Position {
            target: self.target.clone(),
            system_id: view.system_id,
            timeline: view.branch.as_ref().map(|branch| branch.timeline),
            branch: view.branch.map(|branch| branch.branch),
            state,
            start_lsn,
            start_reason,
            received_lsn: view.received,
            durable_lsn: shipped.durable,
            durable_at: shipped.at,
            last_commit_at: shipped.last_commit,
            exposure_seconds: exposure.map(|exposure| exposure.as_secs_f64()),
            regions: regions.collect(),
            epoch: shipped.epoch,
            last_error: shipped.trouble.or(shipped.contradiction).or(view.last_error),
            degraded_to,
            pushes: Pushes::default(),
            slot: self.slot.held(),
            from_standby: self.from_standby.load(Ordering::Relaxed),
            heartbeat: self.beats.then(|| self.pulse.heartbeat(shipped.durable)),
        }
    }
}
