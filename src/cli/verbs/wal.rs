//! `drctl wal`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::render::Output;
use crate::cli::verbs::wal_text::{self, status_line};
use crate::config::{Source, units};
use crate::daemon::control::socket_path;
use crate::jobs::wal::acceptance::{Acceptance, leave};
use crate::jobs::wal::bundle;
use crate::jobs::wal::fetch::borrow::borrow;
use crate::jobs::wal::fetch::{Asker, Fetched, Request, fetch};
use crate::jobs::wal::takeover::{TakenOver, take_over_once};
use crate::jobs::wal::{Position, State, Stream, control, wal_status};
use crate::jobs::{Context, Target};
use crate::model::{Error, Kind, RegionName, Result, TargetName};

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
    /// Show the WAL that can be recovered, per region
    Status {
        /// Only this target
        target: Option<TargetName>,
    },
    /// Take a file from PostgreSQL's archive_command: ends with 0 once it is safe, else with 1
    #[command(after_help = ARCHIVE_HELP)]
    Push {
        /// The file, as PostgreSQL's %p names it
        path: PathBuf,
        /// The target; needed where the configuration has several
        #[arg(long)]
        target: Option<TargetName>,
        /// The target's socket: with it no configuration is read
        #[arg(long, value_name = "PATH", conflicts_with = "target")]
        socket: Option<PathBuf>,
    },
    /// Give PostgreSQL's restore_command a file: ends with 0, with 1 if it exists nowhere, with 255 in doubt
    #[command(after_help = FETCH_HELP)]
    Fetch {
        /// The file, as PostgreSQL's %f names it
        file: String,
        /// Where it is to be, as %p says
        path: PathBuf,
        /// The target; needed where the configuration has several
        #[arg(long)]
        target: Option<TargetName>,
        /// The socket of a daemon that drills or verifies: with it no configuration is read, and nobody else is asked
        #[arg(long, value_name = "PATH", conflicts_with = "target")]
        socket: Option<PathBuf>,
    },
    /// Put the frames of old WAL together into few objects; the frames go with a later prune
    Bundle {
        /// Only this target
        target: Option<TargetName>,
        /// WAL that was written so long ago
        #[arg(long, value_name = "DURATION", default_value = "2d", value_parser = units::parse_duration)]
        older_than: Duration,
        /// Do it, rather than say what would be done
        #[arg(long)]
        execute: bool,
    },
    /// Seal out whoever streamed a target's WAL before, and bring what it left to the write quorum
    Takeover {
        /// The target
        target: TargetName,
        /// Go on although regions that may hold acknowledged WAL cannot be read; it is logged, and holds for an hour
        #[arg(long)]
        accept_loss: bool,
    },
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    match args.action {
        Action::Stream { target } => stream(&target, session).await,
        Action::Status { target } => status(target.as_ref(), session).await,
        Action::Fetch { file, path, socket: Some(socket), .. } => borrowed(&socket, &file, &path).await,
        Action::Fetch { file, path, target, socket: None } => fetched(file, path, target.as_ref(), session).await,
        Action::Push { path, target, socket } => push(&path, target, socket, session).await,
        Action::Bundle { target, older_than, execute } => {
            bundle_old(bundle::Options { target, older_than, execute }, session).await
        }
        Action::Takeover { target, accept_loss } => take_over(&target, accept_loss, session).await,
    }
}

async fn bundle_old(options: bundle::Options, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    if let Some(target) = &options.target {
        settings.target(target)?;
    }
    let context = app::context(&settings, Role::Write, &World::real()).await?;
    let report = bundle::run(&context, &options).await?;
    let exit = if report.owed > 0 { Exit::Debts } else { Exit::Ok };
    if session.output.json {
        session.output.print_json_line(&report)?;
    } else {
        session.output.print(&wal_text::bundled(&report))?;
    }
    Ok(exit)
}

async fn take_over(target: &TargetName, accept_loss: bool, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    settings.target(target)?;
    let context = app::context(&settings, Role::Write, &World::real()).await?;
    let target = context.target(target)?;
    if accept_loss {
        accept_what_is_away(&context, target, session).await?;
    }
    let taken = take_over_once(&context, target).await?;
    if session.output.json {
        session.output.print_json_line(&taken)?;
        return Ok(Exit::Ok);
    }
    let TakenOver { target, sealed, adopted, .. } = &taken;
    let end = match (taken.end, taken.timeline) {
        (Some(end), Some(timeline)) => format!("its WAL ends at {end} on timeline {timeline}"),
        _ => "no WAL of it is stored".to_owned(),
    };
    let text = format!("{target} is taken over: {end}, {sealed} epochs sealed, {adopted} frames adopted");
    session.output.print(&format!("{text}\n  next: drctl wal stream {target}, or the daemon"))?;
    Ok(Exit::Ok)
}

/// The word is good for the regions that are away now, for an hour, for whoever takes over with this state directory.
async fn accept_what_is_away(context: &Context, target: &Target, session: &Session) -> Result<()> {
    let away: BTreeSet<RegionName> = context.repository.regions.silent().await.into_keys().collect();
    if away.is_empty() {
        session.output.note("every region answers: there is no loss to accept");
        return Ok(());
    }
    let names = away.iter().map(RegionName::as_str).collect::<Vec<_>>().join(", ");
    let by = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| app::host_name());
    leave(context, &target.name, &Acceptance { regions: away, by, at: session.clock.now() })?;
    session.output.note(&format!("acknowledged WAL that only {names} holds is given up, for takeovers within an hour"));
    Ok(())
}

const ARCHIVE_HELP: &str = "In postgresql.conf:
  archive_mode = on
  archive_command = 'drctl wal push --socket /run/drctl/ledger.sock %p'
It hands the file to drctl daemon (or drctl wal stream) of this host, which needs to name the account of
PostgreSQL in [daemon] allow. It ends with 1 whenever the file is not surely safe; PostgreSQL keeps it.";

const FETCH_HELP: &str = "For a standby, or a recovery made by hand (`drctl restore` brings a command of its own):
  restore_command = 'drctl --config /etc/drctl/drctl.toml wal fetch %f %p'
It asks the daemon of this host (which gives WAL where it drills or verifies, to its own account, root and whom
[daemon] allow names, and reads the next segments ahead); where none gives it, it opens the regions itself, with the
credentials of role restore: a daemon that only writes cannot open WAL. The last segment is filled up with zeros behind
its last record. PostgreSQL takes 1 to 125 for the end of WAL, so every doubt is 255.";

async fn fetched(file: String, path: PathBuf, target: Option<&TargetName>, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let target = settings.the_target(target)?.name.clone();
    // PostgreSQL runs its commands in the data directory.
    let data_dir = PathBuf::from(".");
    let socket = socket_path(&settings.repository.state_dir);
    if let Some(asker) = Asker::of(&data_dir)? {
        match borrow(&socket, &asker, (&file, &path)).await {
            Ok(Some(fetched)) => return Ok(exit(fetched)),
            Ok(None) => {}
            Err(error) if matches!(error.kind(), Kind::Refused | Kind::Damaged) => return Err(error),
            // What a daemon cannot tell now may be told by the regions.
            Err(error) => tracing::info!(%error, "the daemon gives no WAL; the regions are asked"),
        }
    }
    let context = app::context(&settings, Role::Restore, &World::real()).await?;
    let request = Request { target, file, path, data_dir };
    fetch(&context, &request).await.map(exit)
}

async fn borrowed(socket: &Path, file: &str, path: &Path) -> Result<Exit> {
    let unknown = || {
        let error = Error::usage("which cluster asks is not known");
        error.hint("run it in the data directory, as PostgreSQL does")
    };
    let asker = Asker::of(Path::new("."))?.ok_or_else(unknown)?;
    let nobody = || {
        let error = Error::new(Kind::Unavailable, "nobody gives WAL").because(socket.display());
        error.hint("start drctl daemon so that it drills or verifies, and name this account in [daemon] allow")
    };
    borrow(socket, &asker, (file, path)).await?.map(exit).ok_or_else(nobody)
}

const fn exit(fetched: Fetched) -> Exit {
    match fetched {
        Fetched::Copied => Exit::Ok,
        Fetched::Absent => Exit::Failed,
    }
}

async fn push(path: &Path, target: Option<TargetName>, socket: Option<PathBuf>, session: &Session) -> Result<Exit> {
    let (socket, target) = match socket {
        Some(socket) => (socket, None),
        None => {
            let settings = session.settings()?;
            let target = settings.the_target(target.as_ref())?;
            let Source::Postgres(postgres) = &target.source else {
                return Err(Error::refused(format!("{} is no PostgreSQL cluster: it has no WAL", target.name)));
            };
            (postgres.control_socket.clone(), Some(target.name.clone()))
        }
    };
    let receipt = control::push(&socket, target.as_ref(), path).await?;
    if session.output.json {
        session.output.print_json_line(&receipt)?;
    }
    Ok(Exit::Ok)
}

/// How often the position is looked at for people and for `--json`.
const LOOK: Duration = Duration::from_millis(200);

async fn stream(target: &TargetName, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    settings.target(target)?;
    let (mut interrupt, mut terminate) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    let context = app::context(&settings, Role::Write, &World::real()).await?;
    let stream = Stream::start(&context, context.target(target)?).await?;
    let mut teller = Teller::new(&session.output);
    let mut looks = tokio::time::interval(LOOK);
    while !stream.is_over() {
        tokio::select! {
            _ = looks.tick() => teller.look(&stream.position())?,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    teller.looked_away();
    let last = stream.watch();
    let outcomes = stream.stop().await?;
    teller.stopped(&last())?;
    let debts = outcomes.iter().filter(|outcome| outcome.missing_objects > 0).count();
    Ok(if debts == 0 { Exit::Ok } else { Exit::Debts })
}

fn on(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::failed("signals cannot be received").because(error))
}

/// Tells what changes, and on a terminal where things stand.
struct Teller<'o> {
    output: &'o Output,
    line: ProgressBar,
    told: Option<State>,
}

impl<'o> Teller<'o> {
    fn new(output: &'o Output) -> Self {
        Self { output, line: output.status_line(), told: None }
    }

    fn look(&mut self, position: &Position) -> Result<()> {
        self.line.set_message(status_line(position));
        if self.told == Some(position.state) || position.start_lsn.is_none() && position.last_error.is_none() {
            return Ok(());
        }
        let first = self.told.is_none();
        self.told = Some(position.state);
        if self.output.json {
            return self.output.print_json_line(position);
        }
        if let (true, Some(lsn), Some(reason)) = (first, position.start_lsn, &position.start_reason) {
            let timeline = position.timeline.map(|timeline| format!(" on timeline {timeline}")).unwrap_or_default();
            self.output.print(&format!("{} streams from {lsn}{timeline}: {reason}", position.target))?;
        }
        if !(first && position.state == State::Streaming) {
            self.output.note(&change(position));
        }
        Ok(())
    }

    fn looked_away(&self) {
        self.line.finish_and_clear();
    }

    fn stopped(&self, position: &Position) -> Result<()> {
        if self.output.json {
            return self.output.print_json_line(position);
        }
        self.output.print(&format!("{} stopped: everything up to {} is durable", position.target, position.durable_lsn))
    }
}

/// `ledger: waiting for regions: …`
fn change(position: &Position) -> String {
    let error = position.last_error.as_ref().filter(|_| position.state != State::Streaming);
    let error = error.map(|error| format!(": {error}")).unwrap_or_default();
    format!("{}: {}{error}", position.target, position.state.words())
}

async fn status(target: Option<&TargetName>, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    if let Some(target) = target {
        settings.target(target)?;
    }
    let context = app::context(&settings, Role::Restore, &World::real()).await?;
    let status = wal_status(&context, target).await?;
    match session.output.json {
        true => session.output.print_json(&status)?,
        false => session.output.print(&wal_text::text(&status, session.clock.now(), &session.output))?,
    }
    Ok(Exit::Ok)
}
