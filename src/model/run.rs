//! Runs: what became of a slot.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::schedule::Job;
use crate::model::{ScheduleName, TargetName};

/// The version of [`Run`] that this program writes and reads.
pub const FORMAT: u32 = 1;

/// How a slot ended. Every slot ends in exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Success,
    /// Done and durable at the quorum, but a region still lacks some of it.
    Debts,
    /// It ran and did not succeed, in any attempt.
    Failed,
    /// It was stopped because it took too long.
    Timeout,
    /// It came while an earlier slot of the schedule ran or waited, or while somebody else did the same.
    SkippedOverlap,
    /// It came while the schedule was paused.
    SkippedPaused,
    /// Nobody was there to run it.
    Missed,
    /// Whoever ran it died or was told to stop; what it came to is not known.
    Interrupted,
}

impl Outcome {
    /// Every one.
    pub const ALL: [Self; 8] = [
        Self::Success,
        Self::Debts,
        Self::Failed,
        Self::Timeout,
        Self::SkippedOverlap,
        Self::SkippedPaused,
        Self::Missed,
        Self::Interrupted,
    ];

    /// As people and JSON read it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Debts => "debts",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::SkippedOverlap => "skipped_overlap",
            Self::SkippedPaused => "skipped_paused",
            Self::Missed => "missed",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether what the schedule is for was done.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Success | Self::Debts)
    }
}

/// The record of one slot, or of several missed ones in a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// [`FORMAT`].
    pub format: u32,
    /// The schedule.
    pub schedule: ScheduleName,
    /// The slot: the planned instant, before jitter. Of several missed ones the last.
    pub slot: DateTime<Utc>,
    /// The first of the slots that this record is about.
    pub first_slot: DateTime<Utc>,
    /// How many they are; more than one only when all were missed.
    pub slots: u64,
    /// What was to be done.
    pub job: Job,
    /// About which target; `null` = all.
    pub target: Option<TargetName>,
    /// How it ended.
    pub outcome: Outcome,
    /// Whether it ran late, because nobody was there when it came.
    pub caught_up: bool,
    /// How often it was tried.
    pub attempts: u32,
    /// When the first attempt began.
    pub started_at: Option<DateTime<Utc>>,
    /// When the outcome was known.
    pub ended_at: DateTime<Utc>,
    /// What it came to, or why it did not, in words.
    pub detail: Option<String>,
    /// The host.
    pub host: String,
    /// drctl's version.
    pub drctl: String,
}

/// A slot on its way: it has no outcome yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    /// The schedule.
    pub schedule: ScheduleName,
    /// The slot.
    pub slot: DateTime<Utc>,
    /// What is to be done.
    pub job: Job,
    /// About which target; `null` = all.
    pub target: Option<TargetName>,
    /// Whether it runs late.
    pub caught_up: bool,
    /// Attempts so far.
    pub attempts: u32,
    /// When the first one began; `null` while the slot waits.
    pub started_at: Option<DateTime<Utc>>,
}

/// No slot of a schedule runs until then. Every pause has an end and a reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    /// Slots before this moment are skipped.
    pub until: DateTime<Utc>,
    /// Why.
    pub reason: String,
}

const SLOT_FORMAT: &str = "%Y%m%dt%H%M%Sz";

/// A slot as it stands in names of objects: `20261120t010000z`. They sort by time.
pub fn slot_text(slot: DateTime<Utc>) -> String {
    slot.format(SLOT_FORMAT).to_string()
}

/// Reads [`slot_text`].
pub fn parse_slot(text: &str) -> Option<DateTime<Utc>> {
    let slot = NaiveDateTime::parse_from_str(text, SLOT_FORMAT).ok()?.and_utc();
    (slot_text(slot) == text).then_some(slot)
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn slots_read_back_and_sort_by_time(a in 0i64..4_000_000_000, b in 0i64..4_000_000_000) {
            let at = |seconds| DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
            prop_assert_eq!(parse_slot(&slot_text(at(a))), Some(at(a)));
            prop_assert_eq!(slot_text(at(a)).cmp(&slot_text(at(b))), a.cmp(&b));
        }

        #[test]
        fn no_other_name_is_a_slot(text in "[0-9tz-]{0,20}") {
            if let Some(slot) = parse_slot(&text) {
                prop_assert_eq!(slot_text(slot), text);
            }
        }
    }
}
