//! `drctl wal status`, for people.

use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::cli::figures;
use crate::cli::render::{Colour, Output};
use crate::jobs::wal::bundle::Report;
use crate::jobs::wal::status::{BranchWal, Diverged, RegionWal, TargetWal};
use crate::jobs::wal::{Position, WalStatus};
use crate::model::{Lsn, TargetName};

/// `ledger  streaming  durable 0/3000148  0.4 s exposed  eu-west-1 owes 12`
pub(super) fn status_line(position: &Position) -> String {
    let mut line = format!("{}  {}  durable {}", position.target, position.state.words(), position.durable_lsn);
    let exposure =
        position.exposure_seconds.map(|seconds| figures::duration(Duration::from_secs_f64(seconds.max(0.0))));
    let _ = match exposure {
        Some(exposure) => write!(line, "  {exposure} exposed"),
        None => write!(line, "  exposure unknown"),
    };
    if position.from_standby {
        line.push_str("  from a standby");
    }
    if let Some(quorum) = position.degraded_to {
        let _ = write!(line, "  DEGRADED: acknowledged at {quorum} region");
    }
    for region in position.regions.iter().filter(|region| region.missing_objects > 0) {
        let _ = write!(line, "  {} owes {}", region.name, figures::count(region.missing_objects));
    }
    line
}

/// What was bundled, or would be.
pub(super) fn bundled(report: &Report) -> String {
    let mut text = String::new();
    for epoch in &report.epochs {
        let (frames, bundles) = (figures::count(epoch.frames), figures::count(epoch.bundles));
        let bytes = figures::bytes(epoch.bytes);
        let _ = writeln!(text, "{}  {}  {frames} frames, {bytes} → {bundles} bundles", epoch.target, epoch.epoch);
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    let (frames, bundles) = (figures::count(report.frames), figures::count(report.bundles));
    text.push_str(&match (report.bundles, report.executed) {
        (0, _) => "nothing is to be bundled".to_owned(),
        (_, false) => format!("{frames} frames would be in {bundles} bundles\n  next: drctl wal bundle --execute"),
        (_, true) => format!("{frames} frames are in {bundles} bundles\n  next: drctl prune, which takes the frames"),
    });
    text
}

/// Everything, for people.
pub(super) fn text(status: &WalStatus, now: DateTime<Utc>, output: &Output) -> String {
    let mut text = String::new();
    if status.targets.is_empty() {
        text.push_str("no WAL is stored\n");
    }
    for target in &status.targets {
        target_text(&mut text, target, now, output);
    }
    text
}

fn target_text(text: &mut String, target: &TargetWal, now: DateTime<Utc>, output: &Output) {
    let name = target.target.as_ref().map_or("unknown target", TargetName::as_str);
    let receiver = target.receiver.as_ref().map_or_else(|| "no receiver answers here".to_owned(), status_of_receiver);
    let _ = writeln!(text, "{name}   {receiver}");
    if target.branches.is_empty() {
        let _ = writeln!(text, "  no WAL is stored");
    }
    for branch in &target.branches {
        branch_text(text, branch, now, output);
    }
}

fn status_of_receiver(position: &Position) -> String {
    let line = status_line(position);
    line.split_once("  ").map_or(line.clone(), |(_, rest)| rest.to_owned())
}

fn branch_text(text: &mut String, branch: &BranchWal, now: DateTime<Utc>, output: &Output) {
    let _ = writeln!(text, "  timeline {}-{} of system {}", branch.timeline, branch.branch, branch.system_id);
    let windows = || branch.regions.iter().flat_map(|region| &region.windows);
    let from = windows().map(|window| window.start).min().unwrap_or_default();
    let to = windows().map(|window| window.end).max().unwrap_or_default();
    for region in &branch.regions {
        region_text(text, region, (from, to), (now, output));
    }
    for gap in &branch.gaps {
        let at = figures::moment(now, gap.at);
        let bytes = figures::bytes(gap.to.bytes_since(gap.from));
        let word = match (gap.filled, gap.contradiction) {
            (true, _) => output.paint(Colour::Green, "filled"),
            (false, true) => output.paint(Colour::Red, "CONTRADICTION"),
            (false, false) => output.paint(Colour::Red, "GAP"),
        };
        let _ = writeln!(text, "    {word}  {} to {}  {bytes}  met {at}: {}", gap.from, gap.to, gap.reason);
    }
    for Diverged { timeline, branch: child, from, to } in &branch.diverged {
        let (word, bytes) = (output.paint(Colour::Yellow, "DIVERGED"), figures::bytes(to.bytes_since(*from)));
        let own = format!("{}-{}", branch.timeline, branch.branch);
        let _ = writeln!(
            text,
            "    {word}  {from} to {to}  {bytes}  not in timeline {timeline}-{child}, which left at {from}"
        );
        let _ = writeln!(text, "              →  drctl restore --timeline {own}, into another directory");
    }
    for error in &branch.errors {
        let _ = writeln!(text, "    {}  {error}", output.paint(Colour::Red, "DAMAGED"));
    }
}

fn region_text(text: &mut String, region: &RegionWal, range: (Lsn, Lsn), (now, output): (DateTime<Utc>, &Output)) {
    let name = &region.name;
    if let Some(why) = &region.unreadable {
        let _ = writeln!(text, "    {name}  {}: {why}", output.paint(Colour::Red, "unreadable"));
        return;
    }
    let Some(last) = region.windows.last() else {
        let _ = writeln!(text, "    {name}  {}", output.paint(Colour::Red, "nothing"));
        return;
    };
    let commit = last.last_commit;
    let commit = commit.map_or_else(|| "no commit".to_owned(), |at| format!("commits to {}", figures::moment(now, at)));
    let which = match region.windows.len() {
        1 => format!("{} to {}  {}", last.start, last.end, figures::bytes(last.end.bytes_since(last.start))),
        count => format!("{count} windows, the last {} to {}", last.start, last.end),
    };
    let _ = writeln!(text, "    {name}  {}  {which}  {commit}", drawn(region, range));
    if region.missing_frames > 0 {
        let owes = format!("owes {} frames", figures::count(region.missing_frames));
        let _ = writeln!(text, "    {name}  {}  →  drctl repair", output.paint(Colour::Yellow, &owes));
    }
}

/// Cells of a drawing.
const CELLS: u64 = 20;

/// The WAL of a region on the scale of its branch: `█` where recovery can go, `▒` where no backup leads, `·` where anything
/// is missing, however little.
fn drawn(region: &RegionWal, (from, to): (Lsn, Lsn)) -> String {
    let length = to.bytes_since(from).max(1);
    let position =
        |cell: u64| Lsn(from.0 + u64::try_from(u128::from(length) * u128::from(cell) / u128::from(CELLS)).unwrap_or(0));
    let draw = |cell: u64| {
        let (start, end) = (position(cell), position(cell + 1).max(Lsn(position(cell).0 + 1)).min(to));
        let whole = region.windows.iter().any(|window| window.covers(start, end));
        let reached = region.recoverable.iter().any(|span| span.from < end && start < span.to);
        match (whole, reached) {
            (true, true) => '█',
            (true, false) => '▒',
            (false, _) => '·',
        }
    };
    (0..CELLS).map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::wal::status::Span;
    use crate::repository::wal::index::Window;

    #[test]
    fn a_hole_is_seen_however_small_it_is() {
        let window = |start, end| Window {
            start: Lsn(start),
            end: Lsn(end),
            last_record: None,
            last_record_end: None,
            last_commit: None,
            written_at: DateTime::UNIX_EPOCH,
        };
        let region = |windows: &[(u64, u64)], from: u64| RegionWal {
            name: "a".parse().unwrap(),
            windows: windows.iter().map(|(start, end)| window(*start, *end)).collect(),
            recoverable: windows.last().map(|(_, end)| Span { from: Lsn(from), to: Lsn(*end) }).into_iter().collect(),
            frames: 1,
            missing_frames: 0,
            unreadable: None,
        };
        let range = (Lsn(1000), Lsn(21_000));
        assert_eq!(drawn(&region(&[(1000, 21_000)], 1000), range), "█".repeat(20));
        assert_eq!(drawn(&region(&[(1000, 21_000)], 6000), range), "▒".repeat(5) + &"█".repeat(15));
        assert_eq!(
            drawn(&region(&[(1000, 11_400), (11_401, 21_000)], 11_401), range),
            "▒".repeat(10) + "·" + &"█".repeat(9)
        );
        assert_eq!(drawn(&region(&[(1000, 15_000)], 1000), range), "█".repeat(14) + &"·".repeat(6));
        // Less WAL than cells.
        assert_eq!(drawn(&region(&[(7, 9)], 7), (Lsn(7), Lsn(9))), "█".repeat(20));
    }
}
