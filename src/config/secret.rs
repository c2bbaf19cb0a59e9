//! Secrets by reference: the configuration names where a secret is, never what it is.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use zeroize::Zeroizing;

use crate::model::{Error, Kind, Result};

/// Where a secret is. It holds no secret itself, so it may be printed and logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Secret {
    /// `env:NAME`: the value of an environment variable.
    Env(String),
    /// `file:PATH`: the contents of a file that only its owner can read.
    File(PathBuf),
}

/// Larger files are no secrets but mistakes.
const MAX_BYTES: usize = 64 * 1024;

impl Secret {
    /// Reads a reference; a relative path is taken from `directory`.
    ///
    /// # Errors
    /// Anything but `env:NAME` and `file:PATH`. The error does not repeat the text, which may be the secret itself.
    pub fn parse(text: &str, directory: &Path) -> Result<Self> {
        let is_name = |name: &str| {
            let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            rest && name.bytes().next().is_some_and(|b| !b.is_ascii_digit())
        };
        match text.split_once(':') {
            Some(("env", name)) if is_name(name) => Ok(Self::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(directory.join(path))),
            _ => Err(Error::usage("a secret must not stand in the configuration")
                .hint("name where it is: \"env:VARIABLE\" or \"file:/path\" (mode 600)")),
        }
    }

    /// The file, if the secret is in one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Env(_) => None,
        }
    }

    /// Fetches the secret, without line breaks at its end.
    ///
    /// # Errors
    /// The variable or the file does not exist, is empty or is not text; the file can be read by others.
    pub fn read(&self) -> Result<SecretText> {
        let text = match self {
            Self::Env(name) => Zeroizing::new(std::env::var(name).map_err(|error| {
                let message = format!("the secret {self} cannot be read");
                // `VarError` shows the value when it is not text; only its meaning may be told.
                let cause = match error {
                    std::env::VarError::NotPresent => "the variable is not set",
                    std::env::VarError::NotUnicode(_) => "its value is not UTF-8",
                };
                Error::usage(message).because(cause)
            })?),
            Self::File(path) => self.read_file(path)?,
        };
        let trimmed = text.trim_end_matches(['\n', '\r']);
        if trimmed.is_empty() {
            return Err(Error::usage(format!("the secret {self} is empty")));
        }
        Ok(SecretText(Zeroizing::new(trimmed.to_owned())))
    }

    /// Refuses a secret file that others can read, without reading it. A file that does not exist is no fault yet: this
    /// machine may have no need for it.
    ///
    /// # Errors
    /// The file can be read, written or searched by its group or by others.
    pub fn refuse_if_exposed(&self) -> Result<()> {
        match self {
            Self::Env(_) => Ok(()),
            Self::File(path) => std::fs::metadata(path).map_or(Ok(()), |found| self.check_mode(path, &found)),
        }
    }

    fn read_file(&self, path: &Path) -> Result<Zeroizing<String>> {
        let unreadable = |error: std::io::Error| {
            let kind = if error.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Usage };
            Error::new(kind, format!("the secret {self} cannot be read")).because(error)
        };
        let file = File::open(path).map_err(unreadable)?;
        // The mode of the open file, not of the path: the path may be replaced in between.
        self.check_mode(path, &file.metadata().map_err(unreadable)?)?;
        // The whole buffer is allocated first: one that grows leaves copies of the secret behind.
        let mut text = Zeroizing::new(String::with_capacity(MAX_BYTES + 1));
        file.take(MAX_BYTES as u64 + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() > MAX_BYTES {
            return Err(Error::usage(format!("the secret {self} is larger than {MAX_BYTES} bytes")));
        }
        Ok(text)
    }

    fn check_mode(&self, path: &Path, found: &std::fs::Metadata) -> Result<()> {
        let mode = found.permissions().mode() & 0o777;
        if mode & 0o077 == 0 {
            return Ok(());
        }
        Err(Error::usage(format!("the secret {self} can be read by others"))
            .because(format!("its mode is {mode:03o}"))
            .hint(format!("chmod 600 {}", path.display())))
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A secret in memory: wiped when dropped, and shown by no formatter.
#[derive(Clone)]
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    pub(super) fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The secret, for the one call that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn secret_file(mode: u32, text: &str) -> (tempfile::TempDir, Secret) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        let secret = Secret::parse("file:password", directory.path()).unwrap();
        (directory, secret)
    }

    #[test]
    fn a_private_file_is_read_and_never_shown() {
        let (_directory, secret) = secret_file(0o600, "correct horse\n");
        let text = secret.read().unwrap();
        assert_eq!(text.expose(), "correct horse");
        assert_eq!(format!("{text:?}"), "<redacted>");
        secret.refuse_if_exposed().unwrap();
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o604, 0o640, 0o644, 0o620] {
            let (directory, secret) = secret_file(mode, "correct horse\n");
            for error in [secret.read().unwrap_err(), secret.refuse_if_exposed().unwrap_err()] {
                let path = directory.path().join("password");
                assert!(error.message().contains(&path.display().to_string()), "{error}");
                assert_eq!(error.hint_text(), Some(format!("chmod 600 {}", path.display()).as_str()));
            }
        }
    }

    #[test]
    fn a_literal_is_refused_and_not_repeated() {
        for text in ["hunter2", "env:", "env:hunter 2", "env:2", "file:", "pass:hunter2"] {
            let error = Secret::parse(text, Path::new("/")).unwrap_err();
            assert!(!format!("{error:?}").contains("hunter"), "{error:?}");
            assert!(error.hint_text().unwrap().contains("env:VARIABLE"));
        }
    }

    #[test]
    fn what_is_missing_or_empty_is_an_error() {
        let (_directory, empty) = secret_file(0o600, "\n");
        assert!(empty.read().is_err());
        assert!(Secret::Env("DRCTL_TEST_NO_SUCH_VARIABLE".into()).read().is_err());
        let missing = Secret::File("/nonexistent/secret".into());
        assert_eq!(missing.read().unwrap_err().kind(), Kind::NotFound);
        missing.refuse_if_exposed().unwrap();
    }
}
