//! Passwords from `.pgpass`: `host:port:database:user:password`, `*` matches anything, `\` escapes `:` and `\`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::pg::PgError;

/// A password file and what its absence means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Passfile {
    pub(super) path: PathBuf,
    /// Named by the settings or PGPASSFILE; only `~/.pgpass` may be missing, or closed to us.
    pub(super) required: bool,
}

/// What a line must match.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

impl Passfile {
    /// The password of the first line that matches.
    pub(super) fn lookup(&self, wanted: Wanted<'_>) -> Result<Option<Zeroizing<String>>, PgError> {
        let broken = |reason: &str| PgError::Config(format!("password file {}: {reason}", self.path.display()));
        let text = match read_private(&self.path) {
            Ok(text) => text,
            Err(error) if self.is_passed_over(error.kind()) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(path = %self.path.display(), %error, "a password file is passed over");
                }
                return Ok(None);
            }
            Err(error) => return Err(broken(&error.to_string())),
        };
        Ok(find(&text, wanted))
    }

    /// As libpq does: the home of another account says nothing of what this one needs.
    fn is_passed_over(&self, why: io::ErrorKind) -> bool {
        !self.required && matches!(why, io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
    }
}

/// Reads a file with secrets, refusing one that others can read or write. Root's files may be readable by the group,
/// which is how distributions hand server keys to the postgres account.
pub(in crate::pg) fn read_private(path: &Path) -> io::Result<Zeroizing<String>> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.mode() & forbidden != 0 {
        return Err(io::Error::other(format!("mode {:o} lets others read it; expected 600", metadata.mode() & 0o777)));
    }
    let mut text = Zeroizing::new(String::new());
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn find(text: &str, wanted: Wanted<'_>) -> Option<Zeroizing<String>> {
    let port = wanted.port.to_string();
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let (host, rest) = field(line)?;
        let (line_port, rest) = field(rest)?;
        let (database, rest) = field(rest)?;
        let (user, password) = field(rest)?;
        let matches = |pattern: &str, value: &str| pattern == "*" || pattern == value;
        let fits = matches(&host, wanted.host)
            && matches(&line_port, &port)
            && matches(&database, wanted.database)
            && matches(&user, wanted.user);
        fits.then(|| Zeroizing::new(unescape(password)))
    })
}

/// The field up to the next bare `:`, unescaped, and the rest.
fn field(line: &str) -> Option<(String, &str)> {
    let mut escaped = false;
    for (at, character) in line.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ':' => return Some((unescape(line.get(..at)?), line.get(at + 1..)?)),
            _ => {}
        }
    }
    None
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        plain.push(if character == '\\' { characters.next().unwrap_or(character) } else { character });
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const WANTED: Wanted<'_> = Wanted { host: "db", port: 5432, database: "replication", user: "drctl" };

    #[test]
    fn the_first_matching_line_wins() {
        let text = "# comment\nnonsense\ndb:5433:*:drctl:no\ndb:*:replication:drctl:a\\:b\\\\c\n*:*:*:*:late\n";
        assert_eq!(find(text, WANTED).unwrap().as_str(), r"a:b\c");
        assert_eq!(find(text, Wanted { user: "x", ..WANTED }).unwrap().as_str(), "late");
        assert!(find("db:5432:replication:other:p", WANTED).is_none());
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"*:*:*:*:secret\n").unwrap();
        let passfile = Passfile { path: file.path().to_owned(), required: true };
        assert!(passfile.lookup(WANTED).unwrap().is_some());
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(passfile.lookup(WANTED), Err(PgError::Config(_))));
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let missing = |required| Passfile { path: "/nonexistent/.pgpass".into(), required };
        assert!(missing(true).lookup(WANTED).is_err());
        assert!(missing(false).lookup(WANTED).unwrap().is_none());
        let closed = io::ErrorKind::PermissionDenied;
        assert!(missing(false).is_passed_over(closed) && !missing(true).is_passed_over(closed));
        assert!(!missing(false).is_passed_over(io::ErrorKind::Other));
    }
}
