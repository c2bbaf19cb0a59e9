//! Push: WAL that `archive_command` hands over, the second belt beside streaming.
//!
//! "Taken" is said of a segment only when every byte of it is durable at the write quorum: because it is known by its
//! digest to be stored already, or because it was stored just now, in an epoch of kind `push`. Everything doubtful is
//! refused, and PostgreSQL keeps the file and comes again.

mod name;
mod origin;
mod walk;

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tempfile::SpooledTempFile;

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::contradiction;
use crate::jobs::wal::position::{Position, Pushes, State};
use crate::jobs::wal::push::name::Archived;
use crate::jobs::wal::push::origin::{Line, Origin};
use crate::jobs::wal::push::walk::Segment;
use crate::jobs::wal::segments::{self, SegmentDigest, SegmentKey, SharedBook};
use crate::model::{Error, Kind, Lsn, Result, ResultExt, SystemId, Timeline};
use crate::pg::wal::{SegmentHeader, check_segment_head};
use crate::repository::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::wal_frame::EpochKind;
use crate::repository::wal_index::BranchId;
use crate::repository::wal_log::{Epoch, Log, branch_of, store_history};

/// A keyset seals no more than a day of WAL.
const KEYSET_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a segment that streaming brings anyway is waited for, rather than stored twice.
const STREAM_COMES: Duration = Duration::from_secs(2);
/// History files have a line per promotion.
const LONGEST_HISTORY: u64 = 1024 * 1024;
/// The part of a segment that says which one it is.
const HEAD: usize = 64;

/// What became of a file that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Receipt {
    /// It is stored now.
    Stored,
    /// The same bytes were stored before.
    Known,
    /// Recovery needs nothing of it.
    NotNeeded,
}

/// A file, as `archive_command` handed it over.
#[derive(Debug)]
pub(super) struct Handed {
    /// PostgreSQL's name for it.
    pub(super) name: String,
    /// Its bytes.
    pub(super) file: SpooledTempFile,
    /// How many.
    pub(super) length: u64,
    /// The cluster whose directory it came from, as far as whoever sent it could see.
    pub(super) system_id: Option<SystemId>,
}

/// Takes files one after the other.
#[derive(Debug)]
pub(super) struct PushDesk {
    work: tokio::sync::Mutex<Desk>,
    told: Mutex<Told>,
}

#[derive(Debug, Clone, Default)]
struct Told {
    pushes: Pushes,
    /// The newest segment that was taken, and where it ends.
    newest: Option<(Log, Lsn)>,
}

#[derive(Debug)]
struct Desk {
    context: Context,
    target: Target,
    out: Arc<FanOut>,
    book: SharedBook,
    origin: Origin,
    /// Timelines whose history files are stored.
    histories: BTreeSet<BranchId>,
    open: Option<Open>,
    streamed: Option<Streamed>,
}

/// Where streaming stands, if the target is streamed.
#[derive(Clone)]
pub(super) struct Streamed(pub(super) Arc<dyn Fn() -> Position + Send + Sync>);

impl std::fmt::Debug for Streamed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streamed")
    }
}

#[derive(Debug)]
struct Open {
    epoch: Epoch,
    since: Duration,
}

impl PushDesk {
    /// Opens the desk of a target. The caller holds the lock of its WAL.
    pub(super) fn open(context: &Context, target: &Target, book: SharedBook, streamed: Option<Streamed>) -> Self {
        let out = Arc::new(FanOut::new(&context.repository.regions, Patience::PUSH));
        let origin = Origin::open(context, target);
        let (context, target) = (context.clone(), target.clone());
        let desk = Desk { context, target, out, book, origin, histories: BTreeSet::new(), open: None, streamed };
        Self { work: tokio::sync::Mutex::new(desk), told: Mutex::default() }
    }

    /// Takes a file; when this returns without an error, PostgreSQL may remove it.
    ///
    /// # Errors
    /// It is not this cluster's, not whole, not the one that is stored under its name, or it could not be stored now.
    pub(super) async fn take(&self, handed: Handed) -> Result<Receipt> {
        let name = handed.name.clone();
        let mut desk = self.work.lock().await;
        let taken = desk.take(handed).await;
        let now = desk.context.clock.now();
        let target = desk.target.name.clone();
        drop(desk);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match taken {
            Ok((receipt, newest)) => {
                tracing::debug!(%target, file = name, ?receipt, "archived");
                let count = match receipt {
                    Receipt::Stored => &mut told.pushes.stored,
                    Receipt::Known => &mut told.pushes.known,
                    Receipt::NotNeeded => &mut told.pushes.not_needed,
                };
                *count += 1;
                (told.pushes.last_file, told.pushes.last_at) = (Some(name), Some(now));
                told.newest = newest.or(told.newest.take());
                Ok(receipt)
            }
            Err(error) => {
                // What passes by waiting is no alarm; it is told all the same, because PostgreSQL's disk fills meanwhile.
                match error.kind() {
                    Kind::Unavailable => {
                        tracing::warn!(%target, file = name, %error, "not archived; PostgreSQL tries again")
                    }
                    _ => {
                        tracing::error!(%target, file = name, %error, "a file that PostgreSQL archives was refused");
                        told.pushes.refused += 1;
                        told.pushes.refused_at = Some(now);
                        told.pushes.last_refusal = Some(format!("{name}: {error}"));
                    }
                }
                Err(error.during(format!("archive {name}")))
            }
        }
    }

    /// What was handed over so far.
    pub(super) fn pushes(&self) -> Pushes {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).pushes.clone()
    }

    /// Where a target stands whose WAL comes by `archive_command` alone.
    pub(super) fn position(&self, target: &Target) -> Position {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (log, end) = told.newest.unzip();
        let end = end.unwrap_or(Lsn::INVALID);
        Position {
            target: target.name.clone(),
            system_id: log.as_ref().map(|log| log.system_id),
            timeline: log.as_ref().map(|log| log.timeline),
            branch: log.map(|log| log.branch),
            state: State::Archiving,
            start_lsn: None,
            start_reason: None,
            received_lsn: end,
            durable_lsn: end,
            durable_at: told.pushes.last_at,
            last_commit_at: None,
            // Between two segments nobody sees what the server commits.
            exposure_seconds: None,
            regions: Vec::new(),
            epoch: None,
            last_error: None,
            pushes: told.pushes,
            heartbeat: None,
            slot: None,
        }
    }

    /// Closes the open epoch, and says what each region lacks of what was handed over.
    pub(super) async fn close(&self) -> Vec<LaneOutcome> {
        let mut desk = self.work.lock().await;
        if let Err(error) = desk.close().await {
            // Its frames are durable; what is missing is the word that nobody continues it.
            tracing::info!(%error, "the epoch of archived WAL stays open");
        }
        let fresh = Arc::new(FanOut::new(&desk.context.repository.regions, Patience::PUSH));
        match Arc::try_unwrap(std::mem::replace(&mut desk.out, fresh)) {
            Ok(out) => out.drain().await,
            Err(out) => out.outcomes(),
        }
    }
}

impl Desk {
    async fn take(&mut self, handed: Handed) -> Result<(Receipt, Option<(Log, Lsn)>)> {
        let strange = || Error::refused(format!("`{}` is no file that PostgreSQL archives", handed.name));
        match Archived::parse(&handed.name).ok_or_else(strange)? {
            // Its contents stand in COMMIT; see `docs/format.md`.
            Archived::BackupNote => Ok((Receipt::NotNeeded, None)),
            Archived::History(timeline) => self.history(timeline, handed).await.map(|receipt| (receipt, None)),
            Archived::Segment => self.segment(handed).await,
            Archived::Partial { segment } => self.partial(&segment, handed).await.map(|receipt| (receipt, None)),
        }
    }

    async fn history(&mut self, timeline: Timeline, mut handed: Handed) -> Result<Receipt> {
        if handed.length > LONGEST_HISTORY {
            return Err(Error::refused("a timeline history is smaller than that"));
        }
        let mut text = String::new();
        let read = std::io::Read::read_to_string(&mut rewound(&mut handed.file)?, &mut text);
        read.map_err(|error| Error::damaged("a timeline history is text").because(error))?;
        if let Some(system_id) = handed.system_id {
            self.origin.must_own(&self.target, system_id).await?;
        }
        self.origin.learn(&self.target, timeline, &text).await?;
        let own = self.origin.system_id().ok_or_else(|| Error::failed("the cluster is not known"))?;
        store_history(&self.context.repository, (own, timeline), text.as_bytes(), &self.out).await?;
        Ok(Receipt::Stored)
    }

    async fn segment(&mut self, mut handed: Handed) -> Result<(Receipt, Option<(Log, Lsn)>)> {
        let (header, line) = self.identify(&handed.name.clone(), &mut handed).await?;
        let log = self.log(&header, &line);
        let segment = Segment { file: handed.file, header, history: line.history };
        // Reading and checking 16 MiB takes tens of milliseconds, and a segment may have a gigabyte.
        let looked = tokio::task::spawn_blocking(move || {
            let mut segment = segment;
            segment.check()?;
            let digest = segments::digest_of(rewound(&mut segment.file)?);
            let digest =
                digest.map_err(|error| Error::failed("what was received cannot be read back").because(error))?;
            Ok::<_, Error>((segment, digest))
        });
        let (mut segment, digest) = looked.await.map_err(|error| Error::failed("the check died").because(error))??;
        let key = SegmentKey::of(&log, segment.start());
        let newest = Some((log.clone(), segment.end()));
        self.wait_for_stream(&key, segment.end()).await;
        if self.is_known(&key, &digest)? {
            return Ok((Receipt::Known, newest));
        }
        let (start, to) = (segment.start(), segment.end());
        self.must_be_written(segment.header.name.timeline, (start, to)).await?;
        self.store(&mut segment, to).await?;
        if let Some(found) = segments::note(&self.book, vec![(key.clone(), digest)]).await.first() {
            // Streaming brought another one meanwhile.
            let place = (&self.context.repository, self.context.writer()?);
            contradiction::record(place, &log, found, "archive_command brought", &self.out).await?;
            return Err(another_one(&key));
        }
        Ok((Receipt::Stored, newest))
    }

    /// A copy of the server's storage that was started elsewhere writes the same timeline with records of its own. What it
    /// archives behind the server's own end would be taken for this cluster's, and streaming would go on behind it.
    async fn must_be_written(&mut self, timeline: Timeline, (start, end): (Lsn, Lsn)) -> Result<()> {
        let streamed = self.streamed.as_ref().map(|Streamed(position)| position());
        let received = streamed.filter(|position| position.timeline == Some(timeline));
        if received.is_some_and(|position| position.received_lsn >= end) {
            return Ok(());
        }
        self.origin.must_have_written(&self.target, timeline, (start, end)).await
    }

    /// The end of a timeline that was left: stored as far as it holds records, for until the first segment of the next
    /// timeline, which begins with the same bytes, is full.
    async fn partial(&mut self, name: &str, mut handed: Handed) -> Result<Receipt> {
        let (header, line) = self.identify(name, &mut handed).await?;
        let mut segment = Segment { file: handed.file, header, history: line.history };
        match segment.valid_end()? {
            None => Ok(Receipt::NotNeeded),
            Some(end) => {
                self.must_be_written(segment.header.name.timeline, (segment.start(), end)).await?;
                self.store(&mut segment, end).await.map(|()| Receipt::Stored)
            }
        }
    }

    /// Which segment it is, and that it is one of this cluster's.
    async fn identify(&mut self, name: &str, handed: &mut Handed) -> Result<(SegmentHeader, Line)> {
        let mut head = Vec::with_capacity(HEAD);
        let mut start = std::io::Read::take(rewound(&mut handed.file)?, HEAD as u64);
        let read = std::io::Read::read_to_end(&mut start, &mut head);
        read.map_err(|error| Error::failed("what was received cannot be read back").because(error))?;
        let header = check_segment_head(name, &head, handed.length)?;
        self.origin.must_own(&self.target, header.system_id).await?;
        let line = self.origin.line(&self.target, header.name.timeline).await?;
        self.store_histories(header.system_id, &line).await?;
        Ok((header, line))
    }

    /// Nobody finds WAL of a timeline whose history is not stored, and PostgreSQL may archive that later or never.
    async fn store_histories(&mut self, system_id: SystemId, line: &Line) -> Result<()> {
        for timeline in line.history.ancestry().map(|reign| reign.timeline) {
            let Some(file) = self.origin.file(timeline) else { continue };
            let id = BranchId { system_id, timeline, branch: branch_of(file.as_bytes()) };
            if !self.histories.contains(&id) {
                store_history(&self.context.repository, (system_id, timeline), file.as_bytes(), &self.out).await?;
                self.histories.insert(id);
            }
        }
        Ok(())
    }

    /// PostgreSQL archives a segment in the moment in which its last byte is streamed.
    async fn wait_for_stream(&self, key: &SegmentKey, end: Lsn) {
        const LOOK: Duration = Duration::from_millis(50);
        let Some(Streamed(position)) = &self.streamed else { return };
        let known = || self.book.lock().unwrap_or_else(PoisonError::into_inner).get(key).is_some();
        let coming = || {
            let Position { state, branch, received_lsn, .. } = position();
            // Far behind, streaming does not come in time.
            let near = end.bytes_since(received_lsn) <= 2 * end.bytes_since(key.start);
            state == State::Streaming && branch.as_ref() == Some(&key.branch) && near
        };
        let _ = tokio::time::timeout(STREAM_COMES, async {
            while !known() && coming() {
                tokio::time::sleep(LOOK).await;
            }
        })
        .await;
    }

    fn is_known(&self, key: &SegmentKey, digest: &SegmentDigest) -> Result<bool> {
        let known = self.book.lock().unwrap_or_else(PoisonError::into_inner).get(key);
        match known {
            None => Ok(false),
            Some(known) if known == *digest => Ok(true),
            Some(_) => Err(another_one(key)),
        }
    }

    fn log(&self, header: &SegmentHeader, line: &Line) -> Log {
        Log {
            target: self.target.name.clone(),
            system_id: header.system_id,
            timeline: header.name.timeline,
            branch: line.branch.clone(),
            wal_segment_size: header.segment_size,
        }
    }

    /// Stores a segment up to `to`, each part in the log of the timeline that owns it: the first segment of a timeline
    /// begins with the last bytes of the one before, which are archived nowhere else.
    async fn store(&mut self, segment: &mut Segment, to: Lsn) -> Result<()> {
        for (timeline, stretch) in segment.stretches(to) {
            let line = self.origin.line(&self.target, timeline).await?;
            let log = Log { timeline, ..self.log(&segment.header, &line) };
            let mut cut = segment.cut(stretch)?;
            while let Some(chunk) = segment.next(&mut cut)? {
                let mut open = self.epoch(&log, chunk.start).await?;
                // After an error the epoch is not used again: whether its frame exists is not known.
                open.epoch.append(chunk.start, chunk.wal, chunk.marks).await?;
                self.open = Some(open);
            }
        }
        Ok(())
    }

    /// The open epoch, if the WAL at `start` continues it; else a new one.
    async fn epoch(&mut self, log: &Log, start: Lsn) -> Result<Open> {
        let writer = self.context.writer()?.clone();
        let now = writer.clock.monotonic();
        match self.open.take() {
            Some(open) if fits(&open, log, start, now) => return Ok(open),
            Some(open) => {
                self.open = Some(open);
                self.close().await?;
            }
            None => {}
        }
        let place = (log.clone(), EpochKind::Push, start);
        let (repository, level) = (&self.context.repository, self.context.levels.wal);
        let epoch = Epoch::open(repository, &writer, place, level, Arc::clone(&self.out)).await;
        Ok(Open { epoch: epoch.during(|| "begin an epoch for archived WAL")?, since: now })
    }

    async fn close(&mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => open.epoch.close().await,
            None => Ok(()),
        }
    }
}

fn another_one(key: &SegmentKey) -> Error {
    let text = format!("the segment at {} of timeline {} is stored, and was another one", key.start, key.timeline);
    let error =
        Error::refused(text).because("same name, other bytes: two servers write one timeline, or the file is damaged");
    error.hint("what is stored stays; find out which server is the right one before you change anything")
}

fn fits(open: &Open, log: &Log, start: Lsn, now: Duration) -> bool {
    let fresh = now.saturating_sub(open.since) < KEYSET_LIFE;
    fresh && open.epoch.durable() == start && open.epoch.log() == log
}

fn rewound(file: &mut SpooledTempFile) -> Result<&mut SpooledTempFile> {
    let back = file.seek(SeekFrom::Start(0));
    back.map_err(|error| Error::failed("what was received cannot be read back").because(error))?;
    Ok(file)
}
