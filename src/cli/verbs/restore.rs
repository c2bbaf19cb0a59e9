//! `drctl restore`.

use std::path::PathBuf;
use std::str::FromStr;

use chrono::{DateTime, Utc};

use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::time;
use crate::cli::verbs::not_built_yet;
use crate::model::{Error, Lsn, RegionName, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A backup id or the beginning of one, a target, or `latest`
    #[arg(value_name = "ID|TARGET|latest")]
    pub what: String,
    /// Where the data directory is to stand; it must be empty or left by the same restore
    #[arg(long, value_name = "DIR")]
    pub target_dir: PathBuf,
    /// Where a tablespace is to stand; absolute paths. Repeats
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<TablespaceMove>,
    /// Read from this region first [default: the first that is complete]
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
    /// The point in time.
    #[command(flatten)]
    pub point: PointArgs,
    /// Do it; without this, only the plan is shown
    #[arg(long, help_heading = "Doing it")]
    pub execute: bool,
    /// Do exactly the plan with this digest, or nothing
    #[arg(long, value_name = "DIGEST", help_heading = "Doing it")]
    pub plan: Option<String>,
    /// Start PostgreSQL, replay, promote, and print the phases
    #[arg(long, help_heading = "Doing it")]
    pub start: bool,
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

/// A point in time, in the words of whoever asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Point {
    /// The end of the gap-free WAL.
    End,
    /// The last commit at or before a time.
    Time(DateTime<Utc>),
    /// A position, inclusive.
    Lsn(Lsn),
    /// A transaction, inclusive; with or without its epoch.
    Xid(u64),
    /// A named restore point.
    Name(String),
    /// The end of the backup itself.
    Immediate,
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
    let _ = (args.point.point(), session.settings()?);
    Err(not_built_yet("restore"))
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
