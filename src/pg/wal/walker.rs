//! Finds and checks every record in a stream of WAL bytes.

use chrono::{DateTime, Utc};

use super::blocks::BlockReader;
use super::body::{Body, is_switch};
use super::page::{LONG_HEADER, PageHeader, SHORT_HEADER, WAL_PAGE_SIZE};
use super::{Record, WalError};
use crate::model::{Lsn, SystemId, Timeline, WalSegmentSize};
use crate::pg::history::History;
use crate::pg::le::{u32_at, u64_at};

/// `XLogRecord`: length, transaction, previous record, info, resource manager, two bytes of alignment, CRC.
const RECORD_HEADER: usize = 24;
/// The CRC covers the body and then the header up to itself.
const CRC_OFFSET: usize = 20;
/// Records begin at multiples of this.
const ALIGNMENT: u64 = 8;
/// `MaxAllocSize`; since version 16 PostgreSQL stays 4 MiB below.
const MAX_RECORD: u32 = 1 << 30;
/// No cluster gets here, and arithmetic on positions below cannot overflow.
const MAX_START: u64 = 1 << 62;

/// What is known beforehand about the WAL to be walked. The more is given, the more damage is told from data.
#[derive(Debug, Clone, Default)]
pub struct Expect {
    /// The magic number of the server's version, see [`super::magic_of`]; without it that of the first page. A walk
    /// that begins with [`RecordWalker::at_record`] should be given it: the format of commits depends on it.
    pub magic: Option<u16>,
    /// The cluster; without it that of the first segment seen.
    pub system_id: Option<SystemId>,
    /// The history of the timeline that is read: a page written before a switch keeps the older timeline. Without it,
    /// timelines may only grow.
    pub history: Option<History>,
}

/// What one [`RecordWalker::push`] completed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Number of records.
    pub records: u64,
    /// The start of the first of them.
    pub first: Option<Lsn>,
    /// Start and end of the last of them.
    pub last: Option<(Lsn, Lsn)>,
    /// Earliest and latest commit time among them; commit times are not in the order of records.
    pub commits: Option<(DateTime<Utc>, DateTime<Utc>)>,
}

impl Pushed {
    fn add(&mut self, record: &Record) {
        self.records += 1;
        self.first.get_or_insert(record.start);
        self.last = Some((record.start, record.end));
        if let Some(time) = record.kind.commit_time() {
            self.add_commits((time, time));
        }
    }

    fn add_commits(&mut self, (from, to): (DateTime<Utc>, DateTime<Utc>)) {
        let (earliest, latest) = self.commits.unwrap_or((from, to));
        self.commits = Some((earliest.min(from), latest.max(to)));
    }

    /// Adds what the next push completed.
    pub fn merge(&mut self, next: &Self) {
        self.records += next.records;
        self.first = self.first.or(next.first);
        self.last = next.last.or(self.last);
        if let Some(commits) = next.commits {
            self.add_commits(commits);
        }
    }
}

/// Where a walk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalkState {
    /// In a record that began before the walk.
    Skipping,
    /// Between two records.
    AtBoundary,
    /// In the record that begins here. At the end of the data: it was cut off.
    InRecord(Lsn),
    /// The end of WAL: zeros begin here.
    AtZeros(Lsn),
}

/// A state machine over WAL bytes, pushed in pieces of any size.
///
/// # Contract
/// - A record is emitted once every byte before its `end` was pushed and its length, its link to the record before, its
///   CRC and the headers of all its pages are right. So whoever has stored the pushed bytes can resume at any emitted
///   `end` with [`RecordWalker::at_record`].
/// - Memory does not depend on the size of records.
/// - After an error the walk is over: records emitted before it stand, the walker is of no further use.
/// - Bits that PostgreSQL never reads are not checked: alignment padding (behind records, and bytes 20 to 24 of a page
///   header), the page flag `XLP_BKP_REMOVABLE`, and the void rest of a segment behind a switch. A skipped rest of a
///   record is not checked either, except that it cannot end anywhere but at the first record of the page.
#[derive(Debug, Clone)]
pub struct RecordWalker {
    segment_size: WalSegmentSize,
    expect: Expect,
    /// Whether zeros are the end of WAL or an error.
    is_file: bool,
    /// Whether records are read for what they change.
    reads_blocks: bool,
    walk_start: Lsn,
    /// Where the record before the first one begins, if that is known.
    link: Option<Lsn>,
    position: Lsn,
    /// The part that has come of the header of the current page; empty behind it.
    page: Vec<u8>,
    page_timeline: Timeline,
    state: State,
    last: Option<(Lsn, Lsn)>,
    overwrites: Option<Overwrites>,
}

/// The next record must be XLOG_OVERWRITE_CONTRECORD.
#[derive(Debug, Clone, Copy)]
struct Overwrites {
    /// Start of the record that was cut off, if the walk saw it.
    start: Option<Lsn>,
}

#[derive(Debug, Clone)]
enum State {
    /// In a record that began before the walk; how much is left is unknown before the first page header.
    Skip {
        left: Option<u64>,
    },
    Boundary,
    Header(Head),
    Body(Open),
    /// Behind a record: its padding, or the void rest of its segment.
    Tail(Record),
    /// Behind the end of WAL. PostgreSQL fills a page with zeros before it writes records there, but pages further on
    /// may hold what the file was recycled from.
    Zeros {
        from: Lsn,
        until: Lsn,
    },
}

#[derive(Debug, Clone, Copy)]
struct Head {
    start: Lsn,
    bytes: [u8; RECORD_HEADER],
    filled: usize,
}

impl Head {
    fn length(&self) -> u32 {
        u32_at(&self.bytes, 0).unwrap_or_default()
    }
}

/// A record whose header is complete.
#[derive(Debug, Clone)]
struct Open {
    head: Head,
    left: u64,
    crc: u32,
    body: Body,
    blocks: Option<Box<BlockReader>>,
}

impl RecordWalker {
    /// A walk from the start of a page (a segment begins with one). What remains there of an older record is skipped.
    ///
    /// # Errors
    /// [`WalError::BadStart`] if no page begins there.
    pub fn new(start: Lsn, segment_size: WalSegmentSize) -> Result<Self, WalError> {
        if !start.0.is_multiple_of(WAL_PAGE_SIZE) {
            return Err(WalError::BadStart { at: start });
        }
        Self::begin(start, segment_size, State::Skip { left: None })
    }

    /// A walk from the start of a record or the end of the one before it.
    ///
    /// # Errors
    /// [`WalError::BadStart`] if no record can begin there.
    pub fn at_record(start: Lsn, segment_size: WalSegmentSize) -> Result<Self, WalError> {
        let offset = start.0 % WAL_PAGE_SIZE;
        let in_header = offset > 0 && offset < header_size(start, segment_size) as u64;
        if !start.0.is_multiple_of(ALIGNMENT) || in_header {
            return Err(WalError::BadStart { at: start });
        }
        Self::begin(start, segment_size, State::Boundary)
    }

    fn begin(start: Lsn, segment_size: WalSegmentSize, state: State) -> Result<Self, WalError> {
        if start.0 > MAX_START {
            return Err(WalError::BadStart { at: start });
        }
        Ok(Self {
            segment_size,
            expect: Expect::default(),
            is_file: false,
            reads_blocks: false,
            walk_start: start,
            link: None,
            position: start,
            page: Vec::with_capacity(LONG_HEADER),
            page_timeline: Timeline(0),
            state,
            last: None,
            overwrites: None,
        })
    }

    /// Sets what is known beforehand.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    /// The record before the first one is known to begin there.
    #[must_use]
    pub fn following(mut self, last: Option<Lsn>) -> Self {
        self.link = last;
        self
    }

    /// The bytes come from a file: zeros where a record must be are the end of WAL and no error.
    #[must_use]
    pub fn of_file(mut self) -> Self {
        self.is_file = true;
        self
    }

    /// Records are read for which pages they change as well.
    #[must_use]
    pub fn reading_blocks(mut self) -> Self {
        self.reads_blocks = true;
        self
    }

    /// The next byte expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Start and end of the last complete record of this walk.
    pub fn last_complete(&self) -> Option<(Lsn, Lsn)> {
        self.last
    }

    /// Where the walk stands.
    pub fn state(&self) -> WalkState {
        match &self.state {
            State::Skip { .. } => WalkState::Skipping,
            State::Boundary => WalkState::AtBoundary,
            State::Header(head) if head.filled == 0 => WalkState::AtBoundary,
            State::Header(head) | State::Body(Open { head, .. }) => WalkState::InRecord(head.start),
            State::Tail(record) => WalkState::InRecord(record.start),
            State::Zeros { from, .. } => WalkState::AtZeros(*from),
        }
    }

    /// Takes the bytes at `at` and calls `on_record` for every record that they complete.
    ///
    /// # Errors
    /// [`WalError::NotContiguous`] if `at` is not [`Self::position`]; otherwise what is wrong with the bytes.
    pub fn push(&mut self, at: Lsn, data: &[u8], mut on_record: impl FnMut(&Record)) -> Result<Pushed, WalError> {
        if at != self.position {
            return Err(WalError::NotContiguous { expected: self.position, got: at });
        }
        let mut pushed = Pushed::default();
        let mut data = data;
        while !data.is_empty() {
            let taken = if self.in_page_header() { self.page_header(data)? } else { self.step(data)? };
            self.position.0 += taken as u64;
            data = &data[taken..];
            if let Some(record) = self.complete()? {
                self.last = Some((record.start, record.end));
                pushed.add(&record);
                on_record(&record);
            }
        }
        Ok(pushed)
    }

    fn in_page_header(&self) -> bool {
        let has_header = !matches!(self.state, State::Tail(_) | State::Zeros { .. });
        has_header && (!self.page.is_empty() || self.position.0.is_multiple_of(WAL_PAGE_SIZE))
    }

    fn page_header(&mut self, data: &[u8]) -> Result<usize, WalError> {
        let at = Lsn(self.position.0 - self.page.len() as u64);
        let size = header_size(at, self.segment_size);
        let taken = (size - self.page.len()).min(data.len());
        self.page.extend_from_slice(&data[..taken]);
        if self.page.len() == size {
            if self.page.iter().all(|byte| *byte == 0) {
                self.zeros(at)?;
            } else {
                let header = PageHeader::parse(&self.page, at)?;
                self.check_page(at, &header)?;
                self.enter_page(at, &header)?;
            }
            self.page.clear();
        }
        Ok(taken)
    }

    /// Checks the header against the position and everything known; what was unknown is known from here on.
    fn check_page(&mut self, at: Lsn, header: &PageHeader) -> Result<(), WalError> {
        if header.address != at {
            return Err(WalError::Page { at, what: "its address is another page's" });
        }
        if *self.expect.magic.get_or_insert(header.magic) != header.magic {
            return Err(WalError::OtherVersion { at, got: header.magic });
        }
        if let Some(long) = header.long {
            if u64::from(long.segment_size) != self.segment_size.bytes() {
                return Err(WalError::Page { at, what: "another segment size" });
            }
            let expected = *self.expect.system_id.get_or_insert(long.system_id);
            if expected != long.system_id {
                return Err(WalError::OtherSystem { at, expected, got: long.system_id });
            }
        }
        let got = header.timeline;
        let (expected, matches) = match &self.expect.history {
            Some(history) => (history.timeline_at(at), got == history.timeline_at(at)),
            None => (self.page_timeline, got >= self.page_timeline && got.0 > 0),
        };
        self.page_timeline = got;
        if matches { Ok(()) } else { Err(WalError::OtherTimeline { at, expected, got }) }
    }

    /// Goes on behind a page header: it must continue exactly what the page before left open.
    fn enter_page(&mut self, at: Lsn, header: &PageHeader) -> Result<(), WalError> {
        let remaining = u64::from(header.remaining);
        let (left, start) = match &self.state {
            State::Skip { left: None } => {
                self.state = if remaining > 0 { State::Skip { left: Some(remaining) } } else { State::Boundary };
                self.overwrites = header.overwrites.then_some(Overwrites { start: None });
                return Ok(());
            }
            State::Skip { left: Some(left) } => (*left, None),
            State::Header(head) if head.filled > 0 => {
                check_length(head)?;
                (u64::from(head.length()) - head.filled as u64, Some(head.start))
            }
            State::Body(open) => (open.left, Some(open.head.start)),
            _ => (0, None),
        };
        if header.overwrites && left > 0 {
            self.state = State::Boundary;
            self.overwrites = Some(Overwrites { start });
            return Ok(());
        }
        if header.overwrites || remaining != left {
            return Err(WalError::Page { at, what: "it does not continue the page before" });
        }
        Ok(())
    }

    /// Takes bytes behind the page header.
    fn step(&mut self, data: &[u8]) -> Result<usize, WalError> {
        let room = WAL_PAGE_SIZE - self.position.0 % WAL_PAGE_SIZE;
        match &mut self.state {
            State::Skip { left } => {
                let taken = at_most(data, room.min(left.unwrap_or(room)));
                *left = left.map(|left| left - taken as u64);
                if *left == Some(0) {
                    self.state = State::Boundary;
                }
                Ok(taken)
            }
            State::Boundary => {
                let padding = self.position.0.next_multiple_of(ALIGNMENT) - self.position.0;
                if padding == 0 {
                    let bytes = [0; RECORD_HEADER];
                    self.state = State::Header(Head { start: self.position, bytes, filled: 0 });
                }
                Ok(at_most(data, padding))
            }
            State::Header(head) => {
                let taken = at_most(data, room.min((RECORD_HEADER - head.filled) as u64));
                head.bytes[head.filled..head.filled + taken].copy_from_slice(&data[..taken]);
                head.filled += taken;
                let head = *head;
                self.open(head)?;
                Ok(taken)
            }
            State::Body(open) => {
                let taken = at_most(data, room.min(open.left));
                open.crc = crc32c::crc32c_append(open.crc, &data[..taken]);
                open.body.feed(&data[..taken]);
                if let Some(blocks) = &mut open.blocks {
                    blocks.feed(&data[..taken]);
                }
                open.left -= taken as u64;
                Ok(taken)
            }
            State::Tail(record) => Ok(at_most(data, record.end.0 - self.position.0)),
            State::Zeros { from, until } => {
                let must_be_zero = at_most(data, until.0.saturating_sub(self.position.0));
                if data[..must_be_zero].iter().any(|byte| *byte != 0) {
                    return Err(WalError::Record { at: *from, what: "its length is zero, what follows is not" });
                }
                Ok(data.len())
            }
        }
    }

    /// Begins the body once the header is complete; a header of zeros is the end of WAL.
    fn open(&mut self, head: Head) -> Result<(), WalError> {
        let at = head.start;
        if head.filled >= 4 && head.length() == 0 {
            if head.bytes.iter().any(|byte| *byte != 0) {
                return Err(WalError::Record { at, what: "its length is zero, its header is not" });
            }
            return self.zeros(at);
        }
        if head.filled < RECORD_HEADER {
            return Ok(());
        }
        check_length(&head)?;
        let previous = Lsn(u64_at(&head.bytes, 8).unwrap_or_default());
        // Without a record before it in this walk, the link must at least lead out of the walk: that catches a wrong
        // length of the skipped part, which would otherwise pass over whole records.
        if let (None, Some(expected)) = (self.last, self.link.filter(|expected| *expected != previous)) {
            return Err(WalError::OtherPast { at, expected, got: previous });
        }
        let linked = self.last.map_or(previous < self.walk_start, |(start, _)| previous == start);
        if !linked {
            return Err(WalError::Record { at, what: "it does not link to the record before" });
        }
        let body = Body::new(head.bytes[17], head.bytes[16], self.expect.magic);
        let left = u64::from(head.length()) - RECORD_HEADER as u64;
        let kind = (head.bytes[17], head.bytes[16]);
        let blocks = self.reads_blocks.then(|| Box::new(BlockReader::new(kind, left, self.expect.magic)));
        self.state = State::Body(Open { head, left, crc: 0, body, blocks });
        Ok(())
    }

    fn zeros(&mut self, from: Lsn) -> Result<(), WalError> {
        if !self.is_file {
            return Err(WalError::Zeros { at: from });
        }
        let until = Lsn((from.0 + 1).next_multiple_of(WAL_PAGE_SIZE));
        self.state = State::Zeros { from, until };
        Ok(())
    }

    /// Checks a record whose last byte has come, and returns it once its tail has come too.
    fn complete(&mut self) -> Result<Option<Record>, WalError> {
        if let State::Body(open) = &self.state
            && open.left == 0
        {
            let record = finish(open, self.position, self.segment_size)?;
            if let Some(overwrites) = self.overwrites.take() {
                let names = open.body.overwritten();
                if names.is_none() || overwrites.start.is_some_and(|start| names != Some(start)) {
                    let what = "it does not name the record that its page overwrites";
                    return Err(WalError::Record { at: record.start, what });
                }
            }
            self.state = State::Tail(record);
        }
        match &self.state {
            State::Tail(record) if record.end == self.position => {
                let record = record.clone();
                self.state = State::Boundary;
                Ok(Some(record))
            }
            _ => Ok(None),
        }
    }
}

fn header_size(page: Lsn, segment_size: WalSegmentSize) -> usize {
    if page.0 % segment_size.bytes() < WAL_PAGE_SIZE { LONG_HEADER } else { SHORT_HEADER }
}

fn at_most(data: &[u8], limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX).min(data.len())
}

fn check_length(head: &Head) -> Result<(), WalError> {
    let possible = RECORD_HEADER as u64..=u64::from(MAX_RECORD);
    if possible.contains(&u64::from(head.length())) {
        return Ok(());
    }
    Err(WalError::Record { at: head.start, what: "impossible length" })
}

fn finish(open: &Open, position: Lsn, segment_size: WalSegmentSize) -> Result<Record, WalError> {
    let Head { start, bytes, .. } = open.head;
    let wrong = |what| WalError::Record { at: start, what };
    let crc = crc32c::crc32c_append(open.crc, &bytes[..CRC_OFFSET]);
    if Some(crc) != u32_at(&bytes, CRC_OFFSET) {
        return Err(wrong("wrong CRC"));
    }
    let (info, rmgr) = (bytes[16], bytes[17]);
    let alignment = if is_switch(rmgr, info) { segment_size.bytes() } else { ALIGNMENT };
    let kind = open.body.kind().ok_or_else(|| wrong("its body is not of its kind"))?;
    let xid = u32_at(&bytes, 4).unwrap_or_default();
    let previous = Lsn(u64_at(&bytes, 8).unwrap_or_default());
    let touched = open.blocks.as_ref().map(|blocks| blocks.finish()).unwrap_or_default();
    Ok(Record { start, end: Lsn(position.0.next_multiple_of(alignment)), xid, rmgr, info, previous, kind, touched })
}
