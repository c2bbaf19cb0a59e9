//! `drctl verify`.

use std::fmt::Write as _;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::progress;
use crate::cli::render::Table;
use crate::jobs::verify::{self, Level, Options, Report};
use crate::model::{RegionName, Result};
use crate::repository::survey::scrub::{Problem, Trouble};

/// Problems shown per region; the rest is counted.
const SHOWN: usize = 10;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A target, a backup id, or the beginning of one [default: everything]
    pub id: Option<String>,
    /// How deep: l0 signatures, l1 every object is there, l2 every frame opened [default: l2 for one backup, else l1]
    #[arg(long, value_enum)]
    pub level: Option<LevelName>,
    /// Compare what is stored with its digests, without opening anything: needs no key
    #[arg(long)]
    pub scrub: bool,
    /// Only this region
    #[arg(long, value_name = "NAME")]
    pub region: Option<RegionName>,
}

/// A level as it is typed.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum LevelName {
    /// Catalog and signatures
    L0,
    /// Objects present, sizes, WAL without a hole
    L1,
    /// Every frame fetched, opened and compared
    L2,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Restore, &World::real()).await?;
    // What names no target names one backup, `latest` included.
    let one =
        args.id.as_ref().is_some_and(|id| id.parse().is_ok_and(|_: crate::model::BackupId| true) || id == "latest");
    let level = match args.level {
        Some(LevelName::L0) => Level::L0,
        Some(LevelName::L1) => Level::L1,
        Some(LevelName::L2) => Level::L2,
        None if one && !args.scrub => Level::L2,
        None => Level::L1,
    };
    let options = Options { what: args.id, level, region: args.region, scrub: args.scrub };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = verify::run(&context, &options).await;
    shown.end().await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report))?,
    }
    Ok(match () {
        () if report.is_of_nothing() => Exit::Failed,
        () if report.is_clean() => Exit::Ok,
        () if report.has_only_debts() => Exit::Debts,
        () => Exit::Failed,
    })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for unreadable in &report.unreadable {
        let _ = writeln!(text, "UNREADABLE  {unreadable}");
    }
    for backup in &report.backups {
        for region in &backup.regions {
            problems(&mut text, &format!("{} in {}", backup.id, region.name), &region.problems);
        }
    }
    for wal in &report.wal {
        for contradiction in wal.contradictions.iter().take(SHOWN) {
            let _ = writeln!(text, "CONTRADICTION  WAL of {}: {contradiction}", wal.system_id);
        }
        for error in wal.not_compared.iter().take(SHOWN) {
            let _ = writeln!(text, "NOT COMPARED  overlapping WAL of {}: {error}", wal.system_id);
        }
        problems(&mut text, &format!("WAL of {} timeline {}", wal.system_id, wal.timeline), &wal.problems);
    }
    let mut table = Table::new(["BACKUP", "RESTORABLE", "REGIONS"]);
    for backup in &report.backups {
        let level = |region: &verify::RegionReport| match region.level {
            Some(level) => format!("{} {level:?}", region.name),
            None => format!("{} –", region.name),
        };
        let regions = backup.regions.iter().map(level).collect::<Vec<_>>().join(", ");
        let restorable = if backup.restorable { "yes" } else { "NO" };
        table.row([backup.id.to_string(), restorable.to_owned(), regions]);
    }
    if !table.is_empty() {
        text.push_str(&table.to_text());
    }
    for (what, list) in [("orphan", &report.beside.orphans), ("in progress", &report.beside.in_progress)] {
        for orphan in list {
            let _ = writeln!(text, "{what}: {}, {} objects", orphan.id, orphan.objects);
        }
    }
    text.push_str(&last_line(report));
    text
}

fn last_line(report: &Report) -> String {
    let scrubbed = if report.scrub { ", every byte compared with its digest" } else { "" };
    let count = report.backups.len();
    match () {
        () if report.is_of_nothing() => {
            "NOTHING WAS VERIFIED: no region holds a backup. Next: drctl backup TARGET".to_owned()
        }
        () if report.is_clean() => format!("{count} backups are good at {:?}{scrubbed}", report.level),
        () if report.has_only_debts() => {
            "Every backup can be restored, but regions lack some of it. Next: drctl repair".into()
        }
        () if report.has_contradictions() => {
            "WAL contradicts itself: no restore crosses it, and repair cannot mend it. Next: drctl backup".to_owned()
        }
        () => "Next: drctl repair, then drctl verify again".to_owned(),
    }
}

fn problems(text: &mut String, of: &str, problems: &[Problem]) {
    for problem in problems.iter().take(SHOWN) {
        let word = match problem.trouble {
            Trouble::Missing => "MISSING",
            Trouble::Damaged => "DAMAGED",
            Trouble::Unreachable => "UNREACHABLE",
        };
        let _ = writeln!(text, "{word}  {of}: {}", problem.key);
        let _ = writeln!(text, "         {}", problem.what);
    }
    if problems.len() > SHOWN {
        let _ = writeln!(text, "         and {} more in {of}   (--json shows them all)", problems.len() - SHOWN);
    }
}
