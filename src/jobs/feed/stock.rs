//! What may be served now: the contiguous WAL of every timeline of the way.
//!
//! Nothing behind the last complete record of an open end is given out: what stands there may be the torso of a record
//! that its server, after a crash, writes differently. Nothing is given out across a hole, or from where two versions of
//! the log were stored on.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::jobs::context::Context;
use crate::jobs::feed::way::Way;
use crate::jobs::lineage::StoredHistory;
use crate::model::{Error, Lsn, Result, Timeline};
use crate::repository::wal::gaps::{self, Barrier, Barriers};
use crate::repository::wal::index::{BranchId, Run, Window, windows};
use crate::repository::wal::reader::BranchLog;

/// WAL that is read at once: enough to have several frames on their way, and little to hold.
pub(super) const PIECE: u64 = 16 << 20;

/// The log of one branch, and the gaps that were recorded of it.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) log: BranchLog,
    pub(super) gaps: Barriers,
}

/// Everything that is known of what is stored.
#[derive(Debug)]
pub(super) struct Stock {
    pub(super) way: Way,
    pub(super) histories: Vec<StoredHistory>,
    pub(super) shelves: BTreeMap<BranchId, Shelf>,
}

/// How far a timeline can be served from a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Up to here.
    To(Lsn),
    /// The timeline ends at this position, and another goes on.
    Switch(Timeline, Lsn),
    /// No further for now.
    Nothing,
}

/// The end of all that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Its timeline.
    pub timeline: Timeline,
    /// Behind the last complete record.
    pub lsn: Lsn,
    /// When its frame was written, by the writer's clock.
    pub written_at: Option<DateTime<Utc>>,
    /// The newest commit in it, if one is known.
    pub last_commit: Option<DateTime<Utc>>,
}

impl Shelf {
    pub(super) async fn load(context: &Context, branch: BranchId) -> Result<Self> {
        let gaps = gaps::barriers(&context.repository, &branch).await?;
        gaps.tell();
        let mut log = BranchLog::load(&context.repository, branch).await;
        // With commit times, which nobody needs who only reads: the end tells its last commit.
        (log.runs, log.damaged) = log.index.runs(&context.repository, None).await;
        Ok(Self { log, gaps })
    }

    /// Takes a later look at the whole branch in. Returns whether anything is new; the runs are to be counted anew then.
    pub(super) fn absorb(&mut self, later: Self) -> bool {
        let is_changed = self.record(later.gaps);
        self.log.index.absorb(later.log.index) || is_changed
    }

    /// Takes in what is recorded by now. Returns whether it is something else.
    pub(super) fn record(&mut self, gaps: Barriers) -> bool {
        if self.gaps.ignored != gaps.ignored {
            gaps.tell();
        }
        let is_changed = self.gaps.standing != gaps.standing;
        self.gaps = gaps;
        is_changed
    }

    /// Takes runs that were counted anew. Returns whether they are other ones.
    pub(super) fn count(&mut self, (runs, damaged): (Vec<Run>, Vec<Error>)) -> bool {
        let ends = |runs: &[Run]| -> Vec<_> {
            runs.iter().map(|run| (run.first.place.clone(), run.last.place.seq, run.last.kind)).collect()
        };
        let is_changed = ends(&self.log.runs) != ends(&runs) || self.log.damaged.len() != damaged.len();
        (self.log.runs, self.log.damaged) = (runs, damaged);
        is_changed
    }

    /// The end of what may be served in the window that holds `at`, if it is behind `at`.
    fn end(&self, at: Lsn, cap: Option<Lsn>) -> Result<Option<Lsn>> {
        let Some(window) = self.log.window(at) else { return Ok(None) };
        let end = match cap {
            Some(cap) if window.end >= cap => Some(cap),
            _ => window.last_record_end.map(|end| cap.map_or(end, |cap| end.min(cap))),
        };
        let first = self.gaps.standing.iter().filter(|gap| gap.contradiction && gap.to > at).min_by_key(|gap| gap.from);
        match first {
            Some(gap) if gap.from <= at => {
                let text = format!("the WAL from {} to {} was stored in two versions", gap.from, gap.to);
                Err(Error::damaged(text).because(&gap.reason))
            }
            first => Ok(end.map(|end| first.map_or(end, |gap| end.min(gap.from))).filter(|end| *end > at)),
        }
    }

    fn window_at(&self, at: Lsn) -> Option<Window> {
        self.log.window(at)
    }
}

impl Stock {
    fn shelf(&self, timeline: Timeline) -> Option<&Shelf> {
        self.shelves.get(&self.way.branch(timeline)?)
    }

    /// Whose log gives the byte at `at` to a reader on `timeline`, and up to where at most. A promoted server keeps the
    /// segment in which it left the old timeline under the new one's name, so a reader of the new one begins with bytes of
    /// the old one.
    fn giver(&self, timeline: Timeline, at: Lsn) -> Result<Option<(&Shelf, Option<Lsn>)>> {
        let reign = self.way.reign(timeline)?;
        let own = self.shelf(timeline).map(|shelf| (shelf, reign.end));
        if at >= reign.begin || own.is_some_and(|(shelf, _)| shelf.window_at(at).is_some()) {
            return Ok(own);
        }
        let owner = self.way.history.timeline_at(at);
        let end = self.way.reign(owner)?.end;
        Ok(self.shelf(owner).map(|shelf| (shelf, end)))
    }

    /// How far a reader at `at` on `timeline` can go.
    ///
    /// # Errors
    /// The timeline is not on the way, or two versions are stored of what comes next.
    pub(super) fn reach(&self, timeline: Timeline, at: Lsn) -> Result<Reach> {
        if let Some((next, switch)) = self.way.next(timeline).filter(|(_, switch)| at >= *switch) {
            return match at == switch {
                true => Ok(Reach::Switch(next, switch)),
                false => Err(Error::refused(format!("timeline {timeline} was left at {switch}, before {at}"))),
            };
        }
        let Some((shelf, cap)) = self.giver(timeline, at)? else { return Ok(Reach::Nothing) };
        let end = shelf.end(at, cap)?.map(|end| self.way.until.map_or(end, |until| end.min(until)));
        Ok(end.filter(|end| *end > at).map_or(Reach::Nothing, Reach::To))
    }

    /// Reads what comes next for a reader, whole and compared before a byte of it is given out.
    ///
    /// # Errors
    /// Any doubt about it.
    pub(super) async fn read(&self, context: &Context, timeline: Timeline, (at, to): (Lsn, Lsn)) -> Result<Vec<u8>> {
        let to = to.min(Lsn(at.0.saturating_add(PIECE)));
        let nothing = || Error::refused(format!("no WAL of timeline {timeline} at {at}"));
        let (shelf, _) = self.giver(timeline, at)?.ok_or_else(nothing)?;
        let mut wal = Vec::new();
        let mut sink = |from: Lsn, bytes: &[u8]| {
            if from.0 != at.0 + wal.len() as u64 {
                return Err(Error::damaged(format!("WAL is not contiguous at {from}")));
            }
            wal.extend_from_slice(bytes);
            Ok(ControlFlow::Continue(()))
        };
        match shelf.log.read(&context.repository, &context.ring, (at, to), &mut sink).await {
            // What came before the fault is good; the next read begins with it.
            Err(_) if !wal.is_empty() => return Ok(wal),
            read => read?,
        };
        if at.0 + wal.len() as u64 != to.0 {
            return Err(Error::damaged(format!("{} bytes of WAL came from {at} to {to}", wal.len())));
        }
        Ok(wal)
    }

    /// Walks from a position to the end of all that can be served.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub(super) fn end(&self, (mut timeline, mut at): (Timeline, Lsn)) -> Result<End> {
        loop {
            match self.reach(timeline, at)? {
                Reach::To(end) => at = end,
                Reach::Switch(next, _) => timeline = next,
                Reach::Nothing => break,
            }
        }
        // Nothing may come behind `at`, so the byte before it tells.
        let last = Lsn(at.0.saturating_sub(1));
        let window = self.giver(timeline, last)?.and_then(|(shelf, _)| shelf.window_at(last));
        let written_at = window.map(|window| window.written_at);
        Ok(End { timeline, lsn: at, written_at, last_commit: window.and_then(|window| window.last_commit) })
    }

    /// What lies behind the end although nothing that can be served leads there: WAL that is stored, WAL that is known to be
    /// missing, or a timeline that begins there.
    pub(super) fn hole(&self, end: &End) -> Option<String> {
        let shelf = self.shelf(end.timeline);
        if let Some(damage) = shelf.and_then(|shelf| shelf.log.damaged.first()) {
            return Some(damage.to_string());
        }
        if self.way.until.is_some_and(|until| end.lsn >= until) {
            return None;
        }
        let timeline = end.timeline;
        if let Some((next, switch)) = self.way.next(timeline) {
            let (at, later) = (end.lsn, self.stored_after(timeline));
            let later = later.map_or_else(String::new, |later| format!(", and WAL of timeline {later} is stored"));
            return Some(format!(
                "the WAL of timeline {timeline} ends at {at}; timeline {next} left it behind that, at {switch}{later}"
            ));
        }
        let shelf = shelf?;
        let windows = windows(&shelf.log.runs);
        let is_stored = |from, to| windows.iter().any(|window| window.covers(from, to));
        let is_ahead = |gap: &&Barrier| !gap.contradiction && gap.to > end.lsn && gap.is_open(is_stored);
        if let Some(Barrier { from, to, reason, .. }) = shelf.gaps.standing.iter().find(is_ahead) {
            return Some(format!("the WAL of timeline {timeline} from {from} to {to} was never stored: {reason}"));
        }
        let window_end = shelf.window_at(end.lsn).map_or(end.lsn, |window| window.end);
        let next = shelf.log.runs.iter().map(|run| run.start()).filter(|start| *start > window_end).min()?;
        Some(format!("the WAL of timeline {timeline} has a hole from {window_end}; it goes on at {next}"))
    }

    /// The first timeline of the way behind this one of which WAL is stored.
    fn stored_after(&self, timeline: Timeline) -> Option<Timeline> {
        let mut later = self.way.history.ancestry().map(|reign| reign.timeline).filter(|later| *later > timeline);
        later.find(|later| self.shelf(*later).is_some_and(|shelf| !shelf.log.runs.is_empty()))
    }

    /// When the newest frame of a stream that nobody closed was written, by its writer's clock. Who streams on a timeline that
    /// was left already took part in no decision since.
    pub(super) fn streaming(&self, end: &End) -> Option<DateTime<Utc>> {
        let ahead = self.shelves.iter().filter(|(branch, _)| branch.timeline >= end.timeline);
        let open = ahead.flat_map(|(_, shelf)| shelf.log.index.open_streams());
        open.map(|header| header.written_at).max()
    }

    /// When the oldest stored WAL behind `at` was written.
    ///
    /// # Errors
    /// A header is nowhere intact.
    pub(super) async fn written_at(
        &self,
        context: &Context,
        timeline: Timeline,
        at: Lsn,
    ) -> Result<Option<DateTime<Utc>>> {
        let Reach::To(end) = self.reach(timeline, at)? else { return Ok(None) };
        let Some((shelf, _)) = self.giver(timeline, at)? else { return Ok(None) };
        let stretches = shelf.log.stretches(&context.repository, (at, end)).await?;
        let Some(first) = stretches.first() else { return Ok(None) };
        let seq = shelf.log.locate(&context.repository, first, at).await?;
        Ok(Some(shelf.log.header(&context.repository, &first.epoch, seq).await?.written_at))
    }
}
