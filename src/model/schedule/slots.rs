//! Civil times become instants: what a clock that is put forward or back does to a schedule.
//!
//! - A time with named hours happens exactly once. One that the clock skips happens in the first instant after the gap,
//!   several of them together; one that the clock shows twice happens the first time.
//! - A time whose hour field is `*` or a step follows elapsed time: it happens whenever the clock shows it.

use chrono::{DateTime, NaiveDateTime, Offset, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;

use crate::model::schedule::cron::{Civil, Cron};

/// No zone changes its offset and changes it back within this time.
const STRIDE: TimeDelta = TimeDelta::hours(12);
/// Farther than any zone is from UTC, on either side, a skipped day included.
const FARTHEST: TimeDelta = TimeDelta::hours(40);

/// The slots of a [`Cron`] in a zone, strictly ascending.
#[derive(Debug)]
pub struct Slots<'c> {
    cron: &'c Cron,
    zone: Tz,
    /// Every slot up to here was given.
    last: DateTime<Utc>,
    /// The difference to UTC for which `civil` counts, for times that follow elapsed time.
    offset: TimeDelta,
    civil: Civil,
}

impl Cron {
    /// The slots after `after` in a zone.
    pub fn slots_after(&self, zone: Tz, after: DateTime<Utc>) -> Slots<'_> {
        let offset = offset_at(zone, after);
        Slots { cron: self, zone, last: after, offset, civil: self.civil_after(after.naive_utc() + offset) }
    }
}

impl Iterator for Slots<'_> {
    type Item = DateTime<Utc>;

    fn next(&mut self) -> Option<DateTime<Utc>> {
        loop {
            let civil = self.civil.next()?;
            let slot = match self.cron.has_fixed_hours() {
                true => Some(first_instant(self.zone, civil)),
                false => self.elapsed(civil),
            };
            if let Some(slot) = slot.filter(|slot| *slot > self.last) {
                self.last = slot;
                return Some(slot);
            }
        }
    }
}

impl Slots<'_> {
    /// The instant of a civil time under the offset that holds; `None` if another one begins before it. The walk then
    /// goes on from there.
    fn elapsed(&mut self, civil: NaiveDateTime) -> Option<DateTime<Utc>> {
        let slot = (civil - self.offset).and_utc();
        let Some(change) = self.change_before(slot) else { return Some(slot) };
        let moment_before = change - TimeDelta::seconds(1);
        self.offset = offset_at(self.zone, change);
        self.civil = self.cron.civil_after(moment_before.naive_utc() + self.offset);
        self.last = self.last.max(moment_before);
        None
    }

    /// The first instant after the last slot and not after `until` at which another offset holds.
    fn change_before(&self, until: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let changed = |instant: DateTime<Utc>| offset_at(self.zone, instant) != self.offset;
        let mut same = self.last;
        while same < until {
            let next = (same + STRIDE).min(until);
            if changed(next) {
                return Some(first_that(same, next, changed));
            }
            same = next;
        }
        None
    }
}

fn offset_at(zone: Tz, instant: DateTime<Utc>) -> TimeDelta {
    let offset = zone.offset_from_utc_datetime(&instant.naive_utc()).fix();
    TimeDelta::seconds(offset.local_minus_utc().into())
}

/// The first instant at which the clock shows `civil`, or the end of the gap that holds it.
fn first_instant(zone: Tz, civil: NaiveDateTime) -> DateTime<Utc> {
    match zone.from_local_datetime(&civil).earliest() {
        Some(instant) => instant.to_utc(),
        None => {
            let around = civil.and_utc();
            let shown = |instant: DateTime<Utc>| instant.naive_utc() + offset_at(zone, instant);
            first_that(around - FARTHEST, around + FARTHEST, |instant| shown(instant) > civil)
        }
    }
}

/// The first whole second in `(no, yes]` for which `holds`, which does not hold at `no` and holds at `yes`.
fn first_that(no: DateTime<Utc>, yes: DateTime<Utc>, holds: impl Fn(DateTime<Utc>) -> bool) -> DateTime<Utc> {
    let (mut no, mut yes) = (no.timestamp(), yes.timestamp());
    while no + 1 < yes {
        let middle = no + (yes - no) / 2;
        let instant = DateTime::from_timestamp(middle, 0).unwrap_or_default();
        if holds(instant) { yes = middle } else { no = middle }
    }
    DateTime::from_timestamp(yes, 0).unwrap_or_default()
}
