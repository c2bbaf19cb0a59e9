//! The WAL receiver: connects, finds its place, streams, and begins again for as long as it is not told to stop.
//!
//! It goes on from what is stored, never from what the server would offer: a slot that was lost and made again starts at
//! the server's present, and whoever believes it skips WAL without a word.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::disk::lock::Lock;
use crate::jobs::context::{Context, Target};
use crate::jobs::wal::buffer::Buffer;
use crate::jobs::wal::changes::{Tracker, journal_path};
use crate::jobs::wal::fill::{Filler, fill};
use crate::jobs::wal::position::{Position, State};
use crate::jobs::wal::primary::keep_asking;
use crate::jobs::wal::pulse::keep_beating;
use crate::jobs::wal::run::{Ended, Past, Run, SlotCare, Trouble};
use crate::jobs::wal::seam::Seam;
use crate::jobs::wal::segments::SharedBook;
use crate::jobs::wal::server::{self, Server, Start};
use crate::jobs::wal::session::Session;
use crate::jobs::wal::shared::Shared;
use crate::jobs::wal::shipped::Shipped;
use crate::jobs::wal::shipper::{self, Means};
use crate::jobs::wal::slot::keep_looking;
use crate::jobs::wal::standbys::keep_slots;
use crate::model::{Error, Kind, Lsn, Result, ResultExt};
use crate::observe::task;
use crate::pg::PgError;
use crate::pg::replication::ReplicationClient;
use crate::repository::backup::parent::state_path;
use crate::repository::regions::fan_out::{FanOut, LaneOutcome, Patience};
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::gaps::{self, Gap};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a stop waits for regions. What could not be shipped stays on the server.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A running receiver. Dropping it stops it without shipping the rest; the server keeps that.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<Vec<LaneOutcome>>>>,
    beside: Vec<AbortOnDropHandle<()>>,
}

impl Receiver {
    /// Starts a backup's own receiver: it begins with the segment that the server writes now, and this returns when the
    /// server holds that WAL.
    ///
    /// # Errors
    /// The server does not stream.
    pub async fn for_backup(context: &Context, target: &Target) -> Result<Self> {
        let mut receiver = Self::begin(context, target, EpochKind::Backup, None)?;
        receiver.wait_until(|position| position.state != State::Connecting).await?;
        Ok(receiver)
    }

    /// Starts receiving a target's WAL for good: it continues where stored WAL ends and never gives up. The lock lives as
    /// long as its task.
    pub(super) fn stream(
        context: &Context,
        target: &Target,
        lock: Arc<Lock>,
        (book, filler): (SharedBook, Filler),
    ) -> Result<Self> {
        Self::begin(context, target, EpochKind::Stream, Some((lock, book, filler)))
    }

    fn begin(
        context: &Context,
        target: &Target,
        kind: EpochKind,
        kept: Option<(Arc<Lock>, SharedBook, Filler)>,
    ) -> Result<Self> {
        let (lock, book, filler) =
            kept.map_or((None, None, Filler::default()), |(lock, book, filler)| (Some(lock), Some(book), filler));
        let out = Arc::new(FanOut::new(&context.repository.regions, Patience::WAL));
        let mut shared = Shared::new(target.name.clone(), Arc::clone(&context.clock), &out);
        shared.beats = kind == EpochKind::Stream && target.heartbeat;
        let shared = Arc::new(shared);
        let stop = CancellationToken::new();
        let shipped = Arc::clone(&shared.shipped);
        let means = Means { out, shipped, book, known: Arc::default() };
        let tracker = (kind == EpochKind::Stream && target.detection.reads_wal()).then(|| {
            let (journal, pages) =
                (journal_path(&context.state_dir, &target.name), state_path(&context.state_dir, &target.name));
            Tracker::open(journal, pages, Arc::clone(&context.clock))
        });
        let run = Run {
            shipper: shipper::start(context, kind, means.clone())?,
            context: context.clone(),
            target: target.clone(),
            kind,
            means,
            shared: Arc::clone(&shared),
            stop: stop.clone(),
            pending: VecDeque::new(),
            cursor: None,
            system_id: None,
            sessions: 0,
            slot: SlotCare::Trust,
            past: Past::Compare,
            given_up: None,
            stored_histories: BTreeSet::new(),
            tracker,
            filler,
            _lock: lock,
        };
        let beating =
            shared.beats.then(|| task::spawn("heartbeat", keep_beating(target.clone(), Arc::clone(&shared.pulse))));
        let looking = (kind == EpochKind::Stream)
            .then(|| task::spawn("slot", keep_looking(target.clone(), Arc::clone(&shared.slot))));
        let keeping = (kind == EpochKind::Stream && target.standby_slots)
            .then(|| task::spawn("standby-slots", keep_slots(target.clone(), Arc::clone(&shared))));
        let asking = (kind == EpochKind::Stream)
            .then(|| task::spawn("primary", keep_asking(target.clone(), Arc::clone(&shared))));
        let beside =
            beating.into_iter().chain(looking).chain(keeping).chain(asking).map(AbortOnDropHandle::new).collect();
        Ok(Self { shared, stop, task: Some(task::spawn("wal-receiver", run.until_stopped())), beside })
    }

    /// Every record that ends at or before this position is durable at the write quorum.
    pub fn durable(&self) -> Lsn {
        self.shared.shipped.borrow().durable
    }

    /// Where this run began.
    pub fn start_lsn(&self) -> Option<Lsn> {
        self.shared.view.borrow().start.as_ref().map(|(lsn, _)| *lsn)
    }

    /// What went wrong last; it may have passed.
    pub fn last_error(&self) -> Option<String> {
        self.position().last_error
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.position().state
    }

    /// Everything that is known.
    pub fn position(&self) -> Position {
        self.shared.position()
    }

    /// A way to ask for the position that outlives borrowing.
    pub fn watch(&self) -> impl Fn() -> Position + Clone + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.position()
    }

    /// Whether it has ended by itself, which a stream receiver does only at an error of the configuration.
    pub fn is_over(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until every record up to `lsn` is durable.
    ///
    /// # Errors
    /// Not within `limit`, or the receiver has ended.
    pub async fn wait_durable(&mut self, lsn: Lsn, limit: Duration) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let waited = timeout(limit, self.wait_until(|position| position.reaches(lsn))).await;
        waited.unwrap_or_else(|_| Err(not_durable(&shared.position(), lsn, limit)))
    }

    async fn wait_until(&mut self, reached: impl Fn(&Position) -> bool) -> Result<()> {
        let (mut view, mut shipped) = (self.shared.view.subscribe(), self.shared.shipped.subscribe());
        while !reached(&self.shared.position()) {
            let Some(task) = self.task.as_mut() else { return Err(Error::failed("the WAL receiver has ended")) };
            tokio::select! {
                _ = view.changed() => {}
                _ = shipped.changed() => {}
                ended = task => {
                    self.task = None;
                    let ended = ended.map_err(|error| Error::failed("the WAL receiver died").because(error))?;
                    return Err(ended.err().unwrap_or_else(|| Error::failed("the WAL receiver has ended")));
                }
            }
        }
        Ok(())
    }

    /// Stops: what was received is shipped, the epoch is closed, the server is told. Says what each region lacks.
    ///
    /// # Errors
    /// The receiver had ended with an error, or regions did not take the rest within a minute: the server keeps it.
    pub async fn stop(mut self) -> Result<Vec<LaneOutcome>> {
        self.beside.clear();
        self.stop.cancel();
        let Some(task) = self.task.as_mut() else { return Ok(Vec::new()) };
        match timeout(STOP_LIMIT, task).await {
            Ok(ended) => ended.map_err(|error| Error::failed("the WAL receiver died").because(error))?,
            Err(_) => {
                let position = self.shared.position();
                let text = format!("WAL behind {} could not be shipped; the server keeps it", position.durable_lsn);
                Err(position.last_error.iter().fold(Error::new(Kind::Unavailable, text), Error::because))
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

pub(super) fn lock(context: &Context, target: &Target) -> Result<Lock> {
    let path = context.state_dir.join(format!("{}.wal.lock", target.name));
    let lock = Lock::acquire(&path).map_err(Error::from);
    lock.map_err(|error| match error.kind() {
        Kind::Refused => error
            .during(format!("the WAL of {} is already being streamed on this host", target.name))
            .hint("one receiver per target: stop the other one first, or look at it with `drctl wal status`"),
        _ => error,
    })
}

/// The error of whoever waited for `lsn` in vain.
pub(super) fn not_durable(position: &Position, lsn: Lsn, limit: Duration) -> Error {
    let Position { durable_lsn, state, .. } = position;
    let text = format!("WAL up to {lsn} is not durable after {} s: it is up to {durable_lsn}", limit.as_secs());
    let error = Error::new(Kind::Unavailable, text).because(format!("the receiver is {}", state.words()));
    position.last_error.iter().fold(error.transient(true), Error::because)
}

impl Run {
    async fn until_stopped(mut self) -> Result<Vec<LaneOutcome>> {
        let mut pause = FIRST_PAUSE;
        while !self.stop.is_cancelled() {
            let before = self.shared.view.borrow().received;
            let trouble = match self.once().await {
                Ok(Ended::Stopped) => break,
                Ok(Ended::Timeline) => continue,
                Err(trouble) => trouble,
            };
            if self.shared.view.borrow().received > before {
                (pause, self.given_up) = (FIRST_PAUSE, None);
            }
            if self.recover(trouble).await? {
                let stop = self.stop.clone();
                // Interrupted or over: the loop looks again either way.
                let _ = stop.run_until_cancelled(sleep(pause)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        self.finish().await
    }

    /// One connection, from its beginning to its end.
    async fn once(&mut self) -> Result<Ended, Trouble> {
        let (stop, slot) = (self.stop.clone(), Arc::clone(&self.shared.slot));
        let opened = tokio::select! {
            opened = stop.run_until_cancelled(self.open()) => opened,
            share = slot.over() => return Err(Trouble::Pressure(share)),
        };
        let Some(session) = opened else { return Ok(Ended::Stopped) };
        let mut session = session?;
        self.shared.enter(State::Streaming);
        self.stream(&mut session).await
    }

    async fn open(&mut self) -> Result<Session, Trouble> {
        let mut client = server::connect(&self.target).await?;
        let slot = self.prepare_slot(&mut client).await?;
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        self.note_role(&server);
        let (start, reason) = self.place(&mut client, &server).await?;
        self.store_histories(&server);
        let stored = start.lsn;
        let compares = self.kind == EpochKind::Stream && self.past != Past::Trust;
        let seam = compares.then(|| Seam::before(&start, &server)).flatten();
        self.past = if seam.is_some() { Past::Comparing } else { Past::Compare };
        let start = seam.as_ref().map_or(start, |seam| seam.begin().clone());
        let durable = self.settle(&start, seam.is_some()).await?;
        let mut walker = server.walker(&start)?;
        if self.tracker.is_some() {
            walker = walker.reading_blocks();
        }
        let stream = client.start_physical(Some(&slot), start.lsn, start.branch.timeline).await?;
        tracing::info!(target = %self.target.name, lsn = %start.lsn, timeline = start.branch.timeline.0, reason, "streaming");
        self.shared.view.send_modify(|view| {
            view.system_id = Some(server.system_id);
            view.branch = Some(start.branch.clone());
            view.received = start.lsn;
            view.start.get_or_insert((stored, reason.to_owned()));
        });
        self.sessions += 1;
        let log = server.log(&self.target, &start.branch);
        if let Some(tracker) = &mut self.tracker {
            tracker.begin(&log, stored);
        }
        let is_newest = server.branches().first() == Some(&start.branch);
        let session = Session::new((self.sessions, log), start, stream, Buffer::new(walker), durable).newest(is_newest);
        Ok(session.towards(seam).synchronous(self.target.sync && self.kind == EpochKind::Stream))
    }

    async fn prepare_slot(&mut self, client: &mut ReplicationClient) -> Result<String, Trouble> {
        let slot = self.target.slot.clone();
        match (self.kind, self.slot) {
            (EpochKind::Backup | EpochKind::Push, _) => {
                let slot = server::temporary_slot(&self.context, &self.target)?;
                client.create_physical_slot(&slot, true, true).await?;
                return Ok(slot);
            }
            (EpochKind::Stream, SlotCare::Trust) => {}
            (EpochKind::Stream, SlotCare::Ensure) => server::ensure_slot(client, &slot).await?,
            (EpochKind::Stream, SlotCare::Renew) => server::renew_slot(client, &slot).await?,
        }
        self.slot = SlotCare::Trust;
        Ok(slot)
    }

    /// A name that leads to another cluster all of a sudden must not mix two logs.
    fn check_identity(&mut self, server: &Server) -> Result<()> {
        let known = *self.system_id.get_or_insert(server.system_id);
        if known == server.system_id {
            return Ok(());
        }
        let text = format!("{} is system {} now and was {known} before", self.target.name, server.system_id);
        Err(Error::refused(text).hint("if this is meant, start the receiver again"))
    }

    fn note_role(&self, server: &Server) {
        let was = self.shared.from_standby.swap(server.in_recovery, Ordering::Relaxed);
        if server.in_recovery && !was {
            let target = &self.target.name;
            tracing::info!(%target, "WAL is streamed from a standby: exposure counts from what its primary says");
            if self.target.sync {
                tracing::error!(%target, "sync = true, and no commit waits for a receiver that streams from a standby");
            }
        }
    }

    /// Where to begin, and why there.
    async fn place(
        &mut self,
        client: &mut ReplicationClient,
        server: &Server,
    ) -> Result<(Start, &'static str), Trouble> {
        let cursor = match &self.cursor {
            // Also of a backup's own receiver, whose timeline ended: what it skips is missing from the backup.
            Some(cursor) => Some(cursor.clone()),
            None if self.kind != EpochKind::Stream => {
                return Ok((server.current_segment()?, "the segment that the server writes now"));
            }
            None => {
                let tail = self.take_over_alone(server).await?;
                tail.map(|tail| Start {
                    branch: tail.branch,
                    lsn: tail.end,
                    at_record: tail.at_record,
                    last: tail.last_record,
                })
            }
        };
        let Some(cursor) = cursor else {
            // The slot first: from here on the server keeps what it writes now.
            server::ensure_slot(client, &self.target.slot).await?;
            let mut server = server.clone();
            server.flush_lsn = client.identify_system().await?.flush_lsn;
            return Ok((server.current_segment()?, "no WAL of this cluster is stored yet"));
        };
        let start = server.continue_at(&cursor).ok_or_else(|| {
            let timeline = cursor.branch.timeline;
            Error::refused(format!("timeline {timeline}, which is stored, is not in the history of this server"))
        })?;
        self.cursor = Some(cursor);
        Ok((start, "where stored WAL ends"))
    }

    fn store_histories(&mut self, server: &Server) {
        for (branch, descent) in server.branches().into_iter().zip(&server.lineage) {
            if let (Some(file), true) = (&descent.file, self.stored_histories.insert(branch.clone())) {
                self.shipper.history(branch.system_id, branch.timeline, file.clone());
            }
        }
    }

    /// What is durable of the history that begins at `start`. What is on its way of another one must have landed before:
    /// it may be the beginning of this one, and it may go further than this one has come. `anew`: whose it is has yet to
    /// be seen.
    pub(super) async fn settle(&mut self, start: &Start, anew: bool) -> Result<Lsn, Trouble> {
        let known = self.shared.shipped.borrow().on(&start.branch);
        if let Some(durable) = known.filter(|durable| !anew && *durable <= start.lsn) {
            return Ok(durable);
        }
        self.ship_pending().await?;
        self.shared.stand_at(start);
        Ok(start.lsn)
    }

    /// Ships what earlier sessions left, and waits until it is durable.
    pub(super) async fn ship_pending(&mut self) -> Result<(), Trouble> {
        // A frame leaves the queue when there is room for it: whoever stops waiting loses none.
        while let Some(frame) = self.pending.front() {
            let permit = self.shipper.room(frame.chunk.wal.len()).await?;
            if let Some(frame) = self.pending.pop_front() {
                self.shipper.ship(frame, permit);
            }
        }
        self.shipper.landed().await.map_err(|_| Trouble::ShipperGone)
    }

    /// Does what can be done about `trouble`, and says whether to wait before the next attempt.
    async fn recover(&mut self, trouble: Trouble) -> Result<bool> {
        if self.kind != EpochKind::Stream {
            return Err(trouble.into());
        }
        match trouble {
            Trouble::Server(PgError::WalRemoved { .. }) if self.past == Past::Comparing => {
                self.past = Past::Trust;
                return Ok(false);
            }
            Trouble::OtherPast(at, error) => self.contradict(at, &error).await?,
            Trouble::Server(PgError::WalRemoved { message, .. }) => {
                let (stop, slot) = (self.stop.clone(), Arc::clone(&self.shared.slot));
                let filled = tokio::select! {
                    filled = stop.run_until_cancelled(self.gap(&message)) => filled,
                    share = slot.over() => return self.give_up_slot(share).await,
                };
                let Some(filled) = filled else { return Ok(false) };
                return Ok(filled.inspect_err(|trouble| self.tell(&trouble_text(trouble))).is_err());
            }
            Trouble::Pressure(share) => return self.give_up_slot(share).await,
            Trouble::Server(error) if server::is_missing_slot(&error) && self.slot == SlotCare::Trust => {
                tracing::warn!(slot = self.target.slot, "the replication slot is gone; it is made again");
                self.slot = SlotCare::Ensure;
                return Ok(true);
            }
            Trouble::Server(error) if server::is_invalidated_slot(&error) && self.slot == SlotCare::Trust => {
                tracing::warn!(slot = self.target.slot, %error, "the replication slot was lost; it is made again");
                self.slot = SlotCare::Renew;
                return Ok(true);
            }
            Trouble::Server(error) if self.sessions == 0 && is_hopeless(&error) => return Err(error.into()),
            Trouble::Server(error @ PgError::SlotInUse(_)) => {
                self.tell(&error.to_string());
                self.settle_with_successor().await?;
            }
            Trouble::ShipperGone => self.restart_shipper().await?,
            trouble => self.tell(&trouble_text(&trouble)),
        }
        Ok(true)
    }

    pub(super) fn tell(&self, error: &str) {
        let waiting = self.shared.view.borrow().state == State::WaitingForRegions;
        self.shared.trouble(if waiting { State::WaitingForRegions } else { State::Reconnecting }, &error);
        tracing::info!(target = %self.target.name, error, "streaming is interrupted");
    }

    /// What was on its way may be stored or not: the regions are asked, as after a crash.
    pub(super) async fn restart_shipper(&mut self) -> Result<()> {
        let fresh = shipper::start(&self.context, self.kind, self.means.clone())?;
        let error = match std::mem::replace(&mut self.shipper, fresh).finish().await {
            Ok(()) => Error::failed("the WAL shipper has ended"),
            // Sealed out. To take over in turn would be a fight: whoever runs this decides who goes on.
            Err(error) if error.kind() == Kind::Refused => return Err(error),
            Err(error) => error,
        };
        tracing::error!(%error, "the epoch cannot be continued; another one is begun");
        self.shared.trouble(State::Reconnecting, &error);
        self.shared.shipped.send_modify(Shipped::lose);
        self.pending.clear();
        self.stored_histories.clear();
        self.means.known.clear();
        self.cursor = None;
        Ok(())
    }

    /// The server no longer has the WAL that comes next. Others may have stored it. If not, that is written down at the
    /// quorum before anything else, so that no reader takes what follows for a continuation.
    async fn gap(&mut self, reason: &str) -> Result<(), Trouble> {
        let mut client = server::connect(&self.target).await?;
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        let Some(cursor) = self.cursor.clone() else { return Ok(()) };
        let cursor = server.lacks_from(cursor);
        self.ship_pending().await?;
        // Before the slot is dropped, which lets the server remove what it still keeps: regions that do not answer now may
        // hold all that is missing.
        if self.is_filled(&cursor, &server).await? {
            return Ok(());
        }
        server::renew_slot(&mut client, &self.target.slot).await?;
        let server = Server::identify(&mut client).await?;
        self.check_identity(&server)?;
        let next = server.current_segment()?;
        if cursor.branch == next.branch && next.lsn <= cursor.lsn {
            return Err(Error::failed(format!("the server lacks WAL at {} that it still writes", cursor.lsn)).into());
        }
        self.read_files(&server, (&cursor, next.lsn)).await;
        if self.is_filled(&cursor, &server).await? {
            return Ok(());
        }
        Ok(self.record_gap(&cursor, next, reason).await?)
    }

    async fn record_gap(&mut self, cursor: &Start, next: Start, reason: &str) -> Result<()> {
        let now = self.context.clock.now();
        let reason = &self.given_up.as_ref().map_or_else(|| reason.to_owned(), |why| format!("{why}; {reason}"));
        let gap = Gap::new(&self.target.name, &cursor.branch, (cursor.lsn, next.lsn), reason, now);
        tracing::error!(target = %self.target.name, from = %gap.from, to = %gap.to, reason, "WAL is missing: a new base backup is needed");
        gaps::record(&self.context.repository, self.context.writer()?, &gap, &self.means.out).await?;
        let text = format!("gap from {} to {}: {reason}", gap.from, gap.to);
        self.shared.view.send_modify(|view| (view.gap, view.last_error) = (true, Some(text)));
        self.shared.stand_at(&next);
        self.cursor = Some(next);
        Ok(())
    }

    /// Two servers wrote one branch. The one that is stored stays, and whoever looks for it is told.
    async fn contradict(&mut self, at: Lsn, error: &Error) -> Result<()> {
        let Some(branch) = self.cursor.as_ref().map(|cursor| cursor.branch.clone()) else { return Ok(()) };
        let (name, now) = (&self.target.name, self.context.clock.now());
        let gap = Gap::new(name, &branch, (at, Lsn(at.0 + 1)), error.message(), now).contradicted();
        tracing::error!(target = %name, %at, timeline = branch.timeline.0, %error, "WAL contradicts what is stored: two servers write one timeline");
        self.tell(&error.to_string());
        let recorded = gaps::record(&self.context.repository, self.context.writer()?, &gap, &self.means.out).await;
        if let Err(error) = recorded {
            // It is met again before anything is acknowledged.
            tracing::warn!(%error, "that WAL contradicts itself is not recorded yet");
        }
        Ok(())
    }

    async fn read_files(&self, server: &Server, range: (&Start, Lsn)) {
        let target = &self.target.name;
        match fill((&self.context, &self.target), &self.filler, server, range).await {
            Ok(0) => tracing::info!(%target, "the server's directory does not hold what it lacks"),
            Ok(segments) => tracing::warn!(%target, segments, "files were read of WAL that the server does not stream"),
            Err(error) => tracing::warn!(%target, %error, "the server's files do not fill the gap"),
        }
    }

    /// Whether others stored what the server no longer has, from the cursor on without a hole. Then it goes on behind that.
    async fn is_filled(&mut self, cursor: &Start, server: &Server) -> Result<bool> {
        let tail = self.take_over(&server.eras(), Some(&cursor.branch)).await?;
        let tail = tail.filter(|tail| tail.branch != cursor.branch || tail.end > cursor.lsn);
        let Some(tail) = tail.filter(|tail| tail.is_reached_from(&cursor.branch, cursor.lsn)) else { return Ok(false) };
        let filled = Start { branch: tail.branch, lsn: tail.end, at_record: tail.at_record, last: tail.last_record };
        tracing::info!(target = %self.target.name, from = %cursor.lsn, to = %filled.lsn, "archived WAL takes the place of what the server lacks");
        self.shared.stand_at(&filled);
        self.cursor = Some(filled);
        Ok(true)
    }

    async fn finish(mut self) -> Result<Vec<LaneOutcome>> {
        let shipped = self.ship_pending().await;
        let Self { shipper, means, shared, .. } = self;
        // Why the shipper ended says more than that it did.
        shipper.finish().await.during(|| "close the epoch")?;
        shipped?;
        shared.enter(State::Stopped);
        Ok(match Arc::into_inner(means.out) {
            Some(out) => out.drain().await,
            None => Vec::new(),
        })
    }
}

fn trouble_text(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Server(error) => error.to_string(),
        Trouble::Pressure(_) => "the replication slot fills the server's disk".to_owned(),
        Trouble::ShipperGone => "the epoch cannot be continued".to_owned(),
        Trouble::OtherPast(_, error) | Trouble::Other(error) => error.to_string(),
    }
}

/// What no waiting mends: the configuration, or what the server allows us.
const fn is_hopeless(error: &PgError) -> bool {
    matches!(error, PgError::Auth(_) | PgError::Config(_) | PgError::Tls { .. } | PgError::Unsupported(_))
}
