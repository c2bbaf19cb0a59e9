//! One connection: WAL in, status out, and never a wait for a region in between.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::jobs::wal::buffer::{Buffer, Chunk};
use crate::jobs::wal::changes::Tracker;
use crate::jobs::wal::pulse::Pulse;
use crate::jobs::wal::run::{Ended, Past, Run, Trouble};
use crate::jobs::wal::seam::{Seam, other_past};
use crate::jobs::wal::server::Start;
use crate::jobs::wal::shipped::Shipped;
use crate::jobs::wal::shipper::Frame;
use crate::model::{Clock, Error, Lsn};
use crate::pg::replication::{StandbyStatus, WalEvent, WalStream};
use crate::pg::wal::WalError;
use crate::repository::wal::adopt::Commits;
use crate::repository::wal::log::{FRAME_LIMIT, Log};

/// The server hears from us this often whatever happens, and is asked for a word, which is what exposure is measured against.
const STATUS: Duration = Duration::from_secs(1);
/// With this much, a frame does not wait for its time: alone, and while others are on their way. When WAL comes faster
/// than regions take it in small pieces, the pieces grow.
const EARLY_FRAME: usize = 1024 * 1024;
const EARLY_BESIDE_OTHERS: usize = 4 * 1024 * 1024;
/// A server that does not listen cannot hold up the end.
const GOODBYE: Duration = Duration::from_secs(2);

/// Who is shown every record.
type Watchers<'w> = (&'w Pulse, Option<&'w mut Tracker>);

/// What the server was asked. A walsender answers with the end of what it sent, before it looks for more; when it answers
/// once more, a second later, that has come too.
#[derive(Debug, Default)]
struct Asked {
    /// A question that is not answered yet.
    open: Option<Duration>,
    /// The last one that was.
    answered: Option<Duration>,
}

impl Asked {
    /// Whether it is to be asked now: one question at a time.
    fn ask(&mut self, now: Duration) -> bool {
        let asks = self.open.is_none();
        self.open.get_or_insert(now);
        asks
    }

    /// It answered. If that was not the first time, all that it had when it was asked before has come.
    fn answer(&mut self) -> Option<Duration> {
        self.answered.replace(self.open.take()?)
    }
}

/// A running stream and what it has brought.
#[derive(Debug)]
pub(super) struct Session {
    number: u64,
    log: Log,
    start: Start,
    stream: WalStream,
    buffer: Buffer,
    /// When the first byte in the buffer arrived.
    since: Option<Instant>,
    durable: Lsn,
    seam: Option<Seam>,
    /// The last commits that came, or those that are stored before.
    commits: Option<Commits>,
    /// Whether commits wait for what this stream reports.
    sync: bool,
    is_newest: bool,
    asked: Asked,
}

impl Session {
    /// A stream that begins at `start`.
    pub(super) fn new(
        (number, log): (u64, Log),
        start: Start,
        stream: WalStream,
        buffer: Buffer,
        durable: Lsn,
    ) -> Self {
        let (asked, commits) = (Asked::default(), start.commits);
        Self {
            number,
            log,
            start,
            stream,
            buffer,
            since: None,
            durable,
            seam: None,
            commits,
            sync: false,
            is_newest: true,
            asked,
        }
    }

    /// The same, which begins before the end of what is stored. Nothing is acknowledged before that is met.
    pub(super) fn towards(self, seam: Option<Seam>) -> Self {
        let durable = if seam.is_some() { Lsn::INVALID } else { self.durable };
        let commits = seam.as_ref().map_or(self.commits, |seam| seam.stored().commits);
        Self { seam, durable, commits, ..self }
    }

    /// The same, for a server that lets commits wait.
    pub(super) fn synchronous(self, sync: bool) -> Self {
        Self { sync, ..self }
    }

    /// The same, on a timeline that the server is still on or not.
    pub(super) fn newest(self, is_newest: bool) -> Self {
        Self { is_newest, ..self }
    }

    /// Where to go on when this session is over.
    pub(super) fn resume(&self) -> Start {
        if let Some(seam) = self.unmet() {
            return seam.stored().clone();
        }
        let branch = self.start.branch.clone();
        let record = self.buffer.resume_at();
        let commits = self.commits;
        let behind = record.map(|(last, lsn)| Start { branch, lsn, at_record: true, last: Some(last), commits });
        behind.unwrap_or_else(|| self.start.clone())
    }

    /// The end of the timeline, all of which was received.
    fn at_switch(&self) -> Start {
        let last = self.resume().last;
        let (branch, lsn) = (self.start.branch.clone(), self.buffer.end());
        Start { branch, lsn, at_record: true, last, commits: self.commits }
    }

    /// The seam to what is stored, on the way to it. What is brought before it may be another server's.
    fn unmet(&self) -> Option<&Seam> {
        self.seam.as_ref().filter(|seam| !seam.is_met())
    }

    fn has_frame(&self) -> bool {
        self.unmet().is_none() && self.buffer.has_frame()
    }

    fn receive(&mut self, at: Lsn, data: &[u8], (pulse, mut tracker): Watchers<'_>) -> Result<(), Trouble> {
        let (seam, commits) = (&mut self.seam, &mut self.commits);
        let seen = self.buffer.push_seen(at, data, |record| {
            // What is brought again was seen when it came first.
            if seam.as_mut().is_some_and(|seam| !seam.see(record)) {
                return;
            }
            *commits = Commits::in_record(record).or(*commits);
            pulse.see(record);
            if let Some(tracker) = &mut tracker {
                tracker.see(record);
            }
        });
        if let Some(tracker) = tracker {
            tracker.save_in_time();
        }
        match seen {
            Err(error @ WalError::OtherPast { at, .. }) => {
                return Err(Trouble::OtherPast(at, other_past(at, &error.to_string())));
            }
            seen => seen.map_err(Error::from)?,
        }
        if let Some((seam, error)) = self.unmet().and_then(|seam| Some((seam, seam.broken()?))) {
            return Err(Trouble::OtherPast(seam.stored().lsn, error));
        }
        self.since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Says whether more of what this stream brought is durable than it knew.
    fn learn(&mut self, shipped: &Shipped) -> bool {
        if self.unmet().is_some() {
            return false;
        }
        let durable = shipped.on(&self.start.branch).map(|durable| durable.min(self.buffer.end()));
        let is_news = durable.is_some_and(|durable| durable > self.durable);
        self.durable = durable.unwrap_or_default().max(self.durable);
        is_news
    }

    fn due_at(&self, interval: Duration) -> Option<Instant> {
        self.since.filter(|_| self.has_frame()).map(|since| since + interval)
    }

    fn frame(&mut self, take: impl FnOnce(&mut Buffer) -> Option<Chunk>) -> Option<Frame> {
        let chunk = take(&mut self.buffer)?;
        self.since = (self.buffer.len() > 0).then(Instant::now);
        Some(Frame { log: self.log.clone(), session: self.number, is_newest: self.is_newest, chunk })
    }

    /// Tells where we are and asks the server for a word, unless one is on its way.
    async fn ask(&mut self, clock: &dyn Clock) -> Result<(), Trouble> {
        let asks = self.asked.ask(clock.monotonic());
        self.tell(clock, asks).await
    }

    async fn send_status(&mut self, clock: &dyn Clock) -> Result<(), Trouble> {
        self.tell(clock, false).await
    }

    async fn tell(&mut self, clock: &dyn Clock, reply_requested: bool) -> Result<(), Trouble> {
        let status = StandbyStatus {
            // A server that waits with remote_write takes this for the operating system's hands, and here is only memory.
            write: if self.sync || self.unmet().is_some() { self.durable } else { self.buffer.end() },
            // Never behind the last complete record: the server may remove what lies before, and an unfinished record
            // is streamed again from its start.
            flush: self.durable,
            // We apply nothing. A position here would let commits with synchronous_commit = remote_apply return.
            apply: Lsn::INVALID,
            reply_requested,
        };
        Ok(self.stream.send_status(status, clock.now()).await?)
    }
}

impl Run {
    /// Streams until it is told to stop, the timeline ends, or something breaks. What was received and is complete goes
    /// to `pending` in every case.
    pub(super) async fn stream(&mut self, session: &mut Session) -> Result<Ended, Trouble> {
        let outcome = self.pump(session).await;
        self.save_changes();
        let rest = match &outcome {
            _ if session.unmet().is_some() => None,
            Ok(Ended::Timeline) => session.frame(Buffer::take_all),
            _ => session.frame(Buffer::take),
        };
        self.pending.extend(rest);
        self.cursor = Some(match &outcome {
            Ok(Ended::Timeline) if session.unmet().is_none() => session.at_switch(),
            _ => session.resume(),
        });
        outcome
    }

    async fn pump(&mut self, session: &mut Session) -> Result<Ended, Trouble> {
        let clock = self.context.clock.clone();
        // A commit that waits must not wait for others to share its frame; those that come while frames are on their way do.
        let ship_interval = if self.target.sync { Duration::ZERO } else { self.target.ship_interval };
        let mut shipped = self.shared.shipped.subscribe();
        let mut ticks = interval(STATUS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (stop, slot) = (self.stop.clone(), Arc::clone(&self.shared.slot));
        loop {
            if self.shipper.is_gone() {
                return Err(Trouble::ShipperGone);
            }
            let stopping = stop.is_cancelled();
            let due_at = session.due_at(ship_interval);
            let next = self.pending.front().map(|frame| frame.chunk.wal.len());
            let next = next.or_else(|| session.has_frame().then(|| session.buffer.frame_size()));
            let due = stopping || !self.pending.is_empty() || self.is_due(session, due_at);
            let may_read = !stopping && !is_full(&self.pending, &session.buffer);
            tokio::select! {
                event = session.stream.next(), if may_read => {
                    if let Some(ended) = self.on_event(session, event?).await? {
                        return Ok(ended);
                    }
                }
                permit = self.shipper.room(next.unwrap_or_default()), if due && next.is_some() => {
                    let permit = permit?;
                    self.save_changes();
                    if let Some(frame) = self.pending.pop_front().or_else(|| session.frame(Buffer::take)) {
                        self.shipper.ship(frame, permit);
                    }
                }
                all = self.shipper.idle(), if stopping && next.is_none() => {
                    drop(all?);
                    return self.say_goodbye(session).await;
                }
                () = sleep_until(due_at.unwrap_or_else(Instant::now)), if due_at.is_some() && !due => {}
                _ = ticks.tick() => {
                    self.save_changes();
                    session.ask(&*clock).await?;
                }
                _ = shipped.changed() => {
                    if session.learn(&shipped.borrow_and_update()) {
                        session.send_status(&*clock).await?;
                    }
                }
                share = slot.over() => return Err(Trouble::Pressure(share)),
                () = stop.cancelled(), if !stopping => {}
            }
        }
    }

    /// Before any frame is shipped: a receiver that resumes behind it must find there what changed.
    fn save_changes(&mut self) {
        if let Some(tracker) = &mut self.tracker {
            tracker.save();
        }
    }

    fn is_due(&self, session: &Session, due_at: Option<Instant>) -> bool {
        let full = session.has_frame() && session.buffer.is_full();
        let early = if self.shipper.is_busy() { EARLY_BESIDE_OTHERS } else { EARLY_FRAME };
        full || session.buffer.complete() >= early || due_at.is_some_and(|at| Instant::now() >= at)
    }

    async fn on_event(&mut self, session: &mut Session, event: WalEvent) -> Result<Option<Ended>, Trouble> {
        match event {
            WalEvent::Wal { start, data, server_end, .. } => {
                session.receive(start, &data, (&self.shared.pulse, self.tracker.as_mut()))?;
                if session.unmet().is_none() {
                    self.past = Past::Compare;
                }
                self.shared.sample(server_end);
                let received = session.buffer.end();
                self.shared.view.send_modify(|view| view.received = received);
            }
            WalEvent::KeepAlive { server_end, reply_requested, .. } => {
                self.shared.sample(server_end);
                if reply_requested {
                    session.send_status(&*self.context.clock).await?;
                } else if let Some(before) = session.asked.answer() {
                    self.shared.saw_all(before);
                }
            }
            WalEvent::TimelineEnd { next_timeline, switch_lsn } => {
                tracing::info!(timeline = next_timeline.0, %switch_lsn, "the server continues on another timeline");
                return Ok(Some(Ended::Timeline));
            }
        }
        Ok(None)
    }

    /// Everything is shipped: the server is told, so that it keeps no WAL that nobody needs.
    async fn say_goodbye(&self, session: &mut Session) -> Result<Ended, Trouble> {
        session.learn(&self.shared.shipped.borrow());
        if let Ok(Err(error)) = timeout(GOODBYE, session.send_status(&*self.context.clock)).await {
            tracing::debug!(?error, "the last status did not reach the server");
        }
        Ok(Ended::Stopped)
    }
}

/// Memory is bounded: a server whose WAL is not read keeps it.
fn is_full(pending: &VecDeque<Frame>, buffer: &Buffer) -> bool {
    let waiting: usize = pending.iter().map(|frame| frame.chunk.wal.len()).sum();
    buffer.is_full() || waiting + buffer.len() >= FRAME_LIMIT
}
