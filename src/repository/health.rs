//! Questions to regions and key holders that a writer asks before it relies on them.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::future::join_all;

use crate::keys::keyset::Keyset;
use crate::keys::wrap_everywhere;
use crate::model::{Clock, Error, Kind, RegionName, RepositoryId, Result, Rng, SignerId, TargetName};
use crate::repository::handle::{self, RegionRecord};
use crate::repository::keysets::Holders;
use crate::repository::layout;
use crate::repository::regions::{Region, Regions, list_all};

/// What one region answered.
#[derive(Debug)]
pub struct RegionHealth {
    /// The region.
    pub region: RegionName,
    /// Where it is.
    pub address: String,
    /// Its answers; an error if it did not answer in time.
    pub answers: Result<Answers>,
}

/// The answers of a region that can be reached.
#[derive(Debug)]
pub struct Answers {
    /// Whether the server itself refuses a second put of one name; false where one writer is configured to be alone.
    pub create_only: Result<bool>,
    /// Whether it can lock objects, as far as these credentials may know.
    pub can_lock: bool,
    /// How far the server's clock is ahead of ours (negative: behind), beyond what the measurement cannot tell. `None` if
    /// the store has no clock of its own.
    pub skew: Result<Option<TimeDelta>>,
    /// The repository that it holds.
    pub repository: Result<Option<RepositoryId>>,
    /// Names below `regions/`.
    pub siblings: BTreeSet<String>,
    /// Signers whose keys it holds.
    pub signers: BTreeSet<SignerId>,
}

/// Asks every region at the same time, each for at most `deadline`.
pub async fn examine(regions: &Regions, clock: &dyn Clock, deadline: Duration) -> Vec<RegionHealth> {
    let each = regions.all().iter().map(|region| async {
        let answers = tokio::time::timeout(deadline, ask(region, clock)).await.unwrap_or_else(|_| {
            Err(Error::new(Kind::Unavailable, format!("no answer within {} s", deadline.as_secs())))
        });
        RegionHealth { region: region.name.clone(), address: region.store.address(), answers }
    });
    join_all(each).await
}

/// Whether a region answers, and holds a repository.
///
/// # Errors
/// It does not answer, not within `deadline`, or holds none that can be read.
pub async fn reach(region: &Region, deadline: Duration) -> Result<()> {
    let answered = tokio::time::timeout(deadline, handle::read_record(region)).await;
    let late = || Error::new(Kind::Unavailable, format!("no answer within {} s", deadline.as_secs()));
    answered.map_err(|_| late())?.1.map(drop)
}

async fn ask(region: &Region, clock: &dyn Clock) -> Result<Answers> {
    let store = region.store.as_ref();
    // A listing tells a bucket that does not exist from one that is empty.
    list_all(store, layout::REPOSITORY).await?;
    let proven = store.probe().await.map_err(Error::from);
    let can_lock = proven.as_ref().is_ok_and(|found| found.retention);
    let create_only = proven.map(|found| found.create_only);
    let skew = skew(region, clock).await;
    let repository = match handle::read_record(region).await.1 {
        Ok(record) => Ok(Some(record.repository)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let siblings = list_all(store, layout::REGIONS).await?.into_iter().map(|object| object.key).collect();
    let signers = list_all(store, layout::SIGNERS).await?;
    let signers = signers.iter().filter_map(|object| object.key.strip_prefix(layout::SIGNERS)?.parse().ok()).collect();
    Ok(Answers { create_only, can_lock, skew, repository, siblings, signers })
}

async fn skew(region: &Region, clock: &dyn Clock) -> Result<Option<TimeDelta>> {
    let before = clock.now();
    let server = region.store.server_time().await?;
    Ok(server.map(|server| certain_skew(before, server, clock.now())))
}

/// HTTP tells whole seconds, and the server read its clock somewhere between question and answer.
fn certain_skew(before: DateTime<Utc>, server: DateTime<Utc>, after: DateTime<Utc>) -> TimeDelta {
    let ahead = server - after;
    let behind = server + TimeDelta::seconds(1) - before;
    match () {
        () if ahead > TimeDelta::zero() => ahead,
        () if behind < TimeDelta::zero() => behind,
        () => TimeDelta::zero(),
    }
}

/// Whether a region that holds the names `siblings` knows this address.
///
/// # Errors
/// The record cannot be written down.
pub fn knows_address(siblings: &BTreeSet<String>, record: &RegionRecord) -> Result<bool> {
    Ok(siblings.contains(&handle::sibling_object(record)?.0))
}

/// How one key holder fared with a keyset that is thrown away.
#[derive(Debug)]
pub struct HolderHealth {
    /// For people.
    pub holder: String,
    /// The region that is lost together with it.
    pub region: Option<RegionName>,
    /// Whether it wrapped.
    pub wrapped: Result<()>,
}

/// Lets every holder wrap a keyset that nothing will ever be sealed with.
///
/// # Errors
/// There is no randomness.
pub async fn try_holders(
    holders: &Holders,
    repository: &RepositoryId,
    target: &TargetName,
    rng: &dyn Rng,
    deadline: Duration,
) -> Result<Vec<HolderHealth>> {
    let keyset = Keyset::generate(repository, target, rng)?;
    let wraps = wrap_everywhere(&holders.list, &keyset, deadline).await;
    let health = holders.list.iter().zip(wraps).map(|(holder, (_, wrap))| HolderHealth {
        holder: holder.describe(),
        region: holder.region().cloned(),
        wrapped: wrap.map(drop).map_err(Error::from),
    });
    Ok(health.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_763_600_459_000 + milliseconds).unwrap()
    }

    #[test]
    fn a_skew_is_told_only_beyond_what_cannot_be_measured() {
        for (before, server, after, expected) in
            [(0, 0, 100, 0), (900, 0, 950, 0), (0, 1000, 100, 900), (5000, 0, 5100, -4000), (0, 3000, 4000, 0)]
        {
            assert_eq!(certain_skew(at(before), at(server), at(after)), TimeDelta::milliseconds(expected));
        }
    }
}
