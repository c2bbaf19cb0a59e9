//! The start of a backup, which its end must agree with.

use super::error::SourceError;
use crate::model::{Lsn, Timeline};
use crate::pg::label::BackupLabel;
use crate::source::{Cluster, SmallFile};

/// Where a backup began.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// Where replay begins.
    pub lsn: Lsn,
    /// The timeline there.
    pub timeline: Timeline,
}

impl Started {
    /// Makes sure that the server did not change history.
    ///
    /// # Errors
    /// It was promoted or restarted into another timeline.
    pub fn same_timeline(self, stop: Timeline) -> Result<(), SourceError> {
        if stop == self.timeline { Ok(()) } else { Err(SourceError::TimelineChanged { start: self.timeline, stop }) }
    }

    /// Finds `backup_label`, which decides where recovery starts, and makes sure that it is the one of this backup.
    ///
    /// # Errors
    /// There is none, or it is another one.
    pub fn check_label(self, files: &[SmallFile], cluster: &Cluster) -> Result<(), SourceError> {
        let file = files.iter().find(|file| file.path == "backup_label");
        let file = file.ok_or_else(|| SourceError::Answer("no backup_label".to_owned()))?;
        let text = String::from_utf8_lossy(&file.bytes);
        let label = BackupLabel::parse(&text, cluster.wal_segment_size);
        let label = label.map_err(|error| SourceError::Answer(error.to_string()))?;
        if (label.start, label.timeline) == (self.lsn, self.timeline) && !label.from_standby {
            return Ok(());
        }
        let (lsn, timeline) = (self.lsn, self.timeline);
        Err(SourceError::Answer(format!("the label of the backup from {lsn} on timeline {timeline} says: {text}")))
    }
}

/// A label that fits into `backup_label`: PostgreSQL writes it there as a line, unquoted, and a line break in it would
/// forge the lines that follow.
pub fn one_line(label: &str) -> String {
    let line: String = label.chars().filter(|character| !character.is_control()).take(200).collect();
    if line.is_empty() { "drctl".to_owned() } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SystemId, WalSegmentSize};

    #[test]
    fn only_the_label_of_this_backup_is_accepted() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
            BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-20 01:00:59 UTC\nLABEL: x\nSTART TIMELINE: 1\n";
        let cluster = Cluster {
            system_id: SystemId(1),
            version: 150_000,
            wal_segment_size: WalSegmentSize::DEFAULT,
            checksums: true,
        };
        let files = |text: &str| [SmallFile { path: "backup_label".to_owned(), bytes: text.as_bytes().to_vec() }];
        let started = Started { lsn: Lsn(0x200_0028), timeline: Timeline(1) };
        started.check_label(&files(text), &cluster).unwrap();
        assert!(started.check_label(&[], &cluster).is_err());
        assert!(started.check_label(&files(&text.replace("primary", "standby")), &cluster).is_err());
        assert!(Started { lsn: Lsn(0x200_0060), ..started }.check_label(&files(text), &cluster).is_err());
        assert!(started.same_timeline(Timeline(2)).is_err());
    }

    #[test]
    fn a_label_is_one_line() {
        assert_eq!(one_line("a\nSTART TIMELINE: 7"), "aSTART TIMELINE: 7");
        assert_eq!(one_line("\n"), "drctl");
    }
}
