//! `drctl recovery-fetch`, the `restore_command` of a restore: it gives PostgreSQL a staged WAL file, and needs no configuration,
//! no network and no key.
//!
//! `Ok(Exit::Ok)`: the file is there. `Ok(Exit::Failed)`: the restore's plan lists it as absent, and only then.
//! Everything else is an error, which [`Reader::Recovery`](crate::cli::exit::Reader) turns into 255.

use std::path::PathBuf;

use crate::cli::exit::Exit;
use crate::jobs::restore::feed::{self, Fetched};
use crate::model::Result;

/// The verb, as it stands in `restore_command`.
pub const NAME: &str = "recovery-fetch";

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the WAL is staged
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The file that PostgreSQL wants, `%f`
    pub file: String,
    /// Where it wants it, `%p`
    pub destination: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// Any doubt.
pub fn run(args: Args) -> Result<Exit> {
    Ok(match feed::fetch(&args.dir, &args.file, &args.destination)? {
        Fetched::Given => Exit::Ok,
        Fetched::Absent => Exit::Failed,
    })
}
