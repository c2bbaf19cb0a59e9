//! `drctl show`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::jobs::show::{self, HeldShown, Report};
use crate::model::Result;
use crate::repository::survey::shares::Generation;

/// Things left out that are shown; the rest is counted.
const SHOWN: usize = 20;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A backup id, or the beginning of one; a target or `latest` for the newest
    pub id: String,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Restore, &World::real()).await?;
    let report = show::run(&context, &args.id).await?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, session.clock.now()))?,
    }
    Ok(Exit::Ok)
}

/// One generation as a bar of what it gives to the backup.
fn drawn(generation: &Generation, all: u64) -> String {
    const WIDTH: u64 = 24;
    let filled = (generation.bytes * WIDTH).checked_div(all).unwrap_or_default().clamp(1, WIDTH);
    let bar: String = (0..WIDTH).map(|at| if at < filled { '█' } else { '░' }).collect();
    let share = (generation.bytes * 100).checked_div(all).unwrap_or_default();
    let bytes = figures::bytes(generation.bytes);
    format!("{bar} {share:>3} %  {bytes:>8}  {}", generation.backup)
}

fn text(report: &Report, now: DateTime<Utc>) -> String {
    let listed = &report.listed;
    let mut text = format!("{}  {} of {} ({})\n", listed.id, listed.kind, listed.target, listed.source);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<11} {value}");
    };
    if report.damaged_pages > 0 {
        let pages = figures::count(report.damaged_pages);
        line("DAMAGED", format!("{pages} pages failed their checksum on the source already"));
    }
    match &report.left_out {
        Some(list) => {
            list.iter().take(SHOWN).for_each(|what| line("LEFT OUT", what.clone()));
            if let Some(more) = list.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                line("LEFT OUT", format!("and {more} more   (--json shows them all)"));
            }
        }
        None => line("left out", "not known: no key at hand opens what the backup says of itself".to_owned()),
    }
    if let Some(of) = &listed.copy_of {
        line("copy of", format!("{of}: the same pages, some of them in other packs"));
    }
    let took = (listed.finished_at - listed.started_at).to_std().unwrap_or_default();
    line("finished", format!("{}, in {}", figures::moment(now, listed.finished_at), figures::duration(took)));
    line(
        "size",
        format!("{}, stored {} per region", figures::bytes(listed.size_bytes), figures::bytes(listed.stored_bytes)),
    );
    if let (Some(needs), Some(frees)) = (listed.needs_bytes, listed.frees_bytes) {
        let (needs, frees) = (figures::bytes(needs), figures::bytes(frees));
        line("needs", format!("{needs} in each region; {frees} of it no other backup needs, and would go with it"));
    }
    let packed: u64 = listed.generations.iter().map(|generation| generation.bytes).sum();
    for generation in &listed.generations {
        line("pages of", drawn(generation, packed));
    }
    if let Some(parent) = &report.parent {
        line("parent", parent.to_string());
    }
    if let Some(wal) = &report.wal {
        line("WAL", format!("{} to {}, timeline {}, branch {}", wal.start_lsn, wal.stop_lsn, wal.timeline, wal.branch));
        line("cluster", format!("{}, PostgreSQL {}", wal.system_id, wal.server_version / 10_000));
    }
    match (&report.wal, listed.recoverable_until) {
        (Some(_), until) => {
            let until = until.map_or_else(|| "NOT RESTORABLE: its WAL is not whole".to_owned(), figures::utc);
            line("until", until);
        }
        (None, Some(moment)) => line("brings back", figures::utc(moment)),
        (None, None) => line("brings back", "NOTHING: the regions do not hold all of it".to_owned()),
    }
    line(
        "written by",
        format!(
            "drctl {} on {}, method {}{}, quorum {}",
            report.provenance.drctl,
            report.provenance.host,
            report.provenance.method,
            report.provenance.detection.as_ref().map_or_else(String::new, |how| format!(", changes by {how}")),
            report.quorum
        ),
    );
    line("keyset", report.keyset.to_string());
    for wrap in &report.wraps {
        line("opens with", format!("{} {}", wrap.kind, wrap.key));
    }
    if report.wraps.is_empty() {
        line("opens with", "NOTHING: no region holds a wrap of its keyset".to_owned());
    }
    line("objects", format!("{}, {}", figures::count(report.objects), figures::bytes(report.object_bytes)));
    report.held.iter().for_each(|(name, held)| line(name.as_str(), in_region(held)));
    text
}

/// What a region holds of it.
fn in_region(held: &HeldShown) -> String {
    let what = match held {
        held if held.unreadable.is_some() => format!("UNREACHABLE: {}", held.unreadable.as_deref().unwrap_or_default()),
        held if held.damaged + held.missing > 0 => {
            format!("{} objects, {} missing, {} damaged", held.objects, held.missing, held.damaged)
        }
        held => format!("all {} objects, {}", held.objects, figures::bytes(held.bytes)),
    };
    let locked = held.locked_until.map_or_else(String::new, |until| format!(", locked until {}", figures::utc(until)));
    what + &locked
}
