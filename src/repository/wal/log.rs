//! Writing the WAL log: one epoch is one connection of one writer, with a keyset of its own and frames numbered from 0.
//!
//! An epoch's frames follow each other without a hole. Several may be on their way at once, up to
//! [`IN_FLIGHT`](crate::repository::wal::frame::IN_FLIGHT); a frame
//! counts as durable when it and all before it are at the write quorum. The end of the last frame of that unbroken prefix
//! is a position that may be reported to PostgreSQL as flushed.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::keys::keyset::Keyset;
use crate::model::{
    Branch, EpochId, Error, Kind, Lsn, Result, ResultExt, SystemId, TargetName, Timeline, WalSegmentSize,
};
use crate::repository::FORMAT;
use crate::repository::handle::{Repository, Writer};
use crate::repository::keysets;
use crate::repository::layout;
use crate::repository::regions::fan_out::FanOut;
use crate::repository::wal::claim::{Known, must_be_alone};
use crate::repository::wal::frame::{EpochKind, FrameHeader, FrameKind, FramePlace, FrameSealer, WalSpan};
use crate::repository::wal::index::BranchId;
use crate::repository::wal::seal::sealed_by;
use crate::repository::wrap_debts::WrapDebts;
use crate::store::Digest;

/// The most WAL in one frame: it must fit an object even if it does not compress.
pub const FRAME_LIMIT: usize = 15 * 1024 * 1024;

/// Which log an epoch belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// Whose keys seal it.
    pub target: TargetName,
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// Bytes per WAL segment.
    pub wal_segment_size: WalSegmentSize,
}

impl Log {
    /// The branch that it is of.
    pub fn branch_id(&self) -> BranchId {
        BranchId { system_id: self.system_id, timeline: self.timeline, branch: self.branch.clone() }
    }
}

/// What the walker found in the WAL of one frame.
#[derive(Debug, Clone, Copy, Default)]
pub struct Marks {
    /// Start of the first record that became complete.
    pub first_record: Option<Lsn>,
    /// Start and end of the last record that became complete.
    pub last_record: Option<(Lsn, Lsn)>,
    /// Oldest and newest commit time.
    pub commits: Option<(chrono::DateTime<chrono::Utc>, chrono::DateTime<chrono::Utc>)>,
}

/// An open epoch.
#[derive(Debug)]
pub struct Epoch {
    log: Log,
    id: EpochId,
    kind: EpochKind,
    repository: Repository,
    writer: Writer,
    out: Arc<FanOut>,
    keyset: Arc<Keyset>,
    wrap_debts: WrapDebts,
    level: i32,
    next_seq: u64,
    position: Lsn,
    last_record: Option<(Lsn, Lsn)>,
}

impl Epoch {
    /// Opens an epoch that begins at `start`: draws its id, makes its keyset. No frame is written yet.
    ///
    /// # Errors
    /// The keyset did not reach the quorum, or too few key holders answered.
    pub async fn open(
        repository: &Repository,
        writer: &Writer,
        (log, kind, start): (Log, EpochKind, Lsn),
        level: i32,
        out: Arc<FanOut>,
    ) -> Result<Self> {
        repository.enroll(writer, &out).await.during(|| "enrol the signer")?;
        let rng = writer.rng.as_ref();
        let stored = keysets::create(&repository.id, &log.target, &writer.holders, rng, &out).await?;
        let id = EpochId::new(writer.clock.now(), rng)?;
        Ok(Self {
            log,
            id,
            kind,
            repository: repository.clone(),
            writer: writer.clone(),
            out,
            wrap_debts: WrapDebts::new(&writer.holders, &stored, &writer.clock),
            keyset: stored.keyset,
            level,
            next_seq: 0,
            position: start,
            last_record: None,
        })
    }

    /// The end of the WAL that it was given.
    pub const fn position(&self) -> Lsn {
        self.position
    }

    /// Start and end of the last complete record that it was given.
    pub const fn last_record(&self) -> Option<(Lsn, Lsn)> {
        self.last_record
    }

    /// The log.
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// Its id.
    pub const fn id(&self) -> &EpochId {
        &self.id
    }

    /// Makes this the only open stream epoch of its branch. Nothing of it may be acknowledged before.
    ///
    /// # Errors
    /// `Failed`: another writer has one that is not closed. Otherwise as [`append`](Self::append); it may be tried again.
    pub async fn claim(&mut self, known: &Known) -> Result<()> {
        if self.next_seq == 0 {
            self.put(FrameKind::Begin, self.bare_span(), Vec::new()).await?;
        }
        known.add(self.id.clone());
        must_be_alone(&self.repository, &self.log.branch_id(), known).await
    }

    /// Stores the next WAL bytes as one frame; returns once they are durable at the write quorum.
    ///
    /// # Errors
    /// `start` is not where the last frame ended; the quorum was not reached within the fan-out's patience; or another
    /// owner sealed the epoch (`Refused`). The epoch must not be used after an error: whether the frame exists is unknown.
    pub async fn append(&mut self, start: Lsn, wal: Vec<u8>, marks: Marks) -> Result<Lsn> {
        let sent = self.send(start, wal, marks)?.await?;
        self.pay_wraps().await;
        Ok(sent)
    }

    /// Sends the next WAL bytes as one frame on their way. The result is their end, once they are at the write quorum;
    /// they are durable when all frames before them are, too.
    ///
    /// # Errors
    /// `start` is not where the last frame ended. The frame's own errors are those of [`append`](Self::append).
    pub fn send(&mut self, start: Lsn, wal: Vec<u8>, marks: Marks) -> Result<Sending> {
        if start != self.position {
            let text = format!("WAL is not contiguous: expected {}, got {start}", self.position);
            return Err(Error::failed(text));
        }
        let length = wal.len() as u64;
        let end = start.checked_add(length).ok_or_else(|| Error::failed("WAL position overflow"))?;
        self.last_record = marks.last_record.or(self.last_record);
        let span = WalSpan {
            start,
            end,
            first_record: marks.first_record,
            first_commit: marks.commits.map(|(first, _)| first),
            last_commit: marks.commits.map(|(_, last)| last),
            ..self.bare_span()
        };
        let put = self.put(FrameKind::Data, span, wal);
        self.position = end;
        Ok(Box::pin(async move { put.await.map(|()| end) }))
    }

    /// Stores wraps that have come meanwhile, and asks again for those that are owed.
    pub async fn pay_wraps(&mut self) {
        self.wrap_debts.pay(&self.out).await;
    }

    /// Closes the epoch: nobody needs to take it over. Only when everything that was sent is at the quorum.
    ///
    /// # Errors
    /// The quorum was not reached; the frames before are durable all the same.
    pub async fn close(mut self) -> Result<()> {
        self.wrap_debts.settle(&self.out).await;
        self.put(FrameKind::End, self.bare_span(), Vec::new()).await
    }

    /// The span of a frame without WAL that comes next.
    fn bare_span(&self) -> WalSpan {
        WalSpan {
            start: self.position,
            end: self.position,
            first_record: None,
            last_record: self.last_record.map(|(start, _)| start),
            last_record_end: self.last_record.map(|(_, end)| end),
            first_commit: None,
            last_commit: None,
        }
    }

    fn put(&mut self, kind: FrameKind, span: WalSpan, wal: Vec<u8>) -> BoxFuture<'static, Result<()>> {
        let (header, weight) = (self.header(kind, span), wal.len() as u64);
        self.next_seq += 1;
        let (signer, keyset, level) = (Arc::clone(&self.writer.signer), Arc::clone(&self.keyset), self.level);
        let (repository, out) = (self.repository.clone(), Arc::clone(&self.out));
        Box::pin(async move {
            let place = header.place.clone();
            // Compressing 15 MiB takes tens of milliseconds: not on a thread that also answers the server.
            let encoded = tokio::task::spawn_blocking(move || {
                let key = keyset.data().ok_or_else(|| Error::failed("the epoch's keyset lacks its data secret"))?;
                let object = FrameSealer { signer: &signer, key, level }.encode(header, &wal)?;
                let digest = Digest::of(&object);
                Ok::<_, Error>((Bytes::from(object), digest))
            });
            let (object, digest) = encoded.await.map_err(|error| Error::failed("sealing died").because(error))??;
            match out.put_wal(place.key(), (object, digest), weight).await {
                Err(error) if error.kind() == Kind::Damaged => Err(displaced(&repository, &place, error).await),
                put => put,
            }
        })
    }

    fn header(&self, kind: FrameKind, span: WalSpan) -> FrameHeader {
        let log = &self.log;
        let place = FramePlace {
            system_id: log.system_id,
            timeline: log.timeline,
            branch: log.branch.clone(),
            epoch: self.id.clone(),
            seq: self.next_seq,
        };
        FrameHeader {
            format: FORMAT,
            repository: self.repository.id.clone(),
            target: log.target.clone(),
            place,
            epoch_kind: self.kind,
            kind,
            keyset: self.keyset.id().clone(),
            wal_segment_size: log.wal_segment_size,
            span,
            quorum: u8::try_from(self.out.quorum()).unwrap_or(u8::MAX),
            written_at: self.writer.clock.now(),
            signer: self.writer.signer.id().clone(),
            body_bytes: 0,
            body_sha256: [0; 32],
        }
    }
}

/// A frame on its way.
pub type Sending = BoxFuture<'static, Result<Lsn>>;

/// What it means that other bytes have a frame's name.
async fn displaced(repository: &Repository, place: &FramePlace, error: Error) -> Error {
    let Some(seal) = sealed_by(repository, place).await else { return error };
    let (epoch, at, signer) = (&place.epoch, seal.written_at.format("%Y-%m-%d %H:%M:%S"), &seal.signer);
    let text = format!("the WAL of {} was taken over by another writer", seal.target);
    let because = format!("epoch {epoch} was sealed at frame {} on {at} UTC, signed by {signer}", place.seq);
    let hint = "one receiver per target: if this is the one to go on, stop the other and start this one again";
    Error::refused(text).because(because).hint(hint)
}

/// The branch that a history file names.
pub fn branch_of(history: &[u8]) -> Branch {
    Branch::from_history_digest(&Digest::of(history).0)
}

/// Stores a timeline's history file once. Its content decides its name (see [`Branch`]), so whoever stores it stores the
/// same; what is there already stays.
///
/// # Errors
/// The quorum was not reached.
pub async fn store_history(
    repository: &Repository,
    (system_id, timeline): (SystemId, Timeline),
    content: &[u8],
    out: &FanOut,
) -> Result<Branch> {
    let branch = branch_of(content);
    let key = layout::history(system_id, timeline, &branch);
    out.put(key, Bytes::copy_from_slice(content), Digest::of(content))
        .await
        .during(|| format!("store the history of timeline {timeline} in repository {}", repository.id))?;
    Ok(branch)
}

/// Reads a timeline's history file; its name proves 32 bits of its content, the walk of the WAL the rest.
///
/// # Errors
/// No region has it intact.
pub async fn read_history(
    repository: &Repository,
    system_id: SystemId,
    timeline: Timeline,
    branch: &Branch,
) -> Result<Bytes> {
    let key = layout::history(system_id, timeline, branch);
    let check = |bytes: Bytes| {
        let genuine = branch_of(&bytes) == *branch;
        if genuine { Ok(bytes) } else { Err(Error::damaged("the history file is not the one that its name promises")) }
    };
    repository.regions.read(&key, None, check).await.map(|(bytes, _)| bytes)
}
