//! How a standby is, in the words of `drctl standby status`.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::jobs::feed::{End, Position};
use crate::jobs::standby::record::Record;
use crate::jobs::wal::reaches;
use crate::model::{BackupId, Lsn, RegionName, TargetName, Timeline};

/// WAL that waits longer than this is more than what comes at the moment.
const BEHIND: f64 = 10.0;

/// What a standby does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its server starts, or replays what it has on its own disk.
    Starting,
    /// It replays what is stored, and is behind.
    CatchingUp,
    /// It replays WAL as it is stored.
    Following,
    /// Something that may be stored is not seen, or not given out.
    InDoubt,
    /// PostgreSQL does not run.
    ServerDown,
    /// It is being promoted.
    Promoting,
    /// Nobody feeds it.
    NotFed,
    /// Its server is a primary, and whoever promoted it died before it had told and tidied up.
    Promoted,
}

impl State {
    /// For people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::CatchingUp => "catching up",
            Self::Following => "following",
            Self::InDoubt => "IN DOUBT",
            Self::ServerDown => "SERVER DOWN",
            Self::Promoting => "being promoted",
            Self::NotFed => "NOT FED",
            Self::Promoted => "PROMOTED",
        }
    }
}

/// How a standby is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Whose standby.
    pub target: TargetName,
    /// Its data directory.
    pub directory: PathBuf,
    /// The backup that it was made from.
    pub backup: BackupId,
    /// What it does.
    pub state: State,
    /// What is wrong, if anything is.
    pub why: Option<String>,
    /// The region that is read first.
    pub region: Option<RegionName>,
    /// Regions that did not answer the last time.
    pub silent: Vec<RegionName>,
    /// Its postmaster.
    pub server_pid: Option<u32>,
    /// The timeline that it replays.
    pub timeline: Option<Timeline>,
    /// What it has replayed.
    pub replayed: Option<Lsn>,
    /// The end of what is stored and gap-free.
    pub durable_end: Option<Lsn>,
    /// The timeline of that end.
    pub durable_timeline: Option<Timeline>,
    /// The timeline that is followed; the end is on an older one where WAL between the two is missing.
    pub newest_timeline: Option<Timeline>,
    /// When the newest frame of a stream that nobody closed was written: somebody wrote then.
    pub streamed_at: Option<DateTime<Utc>>,
    /// Bytes between what is replayed and the end.
    pub lag_bytes: Option<u64>,
    /// How long the oldest stored WAL that is not replayed has been stored; `null` = unknown.
    pub lag_seconds: Option<f64>,
    /// When the newest WAL was stored.
    pub stored_at: Option<DateTime<Utc>>,
    /// The newest commit in it, if one is known.
    pub last_commit: Option<DateTime<Utc>>,
}

/// What is known of the server.
#[derive(Debug, Clone, Default)]
pub(super) struct ServerView {
    pub(super) pid: Option<u32>,
    /// How it ended.
    pub(super) down: Option<String>,
    pub(super) promoting: bool,
}

impl Status {
    /// Of a standby that is fed.
    pub(super) fn of(
        record: &Record,
        region: Option<&RegionName>,
        (position, server): (&Position, &ServerView),
        now: DateTime<Utc>,
    ) -> Self {
        let end = position.end.as_ref();
        let lag_bytes = position.replayed.zip(end).map(|(replayed, end)| lag(replayed, end));
        // Without a time it was replayed since the last look.
        let waits = |since: DateTime<Utc>| (now - since).as_seconds_f64().max(0.0);
        let lag_seconds = lag_bytes.map(|bytes| match (bytes, position.waiting_since) {
            (0, _) | (_, None) => 0.0,
            (_, Some(since)) => waits(since),
        });
        let doubt = position.doubt.as_ref().map(|doubt| format!("WAL from {} on: {}", doubt.at, doubt.why));
        let why = server.down.clone().or(doubt).or_else(|| position.trouble.clone());
        let state = match () {
            () if server.promoting => State::Promoting,
            () if server.down.is_some() => State::ServerDown,
            () if why.is_some() => State::InDoubt,
            () if position.replayed.is_none() => State::Starting,
            () if lag_seconds.is_some_and(|seconds| seconds > BEHIND) => State::CatchingUp,
            // It may be connected before its pid is known.
            () if position.connected && server.pid.is_some() => State::Following,
            () => State::Starting,
        };
        Self {
            state,
            why,
            region: region.cloned(),
            silent: position.silent.clone(),
            server_pid: server.pid,
            timeline: position.timeline,
            replayed: position.replayed,
            durable_end: end.map(|end| end.lsn),
            durable_timeline: end.map(|end| end.timeline),
            newest_timeline: position.newest,
            streamed_at: position.streaming,
            lag_bytes,
            lag_seconds,
            stored_at: end.and_then(|end| end.written_at),
            last_commit: end.and_then(|end| end.last_commit),
            ..Self::not_fed(record, None)
        }
    }

    /// Of one whose promotion is done, and not finished.
    pub(super) fn promoted(record: &Record, at: DateTime<Utc>) -> Self {
        let at = at.format("%Y-%m-%d %H:%M:%S");
        let why =
            format!("it was promoted on {at} UTC by a drctl that died: drctl standby promote tidies up behind it");
        Self { state: State::Promoted, why: Some(why), ..Self::not_fed(record, None) }
    }

    /// Of a standby whose feed does not run.
    pub(super) fn not_fed(record: &Record, server_pid: Option<u32>) -> Self {
        Self {
            target: record.target.clone(),
            directory: record.directory.clone(),
            backup: record.backup.clone(),
            state: State::NotFed,
            why: Some("no drctl feeds it".to_owned()),
            region: record.region.clone(),
            silent: Vec::new(),
            server_pid,
            timeline: None,
            replayed: None,
            durable_end: None,
            durable_timeline: None,
            newest_timeline: None,
            streamed_at: None,
            lag_bytes: None,
            lag_seconds: None,
            stored_at: None,
            last_commit: None,
        }
    }

    /// Whether it does what it is for.
    pub const fn is_well(&self) -> bool {
        matches!(self.state, State::Following)
    }
}

fn lag(replayed: Lsn, end: &End) -> u64 {
    if reaches(replayed, end.lsn) || replayed >= end.lsn { 0 } else { end.lsn.bytes_since(replayed) }
}
