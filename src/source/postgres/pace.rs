//! A bound on what all readers together take from the disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::model::Clock;

/// How long a reader sleeps before it looks again whether it should stop.
const SLICE: Duration = Duration::from_millis(100);

/// Hands out the right to read.
#[derive(Debug)]
pub struct Pace {
    rate: Option<u64>,
    clock: Arc<dyn Clock>,
    /// When everything handed out so far will have been read at the allowed rate.
    paid_until: Mutex<Duration>,
}

impl Pace {
    /// `rate` in bytes per second; `None` is as fast as it goes.
    pub fn new(rate: Option<u64>, clock: Arc<dyn Clock>) -> Self {
        Self { rate: rate.filter(|rate| *rate > 0), clock, paid_until: Mutex::new(Duration::ZERO) }
    }

    /// Blocks until `bytes` may be read, or `stop` is set.
    pub fn wait(&self, bytes: usize, stop: &AtomicBool) {
        let Some(rate) = self.rate else { return };
        let turn = self.reserve(bytes, rate);
        while !stop.load(Ordering::Relaxed) {
            let Some(left) = turn.checked_sub(self.clock.monotonic()).filter(|left| !left.is_zero()) else { return };
            thread::sleep(left.min(SLICE));
        }
    }

    /// The moment from which `bytes` may be read. An idle time is not saved up: a burst after it would be exactly the
    /// load that the bound is there to prevent.
    fn reserve(&self, bytes: usize, rate: u64) -> Duration {
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = (*paid_until).max(self.clock.monotonic());
        let nanos = u128::try_from(bytes).unwrap_or(u128::MAX).saturating_mul(1_000_000_000) / u128::from(rate);
        *paid_until = turn.saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
        turn
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;

    #[derive(Debug)]
    struct At(Duration);

    impl Clock for At {
        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH
        }

        fn monotonic(&self) -> Duration {
            self.0
        }
    }

    #[test]
    fn turns_follow_each_other_at_the_rate() {
        let second = Duration::from_secs(1);
        let pace = Pace::new(Some(1000), Arc::new(At(5 * second)));
        let turns: Vec<Duration> = (0..3).map(|_| pace.reserve(2000, 1000)).collect();
        assert_eq!(turns, [5 * second, 7 * second, 9 * second]);
    }

    #[test]
    fn no_rate_and_a_stop_never_wait() {
        let clock = Arc::new(At(Duration::ZERO));
        Pace::new(None, clock.clone()).wait(usize::MAX, &AtomicBool::new(false));
        let pace = Pace::new(Some(1), clock);
        pace.wait(usize::MAX, &AtomicBool::new(true));
        pace.wait(usize::MAX, &AtomicBool::new(true));
    }
}
