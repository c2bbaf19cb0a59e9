//! The part of a receiver that waits for regions: several frames on their way, acknowledged in order.
//!
//! It runs beside the part that talks to the server, so that no region can keep the server waiting for an answer.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::jobs::context::Context;
use crate::jobs::wal::buffer::Chunk;
use crate::jobs::wal::contradiction;
use crate::jobs::wal::passing::{Passed, PassingSegments};
use crate::jobs::wal::segments::{self, Durable, SharedBook};
use crate::jobs::wal::shipped::Shipped;
use crate::model::{EpochId, Error, Kind, Lsn, Result, SystemId, Timeline};
use crate::observe::task;
use crate::repository::handle::{Repository, Writer};
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::claim::Known;
use crate::repository::wal::frame::{EpochKind, IN_FLIGHT};
use crate::repository::wal::left::{Successor, left};
use crate::repository::wal::log::{Epoch, Log, Marks, store_history};

/// A keyset seals no more than a day of WAL.
const KEYSET_LIFE: Duration = Duration::from_secs(24 * 3600);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Frames on their way hold no more WAL than this together, in MiB.
const ROOM: u32 = 32;
/// What a frame takes of it at least, so that there are never more than four.
const SMALLEST_SHARE: u32 = 8;
const _: () = assert!((ROOM / SMALLEST_SHARE) as u64 <= IN_FLIGHT, "readers reckon with no more frames on their way");

/// A frame to be shipped.
#[derive(Debug)]
pub(super) struct Frame {
    /// Its log.
    pub(super) log: Log,
    /// The connection that brought it; an epoch holds the WAL of one connection.
    pub(super) session: u64,
    /// Whether the server was on this timeline when the connection began, rather than to have left it itself.
    pub(super) is_newest: bool,
    /// Its bytes.
    pub(super) chunk: Chunk,
}

#[derive(Debug)]
enum Command {
    Frame(Frame, OwnedSemaphorePermit),
    History(SystemId, Timeline, Vec<u8>),
    /// Answered when all that was sent before is durable.
    Tell(oneshot::Sender<()>),
}

/// The way to a shipper.
#[derive(Debug)]
pub(super) struct ShipperHandle {
    commands: mpsc::UnboundedSender<Command>,
    room: Arc<Semaphore>,
    task: JoinHandle<Result<()>>,
}

/// What a shipper works with.
#[derive(Debug, Clone)]
pub(super) struct Means {
    /// To every region.
    pub(super) out: Arc<FanOut>,
    /// Where it tells its progress.
    pub(super) shipped: Arc<watch::Sender<Shipped>>,
    /// Where digests of whole segments are kept, by which `archive_command` is answered.
    pub(super) book: Option<SharedBook>,
    /// Epochs that are no rivals.
    pub(super) known: Arc<Known>,
}

struct Shipper {
    repository: Repository,
    writer: Writer,
    level: i32,
    kind: EpochKind,
    means: Means,
    open: Option<Open>,
    flying: FuturesOrdered<BoxFuture<'static, Result<Landed>>>,
    /// Since when each of them has been on its way.
    since: VecDeque<Duration>,
    /// Nobody asks for the digests of what a backup receives for itself.
    passing: Option<PassingSegments>,
}

struct Open {
    epoch: Epoch,
    session: u64,
    since: Duration,
    /// The timeline that goes on where this one was left, if it was.
    left: Option<Successor>,
}

/// A frame that the quorum holds.
struct Landed {
    log: Log,
    marks: Marks,
    complete: Vec<Passed>,
    epoch: EpochId,
    _room: OwnedSemaphorePermit,
}

/// Starts a shipper.
pub(super) fn start(context: &Context, kind: EpochKind, means: Means) -> Result<ShipperHandle> {
    let writer = context.writer()?.clone();
    Ok(Shipper::new(context.repository.clone(), writer, (kind, context.levels.wal), means).start())
}

impl ShipperHandle {
    /// Waits until there is room for a frame of so many bytes beside those that are on their way.
    pub(super) async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit> {
        let share = u32::try_from(bytes.div_ceil(1024 * 1024)).unwrap_or(ROOM).clamp(SMALLEST_SHARE, ROOM);
        self.acquire(share).await
    }

    /// Waits until nothing is on its way.
    pub(super) async fn idle(&self) -> Result<OwnedSemaphorePermit> {
        self.acquire(ROOM).await
    }

    /// Waits until everything that it was given is durable. A shipper that ends before has nothing on its way either, so
    /// that to be idle says nothing of what was.
    ///
    /// # Errors
    /// It has ended.
    pub(super) async fn landed(&self) -> Result<()> {
        let (tell, told) = oneshot::channel();
        let _ = self.commands.send(Command::Tell(tell));
        told.await.map_err(|error| Error::failed("the WAL shipper is gone").because(error))
    }

    async fn acquire(&self, share: u32) -> Result<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.room).acquire_many_owned(share).await;
        permit.map_err(|error| Error::failed("the WAL shipper is gone").because(error))
    }

    /// Whether frames are on their way.
    pub(super) fn is_busy(&self) -> bool {
        self.room.available_permits() < ROOM as usize
    }

    /// Ships a frame, which the permit of [`room`](Self::room) allows. Returns at once.
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

impl Means {
    /// Both versions are stored when the second one is found. Which one a restore would take is chance, so it is known
    /// everywhere before the server may forget its own.
    async fn note(&self, place: (&Repository, &Writer), log: &Log, complete: Vec<Passed>) -> Result<()> {
        let Some(book) = &self.book else { return Ok(()) };
        let lowered = self.out.lowered();
        let durable = |Passed { key, digest, mark }| Durable { key, digest, at_full_quorum: mark == lowered };
        for found in segments::note(book, complete.into_iter().map(durable).collect()).await {
            let told = contradiction::record(place, log, &found, "streaming brought", &self.out).await?;
            self.shipped.send_modify(|shipped| shipped.contradiction = Some(told));
        }
        Ok(())
    }
}

impl Shipper {
    fn new(repository: Repository, writer: Writer, (kind, level): (EpochKind, i32), means: Means) -> Self {
        let (flying, since) = (FuturesOrdered::new(), VecDeque::new());
        let digester = means.book.as_ref().map(|book| book.lock().unwrap_or_else(PoisonError::into_inner).digester());
        let passing = digester.map(PassingSegments::new);
        Self { repository, writer, level, kind, means, open: None, flying, since, passing }
    }

    fn start(self) -> ShipperHandle {
        let (commands, queue) = mpsc::unbounded_channel();
        let task = task::spawn("wal-shipper", self.run(queue));
        ShipperHandle { commands, room: Arc::new(Semaphore::new(ROOM as usize)), task }
    }

    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Command>) -> Result<()> {
        loop {
            tokio::select! {
                // What has landed is told before anything else is begun.
                biased;
                Some(landed) = self.flying.next() => self.landed(landed?).await?,
                command = queue.recv() => match command {
                    Some(Command::Frame(frame, room)) => self.ship(frame, room).await?,
                    Some(Command::History(system_id, timeline, content)) => {
                        store_history(&self.repository, (system_id, timeline), &content, &self.means.out).await?;
                    }
                    Some(Command::Tell(landed)) => {
                        self.land().await?;
                        // Whoever stopped waiting does not need to know.
                        let _ = landed.send(());
                    }
                    None => break,
                },
            }
        }
        self.close().await
    }

    async fn ship(&mut self, frame: Frame, room: OwnedSemaphorePermit) -> Result<()> {
        if !self.fits(&frame) {
            self.close().await?;
        }
        self.since.push_back(self.writer.clock.monotonic());
        self.tell_busy();
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.open_epoch(&frame).await?,
        };
        let Chunk { start, wal, marks, .. } = frame.chunk;
        let lowered = self.means.out.lowered();
        let passing = self.passing.as_mut();
        let complete = passing.map(|passing| passing.pass(&frame.log, (start, &wal), lowered)).unwrap_or_default();
        let end = Lsn(start.0 + wal.len() as u64);
        // Up to there both servers have the same. What this one wrote on is acknowledged to nobody.
        if let Some(left) = open.left.as_ref().filter(|left| end > left.switch) {
            return Err(left.ends(&frame.log.branch_id()));
        }
        let (sending, epoch) = (open.epoch.send(start, wal, marks)?, open.epoch.id().clone());
        self.means.shipped.send_modify(|shipped| shipped.begun = end);
        let log = frame.log;
        self.flying.push_back(Box::pin(async move {
            sending.await?;
            Ok(Landed { log, marks, complete, epoch, _room: room })
        }));
        self.open = Some(open);
        Ok(())
    }

    /// A frame is durable, for all before it have landed, too.
    async fn landed(&mut self, mut landed: Landed) -> Result<()> {
        self.since.pop_front();
        let place = (&self.repository, &self.writer);
        self.means.note(place, &landed.log, std::mem::take(&mut landed.complete)).await?;
        let (now, branch) = (self.writer.clock.now(), landed.log.branch_id());
        self.means.shipped.send_modify(|shipped| {
            // A record that is not complete yet does not count: it may be streamed again.
            if let Some((_, end)) = landed.marks.last_record {
                shipped.reach(&branch, end);
            }
            shipped.at = Some(now);
            shipped.last_commit = shipped.last_commit.max(landed.marks.commits.map(|(_, last)| last));
            shipped.epoch = Some(landed.epoch);
            shipped.trouble = None;
        });
        self.tell_busy();
        if let Some(open) = &mut self.open {
            open.epoch.pay_wraps().await;
        }
        Ok(())
    }

    fn tell_busy(&self) {
        let since = self.since.front().copied();
        self.means.shipped.send_modify(|shipped| shipped.busy_since = since);
    }

    /// Whether the open epoch can hold the frame.
    fn fits(&self, frame: &Frame) -> bool {
        self.open.as_ref().is_some_and(|open| {
            let age = self.writer.clock.monotonic().saturating_sub(open.since);
            // A record that is cut stays within one epoch.
            let fresh = age < KEYSET_LIFE || !frame.chunk.at_boundary;
            let follows = open.epoch.position() == frame.chunk.start && *open.epoch.log() == frame.log;
            fresh && follows && open.session == frame.session
        })
    }

    /// Opens an epoch for the frame, as often as it takes: key services and regions come back, and until then the server
    /// keeps its WAL.
    async fn open_epoch(&mut self, frame: &Frame) -> Result<Open> {
        let mut pause = FIRST_PAUSE;
        loop {
            let place = (frame.log.clone(), self.kind, frame.chunk.start);
            let out = Arc::clone(&self.means.out);
            match Epoch::open(&self.repository, &self.writer, place, self.level, out).await {
                Ok(mut epoch) => {
                    let left = self.claim(&mut epoch, frame.is_newest).await?;
                    let (session, since) = (frame.session, self.writer.clock.monotonic());
                    return Ok(Open { epoch, session, since, left });
                }
                Err(error) => self.tell_closed(&error),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Only stream epochs have one owner at a time. Says where others left their timeline, unless it is history of a server that
    /// goes on elsewhere.
    async fn claim(&mut self, epoch: &mut Epoch, is_newest: bool) -> Result<Option<Successor>> {
        let mut pause = FIRST_PAUSE;
        if self.kind != EpochKind::Stream {
            return Ok(None);
        }
        let (known, branch) = (Arc::clone(&self.means.known), epoch.log().branch_id());
        loop {
            let claimed = match epoch.claim(&known).await {
                Ok(()) if is_newest => left(&self.repository, &branch, &known).await,
                Ok(()) => Ok(None),
                Err(error) => Err(error),
            };
            match claimed {
                Err(error) if error.kind() == Kind::Unavailable => self.tell_closed(&error),
                claimed => return claimed,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn tell_closed(&self, error: &Error) {
        tracing::warn!(%error, "an epoch cannot be opened; it is tried again");
        self.means.shipped.send_modify(|shipped| shipped.trouble = Some(error.to_string()));
    }

    /// Waits for what is on its way.
    async fn land(&mut self) -> Result<()> {
        while let Some(landed) = self.flying.next().await {
            self.landed(landed?).await?;
        }
        Ok(())
    }

    /// The same, and ends the epoch behind it.
    async fn close(&mut self) -> Result<()> {
        self.land().await?;
        match self.open.take() {
            Some(open) => open.epoch.close().await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::repository::regions::fan_out::Patience;
    use crate::repository::testing::{Fixture, log};
    use crate::repository::wal::index::BranchId;
    use crate::repository::wal::reader::BranchLog;

    fn frame(start: u64, end: u64, at_boundary: bool) -> Frame {
        let marks = Marks { first_record: Some(Lsn(start)), last_record: Some((Lsn(start), Lsn(end))), commits: None };
        let wal = (start..end).map(|at| at.to_le_bytes()[0]).collect();
        let chunk = Chunk { start: Lsn(start), wal, marks, at_boundary };
        Frame { log: log(), session: 1, is_newest: true, chunk }
    }

    async fn shipped(handle: &ShipperHandle, means: &Means, frame: Frame) -> EpochId {
        let end = frame.chunk.marks.last_record.unwrap().1;
        let room = handle.room(frame.chunk.wal.len()).await.unwrap();
        handle.ship(frame, room);
        let mut shipped = means.shipped.subscribe();
        shipped.wait_for(|shipped| shipped.durable == end).await.unwrap().epoch.clone().unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_keyset_is_renewed_after_a_day_and_never_within_a_record() {
        let fixture = Fixture::memory(3, 2).await;
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let shipped_so_far = Arc::new(watch::channel(Shipped::default()).0);
        shipped_so_far.send_modify(|shipped| shipped.stand_at(&log().branch_id(), Lsn(1000)));
        let means = Means { out, shipped: shipped_so_far, book: None, known: Arc::default() };
        let (repository, writer) = (fixture.repository.clone(), fixture.writer.clone());
        let handle = Shipper::new(repository, writer, (EpochKind::Stream, 1), means.clone()).start();
        let first = shipped(&handle, &means, frame(1000, 1040, true)).await;
        fixture.clock.advance(23 * 3600);
        assert_eq!(shipped(&handle, &means, frame(1040, 1080, true)).await, first);
        fixture.clock.advance(2 * 3600);
        assert_eq!(shipped(&handle, &means, frame(1080, 1120, false)).await, first, "a record is not torn apart");
        let second = shipped(&handle, &means, frame(1120, 1160, true)).await;
        assert_ne!(second, first);
        handle.finish().await.unwrap();

        let branch = BranchId { system_id: log().system_id, timeline: log().timeline, branch: log().branch };
        let stored = BranchLog::load(&fixture.repository, branch).await;
        let keysets: BTreeSet<_> = stored.runs.iter().map(|run| run.first.keyset.clone()).collect();
        assert_eq!((stored.runs.len(), keysets.len()), (2, 2));
        let mut read = Vec::new();
        let mut sink = |_, wal: &[u8]| {
            read.extend_from_slice(wal);
            Ok(std::ops::ControlFlow::Continue(()))
        };
        let range = (Lsn(1000), Lsn(1160));
        stored.read(&fixture.repository, &fixture.ring, range, &mut sink).await.unwrap();
        assert_eq!(read, (1000..1160_u64).map(|at| at.to_le_bytes()[0]).collect::<Vec<_>>());
    }

    /// A connection that was lost, or a keyset that is a day old, begins another epoch without another takeover.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn behind_the_place_where_a_timeline_was_left_nothing_is_shipped() {
        let fixture = Fixture::memory(3, 2).await;
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let shipped_so_far = Arc::new(watch::channel(Shipped::default()).0);
        shipped_so_far.send_modify(|shipped| shipped.stand_at(&log().branch_id(), Lsn(1000)));
        let means = Means { out: Arc::clone(&out), shipped: shipped_so_far, book: None, known: Arc::default() };
        let (repository, writer) = (fixture.repository.clone(), fixture.writer.clone());
        let handle = Shipper::new(repository.clone(), writer.clone(), (EpochKind::Stream, 1), means.clone()).start();
        let first = shipped(&handle, &means, frame(1000, 1040, true)).await;

        let history = b"1\t0/460\tno recovery target specified\n";
        let branch = store_history(&repository, (log().system_id, Timeline(2)), history, &out).await.unwrap();
        let newer = Log { timeline: Timeline(2), branch, ..log() };
        let opening = (newer, EpochKind::Stream, Lsn(0x460));
        let mut successor = Epoch::open(&repository, &writer, opening, 1, out).await.unwrap();
        successor.claim(&Known::default()).await.unwrap();

        fixture.clock.advance(25 * 3600);
        assert_ne!(shipped(&handle, &means, frame(1040, 1120, true)).await, first, "up to there both have the same");
        // What a server that was promoted further on has of the old timeline is its history.
        let history = Frame { session: 2, is_newest: false, ..frame(1120, 1160, true) };
        assert_ne!(shipped(&handle, &means, history).await, first);
        let room = handle.room(40).await.unwrap();
        handle.ship(Frame { session: 3, ..frame(1160, 1200, true) }, room);
        let ended = handle.finish().await.unwrap_err();
        assert!(ended.message().contains("timeline 1 was left at 0/460: timeline 2 is stored"), "{ended:?}");
        assert_eq!(means.shipped.borrow().durable, Lsn(1160));
    }
}
