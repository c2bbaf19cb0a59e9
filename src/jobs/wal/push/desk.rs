//! Judging what is handed over, and storing it.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tempfile::SpooledTempFile;

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::contradiction;
use crate::jobs::wal::position::{Position, State};
use crate::jobs::wal::push::handed::{Handed, Receipt, Streamed};
use crate::jobs::wal::push::name::Archived;
use crate::jobs::wal::push::origin::{Line, Origin};
use crate::jobs::wal::push::walk::Segment;
use crate::jobs::wal::segments::{self, Durable, SegmentDigest, SegmentKey, SharedBook};
use crate::model::{Error, Lsn, Result, ResultExt, SystemId, Timeline};
use crate::pg::wal::{SegmentHeader, check_segment_head};
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Epoch, Log, branch_of, store_history};

/// A keyset seals no more than a day of WAL.
const KEYSET_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a segment that streaming brings anyway is waited for, rather than stored twice.
const STREAM_COMES: Duration = Duration::from_secs(2);
/// History files have a line per promotion.
const LONGEST_HISTORY: u64 = 1024 * 1024;
/// The part of a segment that says which one it is.
const HEAD: usize = 64;

/// Judges files and stores them, one after the other.
#[derive(Debug)]
pub(super) struct Desk {
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

#[derive(Debug)]
struct Open {
    epoch: Epoch,
    since: Duration,
}

impl Desk {
    /// Opens the desk of a target.
    pub(super) fn open(context: &Context, target: &Target, book: SharedBook, streamed: Option<Streamed>) -> Self {
        let out = Arc::new(FanOut::new(&context.repository.regions, Patience::PUSH));
        let origin = Origin::open(context, target);
        let (context, target) = (context.clone(), target.clone());
        Self { context, target, out, book, origin, histories: BTreeSet::new(), open: None, streamed }
    }

    /// Closes the open epoch, and says what each region lacks of what was stored.
    pub(super) async fn end(&mut self) -> Vec<LaneOutcome> {
        if let Err(error) = self.close().await {
            // Its frames are durable; what is missing is the word that nobody continues it.
            tracing::info!(%error, "the epoch of archived WAL stays open");
        }
        let fresh = Arc::new(FanOut::new(&self.context.repository.regions, Patience::PUSH));
        match Arc::try_unwrap(std::mem::replace(&mut self.out, fresh)) {
            Ok(out) => out.drain().await,
            Err(out) => out.outcomes(),
        }
    }

    /// Whether streaming brings what `archive_command` brings.
    pub(super) fn is_streaming(&self) -> bool {
        self.streamed.as_ref().is_some_and(|Streamed(position)| position().state == State::Streaming)
    }

    /// Takes a file: says what became of it, and of a segment where it ends.
    pub(super) async fn take(&mut self, handed: Handed) -> Result<(Receipt, Option<(Log, Lsn)>)> {
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
        let digester = self.book.lock().unwrap_or_else(PoisonError::into_inner).digester();
        // Reading and checking 16 MiB takes tens of milliseconds, and a segment may have a gigabyte.
        let looked = tokio::task::spawn_blocking(move || {
            let mut segment = segment;
            segment.check()?;
            let digest = digester.of(rewound(&mut segment.file)?);
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
        let lowered = self.out.lowered();
        self.store(&mut segment, to).await?;
        let durable = Durable { key: key.clone(), digest, at_full_quorum: self.out.lowered() == lowered };
        if let Some(found) = segments::note(&self.book, vec![durable]).await.first() {
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
        let header = header_of(name, handed)?;
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

    /// Whether its very bytes are safe. What was stored and may be lost since is stored again.
    fn is_known(&self, key: &SegmentKey, digest: &SegmentDigest) -> Result<bool> {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        match book.get(key) {
            Some(known) if known != *digest => Err(another_one(key)),
            _ => Ok(book.safe(key).is_some()),
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
    fresh && open.epoch.position() == start && open.epoch.log() == log
}

/// What a segment says of itself.
pub(super) fn header_of(name: &str, handed: &mut Handed) -> Result<SegmentHeader> {
    let mut head = Vec::with_capacity(HEAD);
    let mut start = std::io::Read::take(rewound(&mut handed.file)?, HEAD as u64);
    let read = std::io::Read::read_to_end(&mut start, &mut head);
    read.map_err(|error| Error::failed("what was received cannot be read back").because(error))?;
    Ok(check_segment_head(name, &head, handed.length)?)
}

/// From its beginning.
pub(super) fn rewound(file: &mut SpooledTempFile) -> Result<&mut SpooledTempFile> {
    let back = file.seek(SeekFrom::Start(0));
    back.map_err(|error| Error::failed("what was received cannot be read back").because(error))?;
    Ok(file)
}
