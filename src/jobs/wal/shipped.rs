//! What has been shipped: a position, and the branch that it is on.
//!
//! A position alone says nothing. A server that dies may have streamed further than the standby that takes its place had
//! come, so a frame of the old timeline that lands late ends where the new timeline has commits of its own. Whoever took
//! its end for one of the new timeline would acknowledge commits that are stored nowhere.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::model::{EpochId, Lsn};
use crate::repository::wal::index::BranchId;

/// What has been shipped.
#[derive(Debug, Clone, Default)]
pub(super) struct Shipped {
    /// The branch that is streamed; none before a stream begins, and after the shipper died.
    branch: Option<BranchId>,
    /// Every record of its history that ends at or before this position is durable.
    pub(super) durable: Lsn,
    /// Where the newest frame ends that the regions were given.
    pub(super) begun: Lsn,
    /// Since when.
    pub(super) at: Option<DateTime<Utc>>,
    /// The newest commit time in it.
    pub(super) last_commit: Option<DateTime<Utc>>,
    /// The open epoch.
    pub(super) epoch: Option<EpochId>,
    /// Since when, on the monotonic clock, a frame has been on its way.
    pub(super) busy_since: Option<Duration>,
    /// Why a frame cannot be shipped at present.
    pub(super) trouble: Option<String>,
    /// What was streamed and is stored in another version, too.
    pub(super) contradiction: Option<String>,
}

impl Shipped {
    /// From here on `branch` is streamed, and all of its history up to `lsn` is durable. Nothing may be on its way that
    /// belongs to it and lies before.
    pub(super) fn stand_at(&mut self, branch: &BranchId, lsn: Lsn) {
        (self.branch, self.durable, self.begun) = (Some(branch.clone()), lsn, lsn);
    }

    /// All of a branch up to `end` has landed. Of another one than is streamed it does not matter here.
    pub(super) fn reach(&mut self, branch: &BranchId, end: Lsn) {
        if self.branch.as_ref() == Some(branch) {
            self.durable = self.durable.max(end);
        }
    }

    /// How far the history of `branch` is durable, if that is known.
    pub(super) fn on(&self, branch: &BranchId) -> Option<Lsn> {
        self.at().filter(|(streamed, _)| *streamed == branch).map(|(_, durable)| durable)
    }

    /// The same with the branch that is streamed.
    pub(super) fn at(&self) -> Option<(&BranchId, Lsn)> {
        self.branch.as_ref().map(|branch| (branch, self.durable))
    }

    /// The shipper died: what was on its way may be stored or not.
    pub(super) fn lose(&mut self) {
        (self.branch, self.busy_since, self.epoch) = (None, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Branch, SystemId, Timeline};

    #[test]
    fn a_frame_of_another_branch_moves_nothing_however_late_it_lands() {
        let branch =
            |timeline| BranchId { system_id: SystemId(7), timeline: Timeline(timeline), branch: Branch::root() };
        let (old, new) = (branch(1), branch(2));
        let mut shipped = Shipped::default();
        shipped.stand_at(&old, Lsn(100));
        assert_eq!((shipped.on(&old), shipped.on(&new)), (Some(Lsn(100)), None));
        shipped.stand_at(&new, Lsn(150));
        shipped.reach(&old, Lsn(200));
        assert_eq!((shipped.on(&old), shipped.on(&new)), (None, Some(Lsn(150))));
        shipped.reach(&new, Lsn(160));
        assert_eq!(shipped.on(&new), Some(Lsn(160)));
        shipped.lose();
        shipped.reach(&new, Lsn(170));
        assert_eq!((shipped.at(), shipped.durable), (None, Lsn(160)));
    }
}
