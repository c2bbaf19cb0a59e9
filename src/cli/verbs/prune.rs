//! `drctl prune`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::cli::render::Table;
use crate::cli::{figures, progress};
use crate::jobs::prune::show::{self, History};
use crate::jobs::prune::{self, Amount, Consent, Options, Report};
use crate::model::{PruneId, Result};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Store no plan and remove nothing
    #[arg(long, conflicts_with = "execute")]
    dry_run: bool,
    /// Remove what an earlier plan found as well, when its grace period is over
    #[arg(long, requires = "plan")]
    execute: bool,
    /// The digest of what is to be removed, as `drctl prune` prints it
    #[arg(long, value_name = "DIGEST")]
    plan: Option<String>,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show what earlier prunes planned and removed
    Show {
        /// One of them, with every object
        id: Option<PruneId>,
    },
}

/// Runs the verb.
///
/// # Errors
/// What stopped it.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let context = app::context(&session.settings()?, Role::Prune, &World::real()).await?;
    let now = session.clock.now();
    if let Some(Verb::Show { id }) = args.verb {
        let history = show::run(&context, id.as_ref()).await?;
        match session.output.json {
            true => session.output.print_json(&history)?,
            false => session.output.print(&told(&history, now))?,
        }
        return Ok(if history.unreadable.is_empty() { Exit::Ok } else { Exit::Failed });
    }
    let consent = match (args.execute, args.plan) {
        (true, Some(digest)) => Consent::Digest(digest),
        _ => Consent::None,
    };
    let shown = progress::show(context.progress.clone(), &session.output);
    let report = prune::run(&context, &Options { dry_run: args.dry_run, consent }).await;
    shown.end().await;
    let report = report?;
    match session.output.json {
        true => session.output.print_json(&report)?,
        false => session
            .output
            .print(&text(&report, (now, figures::duration(context.prune.grace.to_std().unwrap_or_default()))))?,
    }
    Ok(match () {
        () if !report.refusals.is_empty() => Exit::Refused,
        () if report.alarms().next().is_some() => Exit::Debts,
        () => Exit::Ok,
    })
}

fn text(report: &Report, (now, grace): (DateTime<Utc>, String)) -> String {
    let mut text = String::new();
    for refusal in &report.refusals {
        let _ = writeln!(text, "REFUSED  {refusal}");
    }
    let unproven = report.alarms().count();
    if unproven > 0 {
        let _ = writeln!(
            text,
            "ALARM    {unproven} backups go that no drill ever proved   →  drctl drill TARGET, more often"
        );
    }
    for note in &report.notes {
        let _ = writeln!(text, "note     {note}");
    }
    let mut table = Table::new(["BACKUP", "BEGUN", "PROVEN", "FREES", "WHY"]);
    for backup in report.targets.iter().flat_map(|target| &target.backups) {
        let (at, proven) = (figures::moment(now, backup.at), if backup.proven { "yes" } else { "–" });
        let frees = if backup.frees == 0 { "–".to_owned() } else { figures::bytes(backup.frees) };
        table.row([backup.id.to_string(), at, proven.to_owned(), frees, backup.words()]);
    }
    if !table.is_empty() {
        text.push_str(&table.to_text());
    }
    for target in &report.unruled {
        let _ = writeln!(text, "{target} has no [targets.{target}.retention]: everything of it stays");
    }
    for (reason, amount) in &report.planned.by_reason {
        let _ = writeln!(text, "  {:>10}  {}", figures::bytes(amount.bytes), of(*amount, reason));
    }
    text.push_str(&next(report, &grace));
    text
}

fn of(amount: Amount, reason: &str) -> String {
    format!("{} objects {reason}", figures::count(amount.objects))
}

/// What was done, and what to type next.
fn next(report: &Report, grace: &str) -> String {
    let mut text = String::new();
    match (&report.swept, &report.ripe) {
        (Some(swept), _) => {
            let (objects, bytes) = (figures::count(swept.objects), figures::bytes(swept.bytes));
            let _ = writeln!(text, "Removed: {} backups, {objects} objects, {bytes}", swept.backups.len());
            if swept.retained > 0 {
                let until = swept
                    .retained_until
                    .map_or_else(String::new, |until| format!(", the last {}", figures::utc(until)));
                let _ = writeln!(
                    text,
                    "Retained: {} objects are locked and stay until their lock ends{until}",
                    figures::count(swept.retained)
                );
            }
            if swept.spared > 0 {
                let _ = writeln!(text, "Spared: {} objects that somebody needs by now", swept.spared);
            }
        }
        (None, Some(ripe)) => {
            let amount =
                of(ripe.amount, &format!("({}) found by plan {} too", figures::bytes(ripe.amount.bytes), ripe.plan));
            let _ = writeln!(text, "May go now: {} backups, {amount}", ripe.backups.len());
            let _ = writeln!(text, "Next: drctl prune --plan {} --execute", ripe.digest);
        }
        (None, None) => {}
    }
    text.push_str(&match (report.planned.amount.objects, &report.planned.id, report.dry_run) {
        (0, ..) => "Everything that is stored is needed".to_owned(),
        (_, _, true) => {
            "Nothing was written. Without --dry-run the plan is stored, and its grace period begins".to_owned()
        }
        (_, Some(id), _) => {
            format!("Planned: {id}. Nothing of it goes before {grace} are over, and a later run finds it again")
        }
        (_, None, _) if !report.refusals.is_empty() => "Nothing was planned and nothing was removed".to_owned(),
        (_, None, _) => "An earlier plan says the same".to_owned(),
    });
    text
}

fn told(history: &History, now: DateTime<Utc>) -> String {
    let mut text = String::new();
    for unreadable in &history.unreadable {
        let _ = writeln!(text, "UNREADABLE  {unreadable}");
    }
    for sweep in &history.sweeps {
        let begun = &sweep.begun;
        let end = match &sweep.ended {
            None => "did not say that it ended".to_owned(),
            Some(ended) => {
                let stopped = ended.stopped.as_ref().map_or_else(String::new, |why| format!(", STOPPED: {why}"));
                let (objects, bytes) = (figures::count(ended.objects), figures::bytes(ended.bytes));
                format!("removed {objects} objects, {bytes}, {} locked{stopped}", ended.retained)
            }
        };
        let _ = writeln!(text, "sweep {}  {} on {}: {end}", begun.id, figures::moment(now, begun.at), begun.host);
        for backup in &begun.backups {
            let _ = writeln!(text, "  took {backup}");
        }
    }
    for plan in &history.plans {
        let (objects, bytes) = (figures::count(plan.head.objects), figures::bytes(plan.head.bytes));
        let ripe = figures::moment(now, plan.ripe_at);
        let _ = writeln!(text, "plan  {}  {objects} objects, {bytes}, ripe {ripe}", plan.head.id);
        for doomed in &plan.head.backups {
            let _ = writeln!(text, "  {}: {}", doomed.id, doomed.why);
        }
        for item in plan.objects_listed.iter().flatten() {
            let _ = writeln!(text, "  {}  {}  {}", item.region, item.key, figures::bytes(item.size));
        }
    }
    if history.sweeps.is_empty() && history.plans.is_empty() {
        text.push_str("Nothing was ever pruned here");
    }
    text
}
