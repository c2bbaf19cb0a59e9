//! Repair: bring regions that lag or are damaged back to equal. Needs no key.

use serde::Serialize;

use crate::jobs::Context;
use crate::model::Result;
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

/// Repairs.
///
/// # Errors
/// No region answers, or there is none of the name that was given.
pub async fn run(context: &Context, scope: &Scope) -> Result<Report> {
    let phase = context.progress.begin("compare and copy", None);
    let mut regions = mend::mend(&context.repository, scope, &phase).await?;
    let order = context.repository.regions.all();
    regions.sort_by_key(|mended| order.iter().position(|region| region.name == mended.region));
    Ok(Report { dry_run: scope.dry_run, regions })
}
