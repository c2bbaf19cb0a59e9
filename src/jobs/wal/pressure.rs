//! `on_pressure`: when the slot fills the server's disk. A slot that goes costs a gap; a full disk stops production.

use crate::jobs::context::{OnPressure, Target};
use crate::source::postgres::room::Slot;

/// Shares of the room for WAL, in percent, at which somebody is told.
pub const TOLD_AT: [u8; 2] = [50, 75];

/// Decides when the slot goes: at the share that is configured, and never while it gets emptier.
#[derive(Debug)]
pub(super) struct Judge {
    /// `None` = it never goes.
    limit: Option<u8>,
    last: Option<Slot>,
}

impl Judge {
    pub(super) fn new(target: &Target) -> Self {
        let limit = (target.on_pressure == Some(OnPressure::DropSlot)).then_some(target.pressure_percent);
        Self { limit, last: None }
    }

    /// Whether the slot is to go. Two looks in a row say so, or one when the disk is full before a third would come.
    pub(super) fn is_over(&mut self, slot: Option<&Slot>) -> bool {
        let (Some(limit), Some(slot)) = (self.limit, slot) else {
            self.last = None;
            return false;
        };
        let before = self.last.replace(slot.clone());
        let is_high = |slot: &Slot| slot.disk_percent().is_some_and(|percent| percent >= limit);
        let (true, Some(before)) = (is_high(slot), before) else { return false };
        if slot.retained_bytes < before.retained_bytes {
            // What was read is being stored: in a moment the server may remove it.
            return false;
        }
        let (free, was_free) = (slot.free_bytes.unwrap_or_default(), before.free_bytes.unwrap_or_default());
        is_high(&before) || was_free.saturating_sub(free).saturating_mul(2) >= free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(retained: u64, free: u64) -> Slot {
        let (retained_bytes, free_bytes) = (Some(retained), Some(free));
        Slot { name: "s".into(), active: true, wal_status: None, retained_bytes, room_bytes: free_bytes, free_bytes }
    }

    fn judge(looks: &[(u64, u64)]) -> Vec<bool> {
        let mut judge = Judge { limit: Some(90), last: None };
        looks.iter().map(|(retained, free)| judge.is_over(Some(&slot(*retained, *free)))).collect()
    }

    #[test]
    fn a_slot_goes_at_the_second_look_above_the_limit_and_not_below_it() {
        assert_eq!(judge(&[(80, 20), (89, 11), (89, 11), (89, 11)]), [false; 4]);
        assert_eq!(judge(&[(900, 100), (905, 95)]), [false, true], "one look may be wrong");
        assert_eq!(judge(&[(880, 120), (901, 99), (905, 95)]), [false, false, true]);
    }

    #[test]
    fn a_disk_that_is_full_before_the_next_look_is_no_time_for_two() {
        assert_eq!(judge(&[(850, 150), (920, 80)]), [false, true]);
    }

    #[test]
    fn a_slot_that_gets_emptier_stays() {
        assert_eq!(judge(&[(950, 50), (949, 51), (930, 40), (920, 30), (921, 29)]), [false, false, false, false, true]);
    }

    #[test]
    fn nothing_goes_without_the_policy_or_without_a_measure() {
        let unknown = Slot { free_bytes: None, ..slot(1000, 0) };
        let mut judge = Judge { limit: Some(90), last: None };
        assert_eq!([judge.is_over(Some(&unknown)), judge.is_over(Some(&unknown)), judge.is_over(None)], [false; 3]);
        let mut keep = Judge { limit: None, last: None };
        assert_eq!([keep.is_over(Some(&slot(99, 1))), keep.is_over(Some(&slot(99, 1)))], [false; 2]);
    }
}
