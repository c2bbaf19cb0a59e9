//! `drctl restore`.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::progress;
use crate::cli::time;
use crate::cli::verbs::drill::told;
use crate::cli::verbs::restore_streams::{self, Asked, StreamArgs, confirm, directory};
use crate::cli::verbs::restore_text::{plan_text, report_text};
use crate::jobs;
use crate::jobs::restore::{self, Follow, Known, Memory, Plan, Point, Request};
use crate::model::{Error, Lsn, RegionName, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A backup id or the beginning of one, a target, or `latest`
    #[arg(value_name = "ID|TARGET|latest")]
    pub what: String,
    /// Where the data directory, or the tree of files, is to stand; of a dump, where its files go. It must be empty or
    /// left by the same restore
    #[arg(long, value_name = "DIR", required_unless_present = "into_database")]
    pub target_dir: Option<PathBuf>,
    /// Where a tablespace is to stand; absolute paths. Repeats
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<TablespaceMove>,
    /// Read from this region first [default: the first that is complete]
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
    /// The point in time.
    #[command(flatten)]
    pub point: PointArgs,
    /// Follow this timeline [default: the newest that descends from the backup]; where two servers chose one number, with
    /// its branch: 2-5f0c11aa
    #[arg(long, value_name = "N[-BRANCH]")]
    pub timeline: Option<Follow>,
    /// Reuse the data directory that stands there: pages that are those of the backup stay, the others are fetched, and
    /// what the backup does not have is removed
    #[arg(long)]
    pub delta: bool,
    /// What the restore may hold in memory, from 64MiB on
    #[arg(long, value_name = "SIZE", value_parser = memory, default_value = "256MiB")]
    pub memory: Memory,
    /// Do it; without this, only the plan is shown
    #[arg(long, help_heading = "Doing it")]
    pub execute: bool,
    /// Do exactly the plan with this digest, or nothing
    #[arg(long, value_name = "DIGEST", help_heading = "Doing it")]
    pub plan: Option<String>,
    /// Start PostgreSQL, replay, promote, and print the phases
    #[arg(long, help_heading = "Doing it")]
    pub start: bool,
    /// How WAL reaches PostgreSQL with --start: `stage` writes all of it beside the data directory first, `stream` serves it
    /// as a primary would and needs little room [default: stage, and stream where there is no room for that]
    #[arg(long, value_name = "HOW", value_parser = feed, help_heading = "Doing it")]
    pub feed: Option<restore::Feed>,
    /// The account that is to own the files and run PostgreSQL, when drctl is root
    #[arg(long, value_name = "USER", help_heading = "Doing it")]
    pub run_as: Option<String>,
    /// What means something for dumps and files alone.
    #[command(flatten)]
    pub streams: StreamArgs,
}

/// The point in time to restore to.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
#[command(next_help_heading = "To when [default: the end of the gap-free WAL]")]
pub struct PointArgs {
    /// The last commit at or before a time: '2026-11-20 03:55', in UTC unless it has an offset
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    to_time: Option<DateTime<Utc>>,
    /// A position in the WAL, inclusive
    #[arg(long, value_name = "LSN")]
    to_lsn: Option<Lsn>,
    /// A transaction, inclusive
    #[arg(long, value_name = "XID")]
    to_xid: Option<u64>,
    /// A restore point, made with pg_create_restore_point
    #[arg(long, value_name = "NAME")]
    to_name: Option<String>,
    /// As soon as the cluster is consistent: the end of the backup itself
    #[arg(long)]
    immediate: bool,
}

impl PointArgs {
    /// The one point that was asked for.
    pub fn point(&self) -> Point {
        let Self { to_time, to_lsn, to_xid, to_name, immediate } = self;
        let time = to_time.map(Point::Time);
        let position = to_lsn.map(Point::Lsn).or(to_xid.map(Point::Xid));
        let name = to_name.clone().map(Point::Name);
        time.or(position).or(name).unwrap_or(if *immediate { Point::Immediate } else { Point::End })
    }
}

/// A tablespace's old and new place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceMove {
    /// Where it stood on the source.
    pub old: PathBuf,
    /// Where it is to stand.
    pub new: PathBuf,
}

impl FromStr for TablespaceMove {
    type Err = Error;

    /// `\=` stands for an `=` inside a path, as in `pg_basebackup --tablespace-mapping`.
    fn from_str(text: &str) -> Result<Self> {
        let separator = text.match_indices('=').map(|(at, _)| at).find(|at| !text[..*at].ends_with('\\'));
        let (old, new) = separator.and_then(|at| Some((text.get(..at)?, text.get(at + 1..)?))).unzip();
        let path = |part: Option<&str>| PathBuf::from(part.unwrap_or_default().replace("\\=", "="));
        let (old, new) = (path(old), path(new));
        if old.is_absolute() && new.is_absolute() {
            return Ok(Self { old, new });
        }
        Err(Error::usage("write OLD=NEW, both as absolute paths"))
    }
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let (settings, world) = (session.settings()?, World::real());
    world.courier.serve(app::willing_notifiers(&settings));
    let mut context = app::restore_context(&settings, &world).await?;
    // The regions are asked only if the configuration does not say it already: one that hangs would be paid for twice.
    let (is_of_streams, known) = match jobs::restore_streams::is_one(&context, &args.what) {
        Some(is_of_streams) => (is_of_streams, None),
        None => {
            let known = Known::load(&context, &context.repository, &args.what).await?;
            (known.is_of_streams(&args.what)?, Some(Arc::new(known)))
        }
    };
    if is_of_streams {
        let clusters_only = args.point.point() != Point::End
            || args.timeline.is_some()
            || args.start
            || args.run_as.is_some()
            || args.delta
            || args.feed.is_some()
            || !args.tablespace.is_empty();
        let Args { what, target_dir, region, execute, plan, streams, .. } = args;
        let asked = Asked { what, target_dir, region, doing: (execute, plan), streams, clusters_only };
        return restore_streams::run(asked, &context, session).await;
    }
    args.streams.refuse()?;
    if args.execute && settings.file.is_some() {
        // Without a signer the record of it lies beside the directory.
        context.writer = app::writer(&settings, Role::Restore, &world).await.ok();
    }
    let mut request = Request { known, ..request(&args, session)? };
    let digest = match (args.execute, args.plan) {
        (true, Some(digest)) => digest,
        (execute, None) => {
            let plan = restore::plan(&context, &request).await?;
            if !execute {
                return show_plan(&plan, session);
            }
            plan.refuse()?;
            confirm((&plan.target, &plan.command), session, || plan_text(&plan, session.clock.now()))?;
            // Whoever was asked may have taken his time.
            request.known = None;
            plan.digest
        }
        (false, Some(_)) => return Err(Error::usage("--plan names what --execute is to do").hint("add --execute")),
    };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = restore::run(&context, &request, Some(&digest)).await;
    shown.end().await;
    told(&world).await;
    let report = report?;
    if session.output.json {
        session.output.print_json(&report)?;
    } else {
        session.output.print(&report_text(&report))?;
    }
    Ok(Exit::Ok)
}

fn feed(text: &str) -> Result<restore::Feed> {
    match text {
        "stage" => Ok(restore::Feed::Staged),
        "stream" => Ok(restore::Feed::Streamed),
        _ => Err(Error::usage("stage or stream")),
    }
}

pub(super) fn memory(text: &str) -> Result<Memory> {
    Memory::of(crate::config::units::parse_size(text)?)
}

fn request(args: &Args, session: &Session) -> Result<Request> {
    let directory = directory(args.target_dir.as_deref())?;
    let moves = args.tablespace.iter();
    let tablespaces = moves.map(|place| (place.old.to_string_lossy().into_owned(), place.new.clone())).collect();
    Ok(Request {
        what: args.what.clone(),
        directory,
        tablespaces,
        region: args.region.clone(),
        point: args.point.point(),
        timeline: args.timeline.clone(),
        start: args.start,
        run_as: args.run_as.clone(),
        feed: args.feed,
        standby: false,
        delta: args.delta,
        memory: args.memory,
        invocation: session.invocation(),
        known: None,
    })
}

fn show_plan(plan: &Plan, session: &Session) -> Result<Exit> {
    if session.output.json {
        session.output.print_json(plan)?;
    } else {
        session.output.print(&plan_text(plan, session.clock.now()))?;
    }
    Ok(if plan.refused.is_empty() { Exit::Ok } else { Exit::Refused })
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches};

    use super::*;

    fn parse(line: &[&str]) -> Result<Args> {
        let line = ["restore", "ledger", "--target-dir", "/srv/pg"].iter().chain(line);
        let matches = Args::augment_args(Command::new("restore")).try_get_matches_from(line);
        let matches = matches.map_err(|error| Error::usage(error.to_string()))?;
        Args::from_arg_matches(&matches).map_err(|error| Error::usage(error.to_string()))
    }

    #[test]
    fn every_point_can_be_asked_for_and_only_one() {
        let point = |line: &[&str]| parse(line).unwrap().point.point();
        assert_eq!(point(&[]), Point::End);
        assert_eq!(point(&["--immediate"]), Point::Immediate);
        assert_eq!(point(&["--to-lsn", "12/F81130D0"]), Point::Lsn(Lsn(0x12_F811_30D0)));
        assert_eq!(point(&["--to-xid", "733"]), Point::Xid(733));
        assert_eq!(point(&["--to-name", "before the deploy"]), Point::Name("before the deploy".into()));
        let Point::Time(time) = point(&["--to-time", "2026-11-20 03:55"]) else { panic!("not a time") };
        assert_eq!(time.to_rfc3339(), "2026-11-20T03:55:00+00:00");
        assert!(parse(&["--immediate", "--to-xid", "733"]).is_err());
        assert!(parse(&["--to-time", "yesterday"]).is_err());
    }

    #[test]
    fn tablespaces_move_between_absolute_paths() {
        let moved: TablespaceMove = "/old\\=a=/new".parse().unwrap();
        assert_eq!(moved, TablespaceMove { old: "/old=a".into(), new: "/new".into() });
        for text in ["", "/old", "old=/new", "/old=new", "/old=", "=/new"] {
            assert!(text.parse::<TablespaceMove>().is_err(), "{text}");
        }
    }
}
