//! Where a receiver stands, as it is told to people, to `drctl backup` and to the daemon.

use std::collections::VecDeque;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{Branch, EpochId, Lsn, RegionName, SystemId, TargetName, Timeline};
use crate::pg::wal::WAL_PAGE_SIZE;
use crate::source::postgres::room::Slot;

/// What a receiver is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It has not begun to stream yet.
    Connecting,
    /// WAL flows.
    Streaming,
    /// Too few regions answer: acknowledgement holds, the server keeps its WAL.
    WaitingForRegions,
    /// The server does not answer.
    Reconnecting,
    /// WAL flows again after a gap: recovery cannot cross it, a new base backup is needed.
    Gap,
    /// The slot was dropped because it filled the server's disk: nothing is streamed until regions take WAL again.
    GivenUp,
    /// Nothing is streamed: WAL comes by `archive_command` alone.
    Archiving,
    /// It has ended.
    Stopped,
}

impl State {
    /// As people read it.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Streaming => "streaming",
            Self::WaitingForRegions => "waiting for regions",
            Self::Reconnecting => "reconnecting",
            Self::Gap => "gap: take a new base backup",
            Self::GivenUp => "slot dropped: waiting for regions",
            Self::Archiving => "archive_command only",
            Self::Stopped => "stopped",
        }
    }
}

/// A receiver's position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The target.
    pub target: TargetName,
    /// The cluster, once the server said so.
    pub system_id: Option<SystemId>,
    /// The timeline being streamed.
    pub timeline: Option<Timeline>,
    /// Its branch.
    pub branch: Option<Branch>,
    /// What is going on.
    pub state: State,
    /// Where this receiver began, and why there.
    pub start_lsn: Option<Lsn>,
    /// Why there.
    pub start_reason: Option<String>,
    /// End of what has arrived.
    pub received_lsn: Lsn,
    /// Every record that ends at or before this position is durable at the write quorum.
    pub durable_lsn: Lsn,
    /// When that became so.
    pub durable_at: Option<DateTime<Utc>>,
    /// The newest commit time in durable WAL.
    pub last_commit_at: Option<DateTime<Utc>>,
    /// For how long the oldest WAL that is not durable yet may have existed; 0 when all is durable that the server has
    /// shown in the last seconds; `null` when that is unknown, as it is of WAL that was there before it was first asked.
    pub exposure_seconds: Option<f64>,
    /// What each region lacks of this run.
    pub regions: Vec<RegionPosition>,
    /// The open epoch.
    pub epoch: Option<EpochId>,
    /// What went wrong last.
    pub last_error: Option<String>,
    /// The write quorum in force, while it is lower than the configuration wants.
    #[serde(default)]
    pub degraded_to: Option<usize>,
    /// What `archive_command` handed over.
    #[serde(default)]
    pub pushes: Pushes,
    /// The heartbeat row.
    #[serde(default)]
    pub heartbeat: Option<Heartbeat>,
    /// What the server keeps for our slot, as it was seen last; `null` = unknown, or there is no slot.
    #[serde(default)]
    pub slot: Option<Slot>,
    /// Whether the server that streams is a standby. Exposure counts from its primary all the same.
    #[serde(default)]
    pub from_standby: bool,
}

/// What `archive_command` handed over to this process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pushes {
    /// Files that were stored.
    pub stored: u64,
    /// Segments that were known to be stored already.
    pub known: u64,
    /// Files of which recovery needs nothing.
    pub not_needed: u64,
    /// Segments that were read from the server's directory and stored before they were handed over.
    #[serde(default)]
    pub ahead: u64,
    /// The newest file that was taken.
    pub last_file: Option<String>,
    /// When.
    pub last_at: Option<DateTime<Utc>>,
    /// Files that were refused for what they are: of another cluster, damaged, or not what is stored under their name.
    pub refused: u64,
    /// The last one, and why.
    pub last_refusal: Option<String>,
    /// When.
    pub refused_at: Option<DateTime<Utc>>,
}

impl Pushes {
    /// Whether the last thing that happened was a refusal: PostgreSQL does not get rid of its WAL.
    pub fn is_refusing(&self) -> bool {
        self.refused_at.is_some_and(|refused| self.last_at.is_none_or(|taken| refused >= taken))
    }
}

/// The row that a receiver writes into the cluster that it streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The newest beat that was written; on the server's clock.
    pub written_at: Option<DateTime<Utc>>,
    /// The newest one that is durable at the write quorum: every commit before it can be recovered.
    pub durable_at: Option<DateTime<Utc>>,
    /// Why there are no beats.
    pub trouble: Option<String>,
}

/// One region in a [`Position`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPosition {
    /// The region.
    pub name: RegionName,
    /// Objects of this run that it does not hold.
    pub missing_objects: u64,
    /// WAL of this run that was received and that it does not hold.
    #[serde(default)]
    pub unshipped_bytes: u64,
    /// The last thing that went wrong there.
    pub last_error: Option<String>,
}

impl Position {
    /// For how long the oldest WAL has waited that is not durable in `region`, as far as the receiver knows: it speaks for
    /// the regions that have all of what it wrote. `None` is unknown.
    pub fn exposure_of(&self, region: &RegionName) -> Option<f64> {
        let lags = self.regions.iter().any(|lane| lane.name == *region && lane.missing_objects > 0);
        self.exposure_seconds.filter(|_| !lags)
    }

    /// Whether every record up to `lsn` is durable.
    pub fn reaches(&self, lsn: Lsn) -> bool {
        reaches(self.durable_lsn, lsn)
    }
}

/// Whether all records that end at or before `lsn` end at or before `durable`. PostgreSQL reports a position behind the
/// page header where the last record ended with its page: nothing lies between.
pub fn reaches(durable: Lsn, lsn: Lsn) -> bool {
    const LONG_PAGE_HEADER: u64 = 40;
    let at_page = durable.0.is_multiple_of(WAL_PAGE_SIZE);
    durable >= lsn || (at_page && lsn.bytes_since(durable) <= LONG_PAGE_HEADER)
}

/// When which end of WAL was first seen at the server; what exposure is measured against.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Each with the time since when WAL up to there may have existed; `None` is unknown.
    ends: VecDeque<(Lsn, Option<Duration>)>,
    /// All WAL that the server had then has been seen.
    seen_all: Option<Duration>,
}

/// News older than this says nothing about now.
const FRESH: Duration = Duration::from_secs(10);
const SAMPLES_KEPT: usize = 4096;
/// The server is asked every second. Behind a longer silence nobody knows when it was written what it shows: it was out of
/// reach, or this process slept while word from the server waited.
const SILENCE: Duration = Duration::from_secs(3);

impl Samples {
    /// The server has WAL up to `end`, as is heard at `now`.
    pub(super) fn add(&mut self, end: Lsn, now: Duration) {
        // What was there when the server was first asked may be of any age.
        let since = self.seen_all.map(|asked| if now.saturating_sub(asked) <= SILENCE { now } else { asked });
        let is_full = self.ends.len() >= SAMPLES_KEPT;
        match self.ends.back_mut() {
            Some((last, _)) if *last >= end => {}
            // The oldest ones decide; a newer end may wait in the place of the last.
            Some((last, _)) if is_full => *last = end,
            _ => self.ends.push_back((end, since)),
        }
    }

    /// What the server had when it was asked, at `asked`, has been added.
    pub(super) fn saw_all(&mut self, asked: Duration) {
        self.seen_all = self.seen_all.max(Some(asked));
    }

    /// The server that had WAL beyond this position is not the one that is streamed. What this one has there may be as old.
    pub(super) fn forget_behind(&mut self, lsn: Lsn) {
        if let Some((_, since)) = self.ends.iter().find(|(end, _)| *end > lsn) {
            self.seen_all = self.seen_all.min(*since);
        }
        self.ends.retain(|(end, _)| *end <= lsn);
    }

    /// Forgets what is durable, and says for how long the rest has waited; `None` is unknown.
    pub(super) fn exposure(&mut self, durable: Lsn, now: Duration) -> Option<Duration> {
        while self.ends.front().is_some_and(|(end, _)| reaches(durable, *end)) {
            self.ends.pop_front();
        }
        match self.ends.front() {
            Some((_, since)) => since.map(|since| now.saturating_sub(since)),
            None => {
                let silent = now.saturating_sub(self.seen_all?);
                // Since then anything may have been committed, and nobody would know.
                (silent <= FRESH).then_some(if silent <= SILENCE { Duration::ZERO } else { silent })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exposure_is_unknown_without_a_fresh_sample_and_never_zero_then() {
        let seconds = Duration::from_secs;
        let mut samples = Samples::default();
        assert_eq!(samples.exposure(Lsn(100), seconds(1)), None);
        samples.add(Lsn(100), seconds(1));
        assert_eq!(samples.exposure(Lsn(50), seconds(1)), None, "what is there at first may be of any age");
        samples.saw_all(seconds(1));
        assert_eq!(samples.exposure(Lsn(50), seconds(1)), None, "for ever");
        assert_eq!(samples.exposure(Lsn(100), seconds(1)), Some(Duration::ZERO));
        samples.add(Lsn(200), seconds(2));
        samples.add(Lsn(200), seconds(4));
        samples.saw_all(seconds(4));
        assert_eq!(samples.exposure(Lsn(100), seconds(5)), Some(seconds(3)));
        assert_eq!(samples.exposure(Lsn(200), seconds(5)), Some(Duration::ZERO));
        assert_eq!(samples.exposure(Lsn(200), seconds(15)), None);
    }

    #[test]
    fn exposure_counts_from_the_last_time_that_all_was_seen() {
        let seconds = Duration::from_secs;
        let mut samples = Samples::default();
        samples.add(Lsn(100), seconds(0));
        assert_eq!(samples.exposure(Lsn(100), seconds(0)), None, "it may have more");
        samples.saw_all(seconds(0));
        assert_eq!(samples.exposure(Lsn(100), seconds(3)), Some(Duration::ZERO));
        assert_eq!(
            samples.exposure(Lsn(100), seconds(7)),
            Some(seconds(7)),
            "others may commit while it is out of sight"
        );
        // It is met again, and what it wrote meanwhile was not written now; nor what waited on its way since.
        samples.add(Lsn(200), seconds(8));
        samples.add(Lsn(300), seconds(9));
        assert_eq!(samples.exposure(Lsn(200), seconds(9)), Some(seconds(9)));
        // Now it answers, and what comes from here on is new.
        samples.saw_all(seconds(9));
        samples.saw_all(seconds(8));
        samples.add(Lsn(400), seconds(10));
        assert_eq!(samples.exposure(Lsn(200), seconds(11)), Some(seconds(11)));
        assert_eq!(samples.exposure(Lsn(300), seconds(11)), Some(seconds(1)));
        assert_eq!(samples.exposure(Lsn(400), seconds(11)), Some(Duration::ZERO));
        // Another server takes over, which did not have all of it.
        samples.add(Lsn(500), seconds(12));
        samples.saw_all(seconds(14));
        samples.forget_behind(Lsn(450));
        samples.add(Lsn(480), seconds(16));
        assert_eq!(samples.exposure(Lsn(450), seconds(17)), Some(seconds(5)));
    }

    #[test]
    fn a_page_header_is_no_wal_to_wait_for() {
        assert!(reaches(Lsn(8192), Lsn(8192 + 24)) && reaches(Lsn(8192), Lsn(8192 + 40)));
        assert!(!reaches(Lsn(8192), Lsn(8192 + 48)) && !reaches(Lsn(8192 - 8), Lsn(8192 + 24)));
    }
}
