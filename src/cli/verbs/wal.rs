//! `drctl wal`.

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::verbs::not_built_yet;
use crate::model::{Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Receive a target's WAL and store it in every region, until told to stop
    Stream {
        /// The target
        target: TargetName,
    },
    /// Show the time that can be restored, per region
    Status {
        /// Only this target
        target: Option<TargetName>,
    },
    /// Take a target's WAL over from another writer
    Takeover {
        /// The target
        target: TargetName,
        /// Go on although regions that may hold acknowledged WAL cannot be read; it is recorded
        #[arg(long)]
        accept_loss: bool,
    },
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    match args.action {
        Action::Stream { target } => {
            settings.target(&target)?;
            Err(not_built_yet("wal stream"))
        }
        Action::Status { target } => {
            let _ = target;
            Err(not_built_yet("wal status"))
        }
        Action::Takeover { target, accept_loss } => {
            let _ = (settings.target(&target)?, accept_loss);
            Err(not_built_yet("wal takeover"))
        }
    }
}
