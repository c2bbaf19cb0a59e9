//! `drctl drill`.

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::signal::unix::{SignalKind, signal};

use crate::app::{self, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::progress;
use crate::cli::time;
use crate::cli::verbs::drill_text::text;
use crate::config::units::parse_duration;
use crate::jobs::drill::{self, Options, Outcome};
use crate::model::schedule::Pick;
use crate::model::{Error, Kind, RegionName, Result, TargetName};

/// How long a command waits for those whom it tells.
const LAST_NOTICE: Duration = Duration::from_secs(5);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The target
    pub target: TargetName,
    /// Restore from this region, alone [default: the last one of the configuration]
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
    /// The point in time.
    #[command(flatten)]
    pub point: PointArgs,
    /// From this backup, instead of the one that fits best
    #[arg(long, value_name = "ID", conflicts_with = "select")]
    pub backup: Option<String>,
    /// Leave the scratch cluster to be looked at, for this long [default when given: 24h]
    #[arg(
        long,
        value_name = "DURATION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "24h",
        value_parser = parse_duration
    )]
    pub keep: Option<Duration>,
    /// Where the scratch cluster is to stand [default: dir in [drill]]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// The account that is to run PostgreSQL, when drctl is root [default: run_as in [drill]]
    #[arg(long, value_name = "USER")]
    pub run_as: Option<String>,
}

/// Which recovery point.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub struct PointArgs {
    /// The newest point, a random one of all that there are, or the oldest backup [default: latest]
    #[arg(long, value_name = "latest|random|oldest", value_parser = pick)]
    pub select: Option<Pick>,
    /// The state at a time: '2026-11-20 03:55', in UTC unless it has an offset
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    pub to_time: Option<DateTime<Utc>>,
}

fn pick(text: &str) -> Result<Pick> {
    match text {
        "latest" => Ok(Pick::Latest),
        "random" => Ok(Pick::Random),
        "oldest" => Ok(Pick::Oldest),
        _ => Err(Error::usage(format!("`{text}` is none of latest, random, oldest"))),
    }
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let world = World::real();
    world.courier.serve(app::willing_notifiers(&settings));
    let mut context = app::drill_context(&settings, &world).await?;
    if let Some(directory) = args.dir {
        let absolute = std::path::absolute(directory);
        context.scratch.directory =
            absolute.map_err(|error| Error::usage("--dir names no directory").because(error))?;
    }
    context.scratch.run_as = args.run_as.or(context.scratch.run_as);
    let PointArgs { select, to_time } = args.point;
    let (pick, backup, keep) = (select.unwrap_or_default(), args.backup, args.keep);
    let options = Options { target: args.target, region: args.region, pick, backup, to_time, keep };
    let shown = progress::show(context.progress.clone(), &session.output);
    let gone = interrupted()?;
    let report = tokio::select! {
        report = drill::run(&context, &options) => report,
        // Dropping the drill stops its server and removes its files.
        () = gone => Err(Error::new(Kind::Cancelled, "the drill was interrupted; its scratch cluster is gone")),
    };
    shown.end().await;
    told(&world).await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, &session.output))?,
    }
    Ok(match report.outcome {
        Outcome::Pass => Exit::Ok,
        Outcome::Fail => Exit::Failed,
        Outcome::Inconclusive => Exit::Inconclusive,
    })
}

/// Waits a moment for whoever is told; the report is evidence, and this is not.
pub(super) async fn told(world: &World) {
    if !world.courier.flush(LAST_NOTICE).await {
        tracing::warn!("not everybody was told in time; what was done counts all the same");
    }
}

/// Ends with the first signal that asks this process to go.
fn interrupted() -> Result<impl Future<Output = ()>> {
    let on = |kind| signal(kind).map_err(|error| Error::failed("signals cannot be received").because(error));
    let (mut interrupt, mut terminate) = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    let mut hangup = on(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}
