//! `drctl show`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::Result;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A backup id, or the beginning of one
    pub id: String,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let _ = (args, session.settings()?);
    Err(not_built_yet("show"))
}
