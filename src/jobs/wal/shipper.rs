//! The part of a receiver that waits for regions: one frame at a time, in order, each durable before the next.
//!
//! It runs beside the part that talks to the server, so that no region can keep the server waiting for an answer.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::jobs::context::Context;
use crate::jobs::wal::buffer::Chunk;
use crate::jobs::wal::contradiction;
use crate::jobs::wal::segments::{self, PassingSegments, SegmentDigest, SegmentKey, SharedBook};
use crate::model::{EpochId, Error, Lsn, Result, SystemId, Timeline};
use crate::observe::task;
use crate::repository::fan_out::FanOut;
use crate::repository::handle::{Repository, Writer};
use crate::repository::wal_frame::EpochKind;
use crate::repository::wal_log::{Epoch, Log, store_history};

/// A keyset seals no more than a day of WAL.
const KEYSET_LIFE: Duration = Duration::from_secs(24 * 3600);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A frame to be shipped.
#[derive(Debug)]
pub(super) struct Frame {
    /// Its log.
    pub(super) log: Log,
    /// The connection that brought it; an epoch holds the WAL of one connection.
    pub(super) session: u64,
    /// Its bytes.
    pub(super) chunk: Chunk,
}

#[derive(Debug)]
enum Command {
    Frame(Frame, OwnedSemaphorePermit),
    History(SystemId, Timeline, Vec<u8>),
}

/// What has been shipped.
#[derive(Debug, Clone, Default)]
pub(super) struct Shipped {
    /// Every record that ends at or before this position is durable.
    pub(super) durable: Lsn,
    /// Where the newest frame ends that the regions were given.
    pub(super) begun: Lsn,
    /// Since when.
    pub(super) at: Option<DateTime<Utc>>,
    /// The newest commit time in it.
    pub(super) last_commit: Option<DateTime<Utc>>,
    /// The open epoch.
    pub(super) epoch: Option<EpochId>,
    /// Since when, on the monotonic clock, a frame has been on its way.
    pub(super) busy_since: Option<Duration>,
    /// Why a frame cannot be shipped at present.
    pub(super) trouble: Option<String>,
    /// What was streamed and is stored in another version, too.
    pub(super) contradiction: Option<String>,
}

/// The way to a shipper.
#[derive(Debug)]
pub(super) struct ShipperHandle {
    commands: mpsc::UnboundedSender<Command>,
    idle: Arc<Semaphore>,
    task: JoinHandle<Result<()>>,
}

struct Shipper {
    repository: Repository,
    writer: Writer,
    level: i32,
    kind: EpochKind,
    out: Arc<FanOut>,
    open: Option<Open>,
    shipped: Arc<watch::Sender<Shipped>>,
    passing: PassingSegments,
    /// Where digests of whole segments are kept, by which `archive_command` is answered.
    book: Option<SharedBook>,
}

struct Open {
    epoch: Epoch,
    session: u64,
    since: Duration,
}

/// Starts a shipper that tells its progress to `shipped`.
pub(super) fn start(
    context: &Context,
    kind: EpochKind,
    out: &Arc<FanOut>,
    (shipped, book): (&Arc<watch::Sender<Shipped>>, Option<&SharedBook>),
) -> Result<ShipperHandle> {
    let (commands, queue) = mpsc::unbounded_channel();
    let shipper = Shipper {
        repository: context.repository.clone(),
        writer: context.writer()?.clone(),
        level: context.levels.wal,
        kind,
        out: Arc::clone(out),
        open: None,
        shipped: Arc::clone(shipped),
        passing: PassingSegments::default(),
        book: book.cloned(),
    };
    let task = task::spawn("wal-shipper", shipper.run(queue));
    Ok(ShipperHandle { commands, idle: Arc::new(Semaphore::new(1)), task })
}

impl ShipperHandle {
    /// Waits until nothing is on its way.
    pub(super) async fn idle(&self) -> Result<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.idle).acquire_owned().await;
        permit.map_err(|error| Error::failed("the WAL shipper is gone").because(error))
    }

    /// Ships a frame, which the permit of [`idle`](Self::idle) allows. Returns at once.
    pub(super) fn ship(&self, frame: Frame, permit: OwnedSemaphorePermit) {
        // A shipper that is gone is noticed by its task: see `is_gone`.
        let _ = self.commands.send(Command::Frame(frame, permit));
    }

    /// Stores a history file before any later frame.
    pub(super) fn history(&self, system_id: SystemId, timeline: Timeline, content: Vec<u8>) {
        let _ = self.commands.send(Command::History(system_id, timeline, content));
    }

    /// Whether it has ended, which it does only at an error that it cannot wait out.
    pub(super) fn is_gone(&self) -> bool {
        self.task.is_finished()
    }

    /// Ships what it was given, closes the epoch and ends.
    pub(super) async fn finish(self) -> Result<()> {
        drop(self.commands);
        self.task.await.map_err(|error| Error::failed("the WAL shipper died").because(error))?
    }
}

impl Shipper {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Command>) -> Result<()> {
        while let Some(command) = queue.recv().await {
            match command {
                Command::Frame(frame, permit) => {
                    self.ship(frame).await?;
                    drop(permit);
                }
                Command::History(system_id, timeline, content) => {
                    store_history(&self.repository, (system_id, timeline), &content, &self.out).await?;
                }
            }
        }
        self.close().await
    }

    async fn ship(&mut self, frame: Frame) -> Result<()> {
        let since = self.writer.clock.monotonic();
        self.shipped.send_modify(|shipped| shipped.busy_since = Some(since));
        if !self.fits(&frame) {
            self.close().await?;
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.open_epoch(&frame).await,
        };
        let Chunk { start, wal, marks, .. } = frame.chunk;
        let complete = self.passing.pass(&frame.log, start, &wal);
        self.shipped.send_modify(|shipped| shipped.begun = Lsn(start.0 + wal.len() as u64));
        open.epoch.append(start, wal, marks).await?;
        self.note(&frame.log, complete).await?;
        let now = self.writer.clock.now();
        self.shipped.send_modify(|shipped| {
            // A record that is not complete yet does not count: it may be streamed again.
            if let Some((_, end)) = marks.last_record {
                shipped.durable = end;
            }
            shipped.at = Some(now);
            shipped.last_commit = shipped.last_commit.max(marks.commits.map(|(_, last)| last));
            shipped.epoch = Some(open.epoch.id().clone());
            shipped.busy_since = None;
            shipped.trouble = None;
        });
        self.open = Some(open);
        Ok(())
    }

    /// Both versions are stored when the second one is found. Which one a restore would take is chance, so it is known
    /// everywhere before the server may forget its own.
    async fn note(&self, log: &Log, complete: Vec<(SegmentKey, SegmentDigest)>) -> Result<()> {
        let Some(book) = &self.book else { return Ok(()) };
        for found in segments::note(book, complete).await {
            let place = (&self.repository, &self.writer);
            let told = contradiction::record(place, log, &found, "streaming brought", &self.out).await?;
            self.shipped.send_modify(|shipped| shipped.contradiction = Some(told));
        }
        Ok(())
    }

    /// Whether the open epoch can hold the frame.
    fn fits(&self, frame: &Frame) -> bool {
        self.open.as_ref().is_some_and(|open| {
            let age = self.writer.clock.monotonic().saturating_sub(open.since);
            // A record that is cut stays within one epoch.
            let fresh = age < KEYSET_LIFE || !frame.chunk.at_boundary;
            let follows = open.epoch.durable() == frame.chunk.start && *open.epoch.log() == frame.log;
            fresh && follows && open.session == frame.session
        })
    }

    /// Opens an epoch for the frame, as often as it takes: key services and regions come back, and until then the server
    /// keeps its WAL.
    async fn open_epoch(&self, frame: &Frame) -> Open {
        let mut pause = FIRST_PAUSE;
        loop {
            let place = (frame.log.clone(), self.kind, frame.chunk.start);
            match Epoch::open(&self.repository, &self.writer, place, self.level, Arc::clone(&self.out)).await {
                Ok(epoch) => return Open { epoch, session: frame.session, since: self.writer.clock.monotonic() },
                Err(error) => {
                    tracing::warn!(%error, "an epoch cannot be opened; it is tried again");
                    self.shipped.send_modify(|shipped| shipped.trouble = Some(error.to_string()));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn close(&mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => open.epoch.close().await,
            None => Ok(()),
        }
    }
}
