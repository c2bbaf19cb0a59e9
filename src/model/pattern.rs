//! Glob patterns over absolute paths, as bytes: a name need not be UTF-8.
//!
//! `*` and `?` stay within one name, `**` stands for any number of names, `[a-z]` and `[!a-z]` are one byte. A pattern that
//! does not begin with `/` may begin at any name of the path.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Serialize, Serializer};

use crate::model::{Error, Result};

/// One pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    names: Vec<Name>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    AnyNumber,
    One(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Byte(u8),
    AnyByte,
    AnyBytes,
    Class { inverted: bool, ranges: Vec<(u8, u8)> },
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// It is empty, ends with `/`, has an empty name or an open `[`.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |why: &str| Error::usage(format!("`{text}` is not a pattern: {why}"));
        let (absolute, rest) = text.strip_prefix('/').map_or((false, text), |rest| (true, rest));
        if rest.is_empty() {
            return Err(wrong("it names nothing"));
        }
        let mut names = if absolute { Vec::new() } else { vec![Name::AnyNumber] };
        for name in rest.split('/') {
            names.push(match name {
                "" => return Err(wrong("leave out the `/` at its end, and double ones")),
                "**" => Name::AnyNumber,
                name => Name::One(pieces(name.as_bytes()).ok_or_else(|| wrong("a `[` is not closed"))?),
            });
        }
        Ok(Self { text: text.to_owned(), names })
    }

    /// Whether it means this absolute path, or a directory above it.
    pub fn covers(&self, path: &Path) -> bool {
        let bytes = path.as_os_str().as_bytes();
        let names: Vec<_> = bytes.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect();
        (1..=names.len()).any(|depth| matches(&self.names, &names[..depth]))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

fn pieces(name: &[u8]) -> Option<Vec<Piece>> {
    let (mut pieces, mut rest) = (Vec::new(), name);
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        pieces.push(match first {
            b'*' => Piece::AnyBytes,
            b'?' => Piece::AnyByte,
            b'[' => {
                // A `]` that comes first is meant literally, as in the shell.
                let inverted = matches!(rest.first(), Some(b'!' | b'^'));
                let body = rest.get(usize::from(inverted)..)?;
                let end = 1 + body.get(1..)?.iter().position(|byte| *byte == b']')?;
                let class = Piece::Class { inverted, ranges: ranges(&body[..end]) };
                rest = &body[end + 1..];
                class
            }
            byte => Piece::Byte(*byte),
        });
    }
    Some(pieces)
}

fn ranges(mut body: &[u8]) -> Vec<(u8, u8)> {
    let mut ranges = Vec::new();
    loop {
        match body {
            [first, b'-', last, rest @ ..] => {
                ranges.push((*first, *last));
                body = rest;
            }
            [byte, rest @ ..] => {
                ranges.push((*byte, *byte));
                body = rest;
            }
            [] => return ranges,
        }
    }
}

fn matches(pattern: &[Name], names: &[&[u8]]) -> bool {
    match (pattern.split_first(), names.split_first()) {
        (None, _) => names.is_empty(),
        (Some((Name::AnyNumber, rest)), _) => (0..=names.len()).any(|skipped| matches(rest, &names[skipped..])),
        (Some((Name::One(pieces), rest)), Some((name, behind))) => fits(pieces, name) && matches(rest, behind),
        (Some(_), None) => false,
    }
}

/// Remembers the last `*` only: a later one can always take over from it, so this is never exponential.
fn fits(pieces: &[Piece], name: &[u8]) -> bool {
    let (mut at, mut piece, mut star) = (0, 0, None);
    loop {
        match pieces.get(piece) {
            Some(Piece::AnyBytes) => {
                star = Some((piece, at));
                piece += 1;
                continue;
            }
            Some(one) if name.get(at).is_some_and(|byte| one.takes(*byte)) => {
                (piece, at) = (piece + 1, at + 1);
                continue;
            }
            None if at == name.len() => return true,
            _ => {}
        }
        match star {
            Some((star_piece, taken)) if taken < name.len() => {
                star = Some((star_piece, taken + 1));
                (piece, at) = (star_piece + 1, taken + 1);
            }
            _ => return false,
        }
    }
}

impl Piece {
    fn takes(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::AnyByte | Self::AnyBytes => true,
            Self::Class { inverted, ranges } => {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&byte)) != *inverted
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(pattern: &str, path: &str) -> bool {
        Pattern::parse(pattern).unwrap().covers(Path::new(path))
    }

    #[test]
    fn a_pattern_means_what_a_shell_would_mean_by_it() {
        for (pattern, path) in [
            ("*.swp", "/etc/app/.x.swp"),
            ("/etc/*/x", "/etc/a/x"),
            ("/etc/**/x", "/etc/x"),
            ("/etc/**/x", "/etc/a/b/x"),
            ("cache", "/srv/cache/deep/below"),
            ("/srv/cache", "/srv/cache"),
            ("a*b*c", "/axbyybc"),
            ("log.[0-9]", "/var/log.7"),
            ("[!a-c]x", "/dx"),
            ("[]]", "/]"),
            ("**", "/anything"),
            ("a/b", "/x/a/b"),
        ] {
            assert!(covers(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("*.swp", "/etc/x.swpx"),
            ("/etc/*/x", "/etc/a/b/x"),
            ("/cache", "/srv/cache"),
            ("log.[0-9]", "/var/log.77"),
            ("[!a-c]x", "/ax"),
            ("a?", "/a"),
            ("/srv", "/srvx"),
        ] {
            assert!(!covers(pattern, path), "{pattern} {path}");
        }
    }

    #[test]
    fn a_long_row_of_stars_ends() {
        let pattern = format!("{}b", "a*".repeat(30));
        assert!(!covers(&pattern, &format!("/{}", "a".repeat(200))));
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in ["", "/", "cache/", "a//b", "[a", "[", "[]"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
