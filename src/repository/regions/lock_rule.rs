//! How long a region locks what is written to it.

use std::sync::Arc;

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};

use crate::model::Clock;
use crate::repository::layout;

/// WAL is locked so much longer than what it leads on from: its frames may be older than the backup that needs them.
const WAL_MARGIN: TimeDelta = TimeDelta::days(1);
/// Keysets longer still: a keyset is made before the first frame that it seals, and seals frames for a day.
const KEYSET_MARGIN: TimeDelta = TimeDelta::days(3);

/// How long a region locks what is written to it.
#[derive(Debug, Clone)]
pub struct Rule {
    /// From the beginning of what an object belongs to: a backup, or the object itself.
    pub keep: TimeDelta,
    /// Ours; a lock is told as a time.
    pub clock: Arc<dyn Clock>,
}

impl Rule {
    /// Until when an object is locked that belongs to something which began at `since`, or that begins now; `None` for one
    /// that is no evidence and would only pile up.
    pub fn until(&self, key: &str, since: Option<DateTime<Utc>>) -> Option<DateTime<Utc>> {
        if !layout::is_locked(key) {
            return None;
        }
        // A margin that is longer than the lock itself would be what is configured no more.
        let margin = match () {
            () if key.starts_with(layout::WAL) => WAL_MARGIN.min(self.keep),
            () if key.starts_with(layout::KEYSETS) => KEYSET_MARGIN.min(self.keep * 2),
            () => TimeDelta::zero(),
        };
        Some(self.after(since.unwrap_or_else(|| self.clock.now()), self.keep + margin))
    }

    /// Until when everything that a backup needs has to be locked, which began at `since`.
    pub fn promised(&self, since: DateTime<Utc>) -> DateTime<Utc> {
        self.after(since, self.keep)
    }

    /// In whole seconds, as stores keep it, so that what was promised and what is found are the same.
    fn after(&self, since: DateTime<Utc>, span: TimeDelta) -> DateTime<Utc> {
        let until = since.checked_add_signed(span).unwrap_or(DateTime::<Utc>::MAX_UTC);
        until.duration_round_up(TimeDelta::seconds(1)).unwrap_or(until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::repository::testing::TestClock;

    proptest! {
        /// Whatever is written for a backup after it began is locked at least as long as was promised of it.
        #[test]
        fn what_is_written_later_is_locked_no_shorter(
            start in 0i64..4_000_000_000_000, later in 0i64..7 * 86_400_000, keep in 1i64..3_153_600_000
        ) {
            let at = |milliseconds| DateTime::from_timestamp_millis(milliseconds).unwrap();
            let rule = Rule { keep: TimeDelta::seconds(keep), clock: TestClock::new() };
            let promised = rule.promised(at(start));
            prop_assert!(promised >= at(start) + TimeDelta::seconds(keep));
            prop_assert_eq!(promised.timestamp_subsec_nanos(), 0);
            for key in ["commits/a/b", "packs/a/b/000000", "wal/7/x/y/0000000000", "keysets/a/b/c", "drctl.json"] {
                prop_assert!(rule.until(key, Some(at(start + later))).unwrap() >= promised, "{key}");
            }
            prop_assert_eq!(rule.until("commits/a/b", Some(at(start))), Some(promised));
            // A frame of a day later, and the keyset that was ready before it.
            let frame = rule.until("wal/7/x/y/0000000000", Some(at(start) + TimeDelta::days(1).min(rule.keep)));
            prop_assert!(rule.until("keysets/a/b/c", Some(at(start))) >= frame);
            prop_assert_eq!(rule.until("intents/a", Some(at(start))), None);
        }
    }
}
