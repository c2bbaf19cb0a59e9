//! From the point that somebody asked for to one record in the WAL.
//!
//! Recovery is always given a position: the start of the last record wanted, inclusive. PostgreSQL dies on a target that
//! its WAL does not reach, so what cannot be found is refused here, before anything is touched.

use std::ops::ControlFlow;

use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::jobs::context::Context;
use crate::jobs::restore::route::{Leg, Route};
use crate::model::{Error, Lsn, Result};
use crate::pg::wal::{Record, RecordKind};
use crate::repository::handle::Repository;
use crate::repository::wal::frame::FrameHeader;
use crate::repository::wal::index::Stretch;

/// A point in time, in the words of whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Point {
    /// The end of the gap-free WAL.
    End,
    /// The last commit at or before a time.
    Time(DateTime<Utc>),
    /// A position: every record that ends at or before it.
    Lsn(Lsn),
    /// A transaction, inclusive; with or without its epoch.
    Xid(u64),
    /// A named restore point.
    Name(String),
    /// The end of the backup itself.
    Immediate,
}

/// The record that recovery ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pin {
    /// Its start.
    pub(super) record: Lsn,
    /// Its end.
    pub(super) end: Lsn,
}

/// Why a point cannot be restored from a backup.
#[derive(Debug)]
pub(super) enum Unreached {
    /// It lies before the backup's stop: an older backup may do.
    TooEarly(String),
    /// It is not in this backup's WAL.
    NotFound(Error),
}

type Found = std::result::Result<Pin, Unreached>;

/// How far the clocks of the server and of the WAL's writer may differ when frames are skipped by the time of writing.
const CLOCK_SLACK: chrono::Duration = chrono::Duration::minutes(10);
/// Header reads in flight.
const READS: usize = 16;
/// Frames looked back at for the newest commit.
const LOOK_BACK: u64 = 512;

/// Looks for points on one route.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finder<'a> {
    pub(super) context: &'a Context,
    pub(super) repository: &'a Repository,
    pub(super) route: &'a Route,
    /// When the backup began.
    pub(super) began: DateTime<Utc>,
}

impl Finder<'_> {
    /// The record to end with.
    pub(super) async fn find(&self, point: &Point) -> Result<Found> {
        let pin = match point {
            Point::Immediate => match self.consistent().await? {
                Some(pin) => pin,
                None => return Ok(Err(self.not_found("the end of the backup"))),
            },
            Point::End => self.last_record_before(self.route.end()).await?,
            Point::Lsn(lsn) => match self.at_position(*lsn).await? {
                Ok(pin) => pin,
                Err(unreached) => return Ok(Err(unreached)),
            },
            Point::Time(time) => match self.at_time(*time).await? {
                Ok(pin) => pin,
                Err(unreached) => return Ok(Err(unreached)),
            },
            Point::Xid(xid) => {
                let low = u32::try_from(xid & 0xFFFF_FFFF).unwrap_or_default();
                match self.first(|record| ends_transaction(record, low)).await? {
                    Some(pin) => pin,
                    None => return Ok(Err(self.not_found(&format!("transaction {xid}")))),
                }
            }
            Point::Name(name) => match self.first(|record| is_restore_point(record, name)).await? {
                Some(pin) => pin,
                None => return Ok(Err(self.not_found(&format!("restore point `{name}`")))),
            },
        };
        Ok(self.not_before_stop(pin))
    }

    fn not_before_stop(&self, pin: Pin) -> Found {
        let stop = self.route.need.stop_lsn;
        if pin.end >= stop {
            return Ok(pin);
        }
        Err(Unreached::TooEarly(format!("it lies at {}, before this backup is consistent at {stop}", pin.end)))
    }

    fn not_found(&self, what: &str) -> Unreached {
        let (from, to) = (self.route.need.start_lsn, self.route.end());
        Unreached::NotFound(Error::refused(format!("{what} is not in the WAL from {from} to {to}")))
    }

    /// The record that makes the backup consistent. PostgreSQL's own `immediate` stops only before a further record,
    /// which a backup alone does not have.
    async fn consistent(&self) -> Result<Option<Pin>> {
        let stop = self.route.need.stop_lsn;
        let last = self.last_record_before(stop).await?;
        // The end of a backup of a standby need not be that of a record.
        if last.end == stop { Ok(Some(last)) } else { self.first(|record| record.end >= stop).await }
    }

    async fn at_position(&self, lsn: Lsn) -> Result<Found> {
        let (stop, end) = (self.route.need.stop_lsn, self.route.end());
        if lsn < stop {
            return Ok(Err(Unreached::TooEarly(format!("{lsn} lies before this backup is consistent at {stop}"))));
        }
        if lsn > end {
            let error = Error::refused(format!("{lsn} lies beyond the end of the gap-free WAL at {end}"));
            let error = self.route.beyond.iter().fold(error, |error, why| error.because(why));
            return Ok(Err(Unreached::NotFound(
                error.hint(format!("the nearest positions: --to-lsn {stop} to --to-lsn {end}")),
            )));
        }
        self.last_record_before(lsn).await.map(Ok)
    }

    /// Everything before the first commit or abort that is later than `time`, which is where PostgreSQL would stop.
    ///
    /// Commit times are not in the order of records, and a clock may be set back: the first crossing counts.
    async fn at_time(&self, time: DateTime<Utc>) -> Result<Found> {
        if time < self.began {
            // The pages hold what was committed before the backup began, and the WAL does not tell when that was.
            let text = format!("{} lies before this backup began at {}", time.to_rfc3339(), self.began.to_rfc3339());
            return Ok(Err(Unreached::TooEarly(text)));
        }
        let mut newest = None;
        for leg in &self.route.legs {
            for stretch in &leg.stretches {
                if let Some(crossing) = self.crossing(leg, stretch, (time, &mut newest)).await? {
                    return self.last_record_before(crossing).await.map(Ok);
                }
            }
        }
        let newest = newest.or(self.last_commit(self.route.end()).await?);
        match newest {
            Some(newest) if newest >= time => self.last_record_before(self.route.end()).await.map(Ok),
            newest => {
                let ends = newest.map_or_else(
                    || "without a commit".to_owned(),
                    |newest| format!("at commit time {}", newest.to_rfc3339()),
                );
                let error = Error::refused(format!("the WAL ends {ends}, before {}", time.to_rfc3339()));
                let error = self.route.beyond.iter().fold(error, |error, why| error.because(why));
                Ok(Err(Unreached::NotFound(error.hint("leave out --to-time for the end of the WAL"))))
            }
        }
    }

    /// The start of the first record in a stretch that is a commit or abort later than `time`.
    async fn crossing(
        &self,
        leg: &Leg,
        stretch: &Stretch,
        (time, newest): (DateTime<Utc>, &mut Option<DateTime<Utc>>),
    ) -> Result<Option<Lsn>> {
        let last_seq = leg.log.locate(self.repository, stretch, Lsn(stretch.to.0.saturating_sub(1))).await?;
        let first_seq = self.first_written_after(leg, (stretch, last_seq), time).await?;
        let headers =
            stream::iter(first_seq..=last_seq).map(|seq| leg.log.header(self.repository, &stretch.epoch, seq));
        let mut headers = headers.buffered(READS);
        while let Some(header) = headers.try_next().await? {
            let span = &header.span;
            // Aborts are not in the header; they matter only beside a later commit.
            if span.last_commit.is_none_or(|last| last <= time) {
                *newest = (*newest).max(span.last_commit);
                continue;
            }
            let from = self.boundary_before(leg, stretch, header.place.seq).await?;
            let mut found = None;
            let to = span.end.min(stretch.to).min(leg.to);
            self.walk((from, to), |record| {
                if ended_at(record).is_some_and(|at| at > time) {
                    found = Some(record.start);
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
            .await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// A frame of a stretch before which there is no commit later than `time`: frames were written after their commits, so
    /// those that were written by then hold none. That is true as long as whoever wrote them went by the same time as the
    /// server; where a frame was written before its own commits no frame is left out.
    async fn first_written_after(
        &self,
        leg: &Leg,
        (stretch, last): (&Stretch, u64),
        time: DateTime<Utc>,
    ) -> Result<u64> {
        let (mut low, mut high) = (stretch.first_seq, last);
        while low < high {
            let middle = low + (high - low) / 2;
            let header = leg.log.header(self.repository, &stretch.epoch, middle).await?;
            if ahead_of_writer(&header).is_some() {
                return Ok(stretch.first_seq);
            }
            if header.written_at < time - CLOCK_SLACK { low = middle + 1 } else { high = middle }
        }
        if low == stretch.first_seq {
            return Ok(low);
        }
        // Between two looks clocks may have been wrong and right again: the last commit that is left out decides.
        let first = leg.log.header(self.repository, &stretch.epoch, low).await?;
        let newest = self.last_commit(first.span.start).await?;
        Ok(if newest.is_some_and(|newest| newest > time) { stretch.first_seq } else { low })
    }

    /// How far the server's clock was ahead of that of whoever stored its WAL where this route ends, if it certainly was.
    pub(super) async fn clock_ahead(&self, at: Lsn) -> Result<Option<chrono::Duration>> {
        let Some((leg, stretch)) = self.place_of(at) else { return Ok(None) };
        let seq = leg.log.locate(self.repository, stretch, Lsn(at.0.saturating_sub(1))).await?;
        Ok(ahead_of_writer(&leg.log.header(self.repository, &stretch.epoch, seq).await?))
    }

    /// The last record that ends at or before `at`.
    pub(super) async fn last_record_before(&self, at: Lsn) -> Result<Pin> {
        if let Some((leg, stretch)) = self.place_of(at) {
            let seq = leg.log.locate(self.repository, stretch, Lsn(at.0.saturating_sub(1))).await?;
            let header = leg.log.header(self.repository, &stretch.epoch, seq).await?;
            if let Some(pin) = last_record_of(&header).filter(|pin| pin.end <= at) {
                return Ok(pin);
            }
        }
        let from = match self.place_of(at) {
            Some((leg, stretch)) => {
                let seq = leg.log.locate(self.repository, stretch, Lsn(at.0.saturating_sub(1))).await?;
                match self.previous(leg, stretch, seq).await? {
                    Some(pin) if pin.end == at => return Ok(pin),
                    Some(pin) if pin.end < at => pin.record,
                    _ => self.route.need.start_lsn,
                }
            }
            None => self.route.need.start_lsn,
        };
        let last = self.walk((from, at), |_| ControlFlow::Continue(())).await?;
        let (record, end) = last.ok_or_else(|| Error::refused(format!("no record ends at or before {at}")))?;
        Ok(Pin { record, end })
    }

    /// A record boundary at or before the beginning of a frame.
    async fn boundary_before(&self, leg: &Leg, stretch: &Stretch, seq: u64) -> Result<Lsn> {
        let previous = self.previous(leg, stretch, seq).await?;
        Ok(previous.map_or(self.route.need.start_lsn, |pin| pin.end))
    }

    /// The last record that was complete before a frame, as the frame before it says; never before the backup's start.
    async fn previous(&self, leg: &Leg, stretch: &Stretch, seq: u64) -> Result<Option<Pin>> {
        let first = leg.log.run_of(stretch).map_or(stretch.first_seq, |run| run.first.place.seq);
        if seq <= first {
            return Ok(None);
        }
        let header = leg.log.header(self.repository, &stretch.epoch, seq - 1).await?;
        let start = self.route.need.start_lsn.max(leg.from);
        Ok(last_record_of(&header).filter(|pin| pin.record >= start))
    }

    fn place_of(&self, at: Lsn) -> Option<(&Leg, &Stretch)> {
        let leg = self.route.legs.iter().rfind(|leg| leg.from < at)?;
        let stretch = leg.stretches.iter().find(|stretch| stretch.from < at && at <= stretch.to)?;
        Some((leg, stretch))
    }

    /// The newest commit that the frames up to `at` are known to hold.
    pub(super) async fn last_commit(&self, at: Lsn) -> Result<Option<DateTime<Utc>>> {
        let mut looked = 0;
        for leg in self.route.legs.iter().rev().filter(|leg| leg.from < at) {
            for stretch in leg.stretches.iter().rev().filter(|stretch| stretch.from < at) {
                let last = Lsn(stretch.to.min(at).0.saturating_sub(1));
                let mut seq = leg.log.locate(self.repository, stretch, last).await?;
                loop {
                    if (looked + 1_u64).is_power_of_two() {
                        // Where nothing is committed the look back is long: twice as far with each request's way.
                        let next = seq.saturating_sub(looked + 1).max(stretch.first_seq)..seq + 1;
                        leg.log.index.read_ahead(self.repository, &stretch.epoch, next).await;
                    }
                    let header = leg.log.header(self.repository, &stretch.epoch, seq).await?;
                    // The frame that is cut may hold commits behind the cut.
                    let is_cut = header.span.end > at && header.span.last_record_end.is_none_or(|end| end > at);
                    match header.span.last_commit {
                        Some(time) if !is_cut => return Ok(Some(time)),
                        Some(_) => {
                            if let Some(time) = self.commit_in(leg, stretch, (seq, at)).await? {
                                return Ok(Some(time));
                            }
                        }
                        None => {}
                    }
                    looked += 1;
                    if seq <= stretch.first_seq || looked > LOOK_BACK {
                        break;
                    }
                    seq -= 1;
                }
            }
        }
        Ok(None)
    }

    async fn commit_in(&self, leg: &Leg, stretch: &Stretch, (seq, at): (u64, Lsn)) -> Result<Option<DateTime<Utc>>> {
        let from = self.boundary_before(leg, stretch, seq).await?;
        let mut newest = None;
        self.walk((from, at), |record| {
            newest = newest.max(record.kind.commit_time());
            ControlFlow::Continue(())
        })
        .await?;
        Ok(newest)
    }

    /// The first record that fits, of all that follow the backup's start.
    async fn first(&self, fits: impl Fn(&Record) -> bool + Send + Sync) -> Result<Option<Pin>> {
        let mut found = None;
        let range = (self.route.need.start_lsn, self.route.end());
        self.walk(range, |record| {
            if fits(record) {
                found = Some(Pin { record: record.start, end: record.end });
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
        .await?;
        Ok(found)
    }

    async fn walk(
        &self,
        range: (Lsn, Lsn),
        on_record: impl FnMut(&Record) -> ControlFlow<()> + Send,
    ) -> Result<Option<(Lsn, Lsn)>> {
        self.route.walk((self.context, self.repository), range, on_record).await
    }
}

fn last_record_of(header: &FrameHeader) -> Option<Pin> {
    let (record, end) = header.span.last_record.zip(header.span.last_record_end)?;
    Some(Pin { record, end })
}

/// When a transaction ended, committed or not.
fn ended_at(record: &Record) -> Option<DateTime<Utc>> {
    match &record.kind {
        RecordKind::Commit { time }
        | RecordKind::Abort { time }
        | RecordKind::CommitPrepared { time, .. }
        | RecordKind::AbortPrepared { time, .. } => Some(*time),
        _ => None,
    }
}

/// A commit cannot be stored before it happened: the server's clock was ahead by at least this.
fn ahead_of_writer(header: &FrameHeader) -> Option<chrono::Duration> {
    let ahead = header.span.last_commit? - header.written_at;
    (ahead > CLOCK_SLACK).then_some(ahead)
}

fn ends_transaction(record: &Record, wanted: u32) -> bool {
    match &record.kind {
        RecordKind::Commit { .. } | RecordKind::Abort { .. } => record.xid == wanted,
        RecordKind::CommitPrepared { xid, .. } | RecordKind::AbortPrepared { xid, .. } => *xid == wanted,
        _ => false,
    }
}

fn is_restore_point(record: &Record, wanted: &str) -> bool {
    matches!(&record.kind, RecordKind::RestorePoint { name, .. } if name == wanted)
}
