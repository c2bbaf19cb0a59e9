//! Progress of a job: phases with byte counters, and notes.
//!
//! Whoever works holds a [`Phase`] and adds to an atomic; whoever shows or reports takes a [`Snapshot`] when it likes.
//! The two never wait for each other, and nothing here prints.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::model::Clock;

/// Notes kept for a renderer that is slow or absent.
const NOTES_KEPT: usize = 256;
/// Stands for "not known yet" in the counters below; no phase moves that many bytes.
const UNKNOWN: u64 = u64::MAX;

/// The progress of one job; clones show the same job.
#[derive(Clone)]
pub struct Progress {
    shared: Arc<Shared>,
}

struct Shared {
    clock: Arc<dyn Clock>,
    phases: Mutex<Vec<Arc<Counters>>>,
    notes: Mutex<VecDeque<String>>,
}

struct Counters {
    name: &'static str,
    started: Duration,
    done: AtomicU64,
    total: AtomicU64,
    ended_nanos: AtomicU64,
    note: Mutex<Option<String>>,
}

/// A phase that is going on; dropping it ends it. Several may go on at once.
pub struct Phase {
    clock: Arc<dyn Clock>,
    counters: Arc<Counters>,
}

/// What a job has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Monotonic time of the snapshot, on the clock of the phases.
    pub at: Duration,
    /// Every phase so far, in the order of their starts.
    pub phases: Vec<PhaseSnapshot>,
}

/// One phase in a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhaseSnapshot {
    /// Its name: `fetch`, `replay`.
    pub name: &'static str,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, if known. An estimate: `done` may pass it.
    pub total: Option<u64>,
    /// Monotonic time of its start.
    pub started: Duration,
    /// Monotonic time of its end.
    pub ended: Option<Duration>,
    /// What it is busy with or waits for.
    pub note: Option<String>,
}

impl PhaseSnapshot {
    /// How long the phase took, or has been taking up to `now`.
    pub fn elapsed(&self, now: Duration) -> Duration {
        self.ended.unwrap_or(now).saturating_sub(self.started)
    }
}

impl Progress {
    /// Progress of a new job.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let shared = Shared { clock, phases: Mutex::default(), notes: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Begins a phase; `total` is the number of bytes it will move, if known.
    pub fn begin(&self, name: &'static str, total: Option<u64>) -> Phase {
        let counters = Arc::new(Counters {
            name,
            started: self.shared.clock.monotonic(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(total.unwrap_or(UNKNOWN)),
            ended_nanos: AtomicU64::new(UNKNOWN),
            note: Mutex::default(),
        });
        lock(&self.shared.phases).push(Arc::clone(&counters));
        Phase { clock: Arc::clone(&self.shared.clock), counters }
    }

    /// Tells the reader something once. Facts that matter later belong in the report too: when nobody reads, old notes
    /// are dropped.
    pub fn note(&self, text: impl Into<String>) {
        let mut notes = lock(&self.shared.notes);
        if notes.len() == NOTES_KEPT {
            notes.pop_front();
        }
        notes.push_back(text.into());
    }

    /// Takes the notes that nobody has taken yet, oldest first.
    pub fn take_notes(&self) -> Vec<String> {
        lock(&self.shared.notes).drain(..).collect()
    }

    /// The state of every phase.
    pub fn snapshot(&self) -> Snapshot {
        let phases = lock(&self.shared.phases).iter().map(|counters| counters.snapshot()).collect();
        Snapshot { at: self.shared.clock.monotonic(), phases }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("phases", &self.snapshot().phases).finish()
    }
}

impl Phase {
    /// Adds bytes done.
    pub fn advance(&self, bytes: u64) {
        self.counters.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Sets the bytes in all, once they are known.
    pub fn set_total(&self, total: u64) {
        self.counters.total.store(total, Ordering::Relaxed);
    }

    /// Says what the phase is busy with or waits for; an empty text takes it back.
    pub fn note(&self, text: impl Into<String>) {
        *lock(&self.counters.note) = Some(text.into()).filter(|text: &String| !text.is_empty());
    }

    /// Ends the phase.
    pub fn finish(self) {}
}

impl Drop for Phase {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.clock.monotonic().as_nanos()).unwrap_or(UNKNOWN - 1);
        self.counters.ended_nanos.store(nanos, Ordering::Relaxed);
    }
}

impl fmt::Debug for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counters.snapshot().fmt(f)
    }
}

impl Counters {
    fn snapshot(&self) -> PhaseSnapshot {
        PhaseSnapshot {
            name: self.name,
            done: self.done.load(Ordering::Relaxed),
            total: known(&self.total),
            started: self.started,
            ended: known(&self.ended_nanos).map(Duration::from_nanos),
            note: lock(&self.note).clone(),
        }
    }
}

fn known(counter: &AtomicU64) -> Option<u64> {
    Some(counter.load(Ordering::Relaxed)).filter(|value| *value != UNKNOWN)
}

/// A panic while one of these locks is held cannot leave a half-changed value behind, so its poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::SystemClock;

    #[test]
    fn a_snapshot_shows_what_was_done() {
        let progress = Progress::new(Arc::new(SystemClock::new()));
        let fetch = progress.begin("fetch", None);
        let replay = progress.begin("replay", Some(100));
        fetch.advance(3);
        fetch.advance(4);
        fetch.set_total(9);
        replay.note("waits for us-east-1");
        fetch.finish();

        let snapshot = progress.clone().snapshot();
        let shown: Vec<_> = snapshot.phases.iter().map(|p| (p.name, p.done, p.total, p.ended.is_some())).collect();
        assert_eq!(shown, [("fetch", 7, Some(9), true), ("replay", 0, Some(100), false)]);
        assert_eq!(snapshot.phases[1].note.as_deref(), Some("waits for us-east-1"));
    }

    #[test]
    fn notes_are_taken_once_and_bounded() {
        let progress = Progress::new(Arc::new(SystemClock::new()));
        for number in 0..=NOTES_KEPT {
            progress.note(number.to_string());
        }
        let notes = progress.take_notes();
        assert_eq!((notes.len(), notes[0].as_str()), (NOTES_KEPT, "1"));
        assert!(progress.take_notes().is_empty());
    }
}
