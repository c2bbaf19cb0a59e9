//! `drctl list`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::figures;
use crate::cli::render::Table;
use crate::jobs::list::{self, Listed, Report, Restorable};
use crate::model::{Result, TargetName};
use crate::repository::survey::State;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this target
    pub target: Option<TargetName>,
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let settings = session.settings()?;
    let context = app::context(&settings, Role::Restore, &World::real()).await?;
    let report = list::run(&context, args.target.as_ref()).await?;
    if let Some(target) = args.target.as_ref().filter(|_| report.backups.is_empty() && report.unreadable.is_empty()) {
        // Of one that was taken out of the configuration the regions still tell.
        settings.target(target)?;
    }
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session.output.print(&text(&report, session.clock.now()))?,
    }
    Ok(if report.unreadable.is_empty() { Exit::Ok } else { Exit::Failed })
}

fn text(report: &Report, now: DateTime<Utc>) -> String {
    let mut text = String::new();
    for unreadable in &report.unreadable {
        let _ = writeln!(text, "UNREADABLE  {unreadable}");
    }
    if report.backups.is_empty() {
        text.push_str("There is no backup yet. Next: drctl backup TARGET");
        return text;
    }
    let mut table = Table::new(["ID", "KIND", "FINISHED", "SIZE", "STORED", "FREES", "REGIONS"]);
    for backup in &report.backups {
        table.row([
            backup.id.to_string(),
            if backup.copy_of.is_some() { "copy".to_owned() } else { backup.kind.to_owned() },
            figures::moment(now, backup.finished_at),
            figures::bytes(backup.size_bytes),
            figures::bytes(backup.stored_bytes),
            backup.frees_bytes.map_or_else(|| "?".to_owned(), figures::bytes),
            regions(backup),
        ]);
    }
    text.push_str(&table.to_text());
    for (target, bytes) in &report.stored {
        let of_target = report.backups.iter().filter(|backup| backup.target == *target);
        let logical: u64 = of_target.map(|backup| backup.size_bytes).sum();
        let of = if report.stored.len() > 1 { format!(" {target}") } else { String::new() };
        let _ = writeln!(
            text,
            "Stored{of}: {} in each region, for {} without WAL",
            figures::bytes(*bytes),
            figures::bytes(logical)
        );
    }
    for window in &report.windows {
        let _ = writeln!(text, "{}", restorable(window, now, report.windows.len() > 1));
    }
    text
}

/// `3 of 3`, `2 of 3 debt`: the worst word counts.
pub(super) fn regions(backup: &Listed) -> String {
    let whole = backup.regions.iter().filter(|region| region.state == State::Complete).count();
    let worst = backup.regions.iter().map(|region| region.state).max_by_key(|state| *state as u8);
    let word = match worst {
        None | Some(State::Complete) => "",
        Some(State::Debt) => " debt",
        Some(State::Damaged) => " damaged",
        Some(State::Unreachable) => " unreachable",
    };
    let left_out = match backup.left_out_count {
        None | Some(0) => String::new(),
        Some(count) => format!(", {count} LEFT OUT"),
    };
    format!("{whole} of {}{word}{left_out}", backup.regions.len())
}

fn restorable(window: &Restorable, now: DateTime<Utc>, named: bool) -> String {
    let of = if named { format!(" {}", window.target) } else { String::new() };
    let (Some(from), Some(to)) = (window.from, window.to) else {
        return format!("Restorable{of}: NOTHING. Next: drctl verify {}", window.target);
    };
    let seconds = |moment: DateTime<Utc>| moment.format("%Y-%m-%d %H:%M:%S");
    if window.moments > 0 {
        let newest = format!("{} UTC ({})", seconds(to), figures::relative(now, to));
        return match window.moments {
            1 => format!("Restorable{of}: as of {newest}"),
            count => format!("Restorable{of}: {count} moments from {} to {newest}", seconds(from)),
        };
    }
    let gaps = window
        .gaps
        .iter()
        .map(|(from, to)| format!("{} to {}", from.format("%m-%d %H:%M:%S"), to.format("%m-%d %H:%M:%S")));
    let gaps = gaps.collect::<Vec<_>>().join(", ");
    let gaps = match window.gaps.len() {
        0 => String::new(),
        1 => format!(", one gap: {gaps}"),
        count => format!(", {count} gaps: {gaps}"),
    };
    format!("Restorable{of}: from {} to {} UTC ({}){gaps}", seconds(from), seconds(to), figures::relative(now, to))
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone as _;

    use super::*;
    use crate::jobs::list::RegionState;

    #[test]
    fn the_table_is_narrow_and_ends_with_what_can_be_restored() {
        let now = Utc.with_ymd_and_hms(2026, 11, 20, 4, 4, 0).unwrap();
        let at = |hour| Utc.with_ymd_and_hms(2026, 11, 20, hour, 1, 0).unwrap();
        let region =
            |name: &str, state| RegionState { name: name.parse().unwrap(), state, recoverable_until: Some(now) };
        let backup = |id: &str, hour, state| Listed {
            id: id.parse().unwrap(),
            target: "ledger".parse().unwrap(),
            source: "postgres".into(),
            kind: "full",
            copy_of: None,
            started_at: at(hour),
            finished_at: at(hour),
            size_bytes: 1_650_000_000,
            stored_bytes: 254_000_000,
            needs_bytes: Some(300_000_000),
            frees_bytes: Some(21_000_000),
            generations: Vec::new(),
            start_lsn: None,
            stop_lsn: None,
            timeline: Some(1),
            recoverable_until: Some(now),
            left_out_count: (hour == 1).then_some(3),
            regions: vec![region("a", State::Complete), region("b", state)],
        };
        let window = Restorable {
            target: "ledger".parse().unwrap(),
            from: Some(at(1)),
            to: Some(now),
            gaps: vec![(at(2), at(3))],
            moments: 0,
        };
        let report = Report {
            backups: vec![
                backup("ledger-261120-030059-k7f", 3, State::Debt),
                backup("ledger-261120-010059-m2c", 1, State::Complete),
            ],
            windows: vec![window],
            stored: [("ledger".parse().unwrap(), 275_000_000)].into(),
            unreadable: Vec::new(),
        };
        let golden = "\
ID                         KIND   FINISHED              SIZE      STORED   FREES   REGIONS
ledger-261120-030059-k7f   full   1 h ago  03:01 UTC    1.65 GB   254 MB   21.0 MB   1 of 2 debt
ledger-261120-010059-m2c   full   3 h ago  01:01 UTC    1.65 GB   254 MB   21.0 MB   2 of 2, 3 LEFT OUT
Stored: 275 MB in each region, for 3.30 GB without WAL
Restorable: from 2026-11-20 01:01:00 to 2026-11-20 04:04:00 UTC (now), one gap: 11-20 02:01:00 to 11-20 03:01:00
";
        let squeezed = |text: &str| {
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(squeezed(&text(&report, now)), squeezed(golden));
    }
}
