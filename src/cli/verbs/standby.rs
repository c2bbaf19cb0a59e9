//! `drctl standby`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::progress;
use crate::cli::verbs::restore::{TablespaceMove, memory};
use crate::cli::verbs::restore_streams::confirm;
use crate::cli::verbs::restore_text::plan_text;
use crate::cli::verbs::standby_text::{change, promoted_text, promotion_text, status_text};
use crate::config::Settings;
use crate::jobs::Context;
use crate::jobs::restore::Memory;
use crate::jobs::standby::{self, Begin, Ended, Overrides, Record, Standby, Start, State, Status, Wish};
use crate::model::{Error, RegionName, Result, TargetName};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Keep a standby that recovers all the time from what the regions hold, until told to stop; started again on the same
    /// directory it goes on
    Start(Box<StartArgs>),
    /// Show how the standbys of this host are, and how far behind
    Status {
        /// Only this target's
        target: Option<TargetName>,
        /// The data directory of one that this state_dir does not know
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Plan the promotion of a standby, and with --execute drain it to the durable end and promote it
    Promote {
        /// Whose standby
        target: Option<TargetName>,
        /// Its data directory, where this host has several
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Do it; without this, only the plan is shown
        #[arg(long)]
        execute: bool,
        /// Do exactly the plan with this digest, or nothing
        #[arg(long, value_name = "DIGEST")]
        plan: Option<String>,
        /// Although the primary answers or streamed lately: somebody else keeps clients away from it
        #[arg(long)]
        primary_is_fenced: bool,
        /// Although stored WAL may be missing
        #[arg(long)]
        accept_loss: bool,
    },
    /// Stop a standby: its server, and what feeds it
    Stop {
        /// Whose standby
        target: Option<TargetName>,
        /// Its data directory, where this host has several
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// Arguments of `start`.
#[derive(Debug, clap::Args)]
struct StartArgs {
    /// Whose standby
    target: TargetName,
    /// Its data directory: empty, or this standby's already
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Begin with this backup [default: the newest]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Read from this region first [default: the one that answers fastest]
    #[arg(long, value_name = "NAME")]
    region: Option<RegionName>,
    /// The port of its server
    #[arg(long, default_value_t = 5432)]
    port: u16,
    /// The addresses that its server listens on, as listen_addresses takes them [default: only a socket in DIR]
    #[arg(long, value_name = "ADDRESSES")]
    listen: Option<String>,
    /// Where a tablespace is to stand; absolute paths. Repeats
    #[arg(long, value_name = "OLD=NEW")]
    tablespace: Vec<TablespaceMove>,
    /// The account that is to own the files and run PostgreSQL, when drctl is root
    #[arg(long, value_name = "USER")]
    run_as: Option<String>,
    /// What the restore may hold in memory, from 64MiB on
    #[arg(long, value_name = "SIZE", value_parser = memory, default_value = "256MiB")]
    memory: Memory,
    /// Show what would be restored, and touch nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    match args.action {
        Action::Start(args) => start(*args, session).await,
        Action::Status { target, dir } => status(target.as_ref(), dir.as_deref(), session).await,
        Action::Promote { target, dir, execute, plan, primary_is_fenced, accept_loss } => {
            let overrides = Overrides { primary_lives: primary_is_fenced, accept_loss };
            promote((target.as_ref(), dir.as_deref()), (execute, plan.as_deref()), overrides, session).await
        }
        Action::Stop { target, dir } => stop(target.as_ref(), dir.as_deref(), session).await,
    }
}

async fn context(session: &Session) -> Result<Context> {
    app::context(&session.settings()?, Role::Restore, &World::real()).await
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::usage("the directory has no path").because(error))
}

fn the_one(context: &Context, target: Option<&TargetName>, dir: Option<&Path>) -> Result<Record> {
    standby::the_one(context, target, dir.map(absolute).transpose()?.as_deref())
}

async fn start(args: StartArgs, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let mut context = app::context(&settings, Role::Restore, &World::real()).await?;
    let moves = args.tablespace.iter();
    let start = Start {
        directory: absolute(&args.to)?,
        tablespaces: moves.map(|place| (place.old.to_string_lossy().into_owned(), place.new.clone())).collect(),
        target: args.target,
        backup: args.backup,
        region: args.region,
        port: args.port,
        listen: args.listen,
        run_as: args.run_as,
        memory: args.memory,
        invocation: session.invocation(),
    };
    let record = match start.plan(&context).await? {
        Begin::Continue(record) => {
            if args.dry_run {
                session.output.print(&format!("{} goes on at {}", record.target, record.directory.display()))?;
                return Ok(Exit::Ok);
            }
            *record
        }
        Begin::Restore(prepared) => {
            if args.dry_run {
                let refused = !prepared.plan.refused.is_empty();
                match session.output.json {
                    true => session.output.print_json(&prepared.plan)?,
                    false => session.output.print(&plan_text(&prepared.plan, session.clock.now()))?,
                }
                return Ok(if refused { Exit::Refused } else { Exit::Ok });
            }
            prepared.plan.refuse()?;
            let shown = progress::show(context.progress.clone(), &session.output);
            let restored = start.restore(&context, *prepared).await;
            shown.end().await;
            restored?.0
        }
    };
    sign(&mut context, &settings).await;
    feed(&context, record, session).await
}

/// Lets the record of a promotion be signed. Without a signer it lies beside the directory.
async fn sign(context: &mut Context, settings: &Settings) {
    if settings.file.is_some() {
        context.writer = app::writer(settings, Role::Restore, &World::real()).await.ok();
    }
}

/// How often what it does is looked at, for people and for `--json`.
const LOOK: Duration = Duration::from_millis(500);

async fn feed(context: &Context, record: Record, session: &Session) -> Result<Exit> {
    let on = |kind| signal(kind).map_err(|error| Error::failed("signals cannot be received").because(error));
    let (mut interrupt, mut terminate) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    let standby = Standby::open(context, record).await?;
    let watch = standby.watch();
    let stop = CancellationToken::new();
    let mut run = std::pin::pin!(standby.run(&stop));
    let mut looks = tokio::time::interval(LOOK);
    let mut told = None;
    let ended = loop {
        tokio::select! {
            ended = &mut run => break ended?,
            _ = looks.tick() => tell(&watch(), &mut told, session)?,
            _ = interrupt.recv() => stop.cancel(),
            _ = terminate.recv() => stop.cancel(),
        }
    };
    match ended {
        Ended::Stopped if session.output.json => {}
        Ended::Stopped => session.output.print("stopped; started again it goes on where it was")?,
        Ended::Promoted(promoted) if session.output.json => session.output.print_json_line(&promoted)?,
        Ended::Promoted(promoted) => session.output.print(&promoted_text(&promoted))?,
    }
    Ok(Exit::Ok)
}

/// Tells what changes.
fn tell(status: &Status, told: &mut Option<(State, Option<String>)>, session: &Session) -> Result<()> {
    let now = (status.state, status.why.clone());
    if told.as_ref() == Some(&now) {
        return Ok(());
    }
    *told = Some(now);
    match session.output.json {
        true => session.output.print_json_line(status),
        false => session.output.print(&change(status)),
    }
}

async fn status(target: Option<&TargetName>, dir: Option<&Path>, session: &Session) -> Result<Exit> {
    let context = context(session).await?;
    let records = match dir {
        Some(_) => vec![the_one(&context, target, dir)?],
        None => standby::known(&context, target)?,
    };
    let mut all = Vec::new();
    for record in &records {
        all.push(standby::ask::status(record).await?);
    }
    match session.output.json {
        true => session.output.print_json(&serde_json::json!({ "standbys": all }))?,
        false => session.output.print(&status_text(&all, session.clock.now()))?,
    }
    Ok(if all.iter().all(Status::is_well) { Exit::Ok } else { Exit::Failed })
}

async fn promote(
    (target, dir): (Option<&TargetName>, Option<&Path>),
    (execute, digest): (bool, Option<&str>),
    overrides: Overrides,
    session: &Session,
) -> Result<Exit> {
    let settings = session.settings()?;
    let mut context = app::context(&settings, Role::Restore, &World::real()).await?;
    sign(&mut context, &settings).await;
    let record = the_one(&context, target, dir)?;
    let mut plan = standby::plan_promotion(&context, &record, overrides).await?;
    if plan.refused.is_empty() {
        plan.command = command(&record, &plan, overrides, session);
    }
    match (execute, digest) {
        (false, Some(_)) => return Err(Error::usage("--plan names what --execute is to do").hint("add --execute")),
        (false, None) => {
            match session.output.json {
                true => session.output.print_json(&plan)?,
                false => session.output.print(&promotion_text(&plan, session.clock.now()))?,
            }
            return Ok(if plan.refused.is_empty() { Exit::Ok } else { Exit::Refused });
        }
        (true, digest) => {
            digest.map_or(Ok(()), |digest| plan.must_be(digest))?;
            plan.refuse()?;
            if digest.is_none() {
                confirm((&record.target, &plan.command), session, || promotion_text(&plan, session.clock.now()))?;
            }
        }
    }
    let Overrides { accept_loss, primary_lives } = overrides;
    let promoted = standby::ask::order_promotion(&context, &record, Wish { accept_loss, primary_lives }).await?;
    match session.output.json {
        true => session.output.print_json(&promoted)?,
        false => session.output.print(&promoted_text(&promoted))?,
    }
    Ok(if promoted.lost_to.is_some() && !accept_loss { Exit::Failed } else { Exit::Ok })
}

/// The command that runs exactly this plan.
fn command(record: &Record, plan: &standby::PromotionPlan, overrides: Overrides, session: &Session) -> String {
    let quoted = crate::jobs::restore::quoted;
    let mut words: Vec<_> = session.invocation().iter().map(|word| quoted(word)).collect();
    words.push(format!("standby promote {}", record.target));
    words.push(format!("--dir {}", quoted(&record.directory.display().to_string())));
    words.extend(overrides.primary_lives.then(|| "--primary-is-fenced".to_owned()));
    words.extend(overrides.accept_loss.then(|| "--accept-loss".to_owned()));
    words.push(format!("--plan {} --execute", plan.short_digest()));
    words.join(" ")
}

async fn stop(target: Option<&TargetName>, dir: Option<&Path>, session: &Session) -> Result<Exit> {
    let context = context(session).await?;
    let record = the_one(&context, target, dir)?;
    let stopped = standby::ask::stop(&record).await?;
    match (session.output.json, stopped) {
        (true, stopped) => session.output.print_json(&serde_json::json!({ "stopped": stopped }))?,
        (false, true) => session.output.print(&format!("the standby of {} is stopped", record.target))?,
        (false, false) => session.output.print(&format!("the standby of {} did not run", record.target))?,
    }
    Ok(Exit::Ok)
}
