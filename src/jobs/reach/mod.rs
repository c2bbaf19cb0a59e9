//! `reach`: whether a region answers at this moment, at the price of one small object.

use std::time::Duration;

use crate::model::Result;
use crate::repository::health;
use crate::repository::regions::Region;

/// Asks one region.
///
/// # Errors
/// It does not answer within `deadline`, or holds no repository.
pub async fn run(region: &Region, deadline: Duration) -> Result<()> {
    health::reach(region, deadline).await
}
