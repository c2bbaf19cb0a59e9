//! `drctl repair`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::{RegionName, Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this target [default: all]
    pub target: Option<TargetName>,
    /// Only this region
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let _ = (args, session.settings()?);
    Err(not_built_yet("repair"))
}
