//! What ends a drill before its end, and what that says.

use crate::jobs::drill::report::Level;
use crate::jobs::drill::scratch::Scratch;
use crate::model::{Error, Kind};

const FULL: &str = "the disk of the scratch cluster is full";

/// Whether an error says something about the backup, or only that nothing could be found out.
pub(super) fn is_inconclusive(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unavailable | Kind::Cancelled | Kind::Refused | Kind::Usage)
}

/// An error, how deep the drill was, and whether it speaks against the backup.
#[derive(Debug)]
pub(super) struct Stop {
    pub(super) error: Error,
    /// What was going on, as a check is named.
    pub(super) what: &'static str,
    pub(super) level: Level,
    /// Whether recovery from what is stored is impossible; else nothing was found out.
    pub(super) judges: bool,
}

impl Stop {
    /// While the way to the point was looked for. What is refused here is a hole in what is stored: this machine is looked at
    /// later.
    pub(super) fn planning(error: Error) -> Self {
        let judges = !matches!(error.kind(), Kind::Unavailable | Kind::Cancelled | Kind::Usage);
        Self { error, what: "everything needed is there", level: Level::L1, judges }
    }

    /// The plan was refused.
    pub(super) const fn refused(error: Error, judges: bool) -> Self {
        Self { error, what: "a key opens it, and this machine can take it", level: Level::L2, judges }
    }

    /// While files were fetched and PostgreSQL recovered. A full disk says nothing of a backup.
    pub(super) fn restoring(error: Error, scratch: &Scratch) -> Self {
        let full = scratch.is_full();
        let judges = !full && !is_inconclusive(&error);
        let damaged = matches!(error.kind(), Kind::Damaged | Kind::NoKey);
        let error = if full { error.during(FULL) } else { error };
        match damaged {
            true => Self { error, what: "every frame opens", level: Level::L2, judges },
            false => Self { error, what: "starts, replays and is promoted", level: Level::L4, judges },
        }
    }

    /// While the restored cluster was examined, on a disk that was full by then.
    pub(super) fn full(error: Option<Error>) -> Self {
        let error = error.map_or_else(|| Error::refused(FULL), |error| error.during(FULL));
        Self { error, what: "answers questions", level: Level::L5, judges: false }
    }

    /// While the restored cluster was examined.
    pub(super) fn examining(error: Error) -> Self {
        let judges = !is_inconclusive(&error);
        Self { error, what: "answers questions", level: Level::L5, judges }
    }
}
