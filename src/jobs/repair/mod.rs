//! Repair: bring regions that lag or are damaged back to equal. Needs no key.

use serde::Serialize;

use crate::jobs::Context;
use crate::model::{Error, Result, TargetName};
use crate::repository::catalog;
use crate::repository::mend::{self, Mended, Scope};

/// What was done, or with a dry run what would be.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Region by region.
    pub regions: Vec<Mended>,
}

impl Report {
    /// Whether a region still lacks something.
    pub fn has_debts(&self) -> bool {
        self.regions.iter().any(|region| !region.still_missing.is_empty())
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
    Ok(Report { dry_run: scope.dry_run, regions })
}
