//! `drctl daemon`.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::app::World;
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::config::units;
use crate::daemon::{self, Options, Wish};
use crate::model::schedule::Job;
use crate::model::{Error, Result};
use crate::observe::task;

/// What the daemon logs unless it is told otherwise: it has no terminal to talk to.
pub const LOG_LEVEL: &str = "info";

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these jobs, so that roles can live on different hosts: wal, backup, dump, files, verify, drill,
    /// repair, prune, bundle [default: all]
    #[arg(long, value_name = "JOBS", value_delimiter = ',', value_parser = job)]
    only: Vec<Job>,
    /// How long running jobs may go on after SIGTERM
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = units::parse_duration)]
    grace: Duration,
}

fn job(text: &str) -> Result<Job> {
    let known = [Job::Wal].into_iter().chain(Job::RUNNABLE);
    known.clone().find(|job| job.as_str() == text).ok_or_else(|| {
        let words = known.map(Job::as_str).collect::<Vec<_>>().join(", ");
        Error::usage(format!("the daemon runs no `{text}`")).hint(format!("there are {words}"))
    })
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let (wish, wishes) = mpsc::channel(8);
    for (kind, wanted) in [
        (SignalKind::terminate(), Wish::Stop),
        (SignalKind::interrupt(), Wish::Stop),
        (SignalKind::hangup(), Wish::Reload),
    ] {
        let signal = signal(kind).map_err(|error| Error::failed("signals cannot be received").because(error))?;
        task::spawn("signals", forward(signal, wanted, wish.clone()));
    }
    let options = Options { only: args.only.into_iter().collect::<BTreeSet<_>>(), grace: args.grace };
    daemon::run(settings, options, World::real(), wishes).await?;
    Ok(Exit::Ok)
}

async fn forward(mut signal: Signal, wanted: Wish, wish: mpsc::Sender<Wish>) {
    while signal.recv().await.is_some() {
        if wish.send(wanted).await.is_err() {
            return;
        }
    }
}
