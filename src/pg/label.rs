//! `backup_label` and `tablespace_map`: the two files that make a copied data directory a backup.

use crate::model::{Error, Lsn, SegmentName, Timeline, WalSegmentSize};

/// Why a label or a map cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A line that PostgreSQL would not start from either.
    #[error("backup_label has no valid line `{0}`")]
    Missing(&'static str),
    /// Two lines contradict each other.
    #[error("backup_label contradicts itself: {0}")]
    Contradiction(&'static str),
    /// A native incremental backup: useless before `pg_combinebackup`.
    #[error("backup_label is that of an incremental backup")]
    Incremental,
    /// A line of the map is not an oid and a path.
    #[error("tablespace_map line {0} is not an oid and a path")]
    Map(usize),
}

impl From<LabelError> for Error {
    fn from(error: LabelError) -> Self {
        Self::damaged(error.to_string())
    }
}

/// `backup_label`. It is kept byte for byte in a backup; this is only what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins: the redo position of the backup's checkpoint.
    pub start: Lsn,
    /// The timeline of [`Self::start`].
    pub timeline: Timeline,
    /// The backup's checkpoint record.
    pub checkpoint: Lsn,
    /// `BACKUP METHOD`: `streamed` for every backup without the exclusive mode that 15 removed.
    pub method: String,
    /// Whether a standby was copied: then there is no backup-end record, and pg_control says where the backup ends.
    pub from_standby: bool,
    /// The label given at the start.
    pub label: String,
}

impl BackupLabel {
    /// Reads the file.
    ///
    /// # Errors
    /// A line that recovery needs is missing, wrong, or contradicts another.
    pub fn parse(text: &str, segment_size: WalSegmentSize) -> Result<Self, LabelError> {
        let field = |name: &'static str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.ok_or(LabelError::Missing(name))
        };
        if field("INCREMENTAL FROM LSN").is_ok() {
            return Err(LabelError::Incremental);
        }
        let (start, file) =
            position(field("START WAL LOCATION")?, segment_size).ok_or(LabelError::Missing("START WAL LOCATION"))?;
        let checkpoint = field("CHECKPOINT LOCATION")?;
        let checkpoint = checkpoint.parse().map_err(|_| LabelError::Missing("CHECKPOINT LOCATION"))?;
        if start > checkpoint {
            return Err(LabelError::Contradiction("its start lies behind its checkpoint"));
        }
        if file.start(segment_size) != segment_size.segment_start(start) {
            return Err(LabelError::Contradiction("its start is not in the file named beside it"));
        }
        if let Ok(timeline) = field("START TIMELINE")
            && timeline.parse() != Ok(file.timeline.0)
        {
            return Err(LabelError::Contradiction("its timeline is not that of its first file"));
        }
        let from_standby = match field("BACKUP FROM")? {
            // The word of 13.
            "primary" | "master" => false,
            "standby" => true,
            _ => return Err(LabelError::Missing("BACKUP FROM")),
        };
        Ok(Self {
            start,
            timeline: file.timeline,
            checkpoint,
            method: field("BACKUP METHOD")?.to_owned(),
            from_standby,
            label: field("LABEL")?.to_owned(),
        })
    }
}

/// `0/2000028 (file 000000010000000000000002)`.
fn position(text: &str, segment_size: WalSegmentSize) -> Option<(Lsn, SegmentName)> {
    let (lsn, file) = text.split_once(" (file ")?;
    Some((lsn.parse().ok()?, SegmentName::parse(file.strip_suffix(')')?, segment_size)?))
}

/// One tablespace outside of the data directory: recovery makes `pg_tblspc/<oid>` a link to its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its oid.
    pub oid: u32,
    /// The directory that the link points to.
    pub location: String,
}

/// Reads a `tablespace_map`.
///
/// # Errors
/// A line that is not an oid, one space and a path.
pub fn parse_tablespace_map(text: &str) -> Result<Vec<Tablespace>, LabelError> {
    let mut tablespaces = Vec::new();
    let mut line = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            // A backslash takes the next character as it is: a newline, a carriage return or a backslash.
            '\\' => line.extend(characters.next()),
            '\n' | '\r' => push_tablespace(&mut tablespaces, &mut line)?,
            other => line.push(other),
        }
    }
    push_tablespace(&mut tablespaces, &mut line)?;
    Ok(tablespaces)
}

fn push_tablespace(tablespaces: &mut Vec<Tablespace>, line: &mut String) -> Result<(), LabelError> {
    let text = std::mem::take(line);
    if text.is_empty() {
        return Ok(());
    }
    let wrong = LabelError::Map(tablespaces.len() + 1);
    let (oid, location) = text.split_once(' ').ok_or(wrong.clone())?;
    let digits = !oid.is_empty() && oid.bytes().all(|byte| byte.is_ascii_digit());
    let oid = oid.parse().ok().filter(|oid| digits && *oid > 0).ok_or(wrong.clone())?;
    if location.is_empty() {
        return Err(wrong);
    }
    tablespaces.push(Tablespace { oid, location: location.to_owned() });
    Ok(())
}

/// Prints a `tablespace_map`; restore calls it with the locations of the new machine.
pub fn print_tablespace_map(tablespaces: &[Tablespace]) -> String {
    let mut text = String::new();
    for Tablespace { oid, location } in tablespaces {
        text.push_str(&oid.to_string());
        text.push(' ');
        for character in location.chars() {
            if matches!(character, '\n' | '\r' | '\\') {
                text.push('\\');
            }
            text.push(character);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;
    use crate::pg::testing::{Cluster, block_on, installed};

    fn file_in_tar(path: &std::path::Path, name: &str) -> String {
        let mut archive = tar::Archive::new(std::fs::File::open(path).unwrap());
        let mut entries = archive.entries().unwrap().map(Result::unwrap);
        let mut entry = entries.find(|entry| entry.path().unwrap().to_str() == Some(name)).unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn labels_and_maps_of_real_backups_are_understood() {
        block_on(async {
            for binaries in installed().await {
                let cluster = Cluster::create(&binaries, &[]).await;
                let instance = cluster.start(&[]).await;
                let location = cluster.path("a b\\c\nd").display().to_string();
                cluster.make_directory(&location);
                cluster.sql(&[&format!("create tablespace odd location '{location}'")]).await;
                let oid = cluster.sql(&["select oid from pg_tablespace where spcname = 'odd'"]).await;
                let host = cluster.directory.path().display().to_string();
                let arguments = ["-h", &host, "-U", "postgres", "-D", "backup", "-Ft", "-c", "fast", "-l", "night: 1"];
                cluster.run("pg_basebackup", &arguments).await;
                cluster.stop(instance).await;
                let tar = cluster.path("backup/base.tar");
                let label = parse(&file_in_tar(&tar, "backup_label")).unwrap();
                assert_eq!((label.timeline, label.from_standby), (Timeline(1), false));
                assert_eq!((label.method.as_str(), label.label.as_str()), ("streamed", "night: 1"));
                let map = file_in_tar(&tar, "tablespace_map");
                let tablespaces = parse_tablespace_map(&map).unwrap();
                assert_eq!(tablespaces, [Tablespace { oid: oid.trim().parse().unwrap(), location }]);
                assert_eq!(print_tablespace_map(&tablespaces), map);
            }
        });
    }

    const LABEL: &str = "START WAL LOCATION: 16/B3000028 (file 0000000200000016000000B3)\n\
        CHECKPOINT LOCATION: 16/B3000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-20 01:00:59 UTC\nLABEL: drctl ledger: nightly\nSTART TIMELINE: 2\n";

    fn parse(text: &str) -> Result<BackupLabel, LabelError> {
        BackupLabel::parse(text, WalSegmentSize::DEFAULT)
    }

    #[test]
    fn a_label_is_understood() {
        let label = parse(LABEL).unwrap();
        assert_eq!(label.start.to_string(), "16/B3000028");
        assert_eq!(label.checkpoint.to_string(), "16/B3000060");
        assert_eq!((label.timeline, label.from_standby), (Timeline(2), false));
        assert_eq!(parse(&LABEL.replace("FROM: primary", "FROM: master")).unwrap(), label);
        assert_eq!((label.method.as_str(), label.label.as_str()), ("streamed", "drctl ledger: nightly"));
        assert!(parse(&LABEL.replace("primary", "standby")).unwrap().from_standby);
    }

    #[test]
    fn a_wrong_label_is_refused() {
        for line in LABEL.lines().filter(|line| !line.contains("TIME")) {
            assert!(parse(&LABEL.replace(line, "")).is_err(), "without {line}");
        }
        for (from, to) in [
            ("TIMELINE: 2", "TIMELINE: 3"),
            ("16/B3000060", "16/B3000020"),
            ("B3)", "B4)"),
            ("primary", "somewhere"),
            ("BACKUP METHOD", "INCREMENTAL FROM LSN: 0/1\nBACKUP METHOD"),
        ] {
            assert!(parse(&LABEL.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn a_wrong_map_is_refused() {
        for text in ["16384", "16384 ", "x /a", "0 /a", " /a", "+1 /a", "16384 /a\nnonsense\n"] {
            assert!(parse_tablespace_map(text).is_err(), "{text:?}");
        }
        assert_eq!(parse_tablespace_map("").unwrap(), []);
    }

    proptest! {
        #[test]
        fn a_map_reads_back_what_it_prints(
            tablespaces in prop::collection::vec((1u32.., "/(?s:.){0,12}"), 0..5)
        ) {
            let tablespaces: Vec<_> =
                tablespaces.into_iter().map(|(oid, location)| Tablespace { oid, location }).collect();
            prop_assert_eq!(parse_tablespace_map(&print_tablespace_map(&tablespaces)).unwrap(), tablespaces);
        }
    }
}
