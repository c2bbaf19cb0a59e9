//! Names and ids. Each has its own type, so that a keyset is never looked up by the id of a backup.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{Error, Result, Rng};

/// Declares a validated string newtype with `Display`, `FromStr`, serde and `as_str`.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $valid:expr, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// As written in object keys and configuration.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    return Ok(Self(text.to_owned()));
                }
                Err(Error::usage(format!(concat!("`{}` is not a ", $what), text)).hint($expected))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

fn is_label(text: &str) -> bool {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    let rest = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    first && rest && text.len() <= 40 && !text.ends_with('-')
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

name!(
    /// The name of a protected thing: `ledger`.
    TargetName,
    "target name",
    |text| is_label(text) && text != "latest",
    "use a-z, 0-9 and -, beginning with a letter, at most 40 characters; `latest` is taken"
);
name!(
    /// The name of one independent copy: `us-east-1`.
    RegionName,
    "region name",
    is_label,
    "use a-z, 0-9 and -, beginning with a letter, at most 40 characters"
);
name!(
    /// The name of a schedule, which is the stem of its file: `ledger-base`.
    ScheduleName,
    "schedule name",
    is_label,
    "use a-z, 0-9 and -, beginning with a letter, at most 40 characters"
);
name!(
    /// The repository's identity: 32 hex digits drawn at init, the same in every region.
    RepositoryId,
    "repository id",
    |text| is_hex(text, 32),
    "expected 32 hex digits"
);
name!(
    /// A keyset: 32 hex digits.
    KeysetId,
    "keyset id",
    |text| is_hex(text, 32),
    "expected 32 hex digits"
);
name!(
    /// One run of one WAL writer. The first eight hex digits are the Unix time of its start, so epochs list in the order
    /// of their clocks; nothing else relies on that order.
    EpochId,
    "epoch id",
    |text| is_hex(text, 24),
    "expected 24 hex digits"
);
name!(
    /// A holder of keys as it stands in the name of a wrap: `kms-5f0c…`, `age-9b1d…` (kind and 16 hex digits of the
    /// SHA-256 of the key's own identifier).
    HolderId,
    "key holder id",
    |text| text.split_once('-').is_some_and(|(kind, digest)| is_label(kind) && is_hex(digest, 16)),
    "expected a kind, - and 16 hex digits"
);
name!(
    /// The fingerprint of an Ed25519 public key: the first 32 hex digits of its SHA-256.
    SignerId,
    "signer fingerprint",
    |text| is_hex(text, 32),
    "expected 32 hex digits"
);

name!(
    /// A report: the target, the UTC time at which its job began, three random characters, as in [`BackupId`].
    ReportId,
    "report id",
    |text| BackupId::split(text).is_some(),
    "a report id looks like ledger-261120-033000-q4x"
);

name!(
    /// A pin or a hold: when it was made, and four random digits, as in [`PruneId`].
    PinId,
    "pin id",
    |text| Stamp::parse(text).is_some(),
    "a pin id looks like 20261120t033000z-4fa2"
);
name!(
    /// A prune: the UTC time at which it began and four random hex digits. They sort by time.
    PruneId,
    "prune id",
    |text| Stamp::parse(text).is_some(),
    "a prune id looks like 20261120t033000z-4fa2"
);

const STAMP_FORMAT: &str = "%Y%m%dt%H%M%Sz";

/// A time and four random digits, as text.
struct Stamp;

impl Stamp {
    fn draw(now: DateTime<Utc>, rng: &dyn Rng) -> Result<String> {
        Ok(format!("{}-{}", now.format(STAMP_FORMAT), random_hex(rng, 2)?))
    }

    fn parse(text: &str) -> Option<DateTime<Utc>> {
        let (stamp, digits) = text.split_once('-')?;
        let time = NaiveDateTime::parse_from_str(stamp, STAMP_FORMAT).ok()?.and_utc();
        (is_hex(digits, 4) && time.format(STAMP_FORMAT).to_string() == stamp).then_some(time)
    }
}

impl PinId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(now: DateTime<Utc>, rng: &dyn Rng) -> Result<Self> {
        Stamp::draw(now, rng).map(Self)
    }
}

impl PruneId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(now: DateTime<Utc>, rng: &dyn Rng) -> Result<Self> {
        Stamp::draw(now, rng).map(Self)
    }

    /// When it began, by its own clock and to the second.
    pub fn began(&self) -> DateTime<Utc> {
        Stamp::parse(&self.0).unwrap_or_default()
    }
}

/// PostgreSQL's system identifier, drawn at initdb; every copy of a cluster shares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let id = text.parse().map_err(|_| Error::failed(format!("`{text}` is not a system identifier")))?;
        Ok(Self(id))
    }
}

// A string in JSON: the identifier uses all 64 bits, and many readers keep numbers as 53-bit floats.
impl Serialize for SystemId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

/// A backup: target, UTC time of its start to the second, three random characters: `ledger-261120-010059-k7f`.
///
/// Ids of one target sort by time as text, and any unambiguous prefix selects a backup.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

/// Digits and letters that nobody confuses on the phone at night (no 0/o, 1/l/i, u/v).
const SUFFIX_ALPHABET: &[u8; 28] = b"23456789abcdefghjkmnpqrstwxy";
const TIME_FORMAT: &str = "%y%m%d-%H%M%S";

impl BackupId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(target: &TargetName, started: DateTime<Utc>, rng: &dyn Rng) -> Result<Self> {
        let mut bytes = [0; 3];
        rng.fill(&mut bytes)?;
        let letter = |byte: u8| char::from(SUFFIX_ALPHABET[usize::from(byte) % SUFFIX_ALPHABET.len()]);
        let suffix: String = bytes.iter().map(|byte| letter(*byte)).collect();
        Ok(Self(format!("{target}-{}-{suffix}", started.format(TIME_FORMAT))))
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The target that the id begins with.
    ///
    /// # Errors
    /// Never for an id that was parsed.
    pub fn target(&self) -> Result<TargetName> {
        Self::split(&self.0).map(|(target, _)| target).ok_or_else(|| not_an_id(&self.0))
    }

    fn split(text: &str) -> Option<(TargetName, NaiveDateTime)> {
        // The tail has a fixed width, which leaves hyphens to the target's own name: -yymmdd-hhmmss-xxx
        let (target, tail) = text.split_at_checked(text.len().checked_sub(18)?)?;
        let suffix = tail.get(15..)?;
        let fits =
            tail.starts_with('-') && tail.get(14..15)? == "-" && suffix.bytes().all(|b| SUFFIX_ALPHABET.contains(&b));
        let time = NaiveDateTime::parse_from_str(tail.get(1..14)?, TIME_FORMAT).ok()?;
        let canonical = time.format(TIME_FORMAT).to_string() == tail.get(1..14)?;
        (fits && canonical).then_some((target.parse().ok()?, time))
    }
}

fn not_an_id(text: &str) -> Error {
    Error::usage(format!("`{text}` is not a backup id")).hint("an id looks like ledger-261120-010059-k7f")
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for BackupId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::split(text).map(|_| Self(text.to_owned())).ok_or_else(|| not_an_id(text))
    }
}

impl TryFrom<String> for BackupId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

fn random_hex(rng: &dyn Rng, bytes: usize) -> Result<String> {
    let mut buffer = vec![0; bytes];
    rng.fill(&mut buffer)?;
    Ok(buffer.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl RepositoryId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(rng: &dyn Rng) -> Result<Self> {
        random_hex(rng, 16).map(Self)
    }
}

impl KeysetId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(rng: &dyn Rng) -> Result<Self> {
        random_hex(rng, 16).map(Self)
    }
}

impl EpochId {
    /// Draws a new id for an epoch that starts now.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(now: DateTime<Utc>, rng: &dyn Rng) -> Result<Self> {
        let seconds = u32::try_from(now.timestamp().max(0)).unwrap_or(u32::MAX);
        Ok(Self(format!("{seconds:08x}{}", random_hex(rng, 8)?)))
    }
}

impl ReportId {
    /// Draws a new id.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(target: &TargetName, started: DateTime<Utc>, rng: &dyn Rng) -> Result<Self> {
        BackupId::new(target, started, rng).map(|id| Self(id.0))
    }

    /// The target that the id begins with.
    ///
    /// # Errors
    /// Never for an id that was parsed.
    pub fn target(&self) -> Result<TargetName> {
        BackupId::split(&self.0).map(|(target, _)| target).ok_or_else(|| not_an_id(&self.0))
    }
}

impl HolderId {
    /// The id of a holder from its kind and the SHA-256 of its key's own identifier.
    pub fn from_digest(kind: &str, digest: &[u8; 32]) -> Self {
        let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self(format!("{kind}-{hex}"))
    }
}

impl SignerId {
    /// The fingerprint of a public key from its SHA-256.
    pub fn from_digest(digest: &[u8; 32]) -> Self {
        Self(digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    #[derive(Debug)]
    struct Fixed(u8);

    impl Rng for Fixed {
        fn fill(&self, buffer: &mut [u8]) -> Result<()> {
            buffer.fill(self.0);
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn a_backup_id_reads_back_and_keeps_its_target(target in "[a-z][a-z0-9-]{0,8}[a-z]", seconds in 946_684_800i64..4_000_000_000, byte: u8) {
            let target: TargetName = target.parse().unwrap();
            let id = BackupId::new(&target, Utc.timestamp_opt(seconds, 0).unwrap(), &Fixed(byte)).unwrap();
            prop_assert_eq!(&id.as_str().parse::<BackupId>().unwrap(), &id);
            prop_assert_eq!(id.target().unwrap(), target);
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,40}") {
            let _ = text.parse::<BackupId>();
            let _ = text.parse::<TargetName>();
            let _ = text.parse::<HolderId>();
            let _ = text.parse::<PruneId>();
        }
    }

    #[test]
    fn a_prune_id_tells_when_it_began() {
        let at = |seconds| Utc.timestamp_opt(seconds, 0).unwrap();
        let id = |seconds| PruneId::new(at(seconds), &Fixed(0xab)).unwrap();
        assert_eq!(id(1_763_600_459).as_str(), "20251120t010059z-abab");
        assert_eq!(id(1_763_600_459).as_str().parse::<PruneId>().unwrap().began(), at(1_763_600_459));
        assert!(id(1_763_600_459) < id(1_763_600_460));
        assert!(
            "20251120t010059z-ABAB".parse::<PruneId>().is_err() && "20251320t010059z-abab".parse::<PinId>().is_err()
        );
    }

    #[test]
    fn ids_of_one_target_sort_by_time() {
        let target: TargetName = "ledger".parse().unwrap();
        let at = |seconds| BackupId::new(&target, Utc.timestamp_opt(seconds, 0).unwrap(), &Fixed(3)).unwrap();
        assert!(at(1_763_600_459) < at(1_763_600_460));
        assert_eq!(at(1_763_600_459).as_str(), "ledger-251120-010059-555");
    }

    #[test]
    fn names_that_would_break_a_key_are_refused() {
        for text in ["", "Ledger", "a/b", "..", "a b", "-a", "a-", "1a", "latest", "ä"] {
            assert!(text.parse::<TargetName>().is_err(), "{text:?}");
        }
    }
}
