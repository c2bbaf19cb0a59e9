//! Timeline history files: which timeline owned which part of the WAL.

use std::fmt::Write as _;

use crate::model::{Error, Lsn, Timeline};

/// A history file says what no history can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("timeline history of {timeline} is wrong in line {line}: {what}")]
pub struct HistoryError {
    /// Whose history.
    pub timeline: Timeline,
    /// Counted from 1.
    pub line: usize,
    /// What is wrong.
    pub what: &'static str,
}

impl From<HistoryError> for Error {
    fn from(error: HistoryError) -> Self {
        Self::damaged(error.to_string())
    }
}

/// One ancestor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The timeline that was left.
    pub timeline: Timeline,
    /// The first position that no longer belongs to it.
    pub switch: Lsn,
    /// Why, in PostgreSQL's words: `no recovery target specified`.
    pub reason: String,
}

/// A timeline with its ancestors, oldest first; timelines and switch positions ascend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    timeline: Timeline,
    entries: Vec<Entry>,
}

/// A stretch of WAL on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reign {
    /// The timeline.
    pub timeline: Timeline,
    /// The first position that belongs to it.
    pub begin: Lsn,
    /// The first position that does not; none for the newest timeline.
    pub end: Option<Lsn>,
}

impl History {
    /// A timeline without ancestors; there is no file for it.
    pub fn without_ancestors(timeline: Timeline) -> Self {
        Self { timeline, entries: Vec::new() }
    }

    /// Reads the history file of `timeline`. Empty lines and comments (`#`) are skipped, as PostgreSQL does.
    ///
    /// # Errors
    /// A line that is no entry, or entries out of order: PostgreSQL refuses the file too.
    pub fn parse(timeline: Timeline, text: &str) -> Result<Self, HistoryError> {
        let mut history = Self::without_ancestors(timeline);
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |what| HistoryError { timeline, line: index + 1, what };
            let entry = parse_entry(line).ok_or_else(|| wrong("expected a timeline, a position and a reason"))?;
            history.check_next(&entry).map_err(wrong)?;
            history.entries.push(entry);
        }
        Ok(history)
    }

    fn check_next(&self, entry: &Entry) -> Result<(), &'static str> {
        let last = self.entries.last();
        if entry.timeline.0 == 0 || last.is_some_and(|last| entry.timeline <= last.timeline) {
            return Err("timelines do not ascend");
        }
        if entry.timeline >= self.timeline {
            return Err("an ancestor is not older than the timeline itself");
        }
        // Equal positions are possible: a server promoted twice without writing anything in between.
        if last.is_some_and(|last| entry.switch < last.switch) {
            return Err("positions do not ascend");
        }
        Ok(())
    }

    /// The file as PostgreSQL writes it.
    pub fn print(&self) -> String {
        let mut text = String::new();
        for Entry { timeline, switch, reason } in &self.entries {
            let separator = if text.is_empty() { "" } else { "\n" };
            // Writing to a String cannot end in an error.
            let _ = writeln!(text, "{separator}{timeline}\t{switch}\t{reason}");
        }
        text
    }

    /// The timeline itself.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Its ancestors, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The ancestors and the timeline itself with the WAL that each of them owns, oldest first.
    pub fn ancestry(&self) -> impl Iterator<Item = Reign> + '_ {
        let ends = self.entries.iter().map(|entry| (entry.timeline, Some(entry.switch)));
        let mut begin = Lsn::INVALID;
        ends.chain([(self.timeline, None)]).map(move |(timeline, end)| {
            let reign = Reign { timeline, begin, end };
            begin = end.unwrap_or(begin);
            reign
        })
    }

    /// The part owned by `timeline`; `None` if it is neither this timeline nor an ancestor.
    pub fn reign_of(&self, timeline: Timeline) -> Option<Reign> {
        self.ancestry().find(|reign| reign.timeline == timeline)
    }

    /// The timeline that owns the byte at `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        self.entries.iter().find(|entry| lsn < entry.switch).map_or(self.timeline, |entry| entry.timeline)
    }

    /// Whether WAL of `other` up to `lsn` belongs to this history too: then a backup there can be replayed to here.
    pub fn contains(&self, other: Timeline, lsn: Lsn) -> bool {
        self.reign_of(other).is_some_and(|reign| reign.end.is_none_or(|end| lsn <= end))
    }
}

fn parse_entry(line: &str) -> Option<Entry> {
    let (timeline, rest) = line.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (switch, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let reason = reason.trim().to_owned();
    Some(Entry { timeline: Timeline(timeline.parse().ok()?), switch: switch.parse().ok()?, reason })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "1\t0/3000000\tno recovery target specified\n\n2\t0/50001A8\tbefore 2026-11-20 01:00:00+00\n";

    #[test]
    fn ancestry_covers_the_whole_history() {
        let history = History::parse(Timeline(5), FILE).unwrap();
        let reigns: Vec<_> = history.ancestry().map(|r| (r.timeline.0, r.begin.0, r.end.map(|end| end.0))).collect();
        assert_eq!(reigns, [(1, 0, Some(0x300_0000)), (2, 0x300_0000, Some(0x500_01A8)), (5, 0x500_01A8, None)]);
        assert_eq!(history.timeline_at(Lsn(0x2FF_FFFF)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x300_0000)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0x500_01A8)), Timeline(5));
        assert!(history.contains(Timeline(1), Lsn(0x300_0000)));
        assert!(!history.contains(Timeline(1), Lsn(0x300_0008)));
        assert!(!history.contains(Timeline(3), Lsn(1)));
        assert_eq!(history.print(), FILE);
    }

    #[test]
    fn impossible_histories_are_refused() {
        for text in [
            "1\t0/30\ta\n1\t0/40\tb\n",
            "2\t0/30\ta\n1\t0/40\tb\n",
            "1\t0/30\ta\n2\t0/20\tb\n",
            "5\t0/30\ta\n",
            "0\t0/30\ta\n",
            "1\n",
            "1\tnonsense\ta\n",
            "-1\t0/30\ta\n",
        ] {
            assert!(History::parse(Timeline(5), text).is_err(), "{text:?}");
        }
        assert_eq!(History::parse(Timeline(7), "# nothing\n\n").unwrap(), History::without_ancestors(Timeline(7)));
    }

    proptest! {
        #[test]
        fn a_history_reads_back_what_it_prints(
            steps in prop::collection::vec((1u32..9, 0u64..1 << 40, "[a-z0-9][a-z 0-9:+]{0,30}[a-z0-9]"), 0..8)
        ) {
            let (mut timeline, mut switch, mut entries) = (0, 0, Vec::new());
            for (step, distance, reason) in steps {
                timeline += step;
                switch += distance;
                entries.push(Entry { timeline: Timeline(timeline), switch: Lsn(switch), reason });
            }
            let history = History { timeline: Timeline(timeline + 1), entries };
            prop_assert_eq!(History::parse(history.timeline, &history.print()).unwrap(), history);
        }
    }
}
