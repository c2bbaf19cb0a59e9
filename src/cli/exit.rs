//! The exit codes, in one place.

use crate::model::{Error, Kind, Result};

/// How a command ended, as scripts see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything was done.
    Ok = 0,
    /// It ran and did not succeed; also `status` with a violated objective, and `check` with a FAIL.
    Failed = 1,
    /// The command line or the configuration is wrong; nothing was touched.
    Usage = 2,
    /// A drill that proved neither.
    Inconclusive = 3,
    /// Done and durable at the quorum, but a region still lacks some of it.
    Debts = 4,
    /// The plan says no.
    Refused = 5,
    /// The reply to a write was lost and could not be settled.
    Unknown = 75,
}

impl Exit {
    /// The number.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The end that an error means.
    pub fn of(error: &Error) -> Self {
        match error.kind() {
            Kind::Usage => Self::Usage,
            Kind::Refused | Kind::Busy => Self::Refused,
            Kind::Unknown => Self::Unknown,
            Kind::Failed
            | Kind::NotFound
            | Kind::Damaged
            | Kind::Newer
            | Kind::NoKey
            | Kind::Unavailable
            | Kind::Cancelled => Self::Failed,
        }
    }
}

/// Who reads the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// People and scripts: the codes of [`Exit`].
    Script,
    /// PostgreSQL, through `archive_command`: 0 = it is safe, 1 = keep it and come again. Beyond 125 PostgreSQL would stop
    /// its archiver, so everything but success is 1.
    Archive,
    /// PostgreSQL, through `restore_command`: 0 = here it is, 1 = it does not exist, 255 = stop.
    ///
    /// PostgreSQL takes every code from 1 to 125 for "the archive ends here" and opens the database without a word. So
    /// 1 must be a fact, and everything else (wrong usage, a panic, any error) must be 255.
    Recovery,
}

impl Reader {
    /// The code for a result; [`Exit::Failed`] without an error is how a verb says "it does not exist" to recovery.
    pub fn code(self, result: &Result<Exit>) -> u8 {
        match (self, result) {
            (Self::Script, Ok(exit)) => exit.code(),
            (Self::Script, Err(error)) => Exit::of(error).code(),
            (Self::Archive, Ok(Exit::Ok)) => 0,
            (Self::Archive, _) => 1,
            (Self::Recovery, Ok(Exit::Ok)) => 0,
            (Self::Recovery, Ok(Exit::Failed)) => 1,
            (Self::Recovery, _) => 255,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 11] = [
        Kind::Failed,
        Kind::Usage,
        Kind::NotFound,
        Kind::Refused,
        Kind::Busy,
        Kind::Damaged,
        Kind::Newer,
        Kind::NoKey,
        Kind::Unavailable,
        Kind::Unknown,
        Kind::Cancelled,
    ];

    #[test]
    fn errors_end_with_the_code_of_their_kind() {
        for kind in KINDS {
            assert_eq!(Reader::Script.code(&Err(Error::new(kind, "x"))), kind.exit_code(), "{kind:?}");
        }
    }

    #[test]
    fn recovery_never_takes_an_error_for_the_end_of_the_archive() {
        for kind in KINDS {
            assert_eq!(Reader::Recovery.code(&Err(Error::new(kind, "x"))), 255, "{kind:?}");
        }
        for exit in [Exit::Usage, Exit::Inconclusive, Exit::Debts, Exit::Refused, Exit::Unknown] {
            assert_eq!(Reader::Recovery.code(&Ok(exit)), 255, "{exit:?}");
        }
        for exit in [Exit::Failed, Exit::Usage, Exit::Inconclusive, Exit::Debts, Exit::Refused, Exit::Unknown] {
            assert_eq!(Reader::Archive.code(&Ok(exit)), 1, "{exit:?}");
        }
        assert!(KINDS.iter().all(|kind| Reader::Archive.code(&Err(Error::new(*kind, "x"))) == 1));
        assert_eq!(Reader::Archive.code(&Ok(Exit::Ok)), 0);
        assert_eq!((Reader::Recovery.code(&Ok(Exit::Ok)), Reader::Recovery.code(&Ok(Exit::Failed))), (0, 1));
    }
}
