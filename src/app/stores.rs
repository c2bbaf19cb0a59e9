//! Regions: from settings to stores, and the one function that stacks the wrappers around one.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;

use crate::app::{Role, World};
use crate::config::{AwsAccess, Checksum, LockMode, Region as RegionSettings, S3Settings, Settings, Store};
use crate::model::{Error, RegionName, Result, ResultExt};
use crate::repository::handle::RegionRecord;
use crate::repository::regions::lock_rule::Rule;
use crate::repository::regions::{Region, Regions};
use crate::store::absent::AbsentStore;
use crate::store::dir::DirStore;
use crate::store::s3::{S3Checksum, S3Credentials, S3LockMode, S3Options, S3Store};
use crate::store::wrap::meter::Meter;
use crate::store::wrap::retry::{Retry, RetryPolicy};
use crate::store::{ObjectStore, StoreError};

/// All regions; one that cannot be opened stands in its place and says why.
///
/// # Errors
/// The settings contradict themselves.
pub async fn regions(settings: &Settings, role: Role, world: &World) -> Result<Regions> {
    let mut list = Vec::new();
    for region in &settings.regions {
        list.push(self::region(settings, region, role, world).await?);
    }
    let repository = &settings.repository;
    let regions = Regions::new(list, repository.write_quorum, repository.lowest_quorum())?;
    let degrade_after = repository.degrade.as_ref().map(|degrade| degrade.after);
    let regions = regions.detached_after(repository.detach_after).degraded_after(degrade_after);
    Ok(regions.timed_by(Arc::clone(&world.clock)))
}

/// One region of `settings`; if it cannot be opened, one stands in its place that says why.
///
/// # Errors
/// The settings contradict themselves.
pub async fn region(settings: &Settings, region: &RegionSettings, role: Role, world: &World) -> Result<Region> {
    let store = match connect(region, role, world).await? {
        Ok(store) => stacked(store, (&region.name, settings.regions.len()), world),
        Err(error) => Arc::new(AbsentStore::new(region.place().to_string(), &error)),
    };
    Ok(Region { name: region.name.clone(), store, lock: lock(region, world) })
}

/// How long a region locks what is written to it.
pub(super) fn lock(region: &RegionSettings, world: &World) -> Option<Rule> {
    let Store::S3(s3) = &region.store else { return None };
    let keep = TimeDelta::from_std(s3.lock?.keep).unwrap_or(TimeDelta::MAX);
    Some(Rule { keep, clock: Arc::clone(&world.clock) })
}

/// The wrappers around a store, in their order.
pub(super) fn stacked(
    store: Arc<dyn ObjectStore>,
    (name, regions): (&RegionName, usize),
    world: &World,
) -> Arc<dyn ObjectStore> {
    // With several regions the next one is asked sooner than the same one a third time; alone, patience is all there is.
    let policy = match regions {
        1 => RetryPolicy::default(),
        _ => RetryPolicy { attempts: 2, deadline: Duration::from_secs(30), ..RetryPolicy::default() },
    };
    let (meters, clock) = (Arc::clone(&world.meters), Arc::clone(&world.clock));
    let store = Arc::new(Meter::new(store, name.to_string(), meters, clock));
    Arc::new(Retry::new(store, policy, Arc::clone(&world.rng)))
}

/// One store: configuration errors are outside, a store that does not open is inside.
async fn connect(
    region: &RegionSettings,
    role: Role,
    world: &World,
) -> Result<Result<Arc<dyn ObjectStore>, StoreError>> {
    Ok(match &region.store {
        Store::Directory { path } => DirStore::open(path).await.map(|store| Arc::new(store) as Arc<dyn ObjectStore>),
        Store::S3(s3) => {
            let (clock, rng) = (Arc::clone(&world.clock), Arc::clone(&world.rng));
            let store = S3Store::connect(s3_options(s3, role)?, clock, rng).await;
            store.map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    })
}

/// Makes the directories of directory regions; buckets must exist.
///
/// # Errors
/// A directory cannot be made.
pub async fn create_directories(settings: &Settings) -> Result<()> {
    for region in &settings.regions {
        if let Store::Directory { path } = &region.store {
            DirStore::create(path).await.map_err(Error::from).during(|| format!("create region {}", region.name))?;
        }
    }
    Ok(())
}

/// The regions' addresses, which every region stores.
pub fn siblings(settings: &Settings) -> Vec<RegionRecord> {
    let record = |region: &RegionSettings| {
        let (endpoint, aws_region, path_style) = match &region.store {
            Store::S3(s3) => (s3.endpoint.clone(), s3.aws_region.clone(), s3.path_style),
            Store::Directory { .. } => (None, None, false),
        };
        RegionRecord { name: region.name.clone(), url: region.place().to_string(), endpoint, aws_region, path_style }
    };
    settings.regions.iter().map(record).collect()
}

/// The roles beside `write` that its credentials serve as well.
pub(super) fn shared_roles(region: &RegionSettings) -> Option<(RegionName, String)> {
    let Store::S3(s3) = &region.store else { return None };
    let others = [("restore", &s3.credentials.restore), ("prune", &s3.credentials.prune)];
    let shared: Vec<_> =
        others.into_iter().filter(|(_, access)| **access == s3.credentials.write).map(|(role, _)| role).collect();
    let roles = ["write"].into_iter().chain(shared.iter().copied()).collect::<Vec<_>>().join(" and ");
    (!shared.is_empty()).then(|| (region.name.clone(), roles))
}

pub(super) fn s3_options(s3: &S3Settings, role: Role) -> Result<S3Options> {
    let checksum = match s3.checksum {
        Checksum::WhenSupported => S3Checksum::WhenSupported,
        Checksum::WhenRequired => S3Checksum::WhenRequired,
    };
    Ok(S3Options {
        prefix: s3.bucket.prefix.clone(),
        endpoint: s3.endpoint.clone(),
        region: s3.aws_region.clone(),
        path_style: s3.path_style,
        credentials: resolve(access_of(s3, role))?,
        checksum,
        attempt_timeout: s3.timeout,
        single_writer: s3.single_writer,
        lock_mode: match s3.lock.map(|lock| lock.mode) {
            None | Some(LockMode::Compliance) => S3LockMode::Compliance,
            Some(LockMode::Governance) => S3LockMode::Governance,
        },
        ..S3Options::new(s3.bucket.bucket.clone())
    })
}

pub(super) const fn access_of(s3: &S3Settings, role: Role) -> &AwsAccess {
    match role {
        Role::Write => &s3.credentials.write,
        Role::Restore => &s3.credentials.restore,
        Role::Prune => &s3.credentials.prune,
    }
}

pub(super) fn resolve(access: &AwsAccess) -> Result<Option<S3Credentials>> {
    Ok(match access {
        AwsAccess::Chain => None,
        AwsAccess::Profile { profile } => Some(S3Credentials::Profile(profile.clone())),
        AwsAccess::Keys { access_key_id, secret_access_key, session_token } => Some(S3Credentials::Static {
            access_key_id: access_key_id.read()?.expose().to_owned(),
            secret_access_key: secret_access_key.read()?.expose().to_owned(),
            session_token: session_token
                .as_ref()
                .map(|token| token.read())
                .transpose()?
                .map(|text| text.expose().to_owned()),
        }),
    })
}
