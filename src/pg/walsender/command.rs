//! Replication commands as text, in both directions.

use std::fmt;

use crate::model::{Lsn, Timeline};

/// A command of a standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Who is it that serves, and how far is it?
    IdentifySystem,
    /// The value of a setting.
    Show(String),
    /// The history file of a timeline.
    TimelineHistory(Timeline),
    /// What a slot holds.
    ReadSlot(String),
    /// Makes a physical slot.
    CreateSlot {
        /// Its name.
        name: String,
        /// Whether it goes with the connection.
        temporary: bool,
    },
    /// Streams WAL.
    Start {
        /// The slot to use.
        slot: Option<String>,
        /// From where.
        at: Lsn,
        /// On which timeline; the newest if it names none.
        timeline: Option<Timeline>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Quoted(String),
    Mark(char),
}

impl Command {
    /// Reads a command; `None` for one that a physical walsender of a standby does not know.
    pub fn parse(text: &str) -> Option<Self> {
        let tokens = tokens(text)?;
        let (Token::Word(verb), rest) = tokens.split_first()? else { return None };
        match (verb.to_ascii_uppercase().as_str(), rest) {
            ("IDENTIFY_SYSTEM", []) => Some(Self::IdentifySystem),
            ("SHOW", [name]) => Some(Self::Show(name.name()?)),
            ("TIMELINE_HISTORY", [number]) => number.timeline().map(Self::TimelineHistory),
            ("READ_REPLICATION_SLOT", [name]) => Some(Self::ReadSlot(name.name()?)),
            ("CREATE_REPLICATION_SLOT", [name, options @ ..]) => {
                let says = |word: &str| options.iter().any(|option| option.is(word));
                let (name, temporary) = (name.name()?, says("TEMPORARY"));
                says("PHYSICAL").then_some(Self::CreateSlot { name, temporary })
            }
            ("START_REPLICATION", rest) => Self::start(rest),
            _ => None,
        }
    }

    fn start(mut rest: &[Token]) -> Option<Self> {
        let mut slot = None;
        if let [word, name, behind @ ..] = rest
            && word.is("SLOT")
        {
            (slot, rest) = (Some(name.name()?), behind);
        }
        if let [word, behind @ ..] = rest
            && word.is("PHYSICAL")
        {
            rest = behind;
        }
        let (Token::Word(at), rest) = rest.split_first()? else { return None };
        let timeline = match rest {
            [] => None,
            [word, number] if word.is("TIMELINE") => Some(number.timeline()?),
            _ => return None,
        };
        Some(Self::Start { slot, at: at.parse().ok()?, timeline })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        match self {
            Self::IdentifySystem => f.write_str("IDENTIFY_SYSTEM"),
            Self::Show(name) => write!(f, "SHOW {}", quoted(name)),
            Self::TimelineHistory(timeline) => write!(f, "TIMELINE_HISTORY {timeline}"),
            Self::ReadSlot(name) => write!(f, "READ_REPLICATION_SLOT {}", quoted(name)),
            Self::CreateSlot { name, temporary } => {
                let temporary = if *temporary { "TEMPORARY " } else { "" };
                write!(f, "CREATE_REPLICATION_SLOT {} {temporary}PHYSICAL", quoted(name))
            }
            Self::Start { slot, at, timeline } => {
                f.write_str("START_REPLICATION ")?;
                slot.iter().try_for_each(|slot| write!(f, "SLOT {} ", quoted(slot)))?;
                write!(f, "PHYSICAL {at}")?;
                timeline.iter().try_for_each(|timeline| write!(f, " TIMELINE {timeline}"))
            }
        }
    }
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Self::Word(own) if own.eq_ignore_ascii_case(word))
    }

    fn name(&self) -> Option<String> {
        match self {
            Self::Word(word) => Some(word.to_ascii_lowercase()),
            Self::Quoted(name) => Some(name.clone()),
            Self::Mark(_) => None,
        }
    }

    fn timeline(&self) -> Option<Timeline> {
        match self {
            Self::Word(digits) => digits.parse().ok().filter(|number| *number > 0).map(Timeline),
            _ => None,
        }
    }
}

/// Cuts a command into words, quoted names and marks; a semicolon may end it.
fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_end().trim_end_matches(';').chars().peekable();
    while let Some(first) = rest.next() {
        match first {
            _ if first.is_whitespace() => {}
            '"' => {
                let mut name = String::new();
                loop {
                    match rest.next()? {
                        '"' if rest.next_if_eq(&'"').is_some() => name.push('"'),
                        '"' => break,
                        other => name.push(other),
                    }
                }
                tokens.push(Token::Quoted(name));
            }
            _ if is_word(first) => {
                let mut word = String::from(first);
                while let Some(next) = rest.next_if(|next| is_word(*next)) {
                    word.push(next);
                }
                tokens.push(Token::Word(word));
            }
            mark => tokens.push(Token::Mark(mark)),
        }
    }
    Some(tokens)
}

fn is_word(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '/' | '.' | '$')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start(slot: Option<&str>, at: u64, timeline: Option<u32>) -> Option<Command> {
        Some(Command::Start { slot: slot.map(str::to_owned), at: Lsn(at), timeline: timeline.map(Timeline) })
    }

    #[test]
    fn what_walreceivers_of_all_majors_send_is_understood() {
        for (text, command) in [
            ("IDENTIFY_SYSTEM", Some(Command::IdentifySystem)),
            ("TIMELINE_HISTORY 3", Some(Command::TimelineHistory(Timeline(3)))),
            ("START_REPLICATION 0/3000000 TIMELINE 1", start(None, 0x300_0000, Some(1))),
            (
                "START_REPLICATION SLOT \"a \"\"b\" 16/B374D848 TIMELINE 2",
                start(Some("a \"b"), 0x16_B374_D848, Some(2)),
            ),
            ("START_REPLICATION SLOT pair PHYSICAL 0/3000000;", start(Some("pair"), 0x300_0000, None)),
            (
                "CREATE_REPLICATION_SLOT \"pg_walreceiver_7\" TEMPORARY PHYSICAL RESERVE_WAL",
                Some(Command::CreateSlot { name: "pg_walreceiver_7".to_owned(), temporary: true }),
            ),
            (
                "CREATE_REPLICATION_SLOT \"s\" PHYSICAL (RESERVE_WAL)",
                Some(Command::CreateSlot { name: "s".to_owned(), temporary: false }),
            ),
            ("READ_REPLICATION_SLOT \"s\"", Some(Command::ReadSlot("s".to_owned()))),
            ("SHOW wal_segment_size", Some(Command::Show("wal_segment_size".to_owned()))),
        ] {
            assert_eq!(Command::parse(text), command, "{text}");
        }
        for text in [
            "",
            ";",
            "SELECT 1",
            "TIMELINE_HISTORY 0",
            "TIMELINE_HISTORY",
            "START_REPLICATION",
            "START_REPLICATION SLOT s LOGICAL 0/0 (x)",
            "START_REPLICATION 0/zz",
            "START_REPLICATION 0/0 TIMELINE",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput",
            "BASE_BACKUP (PROGRESS)",
            "SHOW \"open",
        ] {
            assert_eq!(Command::parse(text), None, "{text}");
        }
    }

    fn any() -> impl Strategy<Value = Command> {
        let name = "[a-z\" ;é]{1,9}";
        prop_oneof![
            Just(Command::IdentifySystem),
            name.prop_map(Command::Show),
            name.prop_map(Command::ReadSlot),
            (1u32..).prop_map(|number| Command::TimelineHistory(Timeline(number))),
            (name, any_bool()).prop_map(|(name, temporary)| Command::CreateSlot { name, temporary }),
            (prop::option::of(name), 0u64.., prop::option::of(1u32..)).prop_map(|(slot, at, timeline)| {
                Command::Start { slot, at: Lsn(at), timeline: timeline.map(Timeline) }
            }),
        ]
    }

    fn any_bool() -> impl Strategy<Value = bool> {
        prop::bool::ANY
    }

    proptest! {
        #[test]
        fn a_command_reads_back_what_it_prints(command in any()) {
            prop_assert_eq!(Command::parse(&command.to_string()), Some(command));
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = Command::parse(&text);
        }
    }
}
