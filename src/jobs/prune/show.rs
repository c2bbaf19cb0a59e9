//! What earlier prunes planned and did, from the records that they left in the regions.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::model::{PruneId, Result};
use crate::repository::prune::garbage::Item;
use crate::repository::prune::plan::{self, Head, Plan};
use crate::repository::sweeps::{self, Begun, Ended};
use crate::repository::{layout, records};

/// Plans and sweeps.
#[derive(Debug, Clone, Serialize)]
pub struct History {
    /// Stored plans, newest first.
    pub plans: Vec<PlanShown>,
    /// Sweeps, newest first.
    pub sweeps: Vec<SweepShown>,
    /// Records that no region holds intact.
    pub unreadable: Vec<String>,
}

/// A stored plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanShown {
    /// Its first line.
    #[serde(flatten)]
    pub head: Head,
    /// When its grace period is over.
    pub ripe_at: DateTime<Utc>,
    /// Every object; only of a plan that was asked for by its id.
    pub objects_listed: Option<Vec<Item>>,
}

/// A sweep.
#[derive(Debug, Clone, Serialize)]
pub struct SweepShown {
    /// How it began.
    pub begun: Begun,
    /// How it ended; `null` while it runs, and when it was killed.
    pub ended: Option<Ended>,
}

/// Reads plans and sweeps, of one id or all.
///
/// # Errors
/// A region does not answer.
pub async fn run(context: &Context, only: Option<&PruneId>) -> Result<History> {
    let repository = &context.repository;
    let mut history = History { plans: Vec::new(), sweeps: Vec::new(), unreadable: Vec::new() };
    let wanted = |id: &PruneId| only.is_none_or(|only| only == id);
    for id in plan::stored(repository).await?.into_keys().rev().filter(wanted) {
        match Plan::read(repository, &id, |_| true).await {
            Ok(Plan { head, items }) => {
                let ripe_at = super::ripe_at(&id, context.prune.grace);
                history.plans.push(PlanShown { head, ripe_at, objects_listed: only.map(|_| items) });
            }
            Err(error) => history.unreadable.push(error.to_string()),
        }
    }
    let names = repository.regions.list_union(layout::SWEEPS).await?;
    let ids =
        names.iter().rev().filter_map(|key| key.strip_prefix(layout::SWEEPS)?.strip_suffix("/begun")?.parse().ok());
    for id in ids.filter(wanted) {
        let begun = records::read::<Begun>(repository, (sweeps::BEGUN, &layout::sweep(&id))).await;
        let ended = records::read::<Ended>(repository, (sweeps::ENDED, &layout::sweep_end(&id))).await.ok();
        match begun {
            Ok(begun) => history.sweeps.push(SweepShown { begun, ended }),
            Err(error) => history.unreadable.push(error.to_string()),
        }
    }
    Ok(history)
}
