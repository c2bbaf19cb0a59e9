//! `drctl list`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::{Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this target
    pub target: Option<TargetName>,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let _ = (args, session.settings()?);
    Err(not_built_yet("list"))
}
