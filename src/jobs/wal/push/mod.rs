//! Push: WAL that `archive_command` hands over, the second belt beside streaming.
//!
//! "Taken" is said of a segment only when every byte of it is durable at the write quorum: because it is known by its
//! digest to be stored already, or because it was stored just now, in an epoch of kind `push`. Everything doubtful is
//! refused, and PostgreSQL keeps the file and comes again.

mod ahead;
mod desk;
mod handed;
mod name;
mod origin;
mod walk;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;
use tokio_util::task::AbortOnDropHandle;

pub use self::handed::Receipt;
pub(super) use self::handed::{Handed, Streamed};
use crate::jobs::context::{Context, Target};
use crate::jobs::wal::position::{Position, Pushes, State};
use crate::jobs::wal::push::ahead::Shelf;
use crate::jobs::wal::push::desk::{Desk, header_of, rewound};
use crate::jobs::wal::push::name::Archived;
use crate::jobs::wal::segments::{SegmentKey, SharedBook};
use crate::model::{Branch, Error, Kind, Lsn, Result, ResultExt, SegmentName, SystemId, Timeline};
use crate::observe::task;
use crate::repository::regions::fan_out::LaneOutcome;
use crate::repository::wal::log::Log;

/// A segment that was taken: its log, and where it ends.
type Taken = (Log, Lsn);

/// Takes files one after the other.
#[derive(Debug)]
pub(super) struct PushDesk {
    context: Context,
    target: Target,
    work: tokio::sync::Mutex<Desk>,
    told: Mutex<Told>,
    book: SharedBook,
    /// The server's own directory, if it is on this host.
    shelf: OnceCell<Option<Shelf>>,
    /// What stores ahead of the next hand-over.
    ahead: Mutex<Option<AbortOnDropHandle<()>>>,
}

#[derive(Debug, Clone, Default)]
struct Told {
    pushes: Pushes,
    /// The newest segment that was taken.
    newest: Option<Taken>,
    /// Timelines that were found to be this cluster's.
    lines: BTreeMap<(SystemId, Timeline), Branch>,
}

impl PushDesk {
    /// Opens the desk of a target. The caller holds the lock of its WAL.
    pub(super) fn open(context: &Context, target: &Target, book: SharedBook, streamed: Option<Streamed>) -> Self {
        let desk = Desk::open(context, target, Arc::clone(&book), streamed);
        Self {
            context: context.clone(),
            target: target.clone(),
            work: tokio::sync::Mutex::new(desk),
            told: Mutex::default(),
            book,
            shelf: OnceCell::new(),
            ahead: Mutex::default(),
        }
    }

    /// Takes a file; when this returns without an error, PostgreSQL may remove it.
    ///
    /// # Errors
    /// It is not this cluster's, not whole, not the one that is stored under its name, or it could not be stored now.
    pub(super) async fn take(self: &Arc<Self>, mut handed: Handed) -> Result<Receipt> {
        let name = handed.name.clone();
        let taken = match self.known(&mut handed).await {
            Some(newest) => Ok((Receipt::Known, Some(newest))),
            None => self.judged(handed).await,
        };
        match taken {
            Ok((receipt, newest)) => {
                tracing::debug!(target = %self.target.name, file = name, ?receipt, "archived");
                self.count(&name, receipt, newest.clone());
                if let Some(newest) = newest {
                    self.look_ahead(name, newest);
                }
                Ok(receipt)
            }
            Err(error) => {
                self.refused(&name, &error);
                Err(error.during(format!("archive {name}")))
            }
        }
    }

    /// One after the other. Whoever had the desk may have stored the same segment.
    async fn judged(&self, mut handed: Handed) -> Result<(Receipt, Option<Taken>)> {
        let mut desk = self.work.lock().await;
        match self.known(&mut handed).await {
            Some(newest) => Ok((Receipt::Known, Some(newest))),
            None => desk.take(handed).await,
        }
    }

    fn count(&self, name: &str, receipt: Receipt, newest: Option<Taken>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let count = match receipt {
            Receipt::Stored => &mut told.pushes.stored,
            Receipt::Known => &mut told.pushes.known,
            Receipt::NotNeeded => &mut told.pushes.not_needed,
        };
        *count += 1;
        (told.pushes.last_file, told.pushes.last_at) = (Some(name.to_owned()), Some(self.context.clock.now()));
        if let Some((log, _)) = &newest {
            told.lines.insert((log.system_id, log.timeline), log.branch.clone());
        }
        told.newest = newest.or(told.newest.take());
    }

    fn refused(&self, name: &str, error: &Error) {
        let target = &self.target.name;
        // What passes by waiting is no alarm; it is told all the same, because PostgreSQL's disk fills meanwhile.
        if error.kind() == Kind::Unavailable {
            tracing::warn!(%target, file = name, %error, "not archived; PostgreSQL tries again");
            return;
        }
        tracing::error!(%target, file = name, %error, "a file that PostgreSQL archives was refused");
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.pushes.refused += 1;
        told.pushes.refused_at = Some(self.context.clock.now());
        told.pushes.last_refusal = Some(format!("{name}: {error}"));
    }

    /// A segment whose very bytes are stored already; this waits for nobody who stores another one.
    async fn known(&self, handed: &mut Handed) -> Option<Taken> {
        if Archived::parse(&handed.name)? != Archived::Segment {
            return None;
        }
        let header = header_of(&handed.name.clone(), handed).ok()?;
        let line = (header.system_id, header.name.timeline);
        let branch = self.told.lock().unwrap_or_else(PoisonError::into_inner).lines.get(&line).cloned()?;
        let (target, wal_segment_size) = (self.target.name.clone(), header.segment_size);
        let log = Log { target, system_id: line.0, timeline: line.1, branch, wal_segment_size };
        let key = SegmentKey::of(&log, header.name.start(wal_segment_size));
        let (known, digester) = {
            let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
            (book.safe(&key)?, book.digester())
        };
        let mut file = std::mem::replace(&mut handed.file, tempfile::spooled_tempfile(0));
        let hashed = tokio::task::spawn_blocking(move || {
            let digest = rewound(&mut file).ok().and_then(|file| digester.of(file).ok());
            (digest, file)
        });
        let (digest, file) = hashed.await.ok()?;
        handed.file = file;
        (digest == Some(known)).then(|| (log, Lsn(key.start.0 + wal_segment_size.bytes())))
    }

    /// Takes a segment that was found in the server's own directory. Nobody waits for a receipt.
    ///
    /// # Errors
    /// As of [`take`](Self::take).
    pub(super) async fn found(&self, handed: Handed) -> Result<Receipt> {
        let name = handed.name.clone();
        let taken = self.judged(handed).await;
        taken.map(|(receipt, _)| receipt).during(|| format!("store {name}"))
    }

    /// Begins to store what PostgreSQL will hand over next, unless that is going on.
    fn look_ahead(self: &Arc<Self>, name: String, taken: Taken) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        if ahead.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        let desk = Arc::clone(self);
        let looking = task::spawn("wal-look-ahead", async move {
            if let Err(error) = desk.store_ahead(name, taken).await {
                // PostgreSQL hands it over itself, and then it is told.
                tracing::debug!(%error, "WAL is not stored ahead");
            }
        });
        *ahead = Some(AbortOnDropHandle::new(looking));
    }

    async fn store_ahead(&self, name: String, (log, end): Taken) -> Result<()> {
        if self.work.lock().await.is_streaming() {
            return Ok(());
        }
        let shelf = self.shelf.get_or_init(|| async {
            let shelf = Shelf::of(&self.target, log.system_id).await;
            shelf
                .inspect_err(
                    |error| tracing::info!(target = %self.target.name, %error, "no look-ahead for archive_command"),
                )
                .ok()
        });
        let Some(shelf) = shelf.await.clone() else { return Ok(()) };
        let size = log.wal_segment_size;
        let digest_at = |start: Lsn| {
            let key = SegmentKey::of(&log, start);
            self.book.lock().unwrap_or_else(PoisonError::into_inner).get(&key)
        };
        let Some(digest) = digest_at(Lsn(end.0 - size.bytes())) else { return Ok(()) };
        let looked = Arc::new(shelf);
        let (shelf, last) = (Arc::clone(&looked), name);
        let digester = self.book.lock().unwrap_or_else(PoisonError::into_inner).digester();
        let own = move || if shelf.holds(&last, &digest, &digester) { shelf.waiting(&last) } else { Vec::new() };
        let waiting = blocking(own).await?;
        for next in waiting {
            if SegmentName::parse(&next, size).is_none_or(|name| digest_at(name.start(size)).is_some()) {
                continue;
            }
            let (shelf, spool, file) = (Arc::clone(&looked), self.context.state_dir.clone(), next.clone());
            let copied = blocking(move || shelf.copy(&file, &spool)).await?;
            let (file, length) = copied.map_err(|error| Error::failed(format!("read {next}")).because(error))?;
            if self.found(Handed { name: next, file, length, system_id: None }).await? == Receipt::Stored {
                self.told.lock().unwrap_or_else(PoisonError::into_inner).pushes.ahead += 1;
            }
        }
        Ok(())
    }

    /// What was handed over so far.
    pub(super) fn pushes(&self) -> Pushes {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).pushes.clone()
    }

    /// Where a target stands whose WAL comes by `archive_command` alone.
    pub(super) fn position(&self, target: &Target) -> Position {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (log, end) = told.newest.unzip();
        let end = end.unwrap_or(Lsn::INVALID);
        Position {
            target: target.name.clone(),
            system_id: log.as_ref().map(|log| log.system_id),
            timeline: log.as_ref().map(|log| log.timeline),
            branch: log.map(|log| log.branch),
            state: State::Archiving,
            start_lsn: None,
            start_reason: None,
            received_lsn: end,
            durable_lsn: end,
            durable_at: told.pushes.last_at,
            last_commit_at: None,
            // Between two segments nobody sees what the server commits.
            exposure_seconds: None,
            regions: Vec::new(),
            epoch: None,
            last_error: None,
            degraded_to: None,
            pushes: told.pushes,
            heartbeat: None,
            slot: None,
            from_standby: false,
        }
    }

    /// Closes the open epoch, and says what each region lacks of what was handed over.
    pub(super) async fn close(&self) -> Vec<LaneOutcome> {
        // What it was storing is handed over again.
        drop(self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.work.lock().await.end().await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::failed("reading the server's directory died").because(error))
}
