//! `restore` of what is no cluster: an archive of files into a directory, a dump into a database, or either as the files
//! that they are. A plan first, which touches nothing, then the run of exactly that plan.

use std::path::PathBuf;

use crate::jobs::context::Context;
use crate::model::{Error, RegionName, Result};

mod directory;
mod plan;
mod run;
mod words;

pub use words::{Backup, Destination, Plan, Report};

use plan::Prepared;

/// What is to be restored, and where.
#[derive(Debug, Clone)]
pub struct Request {
    /// A backup id or its beginning, a target, or `latest`.
    pub what: String,
    /// Where to.
    pub to: To,
    /// Read from this region first.
    pub region: Option<RegionName>,
    /// The words before the verb, with which the command that the plan prints finds the same repository.
    pub invocation: Vec<String>,
}

/// Where to.
#[derive(Debug, Clone)]
pub enum To {
    /// Into a directory: the tree of files, or the dumps as files.
    Directory {
        /// The directory, absolute.
        path: PathBuf,
        /// The stored streams as they are, also where they could be unpacked.
        raw: bool,
    },
    /// Into a database.
    Database(Box<Database>),
}

/// A database that a dump goes into.
#[derive(Debug, Clone)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Which of the dumped databases; not needed where there is one.
    pub from: Option<String>,
    /// The server, without a password; without it the one that the target's configuration names.
    pub conninfo: Option<String>,
    /// How.
    pub options: Options,
}

/// How a dump goes into a database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// The database may hold something already.
    pub into_nonempty: bool,
    /// Leave owners and grants out.
    pub no_owner: bool,
    /// Leave tablespaces out.
    pub no_tablespaces: bool,
    /// Not all in one transaction.
    pub many_transactions: bool,
}

/// Whether the configuration says that `what` is a target whose backups this job restores, or one of a cluster; `None` if it
/// knows no such target.
pub fn is_one(context: &Context, what: &str) -> Option<bool> {
    let cluster = context.targets.iter().any(|target| target.name.as_str() == what);
    let streamed = context.streamed.iter().any(|target| target.name.as_str() == what);
    (cluster || streamed).then_some(streamed && !cluster)
}

/// Computes the plan; nothing is touched.
///
/// # Errors
/// No backup fits, or no region answers. What merely stands in the way is in [`Plan::refused`].
pub async fn plan(context: &Context, request: &Request) -> Result<Plan> {
    let mut plan = Prepared::new(context, request).await?.plan;
    if !plan.refused.is_empty() {
        plan.command.clear();
    }
    Ok(plan)
}

/// Runs the plan that has this digest (its beginning).
///
/// # Errors
/// The plan is another one than the one named, or refuses; or what stopped the run. It says what is left behind.
pub async fn run(context: &Context, request: &Request, digest: &str) -> Result<Report> {
    const LEAST: usize = 6;
    let prepared = Prepared::new(context, request).await?;
    let plan = &prepared.plan;
    if digest.len() < LEAST || !plan.digest.starts_with(digest) {
        let error = Error::refused(format!("the plan is not {digest} any more, it is {}", plan.short_digest()));
        let error = error.because("the backup, the destination or the options differ from those of that plan");
        return Err(error.hint(format!("look at the plan again, then: {}", plan.command)));
    }
    plan.refuse()?;
    run::run(context, request, prepared).await
}
