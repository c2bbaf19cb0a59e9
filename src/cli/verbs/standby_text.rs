//! Standbys as people read them.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::cli::figures;
use crate::jobs::restore::Primary;
use crate::jobs::standby::{Promoted, PromotionPlan, State, Status};

/// One line when something changes.
pub(super) fn change(status: &Status) -> String {
    let why = status.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    let from = status.region.as_ref().map_or_else(String::new, |region| format!(", from {region}"));
    format!("{} {}{from}{why}", status.target, status.state.words())
}

/// All standbys of a host, the ones that are not well first.
pub(super) fn status_text(all: &[Status], now: DateTime<Utc>) -> String {
    if all.is_empty() {
        return "this host has no standby; drctl standby start <target> --to DIR makes one".to_owned();
    }
    let mut sorted: Vec<_> = all.iter().collect();
    sorted.sort_by_key(|status| status.is_well());
    sorted.into_iter().map(|status| one(status, now)).collect::<Vec<_>>().join("\n\n")
}

fn one(status: &Status, now: DateTime<Utc>) -> String {
    let mut lines = vec![format!("{}  {}", status.target, status.state.words())];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    if let Some(why) = &status.why {
        line("why", why.clone());
    }
    line("behind", behind(status));
    let position = |lsn: Option<_>, timeline: Option<_>| match (lsn, timeline) {
        (Some(lsn), Some(timeline)) => format!("{lsn}, timeline {timeline}"),
        _ => "unknown".to_owned(),
    };
    line("replayed", position(status.replayed, status.timeline));
    line("stored", position(status.durable_end, status.durable_timeline));
    if let Some(at) = status.last_commit {
        line("last commit", figures::moment(now, at));
    }
    let region = status.region.as_ref().map_or_else(|| "unknown".to_owned(), ToString::to_string);
    line("from", region);
    for silent in &status.silent {
        line("silent", silent.to_string());
    }
    let pid = status.server_pid.map_or_else(|| "not running".to_owned(), |pid| format!("pid {pid}"));
    line("server", format!("{pid}, {}", status.directory.display()));
    lines.join("\n")
}

fn behind(status: &Status) -> String {
    match (status.lag_bytes, status.lag_seconds) {
        (Some(0), _) => "nothing of what is stored".to_owned(),
        (Some(bytes), Some(seconds)) => {
            let seconds = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            format!("{}, {}", figures::bytes(bytes), figures::duration(seconds))
        }
        _ => "unknown".to_owned(),
    }
}

/// What promotion will do.
pub(super) fn promotion_text(plan: &PromotionPlan, now: DateTime<Utc>) -> String {
    let standby = &plan.standby;
    if standby.state == State::Promoted {
        let why = standby.why.as_deref().unwrap_or_default();
        return format!("The standby of {} is no more: {why}\n\nRun it:\n  {}", standby.target, plan.command);
    }
    let mut lines = vec![format!("Promote the standby of {}", standby.target)];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    line("where", standby.directory.display().to_string());
    let end = standby.durable_end.map_or_else(|| "unknown".to_owned(), |end| end.to_string());
    line("drain", format!("to {end} or behind it; {} to replay", behind(standby)));
    line(
        "you get",
        match standby.last_commit {
            Some(at) => format!("every commit that a region holds; the newest {}", figures::moment(now, at)),
            None => "every commit that a region holds".to_owned(),
        },
    );
    line(
        "you lose",
        match standby.stored_at {
            Some(at) => format!("what was committed after {} and not shipped", figures::moment(now, at)),
            None => "what was committed and not shipped".to_owned(),
        },
    );
    let primary = match &plan.primary {
        Primary::Answers => "ANSWERS",
        Primary::Silent => "does not answer as one",
        Primary::Unknown(_) => "UNKNOWN",
    };
    line("primary", primary.to_owned());
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

/// What promotion came to.
pub(super) fn promoted_text(promoted: &Promoted) -> String {
    let took = |seconds: f64| figures::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
    let mut lines = vec![format!("{} is open, on timeline {}", promoted.target, promoted.timeline)];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    match promoted.lost_to {
        None => line("recovered", format!("to {}, the end of what was stored", promoted.recovered_to)),
        Some(lost_to) => {
            line("recovered", format!("to {}", promoted.switch));
            let old = promoted.old_timeline;
            line("LOST", format!("timeline {old} is stored up to {lost_to} by now: what lies between is not here"));
        }
    }
    line("last commit", promoted.last_commit.map_or_else(|| "unknown".to_owned(), figures::utc));
    line(
        "RPO",
        match promoted.stored_at {
            _ if promoted.lost_to.is_some() => "acknowledged commits may be lost".to_owned(),
            Some(at) => format!("nothing that was stored is lost; the newest was stored at {}", figures::utc(at)),
            None => "nothing that was stored is lost".to_owned(),
        },
    );
    promoted.phases.iter().for_each(|(name, seconds)| line(name, took(*seconds)));
    line("in all", took(promoted.seconds));
    promoted.silent.iter().for_each(|region| line("silent", region.to_string()));
    promoted.warnings.iter().for_each(|warning| line("warning", warning.clone()));
    promoted.stored_as.iter().for_each(|id| line("report", id.to_string()));
    promoted.record.iter().for_each(|path| line("report", path.display().to_string()));
    promoted.next.iter().for_each(|next| line("next", next.clone()));
    lines.join("\n")
}
