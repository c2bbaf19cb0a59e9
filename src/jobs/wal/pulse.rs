//! The heartbeat of a streamed target: one row a second, and only while somebody else commits.
//!
//! A beat that comes back proves how far a restore reaches. An idle database has nothing to prove: there the row stays as
//! it is, and drctl causes no WAL at all. A beat of somebody else into the same table is no work either: two drctl on one
//! cluster must not keep each other awake. Whatever goes wrong here is told and never disturbs the stream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::jobs::context::Target;
use crate::jobs::wal::position::{Heartbeat, reaches};
use crate::model::{Error, Kind, Lsn, Result};
use crate::pg::wal::{Record, RecordKind};
use crate::source::postgres::heartbeat::Pulse as Writer;

const EVERY: Duration = Duration::from_secs(1);
/// How long a server that takes no beats is left alone. It may be promoted, or the grant may come.
const LEFT_ALONE: Duration = Duration::from_secs(10);
/// A server that does not answer is asked again with the next look.
const ANSWER_TIME: Duration = Duration::from_secs(20);
/// Beats whose way is followed: a minute of them.
const FOLLOWED: usize = 64;

/// Which of the commits that stream by are our own, and how far our beats have come.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Commits of others since the stream began.
    others: u64,
    beats: VecDeque<Beat>,
    durable_at: Option<DateTime<Utc>>,
    trouble: Option<String>,
}

#[derive(Debug)]
struct Beat {
    xid: u32,
    at: DateTime<Utc>,
    /// Where its commit ends, once it has streamed by.
    end: Option<Lsn>,
}

impl Pulse {
    /// A record streamed by. Only commits count: what an idle server writes for itself, for its standbys or about hint bits
    /// carries none, and neither does the pruning that our own row brings about.
    pub(super) fn see(&self, record: &Record) {
        match &record.kind {
            RecordKind::Commit { .. } => {
                let mut state = self.lock();
                match state.beats.iter_mut().find(|beat| beat.xid == record.xid && beat.end.is_none()) {
                    Some(own) => own.end = Some(record.end),
                    None => state.others += 1,
                }
            }
            RecordKind::CommitPrepared { .. } => self.lock().others += 1,
            _ => {}
        }
    }

    /// Announces a beat before it commits, so that its commit is known when it streams by.
    fn announce(&self, xid: u32, at: DateTime<Utc>) {
        let mut state = self.lock();
        if state.beats.len() >= FOLLOWED {
            state.beats.pop_front();
        }
        state.beats.push_back(Beat { xid, at, end: None });
    }

    /// What was committed beyond this position is on a timeline that was left, and what has not streamed by may be.
    pub(super) fn forget_behind(&self, lsn: Lsn) {
        self.lock().beats.retain(|beat| beat.end.is_some_and(|end| end <= lsn));
    }

    fn others(&self) -> u64 {
        self.lock().others
    }

    /// How far the beats have come.
    pub(super) fn heartbeat(&self, durable: Lsn) -> Heartbeat {
        let mut state = self.lock();
        let newest = state.beats.iter().filter(|beat| beat.end.is_some_and(|end| reaches(durable, end)));
        let newest = newest.map(|beat| beat.at).max();
        state.durable_at = state.durable_at.max(newest);
        Heartbeat {
            written_at: state.beats.back().map(|beat| beat.at),
            durable_at: state.durable_at,
            trouble: state.trouble.clone(),
        }
    }

    /// Notes why there are no beats, and says whether that is news.
    fn troubled(&self, trouble: Option<String>) -> bool {
        let mut state = self.lock();
        let news = trouble.is_some() && state.trouble != trouble;
        state.trouble = trouble;
        news
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Beats for as long as nobody drops it.
pub(super) async fn keep_beating(target: Target, pulse: Arc<Pulse>) {
    let mut looks = interval(EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut writer, mut tally, mut seen) = (None, Tally::default(), pulse.others());
    loop {
        looks.tick().await;
        let others = pulse.others();
        if others == seen {
            continue;
        }
        let hangs = || Err(Error::new(Kind::Unavailable, "the server does not answer in time").transient(true));
        let beaten = timeout(ANSWER_TIME, beat(&target, &pulse, (&mut writer, &mut tally), others)).await;
        match beaten.unwrap_or_else(|_| hangs()) {
            Ok(()) => {
                seen = others;
                pulse.troubled(None);
            }
            Err(error) => {
                (writer, tally) = (None, Tally::default());
                tell(&target, &error, pulse.troubled(Some(error.to_string())));
                sleep(LEFT_ALONE).await;
            }
        }
    }
}

/// Said once, in the tone of what it is: a server that is away is the receiver's to tell, a standby takes no beats by
/// nature, and a grant that is missing is for somebody to give.
fn tell(target: &Target, error: &Error, is_news: bool) {
    let name = &target.name;
    match error.kind() {
        _ if !is_news || error.is_transient() => tracing::debug!(target = %name, %error, "no heartbeat"),
        Kind::Refused => tracing::info!(target = %name, %error, "no heartbeat is written"),
        _ => tracing::warn!(target = %name, %error, "no heartbeat is written; WAL is streamed all the same"),
    }
}

/// Commits that streamed by, held against the beats that the table has taken.
#[derive(Debug, Default)]
struct Tally {
    /// The count in the table when it was looked at first.
    base: Option<i64>,
    own: i64,
    /// The most commits that were no beats.
    met: i64,
}

impl Tally {
    /// The table may be ahead of the stream by a few beats that have not streamed by yet; more than these means that it was
    /// written by other hands, and then it says nothing.
    const AHEAD: i64 = 16;

    /// Whether somebody committed something since, other than a beat.
    fn is_news(&mut self, others: u64, beats: i64) -> bool {
        let foreign = beats - *self.base.get_or_insert(beats) - self.own;
        let met = i64::try_from(others).unwrap_or(i64::MAX) - foreign;
        let is_news = met > self.met || met < self.met - Self::AHEAD;
        if is_news {
            self.met = met;
        }
        is_news
    }
}

async fn beat(
    target: &Target,
    pulse: &Pulse,
    (writer, tally): (&mut Option<Writer>, &mut Tally),
    others: u64,
) -> Result<()> {
    let writer = match writer {
        Some(writer) => writer,
        None => {
            let info = target.conninfo.primary().with_dbname(&target.heartbeat_database);
            let info = info.with_application_name(format!("drctl heartbeat {}", target.name));
            writer.insert(Writer::connect(&info, &target.name).await?)
        }
    };
    if tally.is_news(others, writer.beats().await?) {
        writer.beat(|xid, beat| pulse.announce(xid, beat.at)).await?;
        tally.own += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(xid: u32, end: u64) -> Record {
        let kind = RecordKind::Commit { time: DateTime::UNIX_EPOCH };
        Record {
            start: Lsn(end - 40),
            end: Lsn(end),
            xid,
            rmgr: 1,
            info: 0,
            previous: Lsn::INVALID,
            kind,
            touched: Vec::new(),
        }
    }

    #[test]
    fn only_commits_of_others_are_a_reason_to_beat() {
        let pulse = Pulse::default();
        let second = |second: i64| DateTime::from_timestamp(second, 0).unwrap();
        pulse.announce(7, second(1));
        pulse.see(&commit(7, 1000));
        pulse.see(&Record { kind: RecordKind::RunningXacts, ..commit(0, 1040) });
        pulse.see(&Record { kind: RecordKind::CheckpointOnline, ..commit(0, 1080) });
        pulse.see(&Record { kind: RecordKind::Other, ..commit(9, 1120) });
        assert_eq!(pulse.others(), 0);
        pulse.see(&commit(8, 1160));
        assert_eq!(pulse.others(), 1);
        // A number that comes round again is somebody else's transaction.
        pulse.see(&commit(7, 1200));
        assert_eq!(pulse.others(), 2);
    }

    #[test]
    fn a_beat_is_durable_with_the_end_of_its_commit() {
        let pulse = Pulse::default();
        let second = |second: i64| DateTime::from_timestamp(second, 0).unwrap();
        for (xid, end) in [(1, 1000), (2, 2000)] {
            pulse.announce(xid, second(i64::from(xid)));
            pulse.see(&commit(xid, end));
        }
        pulse.announce(3, second(3));
        let told = |durable| {
            let Heartbeat { written_at, durable_at, .. } = pulse.heartbeat(Lsn(durable));
            (written_at, durable_at)
        };
        assert_eq!(told(999), (Some(second(3)), None));
        assert_eq!(told(1999), (Some(second(3)), Some(second(1))));
        assert_eq!(told(9999), (Some(second(3)), Some(second(2))));
        // Where streaming goes on from an older place, what was proven stays proven.
        assert_eq!(told(1000), (Some(second(3)), Some(second(2))));
    }

    #[test]
    fn beats_of_others_are_no_reason_to_beat() {
        let mut tally = Tally::default();
        // Work, and a beat of ours.
        assert!(tally.is_news(3, 100));
        tally.own += 1;
        // A beat of somebody else, and again.
        assert!(!tally.is_news(4, 102));
        assert!(!tally.is_news(5, 103));
        // The table is ahead of the stream; then work streams by with the beat.
        assert!(!tally.is_news(6, 105));
        assert!(tally.is_news(8, 105));
        // Somebody wrote into the table by hand, or it was made anew: rather one beat too many.
        assert!(tally.is_news(9, 90_000));
        assert!(tally.is_news(10, 0));
        assert!(!tally.is_news(11, 1));
    }

    #[test]
    fn trouble_is_news_once() {
        let pulse = Pulse::default();
        assert!(pulse.troubled(Some("no grant".to_owned())));
        assert!(!pulse.troubled(Some("no grant".to_owned())));
        assert!(!pulse.troubled(None));
        assert!(pulse.troubled(Some("no grant".to_owned())));
    }
}
