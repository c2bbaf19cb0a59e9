//! `drctl verify`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::{RegionName, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A backup id, or the beginning of one [default: all]
    pub id: Option<String>,
    /// Compare what is stored with its digests, without opening anything: needs no key
    #[arg(long)]
    pub scrub: bool,
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
    Err(not_built_yet("verify"))
}
