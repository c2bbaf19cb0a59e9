//! `drctl init`.

use std::path::PathBuf;

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::Result;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to write a first configuration, with two directory regions and a recovery key
    pub dir: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    if args.dir.is_none() {
        session.settings()?;
    }
    Err(not_built_yet("init"))
}
