//! WAL frames: the objects of the log, written and read here.
//!
//! A frame is a clear signed header and a sealed body. The header is clear so that continuity, recovery windows and
//! takeover need no key; it carries the digest of the body, so that damage is found without a key as well.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::codec::compress::{pack_payload, unpack_payload};
use crate::codec::seal::{Aad, SealingKey, Unit, open, seal};
use crate::codec::sign::Signer;
use crate::model::{
    Branch, EpochId, Error, KeysetId, Lsn, RepositoryId, Result, ResultExt, SignerId, SystemId, TargetName, Timeline,
    WalSegmentSize,
};
use crate::repository::FORMAT;
use crate::repository::layout;
use crate::repository::trust::Trust;
use crate::store::Digest;

/// Where in the log a frame stands: the log, the epoch, and the place in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FramePlace {
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch of that timeline.
    pub branch: Branch,
    /// The run of the writer.
    pub epoch: EpochId,
    /// The place in the epoch, from 0.
    pub seq: u64,
}

impl FramePlace {
    /// The object's name.
    pub fn key(&self) -> String {
        layout::wal_frame(&self.epoch_prefix(), self.seq)
    }

    /// The place of which this is the name.
    pub fn parse(key: &str) -> Option<Self> {
        let parts: Vec<_> = key.strip_prefix(layout::WAL)?.split('/').collect();
        let [system, branch, epoch, seq] = parts.as_slice() else { return None };
        let (timeline, branch) = layout::parse_branch(branch)?;
        let (system_id, epoch) = (system.parse().ok()?, epoch.parse().ok()?);
        Some(Self { system_id, timeline, branch, epoch, seq: layout::parse_seq(seq)? })
    }

    /// What the names of all frames of its epoch begin with.
    pub fn epoch_prefix(&self) -> String {
        layout::wal_epoch(self.system_id, self.timeline, &self.branch, &self.epoch)
    }

    fn logical_id(&self) -> String {
        format!("{}/{:08x}-{}/{}/{}", self.system_id, self.timeline.0, self.branch, self.epoch, self.seq)
    }
}

/// Why an epoch exists. Only stream epochs take over from each other and are sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpochKind {
    /// The permanent receiver.
    Stream,
    /// A backup's own receiver.
    Backup,
    /// Segments handed over by `archive_command`.
    Push,
}

/// What an object of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameKind {
    /// The writer of a stream epoch shows itself before it acknowledges anything; no body.
    Begin,
    /// WAL bytes.
    Data,
    /// The writer closed its epoch; no body.
    End,
    /// Another writer closed this epoch; no body.
    Seal,
}

/// The clear, signed head of a frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameHeader {
    /// Version of the repository format.
    pub format: u32,
    /// The repository.
    pub repository: RepositoryId,
    /// The target whose keyset seals the body.
    pub target: TargetName,
    /// Where the frame stands.
    pub place: FramePlace,
    /// Why the epoch exists.
    pub epoch_kind: EpochKind,
    /// Data, END or SEAL.
    pub kind: FrameKind,
    /// The epoch's keyset.
    pub keyset: KeysetId,
    /// Bytes per WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// The WAL in it.
    pub span: WalSpan,
    /// Write quorum in force when it was written.
    pub quorum: u8,
    /// The writer's clock.
    pub written_at: DateTime<Utc>,
    /// Who signed.
    pub signer: SignerId,
    /// Bytes of the sealed body.
    pub body_bytes: u64,
    /// SHA-256 of the sealed body.
    #[serde(with = "crate::model::commit::hex32")]
    pub body_sha256: [u8; 32],
}

/// Which WAL a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalSpan {
    /// Position of the first byte.
    pub start: Lsn,
    /// Position after the last byte.
    pub end: Lsn,
    /// Start of the first record that is complete with this frame; it may lie in an earlier frame.
    pub first_record: Option<Lsn>,
    /// Start of the last complete record of the epoch so far: the position that recovery can aim at.
    pub last_record: Option<Lsn>,
    /// End of that record.
    pub last_record_end: Option<Lsn>,
    /// The oldest commit time in it.
    pub first_commit: Option<DateTime<Utc>>,
    /// The newest commit time in it.
    pub last_commit: Option<DateTime<Utc>>,
}

const MAGIC: &[u8; 8] = b"DRCTLW1\n";
const SIGNATURE_BYTES: usize = 64;
/// More than any header needs, and what a reader fetches to see one.
pub const HEADER_LIMIT: u64 = 4096;
/// More than any frame without a body has.
pub const BARE_LIMIT: u64 = 2048;
/// A writer never has more frames on their way than this: when a frame exists anywhere, all but the last of so many were
/// acknowledged. Only among them can holes be that somebody still may fill.
pub const IN_FLIGHT: u64 = 8;

/// Writes the frames of one epoch.
#[derive(Debug)]
pub struct FrameSealer<'a> {
    /// Signs headers.
    pub signer: &'a Signer,
    /// The keyset's data secret.
    pub key: &'a SealingKey,
    /// zstd level of the body.
    pub level: i32,
}

impl FrameSealer<'_> {
    /// The object for `wal`; the header's signer and body fields are filled in here.
    ///
    /// # Errors
    /// No randomness for the seal.
    pub fn encode(&self, header: FrameHeader, wal: &[u8]) -> Result<Vec<u8>> {
        let id = header.place.logical_id();
        let body = match header.kind {
            FrameKind::Data => seal(self.key, &body_aad(&header, &id), &pack_payload(self.level, wal)?)?,
            FrameKind::Begin | FrameKind::End | FrameKind::Seal => Vec::new(),
        };
        header.sign(self.signer, body)
    }
}

impl FrameHeader {
    /// The object of a frame without WAL, for which no key is needed.
    ///
    /// # Errors
    /// It is a frame with WAL.
    pub fn encode_bare(self, signer: &Signer) -> Result<Vec<u8>> {
        match self.kind {
            FrameKind::Data => Err(Error::failed("a WAL frame without its WAL")),
            FrameKind::Begin | FrameKind::End | FrameKind::Seal => self.sign(signer, Vec::new()),
        }
    }

    /// Bytes of the whole object: this header as it is written, with what stands around it, and the body.
    pub fn object_bytes(&self) -> Option<u64> {
        let head = serde_json::to_vec(self).ok()?.len();
        Some((MAGIC.len() + 4 + head + SIGNATURE_BYTES) as u64 + self.body_bytes)
    }

    fn sign(mut self, signer: &Signer, body: Vec<u8>) -> Result<Vec<u8>> {
        let header = &mut self;
        header.signer = signer.id().clone();
        header.body_bytes = body.len() as u64;
        header.body_sha256 = Digest::of(&body).0;
        let head =
            serde_json::to_vec(header).map_err(|error| Error::failed("a WAL header is not JSON").because(error))?;
        let length = u32::try_from(head.len()).unwrap_or(u32::MAX);
        let signature = signer.sign_bytes(&context(header), &head)?;
        Ok([MAGIC.as_slice(), &length.to_le_bytes(), &head, &signature, &body].concat())
    }
}

fn body_aad<'a>(header: &'a FrameHeader, id: &'a str) -> Aad<'a> {
    Aad { repository: &header.repository, keyset: &header.keyset, kind: Unit::Wal, id }
}

fn context(header: &FrameHeader) -> String {
    format!("wal {} {}", header.repository, header.place.logical_id())
}

/// A frame that was read: its header is signed by a trusted signer and stands where it says.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The head.
    pub header: FrameHeader,
    body: Bytes,
}

impl Frame {
    /// Reads the header from the first [`HEADER_LIMIT`] bytes of an object (or all of it), without the body.
    ///
    /// # Errors
    /// It is not a frame of this repository at `place`, or not signed by a trusted signer.
    pub fn header(bytes: &[u8], repository: &RepositoryId, place: &FramePlace, trust: &Trust) -> Result<FrameHeader> {
        Self::split(bytes, repository, place, trust).map(|(header, _)| header)
    }

    /// What the header says that these bytes are; whether it may say so is not looked at.
    pub fn kind(bytes: &[u8]) -> Option<FrameKind> {
        let (head, _) = split_head(bytes)?;
        serde_json::from_slice::<FrameHeader>(head).ok().map(|header| header.kind)
    }

    /// Who says that he signed these bytes; whether he did is not looked at.
    pub(in crate::repository) fn claimed_signer(bytes: &[u8]) -> Option<SignerId> {
        let (head, _) = split_head(bytes)?;
        serde_json::from_slice::<FrameHeader>(head).ok().map(|header| header.signer)
    }

    /// Reads a whole object; the body's digest is checked, no key is needed.
    ///
    /// # Errors
    /// As [`header`](Self::header), or the body is not the one that was signed.
    pub fn decode(bytes: &Bytes, repository: &RepositoryId, place: &FramePlace, trust: &Trust) -> Result<Self> {
        let (header, body_at) = Self::split(bytes, repository, place, trust)?;
        let body = bytes.slice(body_at..);
        if body.len() as u64 != header.body_bytes || Digest::of(&body).0 != header.body_sha256 {
            return Err(Error::damaged(format!("WAL frame {}: its body is not the one that was signed", place.key())));
        }
        Ok(Self { header, body })
    }

    /// The WAL bytes from `header.span.start` to `header.span.end`.
    ///
    /// # Errors
    /// The body does not open with `key`, or holds another number of bytes.
    pub fn open(&self, key: &SealingKey) -> Result<Vec<u8>> {
        let id = self.header.place.logical_id();
        if self.header.kind != FrameKind::Data {
            return Ok(Vec::new());
        }
        let payload = open(key, &body_aad(&self.header, &id), &self.body).during(|| format!("open WAL frame {id}"))?;
        let length = usize::try_from(self.header.span.end.bytes_since(self.header.span.start)).unwrap_or(usize::MAX);
        unpack_payload(&payload, Some(length)).during(|| format!("unpack WAL frame {id}"))
    }

    fn split(
        bytes: &[u8],
        repository: &RepositoryId,
        place: &FramePlace,
        trust: &Trust,
    ) -> Result<(FrameHeader, usize)> {
        let wrong = |why: &str| Error::damaged(format!("WAL frame {}: {why}", place.key()));
        let (head, after_head) = split_head(bytes).ok_or_else(|| wrong("not a frame"))?;
        let signature = bytes.get(after_head..).and_then(<[u8]>::first_chunk::<SIGNATURE_BYTES>);
        let signature = signature.ok_or_else(|| wrong("cut short"))?;
        let header: FrameHeader =
            serde_json::from_slice(head).map_err(|error| wrong("unreadable header").because(error))?;
        if header.format != FORMAT {
            return Err(wrong("written by a newer drctl"));
        }
        if header.place != *place || header.repository != *repository {
            return Err(wrong("it belongs elsewhere"));
        }
        trust
            .verify_bytes(&header.signer, &context(&header), head, signature)
            .during(|| format!("check {}", place.key()))?;
        if header.span.end < header.span.start || (header.kind != FrameKind::Data && header.body_bytes != 0) {
            return Err(wrong("its header contradicts itself"));
        }
        Ok((header, after_head + SIGNATURE_BYTES))
    }
}

fn split_head(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (length, rest) = rest.split_at_checked(4)?;
    let length = usize::try_from(u32::from_le_bytes(length.try_into().ok()?)).ok()?;
    let head = rest.get(..length)?;
    Some((head, MAGIC.len() + 4 + length))
}
