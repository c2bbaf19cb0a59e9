//! Repair: bring regions that lag or are damaged back to equal. Needs no key.

use serde::Serialize;

use crate::jobs::Context;
use crate::model::{Error, Result, TargetName};
use crate::repository::catalog;
use crate::repository::locks::extend::Extended;
use crate::repository::locks::look;
use crate::repository::mend::{self, Mended, Scope};

/// What was done, or with a dry run what would be.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Region by region.
    pub regions: Vec<Mended>,
    /// Locks that ended too early and were made longer, in each region that locks.
    pub locks: Vec<Extended>,
}

impl Report {
    /// Whether a region still lacks something.
    pub fn has_debts(&self) -> bool {
        let owes = |locks: &Extended| locks.owed > 0 && !self.dry_run;
        self.regions.iter().any(|region| !region.still_missing.is_empty()) || self.locks.iter().any(owes)
    }
}

/// A name that nothing has is mistyped; one that the configuration forgot may have backups.
async fn must_exist(context: &Context, target: &TargetName) -> Result<()> {
    if context.promises().any(|(known, _)| known == target) {
        return Ok(());
    }
    let (backups, unreadable) = catalog::backups(&context.repository, Some(target)).await?;
    if !backups.is_empty() || !unreadable.is_empty() {
        return Ok(());
    }
    let known = context.promises().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    Err(Error::usage(format!("there is no target `{target}`, and no backup of one")).hint(format!("targets: {known}")))
}

/// Repairs.
///
/// # Errors
/// No region answers, or there is none of the name that was given.
pub async fn run(context: &Context, scope: &Scope) -> Result<Report> {
    if let Some(target) = &scope.target {
        must_exist(context, target).await?;
    }
    let phase = context.progress.begin("compare and copy", None);
    let mut regions = mend::mend(&context.repository, scope, &phase).await?;
    let order = context.repository.regions.all();
    regions.sort_by_key(|mended| order.iter().position(|region| region.name == mended.region));
    drop(phase);
    let locks = locks(context, scope).await?;
    Ok(Report { dry_run: scope.dry_run, regions, locks })
}

/// After the objects: what was brought just now is looked at as well.
async fn locks(context: &Context, scope: &Scope) -> Result<Vec<Extended>> {
    let repository = &context.repository;
    if repository.regions.all().iter().all(|region| region.lock.is_none()) {
        return Ok(Vec::new());
    }
    let phase = context.progress.begin("look at locks", None);
    let (backups, _) = catalog::backups(repository, scope.target.as_ref()).await?;
    let looked = look::look(repository, &backups, context.clock.now(), &phase).await;
    Ok(match scope.dry_run {
        true => looked.owed(scope.region.as_ref()),
        false => look::renew(repository, &looked, scope.region.as_ref()).await,
    })
}
