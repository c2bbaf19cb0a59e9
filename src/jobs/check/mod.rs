//! The preflight: everything that would stop a backup or a restore, each with its fix. Reads much, changes nothing but
//! the probe object that proves conditional puts.

use std::time::Duration;

use futures::future::join_all;
use serde::Serialize;

use crate::model::{Error, Result, TargetName};
use crate::repository::health;
use crate::repository::locks::look::BackupLocks;

mod facts;
mod finding;
mod keys;
mod locks;
mod machine;
mod postgres;
mod price;
mod regions;
mod rules;
mod streams;
mod subject;

pub use finding::{Finding, Level};
pub use subject::Subject;

/// How long a region, a key holder or a server may take. All are asked at the same time.
const DEADLINE: Duration = Duration::from_secs(15);

/// Everything that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The worst first, else in the order in which it was looked at.
    pub checks: Vec<Finding>,
    /// Until when each backup is locked in each region that locks, oldest first.
    pub locks: Vec<BackupLocks>,
}

impl Report {
    /// The worst of it.
    pub fn worst(&self) -> Level {
        self.checks.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
    }
}

/// Examines everything, or of the targets only `target`. `with_locks` asks each region that locks for the lock of every
/// object that a backup needs: one small request for each.
///
/// # Errors
/// There is no such target, or no randomness. What is wrong with the subject is a finding, not an error.
pub async fn run(subject: &Subject, target: Option<&TargetName>, with_locks: bool) -> Result<Report> {
    let targets: Vec<_> =
        subject.targets.iter().filter(|known| target.is_none_or(|wanted| known.name == *wanted)).collect();
    let streamed: Vec<_> =
        subject.streamed.iter().filter(|known| target.is_none_or(|wanted| known.name == *wanted)).collect();
    if let (Some(target), true) = (target, targets.is_empty() && streamed.is_empty()) {
        return Err(Error::usage(format!("there is no target `{target}`")));
    }
    let servers = join_all(targets.iter().map(|target| postgres::check(target, subject.clock.as_ref(), DEADLINE)));
    let others = join_all(streamed.iter().map(|target| streams::check(subject, target, DEADLINE)));
    let (regions, holders, servers, others) = tokio::join!(
        health::examine(&subject.regions, subject.clock.as_ref(), DEADLINE),
        keys::try_holders(subject, DEADLINE),
        servers,
        others,
    );
    let mut checks = regions::check(subject, &regions);
    checks.extend(keys::check(subject, holders?));
    checks.extend(servers.into_iter().chain(others).flatten());
    checks.extend(machine::check(subject, &targets));
    checks.extend(price::check(subject, &targets));
    if !targets.is_empty() {
        checks.extend(machine::scratch(subject).await);
    }
    checks.extend(locks::promises(subject, &regions));
    let (found, locks) = if with_locks { locks::backups(subject).await } else { (Vec::new(), Vec::new()) };
    checks.extend(found);
    checks.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    Ok(Report { checks, locks })
}
