//! `drctl config`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::model::Result;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Print the settings with every default; secrets stay references
    Show,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub fn run(args: &Args, session: &Session) -> Result<Exit> {
    let Action::Show = args.action;
    let settings = session.settings()?;
    if session.output.json {
        session.output.print_json(&settings)?;
        return Ok(Exit::Ok);
    }
    let origin =
        settings.file.as_ref().map_or_else(|| "the command line".to_owned(), |file| file.display().to_string());
    session.output.print(&format!("# {origin}, with every default\n{}", settings.to_toml()?))?;
    Ok(Exit::Ok)
}
