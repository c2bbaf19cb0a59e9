//! A restore's plan and its end, as people read them.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::cli::figures;
use crate::jobs::restore::{Feed, Plan, Point, Report, Reuse};

/// The plan.
pub(super) fn plan_text(plan: &Plan, now: DateTime<Utc>) -> String {
    let mut lines = vec![format!("Restore {} to {}", plan.target, point(plan))];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    line("base", base(plan, now));
    line("", regions(plan));
    line("replay", replay(plan));
    line("you get", you_get(plan));
    line("you lose", you_lose(plan));
    let free = plan.free_bytes.map_or_else(|| "unknown".to_owned(), figures::bytes);
    let (data, wal) = plan.write_bytes;
    line("fetch", format!("at most {} and the WAL", figures::bytes(plan.fetch_bytes)));
    let how = match plan.feed {
        Feed::Staged => "WAL staging",
        Feed::Streamed => "for WAL, which is streamed",
    };
    line(
        "write",
        format!(
            "{} + {} {how}, {free} free at {}",
            figures::bytes(data),
            figures::bytes(wal),
            plan.directory.display()
        ),
    );
    if let Some(reuse) = &plan.reuse {
        line("reuse", reused(reuse));
        line("remove", removed(reuse));
    }
    for (old, new) in &plan.tablespaces {
        let new = new.as_ref().map_or_else(|| "no place yet".to_owned(), |new| new.display().to_string());
        line("tablespace", format!("{old} at {new}"));
    }
    let expected = figures::duration(Duration::from_secs(plan.expected_seconds));
    let why = match &plan.predicted {
        Some(predicted) => format!("as {}", predicted.how),
        None => format!("assuming {}/s; no drill yet", figures::bytes(plan.assumed_rate)),
    };
    line("expected", format!("{expected}, {why}"));
    line(
        "opens with",
        plan.opens_with.as_ref().map_or_else(|| "nothing at hand".to_owned(), |key| format!("{key}, tested just now")),
    );
    line("needs", needs(plan));
    match plan.refused.as_slice() {
        [] => line("refused", "–".to_owned()),
        refused => refused.iter().for_each(|refusal| {
            line("REFUSED", format!("{}: {}", refusal.what, refusal.why));
            line("", format!("→ {}", refusal.next));
        }),
    }
    plan.warnings.iter().for_each(|warning| line("warning", warning.clone()));
    lines.push(String::new());
    lines.push(match plan.refused.is_empty() {
        true => format!("Nothing was touched. Run it:\n  {}", plan.command),
        false => "Nothing was touched, and nothing will be until the above is settled.".to_owned(),
    });
    lines.join("\n")
}

fn reused(reuse: &Reuse) -> String {
    let (files, bytes) = (figures::count(reuse.files), figures::bytes(reuse.bytes));
    format!("at most {bytes} in {files} files stay; the pages that differ are fetched")
}

fn removed(reuse: &Reuse) -> String {
    if reuse.remove_files == 0 {
        return "nothing".to_owned();
    }
    let (files, bytes) = (figures::count(reuse.remove_files), figures::bytes(reuse.remove_bytes));
    let more = if (reuse.examples.len() as u64) < reuse.remove_files { ", …" } else { "" };
    format!("{files} files that the backup does not have, {bytes}: {}{more}", reuse.examples.join(", "))
}

fn point(plan: &Plan) -> String {
    match &plan.point {
        Point::End => "the end of the gap-free WAL".to_owned(),
        Point::Time(time) => figures::utc(*time),
        Point::Lsn(lsn) => lsn.to_string(),
        Point::Xid(xid) => format!("transaction {xid}, inclusive"),
        Point::Name(name) => format!("restore point `{name}`"),
        Point::Immediate => "the end of the backup itself".to_owned(),
    }
}

fn base(plan: &Plan, now: DateTime<Utc>) -> String {
    format!("{}  ({})", plan.backup, figures::moment(now, plan.backup_finished_at))
}

fn regions(plan: &Plan) -> String {
    let region = |region: &crate::jobs::restore::RegionState| match (&region.unreadable, region.missing) {
        (Some(why), _) => format!("{} does not answer ({why})", region.name),
        (None, 0) => format!("{} complete", region.name),
        (None, missing) => format!("{} lacks {} objects", region.name, figures::count(missing as u64)),
    };
    format!("from {}", plan.regions.iter().map(region).collect::<Vec<_>>().join(", "))
}

fn replay(plan: &Plan) -> String {
    let from = plan.wal.first().map_or(plan.consistent_at, |leg| leg.from);
    format!("{} of WAL, {from} to {}, timeline {}", figures::bytes(plan.wal_bytes), plan.end_lsn, plan.timeline)
}

fn you_get(plan: &Plan) -> String {
    match plan.last_commit {
        Some(time) => format!("every transaction committed up to {}", figures::utc(time)),
        None => format!("every transaction committed before {}", plan.end_lsn),
    }
}

fn you_lose(plan: &Plan) -> String {
    let on_purpose = match &plan.point {
        Point::End => return "only what had not reached a region".to_owned(),
        Point::Time(_) => "--to-time",
        Point::Lsn(_) => "--to-lsn",
        Point::Xid(_) => "--to-xid",
        Point::Name(_) => "--to-name",
        Point::Immediate => "--immediate",
    };
    match (plan.last_commit, plan.newest_commit) {
        (Some(last), Some(newest)) if newest > last => {
            let lost = figures::duration((newest - last).to_std().unwrap_or_default());
            format!("{lost} of commits after that, on purpose ({on_purpose})")
        }
        (Some(_), Some(_)) => "no commit that the regions hold".to_owned(),
        _ => format!("whatever was committed after that, on purpose ({on_purpose})"),
    }
}

fn needs(plan: &Plan) -> String {
    let needs = &plan.needs;
    let found = needs
        .found_at
        .as_ref()
        .map_or_else(|| "NOT FOUND here".to_owned(), |path| format!("found at {}", path.display()));
    let mut text = format!("PostgreSQL {}: {found}", needs.major);
    if !needs.extensions.is_empty() {
        text.push_str(&format!("; extensions {}", needs.extensions.join(", ")));
    }
    if !needs.preload.is_empty() {
        text.push_str(&format!("; libraries {}", needs.preload));
    }
    if !needs.collations.is_empty() {
        text.push_str(&format!("; collations {}", needs.collations.join(", ")));
    }
    text
}

/// The end.
pub(super) fn report_text(report: &Report) -> String {
    let seconds = |seconds: f64| figures::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
    let head = if report.started.is_some() { "RESTORED and running" } else { "RESTORED, not started" };
    let mut lines =
        vec![format!("{head}: {} at {}, in {}", report.target, report.directory.display(), seconds(report.seconds))];
    let commit = report.last_commit.map_or_else(String::new, |time| format!(", commits up to {}", figures::utc(time)));
    lines.push(format!("  {} to {}, timeline {}{commit}", report.backup, report.recovered_to, report.timeline));
    for phase in &report.phases {
        let bytes = phase.bytes.map_or_else(String::new, |bytes| {
            format!("  {}, {}/s", figures::bytes(bytes), figures::bytes(rate(bytes, phase.seconds)))
        });
        let reused = phase
            .reused_bytes
            .map_or_else(String::new, |reused| format!(", of which {} stood there already", figures::bytes(reused)));
        lines.push(format!("  {:<8}{:>10}{bytes}{reused}", phase.name, seconds(phase.seconds)));
    }
    for incident in &report.incidents {
        lines.push(format!(
            "  {} gave {} not: {}; taken from another region",
            incident.region, incident.key, incident.reason
        ));
    }
    lines.extend(report.warnings.iter().map(|warning| format!("  warning  {warning}")));
    lines.extend(report.stored_as.iter().map(|id| format!("  record {id}, in the regions")));
    lines.extend(
        report
            .record
            .iter()
            .map(|path| format!("  record {}: this machine cannot sign one for the regions", path.display())),
    );
    if let Some(started) = &report.started {
        lines.push(format!("  PostgreSQL runs (pid {}), its log: {}", started.pid, started.log.display()));
    }
    if report.incidents.iter().any(|incident| incident.damaged) {
        lines.push(format!("Next: drctl repair {}", report.target));
    }
    lines.extend(report.next.iter().map(|next| format!("Next: {next}")));
    lines.join("\n")
}

/// Bytes per second.
fn rate(bytes: u64, seconds: f64) -> u64 {
    let milliseconds = Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / milliseconds).unwrap_or(u64::MAX)
}
