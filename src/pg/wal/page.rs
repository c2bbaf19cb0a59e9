//! Headers of WAL pages, and the check of a segment file.

use super::WalError;
use crate::model::{Lsn, SegmentName, SystemId, Timeline, WalSegmentSize};
use crate::pg::le::{u16_at, u32_at, u64_at};

/// Bytes per WAL page; servers built with another `XLOG_BLCKSZ` are refused.
pub const WAL_PAGE_SIZE: u64 = 8192;

/// A short header with its four bytes of alignment.
pub(super) const SHORT_HEADER: usize = 24;
/// The header of a segment's first page.
pub(super) const LONG_HEADER: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const HAS_LONG_HEADER: u16 = 0x0002;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
const ALL_FLAGS: u16 = 0x000F;

/// `XLOG_PAGE_MAGIC` by major version.
const MAGICS: [(u32, u16); 6] = [(13, 0xD106), (14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118)];

/// The magic number of WAL pages of a major version.
pub fn magic_of(major: u32) -> Option<u16> {
    MAGICS.iter().find(|(known, _)| *known == major).map(|(_, magic)| *magic)
}

/// `XLogPageHeaderData`, with the long form's fields on the first page of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// Which version wrote it.
    pub magic: u16,
    /// The timeline of the server that wrote the page.
    pub timeline: Timeline,
    /// The page's own position.
    pub address: Lsn,
    /// Bytes that a record from the page before still needs; 0 if the page begins with a record.
    pub remaining: u32,
    /// The page takes the place of one that a crash left unwritten in the middle of a record.
    pub overwrites: bool,
    /// The fields of a segment's first page.
    pub long: Option<LongFields>,
}

/// What only the first page of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongFields {
    /// The cluster.
    pub system_id: SystemId,
    /// Bytes per segment.
    pub segment_size: u32,
}

impl PageHeader {
    /// Reads the header of the page at `at`, from exactly as many bytes as it has there.
    ///
    /// Bytes 20 to 24 are alignment, and `XLP_BKP_REMOVABLE` is advice that no server reads: both are ignored.
    pub(super) fn parse(bytes: &[u8], at: Lsn) -> Result<Self, WalError> {
        let wrong = |what| WalError::Page { at, what };
        Self::fields(bytes).ok_or_else(|| wrong("short header"))?.map_err(wrong)
    }

    fn fields(bytes: &[u8]) -> Option<Result<Self, &'static str>> {
        let flags = u16_at(bytes, 2)?;
        let remaining = u32_at(bytes, 16)?;
        let is_long = flags & HAS_LONG_HEADER != 0;
        let header = Self {
            magic: u16_at(bytes, 0)?,
            timeline: Timeline(u32_at(bytes, 4)?),
            address: Lsn(u64_at(bytes, 8)?),
            remaining,
            overwrites: flags & FIRST_IS_OVERWRITE_CONTRECORD != 0,
            long: match bytes.len() {
                LONG_HEADER.. => {
                    Some(LongFields { system_id: SystemId(u64_at(bytes, 24)?), segment_size: u32_at(bytes, 32)? })
                }
                _ => None,
            },
        };
        let fault = if !MAGICS.iter().any(|(_, magic)| *magic == header.magic) {
            Some("unknown magic number")
        } else if flags & !ALL_FLAGS != 0 {
            Some("unknown flags")
        } else if is_long != header.long.is_some() {
            Some("long header in the wrong place")
        } else if is_long && u64::from(u32_at(bytes, 36)?) != WAL_PAGE_SIZE {
            Some("page size is not 8192")
        } else if (flags & FIRST_IS_CONTRECORD != 0) != (remaining != 0) {
            Some("continuation flag and length disagree")
        } else if header.overwrites && remaining != 0 {
            Some("a page both continues and overwrites a record")
        } else {
            None
        };
        Some(fault.map_or(Ok(header), Err))
    }
}

/// The identity of a segment, from its first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The file's timeline and number.
    pub name: SegmentName,
    /// The cluster that wrote it.
    pub system_id: SystemId,
    /// Bytes per segment.
    pub segment_size: WalSegmentSize,
    /// The timeline in its first page: older than that of the name if the timeline begins within the segment.
    pub page_timeline: Timeline,
    /// The magic number of its pages.
    pub magic: u16,
}

/// Checks that `bytes` is a whole segment, and the one that `name` says.
///
/// # Errors
/// [`WalError::Segment`] or [`WalError::Page`]; the records inside are not looked at.
pub fn check_segment(name: &str, bytes: &[u8]) -> Result<SegmentHeader, WalError> {
    check_segment_head(name, bytes, bytes.len() as u64)
}

/// The same for a file of `length` bytes of which `bytes` are the first.
///
/// # Errors
/// As [`check_segment`].
pub fn check_segment_head(name: &str, bytes: &[u8], length: u64) -> Result<SegmentHeader, WalError> {
    let wrong = |what| WalError::Segment { name: name.to_owned(), what };
    let head = bytes.get(..LONG_HEADER).ok_or_else(|| wrong("shorter than its header"))?;
    let header = PageHeader::parse(head, Lsn(u64_at(head, 8).unwrap_or_default()))?;
    let long = header.long.ok_or_else(|| wrong("no long header"))?;
    let segment_size =
        WalSegmentSize::try_from(u64::from(long.segment_size)).map_err(|_| wrong("impossible segment size"))?;
    if length != segment_size.bytes() {
        return Err(wrong("wrong size"));
    }
    let parsed = SegmentName::parse(name, segment_size).ok_or_else(|| wrong("not the name of a segment"))?;
    if Some(header.address.0) != parsed.number.checked_mul(segment_size.bytes()) {
        return Err(wrong("its first page belongs elsewhere"));
    }
    // A promotion copies the old timeline's part of the segment, page headers included.
    if header.timeline > parsed.timeline || header.timeline.0 == 0 {
        return Err(wrong("its first page is of a timeline newer than its name"));
    }
    Ok(SegmentHeader {
        name: parsed,
        system_id: long.system_id,
        segment_size,
        page_timeline: header.timeline,
        magic: header.magic,
    })
}
