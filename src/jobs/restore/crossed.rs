//! WAL of which two versions are stored is not crossed. Where no key opens it, the records that its writers left say so.

use futures::future::{join, join_all};

use crate::jobs::context::Context;
use crate::jobs::restore::route::{Leg, Route};
use crate::jobs::restore::words::Plan;
use crate::model::{Error, Kind, Lsn, Result};
use crate::repository::handle::Repository;
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::reader::Contradiction;

/// What speaks against the WAL of a way, leg by leg.
#[derive(Debug)]
pub(super) struct Crossed {
    legs: Vec<CrossedLeg>,
}

#[derive(Debug)]
struct CrossedLeg {
    recorded: Vec<Gap>,
    /// Records that no region holds intact.
    unknown: Vec<Error>,
    found: Vec<Contradiction>,
    unread: Vec<Error>,
}

impl Crossed {
    /// Reads the records, and compares what several epochs hold.
    pub(super) async fn read(context: &Context, repository: &Repository, route: &Route) -> Result<Self> {
        let legs = join_all(route.legs.iter().map(|leg| CrossedLeg::read(context, repository, leg))).await;
        Ok(Self { legs: legs.into_iter().collect::<Result<_>>()? })
    }

    /// Tells the plan.
    pub(super) fn tell(self, plan: &mut Plan) {
        for CrossedLeg { recorded, unknown, found, unread } in self.legs {
            plan.warnings
                .extend(unknown.iter().map(|error| format!("what was recorded of the WAL is not readable: {error}")));
            for gap in recorded {
                let what = format!("the WAL from {} to {} was stored in two versions", gap.from, gap.to);
                plan.refuse_because(what, gap.reason, before(gap.from));
            }
            for contradiction in &found {
                let error = Error::from(contradiction);
                plan.refuse_because(error.message(), error.causes().join("; "), before(contradiction.at));
            }
            // A key that is missing is told where the backup is opened.
            let damage = unread.iter().filter(|error| !matches!(error.kind(), Kind::NoKey | Kind::Unavailable));
            plan.warnings.extend(damage.map(|error| format!("overlapping WAL was not compared: {error}")));
        }
    }
}

impl CrossedLeg {
    async fn read(context: &Context, repository: &Repository, leg: &Leg) -> Result<Self> {
        let recorded = gaps::read(repository, &leg.branch);
        let compared = leg.log.compare(repository, &context.ring, (leg.from, leg.to));
        let (recorded, (found, unread)) = join(recorded, compared).await;
        let crossed = |gap: &Gap| gap.contradiction && gap.from < leg.to && leg.from < gap.to;
        let (recorded, unknown) = recorded?;
        let recorded = recorded.into_iter().filter(crossed).collect();
        Ok(Self { recorded, unknown, found, unread })
    }
}

fn before(at: Lsn) -> String {
    format!("restore to a point before it (--to-lsn {at}), or from a backup that began behind it: drctl list")
}
