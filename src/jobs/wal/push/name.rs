//! What `archive_command` hands over, by its name.

use crate::model::Timeline;

/// The kinds of files that PostgreSQL archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Archived {
    /// A whole segment.
    Segment,
    /// The last segment of a timeline that a promotion left: the part that was written.
    Partial {
        /// The segment's own name.
        segment: String,
    },
    /// How a timeline came about.
    History(Timeline),
    /// When a backup began and ended, for people: recovery does not read it, and the backups of drctl say the same.
    BackupNote,
}

impl Archived {
    /// Reads a name; `None` for a file that PostgreSQL does not archive.
    pub(super) fn parse(name: &str) -> Option<Self> {
        if let Some(number) = name.strip_suffix(".history") {
            let timeline = is_hex(number, 8).then(|| u32::from_str_radix(number, 16).ok()).flatten()?;
            // Timeline 1 has no history.
            return (timeline > 1).then_some(Self::History(Timeline(timeline)));
        }
        if let Some(segment) = name.strip_suffix(".partial") {
            return is_hex(segment, 24).then(|| Self::Partial { segment: segment.to_owned() });
        }
        if let Some((segment, offset)) = name.strip_suffix(".backup").and_then(|rest| rest.split_once('.')) {
            return (is_hex(segment, 24) && is_hex(offset, 8)).then_some(Self::BackupNote);
        }
        is_hex(name, 24).then_some(Self::Segment)
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_postgresql_writes_them() {
        let segment = "0000000100000000000000AB";
        let known = [
            (segment.to_owned(), Archived::Segment),
            (format!("{segment}.partial"), Archived::Partial { segment: segment.to_owned() }),
            (format!("{segment}.00000028.backup"), Archived::BackupNote),
            ("0000000A.history".to_owned(), Archived::History(Timeline(10))),
        ];
        for (name, kind) in known {
            assert_eq!(Archived::parse(&name), Some(kind), "{name}");
        }
        for name in ["", "00000001.history", "1.history", "0000000100000000000000ab", "../0000000A.history", "x.backup"]
        {
            assert_eq!(Archived::parse(name), None, "{name}");
        }
    }
}
