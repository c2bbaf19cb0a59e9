//! Which timelines are served, and up to where each of them.

use std::collections::BTreeMap;

use crate::jobs::lineage::{StoredHistory, branch_of, choose};
use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Lsn, Result, SystemId, Timeline};
use crate::pg::history::{History, Reign};
use crate::repository::wal::index::BranchId;

/// A history, the branch of each timeline in it, and where serving ends at the latest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    pub(super) system_id: SystemId,
    pub(super) history: History,
    pub(super) branches: BTreeMap<Timeline, Branch>,
    /// Behind the last byte that is wanted; `None`: whatever is stored, and what comes.
    pub(super) until: Option<Lsn>,
}

impl Way {
    /// A way that somebody planned, up to `until`.
    pub fn planned(system_id: SystemId, history: History, branches: BTreeMap<Timeline, Branch>, until: Lsn) -> Self {
        Self { system_id, history, branches, until: Some(until) }
    }

    /// The newest timeline that descends from `origin`, whose `stop_lsn` is where its reader stands.
    ///
    /// # Errors
    /// Two histories claim that timeline, or one on the way is not stored.
    pub(super) fn newest(histories: &[StoredHistory], origin: &WalNeed) -> Result<Self> {
        let (history, branch) = choose(histories, origin, None)?;
        let mut branches = BTreeMap::from([(history.timeline(), branch)]);
        for Reign { timeline, .. } in history.ancestry().filter(|reign| reign.timeline < history.timeline()) {
            match branch_of(histories, origin, &history, timeline) {
                Ok(branch) => _ = branches.insert(timeline, branch),
                // WAL before the origin is wanted only where its segment began.
                Err(_) if timeline < origin.timeline => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { system_id: origin.system_id, history, branches, until: None })
    }

    pub(super) fn branch(&self, timeline: Timeline) -> Option<BranchId> {
        let branch = self.branches.get(&timeline)?.clone();
        Some(BranchId { system_id: self.system_id, timeline, branch })
    }

    /// The part of a timeline.
    pub(super) fn reign(&self, timeline: Timeline) -> Result<Reign> {
        let unknown = || Error::refused(format!("timeline {timeline} is not on the way to the newest one"));
        self.history.reign_of(timeline).ok_or_else(unknown)
    }

    /// Which timeline goes on where `timeline` ends.
    pub(super) fn next(&self, timeline: Timeline) -> Option<(Timeline, Lsn)> {
        let switch = self.history.reign_of(timeline)?.end?;
        let next = self.history.ancestry().find(|reign| reign.timeline > timeline)?;
        Some((next.timeline, switch))
    }
}
