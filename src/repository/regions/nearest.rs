//! Which region answers fastest from here.

use std::time::Duration;

use futures::future::join_all;

use crate::model::{Clock, RegionName};
use crate::repository::layout;
use crate::repository::regions::{Region, Regions};
use crate::store::Depth;

/// One answer may be slow by chance.
const TRIES: usize = 3;
/// A region that takes longer is asked last anyway.
const PATIENCE: Duration = Duration::from_secs(5);

/// The region with the quickest answer; without an answer, and among equals, the first of the configuration.
pub async fn nearest(regions: &Regions, clock: &dyn Clock) -> Option<RegionName> {
    let measured = join_all(regions.all().iter().map(|region| measure(region, clock))).await;
    let named = regions.all().iter().zip(measured);
    let quickest = named.filter_map(|(region, took)| Some((took?, region))).min_by_key(|(took, _)| *took);
    quickest.map(|(_, region)| region.name.clone()).or_else(|| regions.all().first().map(|first| first.name.clone()))
}

async fn measure(region: &Region, clock: &dyn Clock) -> Option<Duration> {
    let mut best = None::<Duration>;
    for _ in 0..TRIES {
        let began = clock.monotonic();
        let asked = tokio::time::timeout(PATIENCE, region.store.list(layout::SIGNERS, Depth::Level, None)).await;
        asked.ok()?.ok()?;
        let took = clock.monotonic().saturating_sub(began);
        best = Some(best.map_or(took, |best| best.min(took)));
    }
    // Differences below a millisecond say nothing about where a region is.
    best.map(|best| Duration::from_millis(u64::try_from(best.as_millis()).unwrap_or(u64::MAX)))
}
