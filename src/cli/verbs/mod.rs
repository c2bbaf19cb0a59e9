//! One file per verb: its arguments, and the function that runs it and renders what came of it.

use clap::Subcommand;

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::model::Result;

pub mod backup;
pub mod check;
pub mod compact;
pub mod completions;
pub mod config;
pub mod daemon;
pub mod drill;
mod drill_text;
pub mod init;
pub mod jobs;
pub mod keys;
pub mod list;
pub mod metrics;
pub mod notify;
pub mod pin;
pub mod prune;
pub mod recovery_fetch;
pub mod repair;
pub mod report;
pub mod restore;
pub mod restore_streams;
mod restore_text;
pub mod runs;
pub mod schedule;
mod schedule_dry_run;
pub mod show;
pub mod standby;
mod standby_text;
pub mod status;
pub mod verify;
pub mod wal;
mod wal_text;

/// The verbs, in the order in which people meet them.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create the repository in every region; with DIR, write a first configuration there
    Init(init::Args),
    /// Look for what would stop a backup or a restore, with the fix for each finding
    Check(check::Args),
    /// Back up a target (a cluster, dumps, files) into every region
    Backup(backup::Args),
    /// Stream a target's WAL, or look at what was streamed
    Wal(wal::Args),
    /// List backups and the time that can be restored
    List(list::Args),
    /// Show one backup
    Show(show::Args),
    /// Show the worst first: is the data safe, what is wrong, what to type next
    Status(status::Args),
    /// Plan a restore, and run it with --execute
    Restore(Box<restore::Args>),
    /// Keep a standby that recovers all the time from the regions, and promote it
    Standby(standby::Args),
    /// Restore a target into a scratch cluster, start it, check it, and measure RPO and recovery time
    Drill(drill::Args),
    /// Look at the reports that drills left in the regions
    Report(report::Args),
    /// Check stored backups in every region
    Verify(verify::Args),
    /// Bring a lagging or damaged region back from a healthy one
    Repair(repair::Args),
    /// Remove what retention no longer wants: plan it, and with --execute sweep what an earlier plan found too
    Prune(prune::Args),
    /// Leave packs that are mostly dead: plan it, and with --execute make copies of the backups that need a little of them
    Compact(compact::Args),
    /// Keep a backup whatever retention says, or list what is kept so
    Pin(pin::PinArgs),
    /// End the pins of a backup
    Unpin(pin::UnpinArgs),
    /// Keep everything of a target, backups and WAL, until it is released
    Hold(pin::HoldArgs),
    /// End the holds of a target
    Release(pin::ReleaseArgs),
    /// Pay wraps of keysets that key holders owe
    Keys(keys::Args),
    /// Stream WAL and run jobs to their schedules, until told to stop
    Daemon(daemon::Args),
    /// Show what the daemon of this host runs, waits for, and does next
    Jobs(jobs::JobsArgs),
    /// Ask the daemon of this host to run a schedule now
    Run(jobs::Named),
    /// Let a schedule skip its slots for some time
    Pause(jobs::PauseArgs),
    /// End a pause
    Resume(jobs::Named),
    /// Show what became of the slots of schedules, the newest first
    Runs(runs::Args),
    /// Look at the schedules
    Schedule(schedule::Args),
    /// Print what /metrics of a daemon would say, or write it for node_exporter
    Metrics(metrics::Args),
    /// Try out who is told when something is wrong
    Notify(notify::Args),
    /// Look at the configuration
    Config(config::Args),
    /// Print the completion script of a shell
    Completions(completions::Args),
    /// Hand a staged WAL file to PostgreSQL
    #[command(name = recovery_fetch::NAME, hide = true)]
    RecoveryFetch(recovery_fetch::Args),
}

impl Verb {
    /// What is logged when neither the command line nor `RUST_LOG` says it; none leaves it to the log.
    pub fn log_level(&self) -> Option<&'static str> {
        let unset = std::env::var_os("RUST_LOG").is_none_or(|value| value.is_empty());
        (unset && matches!(self, Self::Daemon(_))).then_some(daemon::LOG_LEVEL)
    }
}

/// Runs one verb.
///
/// # Errors
/// What stopped it.
pub async fn run(verb: Verb, session: &Session) -> Result<Exit> {
    match verb {
        Verb::Init(args) => init::run(args, session).await,
        Verb::Check(args) => check::run(args, session).await,
        Verb::Backup(args) => backup::run(args, session).await,
        Verb::Wal(args) => wal::run(args, session).await,
        Verb::List(args) => list::run(args, session).await,
        Verb::Show(args) => show::run(args, session).await,
        Verb::Status(args) => status::run(args, session).await,
        Verb::Restore(args) => restore::run(*args, session).await,
        Verb::Standby(args) => standby::run(args, session).await,
        Verb::Drill(args) => drill::run(args, session).await,
        Verb::Report(args) => report::run(&args, session).await,
        Verb::Verify(args) => verify::run(args, session).await,
        Verb::Repair(args) => repair::run(args, session).await,
        Verb::Prune(args) => prune::run(args, session).await,
        Verb::Compact(args) => compact::run(args, session).await,
        Verb::Pin(args) => pin::pin(args, session).await,
        Verb::Unpin(args) => pin::unpin(args, session).await,
        Verb::Hold(args) => pin::hold(args, session).await,
        Verb::Release(args) => pin::release(args, session).await,
        Verb::Keys(args) => keys::run(&args, session).await,
        Verb::Daemon(args) => daemon::run(args, session).await,
        Verb::Jobs(args) => jobs::list(args, session).await,
        Verb::Run(args) => jobs::run(args, session).await,
        Verb::Pause(args) => jobs::pause(args, session).await,
        Verb::Resume(args) => jobs::resume(args, session).await,
        Verb::Runs(args) => runs::run(args, session).await,
        Verb::Schedule(args) => schedule::run(args, session),
        Verb::Metrics(args) => metrics::run(args, session).await,
        Verb::Notify(args) => notify::run(args, session).await,
        Verb::Config(args) => config::run(&args, session),
        Verb::Completions(args) => completions::run(&args, session),
        Verb::RecoveryFetch(args) => recovery_fetch::run(args),
    }
}
