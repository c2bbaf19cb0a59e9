//! `drctl completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::model::{Error, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub fn run(args: &Args, session: &Session) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::cli::Arguments::command(), "drctl", &mut script);
    let script = String::from_utf8(script).map_err(|error| Error::failed("the script is not text").because(error))?;
    session.output.print(&script)?;
    Ok(Exit::Ok)
}
