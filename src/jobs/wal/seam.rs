//! Where a stream goes on: whether the server that is asked now is the one whose WAL is stored.
//!
//! Two standbys that are promoted at the same position write the same history file, so their WAL has one branch, and so has
//! that of a storage that was copied. A walk that begins behind the last stored record sees valid records either way. The
//! first of them must at least link to that record. On a timeline that was promoted the stream begins earlier as well: what
//! it brings again must have its records where the stored ones are, and its last commits when the stored ones were. Nothing of
//! it is shipped or acknowledged before that is seen, and then it is stored a second time. A writer cannot open what is
//! stored, but headers tell when commits were, and readers compare both versions byte by byte.

use chrono::{DateTime, Utc};

use crate::jobs::wal::server::{Server, Start};
use crate::model::{Error, Lsn, Timeline};
use crate::pg::wal::{Record, WAL_PAGE_SIZE};

/// How far back a stream begins at most: far enough to hold commits or a checkpoint, whose times differ between any two
/// servers, and less than a receiver holds in memory.
const REACH: u64 = 8 * 1024 * 1024;

/// The end of what is stored, on the way to it.
#[derive(Debug)]
pub(super) struct Seam {
    /// Where stored WAL ends.
    stored: Start,
    /// Start of its last record.
    last: Lsn,
    /// Where the stream begins instead.
    begin: Start,
    /// When the first and the last commit were that the server has where the last stored ones are.
    commits: Option<(DateTime<Utc>, DateTime<Utc>)>,
    found: Found,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// The stored record.
    Same,
    /// Another one in its place, which begins here.
    Other(Lsn),
    /// The same place, and other commits before it.
    OtherCommits,
}

impl Seam {
    /// The way to `stored`, if the server has a part of its branch before that.
    pub(super) fn before(stored: &Start, server: &Server) -> Option<Self> {
        let last = stored.last.filter(|_| stored.at_record)?;
        let begin = server.begin_of(&stored.branch)?;
        if stored.branch.timeline == Timeline::FIRST || stored.lsn <= begin || server.flush_lsn < stored.lsn {
            return None;
        }
        let page = Lsn(stored.lsn.0.saturating_sub(REACH) / WAL_PAGE_SIZE * WAL_PAGE_SIZE);
        let from = page.max(server.segment_size.segment_start(Lsn(stored.lsn.0 - 1)));
        // The first record of a timeline stands at the switch, anywhere in a page.
        let (lsn, at_record) = if from <= begin { (begin, true) } else { (from, false) };
        let begin = Start { branch: stored.branch.clone(), lsn, at_record, last: None, commits: None };
        let found = Found::Nothing;
        (last >= lsn).then(|| Self { stored: stored.clone(), last, begin, commits: None, found })
    }

    /// Where to begin.
    pub(super) const fn begin(&self) -> &Start {
        &self.begin
    }

    /// Where to go on if it is not reached.
    pub(super) const fn stored(&self) -> &Start {
        &self.stored
    }

    /// A record streamed by. Says whether it is a new one behind what is stored: of another server none is.
    pub(super) fn see(&mut self, record: &Record) -> bool {
        if self.found == Found::Nothing {
            self.note_commit(record);
        }
        if self.found == Found::Nothing && record.end >= self.stored.lsn {
            let is_same = (record.start, record.end) == (self.last, self.stored.lsn);
            self.found = match is_same {
                true if self.has_other_commits() => Found::OtherCommits,
                true => Found::Same,
                false => Found::Other(record.start),
            };
        }
        self.is_met() && record.end > self.stored.lsn
    }

    fn note_commit(&mut self, record: &Record) {
        let (Some(stored), Some(time)) = (self.stored.commits, record.kind.commit_time()) else { return };
        if record.start >= stored.from && record.end <= stored.to {
            let (first, last) = self.commits.unwrap_or((time, time));
            self.commits = Some((first.min(time), last.max(time)));
        }
    }

    /// Nothing is known where the stream begins among those commits, or behind them.
    fn has_other_commits(&self) -> bool {
        let stored = self.stored.commits.filter(|stored| stored.from >= self.begin.lsn);
        stored.is_some_and(|stored| self.commits != Some((stored.first, stored.last)))
    }

    /// Whether the server has the stored record where it is stored.
    pub(super) fn is_met(&self) -> bool {
        self.found == Found::Same
    }

    /// That it has another one.
    pub(super) fn broken(&self) -> Option<Error> {
        match self.found {
            Found::Other(at) => Some(other_past(
                self.stored.lsn,
                &format!("it has a record at {at}, and the last stored one begins at {}", self.last),
            )),
            Found::OtherCommits => {
                let stored = self.stored.commits.map_or_else(String::new, |commits| commits.last.to_rfc3339());
                let own = self.commits.map_or_else(|| "none".to_owned(), |(_, last)| last.to_rfc3339());
                let why = format!("the last commit that is stored before that was at {stored}, and here it is {own}");
                Some(other_past(self.stored.lsn, &why))
            }
            Found::Nothing | Found::Same => None,
        }
    }
}

/// The server is not the one whose WAL is stored up to `end`.
pub(super) fn other_past(end: Lsn, because: &str) -> Error {
    let text = format!("the server's WAL does not continue what is stored up to {end}");
    let hint = "two servers were promoted at the same position, or one is a copy of the other; nothing of this one is \
                acknowledged. Stop the wrong one; if this is the one to go on, give it a timeline of its own \
                (standby.signal, restart, SELECT pg_promote()) and take a base backup";
    Error::refused(text).because(because).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::wal::server::tests::server;
    use crate::pg::wal::RecordKind;
    use crate::repository::wal::adopt::Commits;

    const SWITCH: u64 = 0x305_0028;

    /// A server on timeline 2, and where what is stored of it ends.
    fn seam(last: u64, end: u64) -> Option<Seam> {
        let server = server(&format!("1\t0/{SWITCH:X}\tx\n"), 2);
        let branch = server.branches()[0].clone();
        let last = Some(Lsn(last));
        Seam::before(&Start { branch, lsn: Lsn(end), at_record: true, last, commits: None }, &server)
    }

    fn record(start: u64, end: u64) -> Record {
        let (start, end, previous) = (Lsn(start), Lsn(end), Lsn(0));
        Record { start, end, xid: 0, rmgr: 10, info: 0, previous, kind: RecordKind::Other, touched: Vec::new() }
    }

    #[test]
    fn a_stream_begins_where_both_servers_must_have_the_same() {
        let begin = |last, end| seam(last, end).map(|seam| (seam.begin.lsn.0, seam.begin.at_record));
        assert_eq!(begin(SWITCH, 0x305_0060), Some((SWITCH, true)), "the first record of the timeline");
        assert_eq!(begin(SWITCH - 40, SWITCH), None, "nothing of it is stored");
        assert_eq!(begin(0x500_0100, 0x500_0200), Some((0x500_0000, false)));
        assert_eq!(begin(0x4FF_0000, 0x500_0000), Some((0x480_0000, false)), "a segment that is full");
        assert_eq!(begin(0x4F8_4000, 0x4F8_5008), Some((0x478_4000, false)));
        assert_eq!(begin(0x401_0000, 0x4F8_5008), None, "a record that is larger than that");
        assert_eq!(begin(0x600_0000, 0x600_0008), None, "the server has not come so far");
    }

    #[test]
    fn a_server_with_another_record_in_the_last_place_is_another_server() {
        let end = 0x500_0200;
        for (records, met, broken) in [
            (vec![(0x500_0028, 0x500_0100)], false, false),
            (vec![(0x500_0028, 0x500_0100), (0x500_0100, end), (end, end + 40)], true, false),
            (vec![(0x500_0028, 0x500_00F8), (0x500_00F8, end)], false, true),
            (vec![(0x500_0028, 0x500_0100), (0x500_0100, end + 8)], false, true),
        ] {
            let mut seam = seam(0x500_0100, end).unwrap();
            for (start, end_of) in &records {
                assert_eq!(seam.see(&record(*start, *end_of)), met && *end_of > end);
            }
            assert_eq!((seam.is_met(), seam.broken().is_some()), (met, broken), "{records:x?}");
        }
    }

    /// The records lie in the same places, and were written by another server.
    #[test]
    fn a_server_with_other_commits_in_the_same_places_is_another_server() {
        let time = |micros: i64| DateTime::from_timestamp_micros(1_700_000_000_000_000 + micros).unwrap();
        let commit = |start: u64, end: u64, micros: i64| Record {
            kind: RecordKind::Commit { time: time(micros) },
            ..record(start, end)
        };
        let end = 0x500_0200;
        let stored = |from: u64| Some(Commits { from: Lsn(from), to: Lsn(end), first: time(5), last: time(9) });
        for (commits, times, met) in [
            (stored(0x500_0100), [5, 9], true),
            (stored(0x500_0100), [5, 10], false),
            (stored(0x500_0100), [4, 9], false),
            // Those before are in another frame, and where the stream begins among them nobody can tell.
            (stored(0x500_0180), [4, 9], false),
            (Some(Commits { first: time(9), ..stored(0x500_0180).unwrap() }), [4, 9], true),
            (stored(0x4FF_0000), [4, 10], true),
            (None, [4, 10], true),
        ] {
            let mut seam = seam(0x500_0180, end).unwrap();
            seam.stored.commits = commits;
            seam.see(&commit(0x500_0100, 0x500_0180, times[0]));
            seam.see(&commit(0x500_0180, end, times[1]));
            assert_eq!((seam.is_met(), seam.broken().is_none()), (met, met), "{commits:?} {times:?}");
        }
    }
}
