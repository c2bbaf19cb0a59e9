//! The wait for the end before a promotion: everything that is stored is replayed, and nothing more comes.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::jobs::standby::words::Wish;
use crate::jobs::wal::reaches;
use crate::model::{Error, Lsn};

/// Replay that does not move for so long is stuck.
const STALL: Duration = Duration::from_secs(60);
/// What is in doubt may be on its way for so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// A stream that was fed so lately may be fed again.
const LATELY: Duration = Duration::from_secs(30);

/// What one look saw.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// When, by the clock that never jumps.
    pub(super) at: Duration,
    /// When, by the one that the writers have, too.
    pub(super) on: DateTime<Utc>,
    /// Moves with whatever was not known before.
    pub(super) growth: u64,
    /// The end of what can be served.
    pub(super) end: Option<Lsn>,
    /// What is replayed.
    pub(super) replayed: Option<Lsn>,
    /// Why it may not be all.
    pub(super) doubt: Option<String>,
    /// Whether WAL before the end is not given out: replay never reaches it.
    pub(super) is_withheld: bool,
    /// When the newest frame of a stream that nobody closed was written.
    pub(super) streaming: Option<DateTime<Utc>>,
}

/// What to do after a look.
#[derive(Debug)]
pub(super) enum Step {
    /// Look again.
    Wait,
    /// It is the end.
    Done,
    /// Nothing is promoted.
    Refuse(Error),
}

/// The end, and what is replayed.
type Place = (Option<Lsn>, Option<Lsn>);

/// A wait for the end.
#[derive(Debug)]
pub(super) struct Drain {
    wish: Wish,
    ship_interval: Duration,
    /// Where it is; since when.
    stands: Option<(Place, Duration)>,
    grew: Option<(u64, Duration)>,
    /// The newest frame of an open stream at the first look.
    began_with: Option<Option<DateTime<Utc>>>,
}

impl Drain {
    pub(super) const fn new(wish: Wish, ship_interval: Duration) -> Self {
        Self { wish, ship_interval, stands: None, grew: None, began_with: None }
    }

    /// Judges a look. A server ships what it has within its interval, so the end counts when it stood for two.
    pub(super) fn step(&mut self, seen: Seen) -> Step {
        let Seen { at, end, replayed, growth, .. } = seen;
        let stands = self.stands.filter(|(place, _)| *place == (end, replayed)).unwrap_or(((end, replayed), at));
        let grew = self.grew.filter(|(known, _)| *known == growth).unwrap_or((growth, at));
        (self.stands, self.grew) = (Some(stands), Some(grew));
        let waited = at.saturating_sub(stands.1);
        let stood = waited.min(at.saturating_sub(grew.1));
        if let Some(life) = self.life(&seen).filter(|_| !self.wish.primary_lives) {
            let error = Error::refused("the primary may live").because(life);
            return Step::Refuse(error.hint("nothing was promoted; stop or fence it, or add --primary-is-fenced"));
        }
        let is_done = end.zip(replayed).is_some_and(|(end, replayed)| replayed >= end || reaches(replayed, end));
        match seen.doubt {
            None if is_done && stood > self.ship_interval * 2 => Step::Done,
            None if !is_done && waited > STALL => {
                let at = replayed.map_or_else(|| "nowhere".to_owned(), |at| at.to_string());
                let error = Error::failed(format!("replay stands still at {at}"));
                Step::Refuse(error.hint("nothing was promoted; see the server's log, drctl-standby.log"))
            }
            Some(_) if self.wish.accept_loss && waited > self.patience(is_done || seen.is_withheld) => Step::Done,
            Some(doubt) if !self.wish.accept_loss && waited > PATIENCE => {
                let error = Error::refused("stored WAL is not all replayed").because(doubt);
                Step::Refuse(error.hint("nothing was promoted; --accept-loss promotes all the same"))
            }
            _ => Step::Wait,
        }
    }

    /// How long what is in doubt is waited for by whoever accepts its loss. Regions that are away never let replay reach
    /// the end that they showed once.
    const fn patience(&self, is_over: bool) -> Duration {
        if is_over { PATIENCE } else { STALL }
    }

    fn life(&mut self, seen: &Seen) -> Option<String> {
        let began_with = *self.began_with.get_or_insert(seen.streaming);
        let came = seen.streaming.filter(|newest| began_with.is_none_or(|first| *newest > first));
        let came = came.map(|at| format!("WAL that was written at {} UTC came meanwhile", at.format("%H:%M:%S")));
        came.or_else(|| streams(seen.streaming, seen.on, self.ship_interval))
    }
}

/// Whether somebody streams, by the newest frame of a stream that nobody closed: a primary that cannot be reached from here may
/// reach the regions.
pub(super) fn streams(newest: Option<DateTime<Utc>>, now: DateTime<Utc>, ship_interval: Duration) -> Option<String> {
    let age = (now - newest?).abs().to_std().ok()?;
    let is_young = age < LATELY.max(ship_interval * 2);
    is_young.then(|| format!("its WAL was streamed {} s ago, and nobody closed that stream", age.as_secs()))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    const SHIP: Duration = Duration::from_secs(1);

    fn seen(millis: u64) -> Seen {
        let on = DateTime::UNIX_EPOCH + TimeDelta::days(20_000) + TimeDelta::milliseconds(millis.cast_signed());
        let end = Some(Lsn(0x300_0100));
        Seen { at: Duration::from_millis(millis), on, growth: 1, end, replayed: end, ..Seen::default() }
    }

    /// Looks five times a second until there is more to do than wait. Returns when, and what.
    fn until(drain: &mut Drain, look: impl Fn(Seen) -> Seen) -> (Duration, Step) {
        for millis in (0..120_000).step_by(200) {
            match drain.step(look(seen(millis))) {
                Step::Wait => {}
                step => return (Duration::from_millis(millis), step),
            }
        }
        panic!("it waits for ever: {drain:?}")
    }

    fn refusal(step: Step) -> String {
        match step {
            Step::Refuse(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_end_stands_for_two_intervals() {
        let (at, step) = until(&mut Drain::new(Wish::default(), SHIP), |seen| seen);
        assert!(matches!(step, Step::Done) && at > SHIP * 2 && at < SHIP * 3, "{at:?} {step:?}");
        // Frames that complete no record move no end.
        let grows = |seen: Seen| Seen { growth: u64::try_from(seen.at.as_millis().min(5000) / 400).unwrap(), ..seen };
        let (at, step) = until(&mut Drain::new(Wish::default(), SHIP), grows);
        assert!(matches!(step, Step::Done) && at > Duration::from_millis(6800), "{at:?} {step:?}");
    }

    #[test]
    fn a_stream_that_goes_on_is_a_primary_that_lives() {
        let start = seen(0).on;
        let goes_on = |seen: Seen| {
            let frame = i64::try_from(seen.at.as_secs().min(20)).unwrap();
            // A writer whose clock is an hour slow.
            Seen { streaming: Some(start + TimeDelta::seconds(frame) - TimeDelta::hours(1)), ..seen }
        };
        let (_, step) = until(&mut Drain::new(Wish::default(), SHIP), goes_on);
        assert!(refusal(step).contains("came meanwhile"));
        let lately = |seen: Seen| Seen { streaming: Some(start - TimeDelta::seconds(8)), ..seen };
        let (_, step) = until(&mut Drain::new(Wish::default(), SHIP), lately);
        assert!(refusal(step).contains("streamed 8 s ago"));
        let fenced = Wish { primary_lives: true, ..Wish::default() };
        assert!(matches!(until(&mut Drain::new(fenced, SHIP), lately).1, Step::Done));
        let long_ago = |seen: Seen| Seen { streaming: Some(start - TimeDelta::seconds(31)), ..seen };
        assert!(matches!(until(&mut Drain::new(Wish::default(), SHIP), long_ago).1, Step::Done));
    }

    #[test]
    fn whoever_accepts_a_loss_waits_for_no_region_for_ever() {
        let away = |seen: Seen| Seen { replayed: Some(Lsn(0x200_0000)), doubt: Some("no answer".to_owned()), ..seen };
        let accepts = Wish { accept_loss: true, ..Wish::default() };
        let (at, step) = until(&mut Drain::new(accepts, SHIP), away);
        assert!(matches!(step, Step::Done) && at > STALL, "{at:?} {step:?}");
        let (at, step) = until(&mut Drain::new(Wish::default(), SHIP), away);
        assert!(at > PATIENCE && refusal(step).contains("not all replayed"));
        let stuck = |seen: Seen| Seen { replayed: Some(Lsn(0x200_0000)), ..seen };
        assert!(refusal(until(&mut Drain::new(accepts, SHIP), stuck).1).contains("stands still"));
    }
}
