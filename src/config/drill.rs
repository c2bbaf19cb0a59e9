//! `[drill]`, and the assertions of a target.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::file::Section;
use crate::config::show;
use crate::model::{Error, Result};

/// Libraries that a copy of production may have: they count, explain and check, and never act by themselves, on a clock
/// or on the network.
const HARMLESS: [&str; 10] = [
    "auth_delay",
    "auto_explain",
    "passwordcheck",
    "pg_hint_plan",
    "pg_qualstats",
    "pg_stat_kcache",
    "pg_stat_monitor",
    "pg_stat_statements",
    "pgaudit",
    "sepgsql",
];

/// `[drill]`: where scratch clusters live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drill {
    /// The directory below which each drill has its own.
    pub dir: PathBuf,
    /// The account that scratch clusters run as, when drctl is root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// Libraries of `shared_preload_libraries` that a scratch cluster loads; others are left out and named.
    pub preload: Vec<String>,
}

impl Drill {
    /// Without a `[drill]`.
    pub(super) fn below(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("scratch"), run_as: None, preload: HARMLESS.map(str::to_owned).to_vec() }
    }
}

/// `[targets.NAME.assertions.NAME]`: what holds in every good copy of a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assertion {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// A query that gives one row with one column.
    pub sql: String,
    /// What it gives, as text.
    pub expect: String,
    /// The database to ask.
    pub database: String,
    /// Statements that break what it is about, so that a drill sees it fail; they are rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<String>,
}

impl show::Named for Assertion {
    fn name(&self) -> &str {
        &self.name
    }
}

pub(super) fn drill(section: &Section<'_>, state_dir: &Path) -> Result<Drill> {
    let default = Drill::below(state_dir);
    let dir = section.path("dir")?.unwrap_or(default.dir);
    let run_as = section.string("run_as")?.map(str::to_owned);
    let named = section.strings("preload")?.into_iter().map(str::to_owned).collect();
    let preload = if section.has("preload") { named } else { default.preload };
    section.finish()?;
    Ok(Drill { dir, run_as, preload })
}

pub(super) fn assertions(section: &Section<'_>) -> Result<Vec<Assertion>> {
    section.named("assertions")?.iter().map(|(name, section)| assertion(name, section)).collect()
}

fn assertion(name: &str, section: &Section<'_>) -> Result<Assertion> {
    // The heartbeat is a check of that name in every report.
    if name.is_empty() || name == "heartbeat" {
        return Err(section.wrong_here(&Error::usage("an assertion needs a name of its own")));
    }
    let text = |key| section.string(key).map(|text| text.map(str::to_owned));
    let sql = text("sql")?.ok_or_else(|| section.missing("sql"))?;
    let expect = text("expect")?.unwrap_or_else(|| "t".to_owned());
    let database = text("database")?.unwrap_or_else(|| "postgres".to_owned());
    let control = text("control")?;
    section.finish()?;
    Ok(Assertion { name: name.to_owned(), sql, expect, database, control })
}
