//! Positions in the WAL: LSN, timeline, branch, segment.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::Error;

/// A byte position in the write-ahead log, as PostgreSQL prints it: `16/B374D848`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Position zero, which PostgreSQL calls invalid and never writes to.
    pub const INVALID: Self = Self(0);

    /// Bytes from `start` to here; zero when `start` lies ahead.
    pub const fn bytes_since(self, start: Self) -> u64 {
        self.0.saturating_sub(start.0)
    }

    /// The position `bytes` further on, `None` beyond the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::usage(format!("`{text}` is not an LSN")).hint("an LSN looks like 16/B374D848");
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        let half = |part: &str| {
            let fits = (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            fits.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        let (high, low) = half(high).zip(half(low)).ok_or_else(wrong)?;
        Ok(Self(high << 32 | low))
    }
}

/// A timeline id; PostgreSQL begins at 1 and never uses 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl Timeline {
    /// The timeline of a freshly initialised cluster.
    pub const FIRST: Self = Self(1);

    /// The name of the history file that describes this timeline: `00000002.history`.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Tells apart two histories that chose the same timeline id: `0` on timeline 1, else the first eight hex digits of the
/// SHA-256 of the timeline's history file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Branch(String);

impl Branch {
    /// The only branch of timeline 1, which has no history file.
    pub fn root() -> Self {
        Self("0".to_owned())
    }

    /// The branch named by the SHA-256 of a history file.
    pub fn from_history_digest(digest: &[u8; 32]) -> Self {
        Self(digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect())
    }

    /// As written in object keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Branch {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        let digest = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if text == "0" || digest {
            return Ok(Self(text));
        }
        Err(Error::usage(format!("`{text}` is not a branch: expected 0 or eight hex digits")))
    }
}

impl From<Branch> for String {
    fn from(branch: Branch) -> Self {
        branch.0
    }
}

/// The size of a WAL segment: a power of two from 1 MiB to 1 GiB, fixed at initdb.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct WalSegmentSize(u64);

impl WalSegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: Self = Self(16 * 1024 * 1024);

    /// Bytes per segment.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The first byte of the segment that contains `lsn`.
    pub const fn segment_start(self, lsn: Lsn) -> Lsn {
        Lsn(lsn.0 - lsn.0 % self.0)
    }
}

impl TryFrom<u64> for WalSegmentSize {
    type Error = Error;

    fn try_from(bytes: u64) -> Result<Self, Error> {
        const MIB: u64 = 1024 * 1024;
        if bytes.is_power_of_two() && (MIB..=1024 * MIB).contains(&bytes) {
            return Ok(Self(bytes));
        }
        Err(Error::failed(format!("{bytes} is not a WAL segment size: expected a power of two, 1 MiB to 1 GiB")))
    }
}

impl From<WalSegmentSize> for u64 {
    fn from(size: WalSegmentSize) -> Self {
        size.0
    }
}

/// One WAL segment file by timeline and number, named as PostgreSQL names it: `000000010000000000000001`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline in the first eight digits.
    pub timeline: Timeline,
    /// Segments since position zero.
    pub number: u64,
}

impl SegmentName {
    /// The segment that holds the byte at `lsn`.
    pub const fn containing(timeline: Timeline, lsn: Lsn, size: WalSegmentSize) -> Self {
        Self { timeline, number: lsn.0 / size.0 }
    }

    /// The position of its first byte.
    pub const fn start(self, size: WalSegmentSize) -> Lsn {
        Lsn(self.number * size.0)
    }

    /// The file name; the split of the number depends on the segment size.
    pub fn file_name(self, size: WalSegmentSize) -> String {
        let per_id = 0x1_0000_0000 / size.0;
        format!("{:08X}{:08X}{:08X}", self.timeline.0, self.number / per_id, self.number % per_id)
    }

    /// Reads a file name of exactly 24 hex digits; `None` for anything else (history files, `.partial`, `.backup`).
    pub fn parse(name: &str, size: WalSegmentSize) -> Option<Self> {
        if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)) {
            return None;
        }
        let word = |range| u64::from_str_radix(name.get(range)?, 16).ok();
        let (timeline, id, segment) = (word(0..8)?, word(8..16)?, word(16..24)?);
        let per_id = 0x1_0000_0000 / size.0;
        let in_range = segment < per_id && timeline > 0;
        let timeline = Timeline(u32::try_from(timeline).ok()?);
        in_range.then_some(Self { timeline, number: id * per_id + segment })
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn an_lsn_reads_back_what_it_prints(value: u64) {
            prop_assert_eq!(Lsn(value).to_string().parse::<Lsn>().unwrap(), Lsn(value));
        }

        #[test]
        fn a_segment_name_reads_back_what_it_prints(timeline in 1u32.., lsn: u64, exponent in 20u32..=30) {
            let size = WalSegmentSize::try_from(1 << exponent).unwrap();
            let name = SegmentName::containing(Timeline(timeline), Lsn(lsn), size);
            prop_assert_eq!(SegmentName::parse(&name.file_name(size), size), Some(name));
            prop_assert_eq!(name.start(size), size.segment_start(Lsn(lsn)));
        }
    }

    #[test]
    fn postgresql_names_are_understood() {
        let name = SegmentName::containing(Timeline(0x1A), Lsn(0x16_B374_D848), WalSegmentSize::DEFAULT);
        assert_eq!(name.file_name(WalSegmentSize::DEFAULT), "0000001A00000016000000B3");
        assert_eq!(Timeline(0x1A).history_file_name(), "0000001A.history");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "/", "1", "1/", "/1", "G/0", "0/123456789", "+1/0", "-1/0", " 1/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
        for name in [
            "",
            "00000002.history",
            "000000010000000000000001.partial",
            "0000000100000000000001FF",
            "000000000000000000000001",
        ] {
            assert!(SegmentName::parse(name, WalSegmentSize::DEFAULT).is_none(), "{name:?}");
        }
        assert!(WalSegmentSize::try_from(3 << 20).is_err());
        assert!(Branch::try_from("abc".to_owned()).is_err());
    }
}
