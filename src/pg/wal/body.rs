//! What the body of a few kinds of records says, read as it streams by: a body may be a gigabyte, what is kept of it is
//! never more than one field.

use super::{RecordKind, timestamp};
use crate::model::Lsn;
use crate::pg::le::{i64_at, u32_at, u64_at};

pub(super) const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_STANDBY: u8 = 8;

/// The bits of `xl_info` that belong to the resource manager.
const RMGR_INFO: u8 = 0xF0;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

const XACT_OPERATION: u8 = 0x70;
const XACT_HAS_INFO: u8 = 0x80;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;

// Sections of a commit or abort record, in this order, each present if its bit of xinfo is set.
const HAS_DBINFO: u32 = 1;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_DROPPED_STATS: u32 = 1 << 8;
const HAS_INVALS: u32 = 1 << 3;
const HAS_TWOPHASE: u32 = 1 << 4;

/// Whether the rest of the segment behind this record is void.
pub(super) fn is_switch(rmgr: u8, info: u8) -> bool {
    rmgr == RM_XLOG && info & RMGR_INFO == XLOG_SWITCH
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The id byte of the next header before the main data.
    Tag,
    ShortLength,
    LongLength,
    Time,
    Xinfo,
    /// A count at the head of the section with this bit.
    Count(u32),
    Twophase,
    RestorePoint,
    Overwritten,
    /// Everything needed is known.
    Done,
    /// The body is not what its header promised.
    Broken,
}

/// Reads one body.
#[derive(Debug, Clone)]
pub(super) struct Body {
    rmgr: u8,
    info: u8,
    /// Bytes of one dropped-statistics item; `None` if the version is unknown.
    stats_item: Option<u64>,
    step: Step,
    /// The field being collected; 72 bytes at most.
    field: Vec<u8>,
    skip: u64,
    xinfo: u32,
    found: Found,
}

#[derive(Debug, Clone, Default)]
struct Found {
    time: Option<i64>,
    xid: Option<u32>,
    name: Vec<u8>,
    overwritten: Option<u64>,
}

impl Body {
    /// A reader for the body of a record with this header, written by a server with this page magic.
    pub(super) fn new(rmgr: u8, info: u8, magic: Option<u16>) -> Self {
        let operation = info & XACT_OPERATION;
        let wanted = match rmgr {
            RM_XACT => matches!(operation, XACT_COMMIT | XACT_ABORT | XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED),
            RM_XLOG => matches!(info & RMGR_INFO, XLOG_RESTORE_POINT | XLOG_OVERWRITE_CONTRECORD),
            _ => false,
        };
        let step = if wanted { Step::Tag } else { Step::Done };
        // Version 18 widened the object's id from four bytes to eight.
        let stats_item = magic.map(|magic| if magic >= 0xD118 { 16 } else { 12 });
        Self { rmgr, info, stats_item, step, field: Vec::new(), skip: 0, xinfo: 0, found: Found::default() }
    }

    /// Takes the next bytes.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
                bytes = &bytes[skipped..];
                self.skip -= skipped as u64;
                continue;
            }
            let Some(width) = self.width() else { return };
            let (taken, rest) = bytes.split_at((width - self.field.len()).min(bytes.len()));
            self.field.extend_from_slice(taken);
            bytes = rest;
            if self.field.len() == width {
                self.step = self.advance().unwrap_or(Step::Broken);
                self.field.clear();
            }
        }
    }

    fn width(&self) -> Option<usize> {
        match self.step {
            Step::Tag | Step::ShortLength => Some(1),
            Step::LongLength | Step::Xinfo | Step::Count(_) | Step::Twophase => Some(4),
            Step::Time | Step::Overwritten => Some(8),
            Step::RestorePoint => Some(72),
            Step::Done | Step::Broken => None,
        }
    }

    /// The step after the one whose field is complete.
    fn advance(&mut self) -> Option<Step> {
        Some(match self.step {
            Step::Tag => match *self.field.first()? {
                255 => Step::ShortLength,
                254 => Step::LongLength,
                253 => self.skipping(2, Step::Tag),
                252 => self.skipping(4, Step::Tag),
                // A reference to a block: none of the kinds read here has one.
                _ => Step::Broken,
            },
            Step::ShortLength | Step::LongLength => match (self.rmgr, self.info & RMGR_INFO) {
                (RM_XLOG, XLOG_RESTORE_POINT) => Step::RestorePoint,
                (RM_XLOG, _) => Step::Overwritten,
                _ => Step::Time,
            },
            Step::Time => {
                self.found.time = i64_at(&self.field, 0);
                if self.info & XACT_HAS_INFO != 0 { Step::Xinfo } else { Step::Done }
            }
            Step::Xinfo => {
                self.xinfo = u32_at(&self.field, 0)?;
                self.skip = if self.xinfo & HAS_DBINFO != 0 { 8 } else { 0 };
                self.section_after(0)
            }
            Step::Count(section) => {
                let item = match section {
                    HAS_SUBXACTS => 4,
                    HAS_RELATIONS => 12,
                    HAS_DROPPED_STATS => self.stats_item?,
                    _ => 16,
                };
                self.skip = u64::from(u32_at(&self.field, 0)?) * item;
                self.section_after(section)
            }
            Step::Twophase => {
                self.found.xid = u32_at(&self.field, 0);
                Step::Done
            }
            Step::RestorePoint => {
                self.found.time = i64_at(&self.field, 0);
                self.found.name = self.field.get(8..)?.split(|byte| *byte == 0).next()?.to_vec();
                Step::Done
            }
            Step::Overwritten => {
                self.found.overwritten = u64_at(&self.field, 0);
                Step::Done
            }
            Step::Done | Step::Broken => self.step,
        })
    }

    fn skipping(&mut self, bytes: u64, next: Step) -> Step {
        self.skip = bytes;
        next
    }

    fn section_after(&self, section: u32) -> Step {
        const COUNTED: [u32; 4] = [HAS_SUBXACTS, HAS_RELATIONS, HAS_DROPPED_STATS, HAS_INVALS];
        if self.xinfo & HAS_TWOPHASE == 0 {
            return Step::Done;
        }
        let behind = COUNTED.iter().position(|known| *known == section).map_or(0, |index| index + 1);
        let next = COUNTED.iter().skip(behind).find(|bit| self.xinfo & **bit != 0);
        next.map_or(Step::Twophase, |bit| Step::Count(*bit))
    }

    /// The position of the record that an overwriting one replaces.
    pub(super) fn overwritten(&self) -> Option<Lsn> {
        self.found.overwritten.map(Lsn)
    }

    /// What the record means, once its whole body was fed; `None` if it is not well-formed.
    pub(super) fn kind(&self) -> Option<RecordKind> {
        if self.step != Step::Done {
            return None;
        }
        let time = || timestamp(self.found.time?);
        let kind = match (self.rmgr, self.info & RMGR_INFO) {
            (RM_XLOG, 0x00) => RecordKind::CheckpointShutdown,
            (RM_XLOG, 0x10) => RecordKind::CheckpointOnline,
            (RM_XLOG, XLOG_SWITCH) => RecordKind::Switch,
            (RM_XLOG, 0x60) => RecordKind::ParameterChange,
            (RM_XLOG, XLOG_RESTORE_POINT) => {
                let name = String::from_utf8_lossy(&self.found.name).into_owned();
                RecordKind::RestorePoint { name, time: time()? }
            }
            (RM_XLOG, 0x90) => RecordKind::EndOfRecovery,
            (RM_XLOG, XLOG_OVERWRITE_CONTRECORD) => RecordKind::OverwriteContrecord,
            (RM_STANDBY, 0x10) => RecordKind::RunningXacts,
            (RM_XACT, info) => match info & XACT_OPERATION {
                XACT_COMMIT => RecordKind::Commit { time: time()? },
                XACT_ABORT => RecordKind::Abort { time: time()? },
                XACT_COMMIT_PREPARED => RecordKind::CommitPrepared { xid: self.found.xid?, time: time()? },
                XACT_ABORT_PREPARED => RecordKind::AbortPrepared { xid: self.found.xid?, time: time()? },
                _ => RecordKind::Other,
            },
            _ => RecordKind::Other,
        };
        Some(kind)
    }
}
