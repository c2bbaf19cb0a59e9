//! What a receiver remembers from one connection to the next, and how a connection ends.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::disk::lock::Lock;
use crate::jobs::context::{Context, Target};
use crate::jobs::wal::changes::Tracker;
use crate::jobs::wal::fill::Filler;
use crate::jobs::wal::server::Start;
use crate::jobs::wal::shared::Shared;
use crate::jobs::wal::shipper::{self, Frame, Means, ShipperHandle};
use crate::model::{Error, Lsn, Result, SystemId};
use crate::pg::PgError;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;

/// How a session ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// As told.
    Stopped,
    /// The server continued on another timeline.
    Timeline,
}

/// What broke a session.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The server or the connection.
    Server(PgError),
    /// The slot fills the server's disk, to this share, and is to go.
    Pressure(u8),
    /// The server is not the one whose WAL is stored up to this position.
    OtherPast(Lsn, Error),
    /// The shipper met something that waiting does not mend.
    ShipperGone,
    /// Anything else.
    Other(Error),
}

impl From<PgError> for Trouble {
    fn from(error: PgError) -> Self {
        Self::Server(error)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Server(error) => error.into(),
            Trouble::Pressure(_) => Self::failed("the replication slot fills the server's disk"),
            Trouble::ShipperGone => Self::failed("the epoch cannot be continued"),
            Trouble::OtherPast(_, error) | Trouble::Other(error) => error,
        }
    }
}

/// What to do about the permanent slot before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotCare {
    Trust,
    Ensure,
    Renew,
}

/// What to do about the seam to what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Past {
    /// The next stream begins before it, if it can.
    Compare,
    /// A stream is on its way to it.
    Comparing,
    /// The server lacks what lies before it: the next stream begins there.
    Trust,
}

/// The receiver's own state.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) context: Context,
    pub(super) target: Target,
    pub(super) kind: EpochKind,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: CancellationToken,
    pub(super) shipper: ShipperHandle,
    /// Complete frames of earlier sessions that are not shipped yet.
    pub(super) pending: VecDeque<Frame>,
    /// Where to go on; unknown at first and after the shipper died.
    pub(super) cursor: Option<Start>,
    pub(super) system_id: Option<SystemId>,
    pub(super) sessions: u64,
    pub(super) slot: SlotCare,
    pub(super) past: Past,
    /// Why the slot was dropped, until WAL flows again.
    pub(super) given_up: Option<String>,
    pub(super) stored_histories: BTreeSet<BranchId>,
    pub(super) means: Means,
    /// Notes which pages change, where base backups are to know.
    pub(super) tracker: Option<Tracker>,
    /// Takes segments that the server still has and does not stream.
    pub(super) filler: Filler,
    pub(super) _lock: Option<Arc<Lock>>,
}

impl Run {
    /// One that has not connected yet. It tracks no changes, fills no gaps and holds no lock.
    ///
    /// # Errors
    /// Nobody can write to the repository here.
    pub(super) fn new(
        (context, target): (&Context, &Target),
        kind: EpochKind,
        (means, shared): (Means, Arc<Shared>),
        stop: CancellationToken,
    ) -> Result<Self> {
        Ok(Self {
            shipper: shipper::start(context, kind, means.clone())?,
            context: context.clone(),
            target: target.clone(),
            kind,
            shared,
            stop,
            pending: VecDeque::new(),
            cursor: None,
            system_id: None,
            sessions: 0,
            slot: SlotCare::Trust,
            past: Past::Compare,
            given_up: None,
            stored_histories: BTreeSet::new(),
            means,
            tracker: None,
            filler: Filler::default(),
            _lock: None,
        })
    }
}
