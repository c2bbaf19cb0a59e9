//! The one door for whoever runs jobs without being asked by a person: a job with its parameters in, what it came to out.

use crate::jobs::context::Context;
use crate::jobs::wal::bundle;
use crate::jobs::{backup, compact, drill, prune, repair, verify};
use crate::model::run::Outcome;
use crate::model::schedule::{Depth, Work};
use crate::model::{Error, Kind, Result};
use crate::repository::mend::Scope;

/// What a job came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// [`Outcome::Success`] or [`Outcome::Debts`].
    pub outcome: Outcome,
    /// In words.
    pub detail: String,
}

/// Runs a job.
///
/// # Errors
/// What stopped it; or what it found, where finding something is a failure.
pub async fn run(context: &Context, work: &Work) -> Result<Done> {
    match work {
        Work::Backup { target, fast, verify_detection } => {
            let options = backup::Options { fast: *fast, verify_detection: *verify_detection, full: false };
            let report = backup::run(context, target, options).await?;
            if report.detection.is_wrong() {
                let text = format!("{}: change detection missed pages; the backup holds them", report.backup.id);
                return Err(Error::failed(text).hint(format!("drctl backup {target} --full; see docs/incremental.md")));
            }
            let why = report.full_because.as_ref();
            let why = why.map_or_else(String::new, |why| format!(", full, because {why}"));
            Ok(done(report.has_debts(), format!("{}{why}", report.backup.id)))
        }
        Work::Dump { target } | Work::Files { target } => {
            let report = backup::run(context, target, backup::Options::default()).await?;
            let left_out = match report.left_out.len() {
                0 => String::new(),
                count => format!(", {count} left out; see: drctl show {}", report.backup.id),
            };
            Ok(done(report.has_debts(), format!("{}{left_out}", report.backup.id)))
        }
        Work::Verify { target, level, scrub, region } => {
            let level = match level {
                Depth::L0 => verify::Level::L0,
                Depth::L1 => verify::Level::L1,
                Depth::L2 => verify::Level::L2,
            };
            let what = target.as_ref().map(ToString::to_string);
            let options = verify::Options { what, level, region: region.clone(), scrub: *scrub };
            verified(&verify::run(context, &options).await?)
        }
        Work::Drill { target, region, select } => {
            let newest = drill::Options::newest(target.clone());
            let options = drill::Options { region: region.clone(), pick: *select, ..newest };
            drilled(&drill::run(context, &options).await?)
        }
        Work::Repair { target, region, quick } => {
            let (target, region) = (target.clone(), region.clone());
            let scope = Scope { target, region, quick: *quick, dry_run: false, unattended: true };
            let report = repair::run(context, &scope).await?;
            let copied: u64 = report.regions.iter().map(|region| region.copied).sum();
            let replaced: usize = report.regions.iter().map(|region| region.replaced.len()).sum();
            Ok(done(report.has_debts(), format!("{copied} objects copied, {replaced} replaced")))
        }
        Work::Prune => {
            let options = prune::Options { dry_run: false, consent: prune::Consent::Scheduled };
            pruned(&prune::run(context, &options).await?)
        }
        Work::Compact { target } => {
            let report = compact::run(context, target, true).await?;
            let copies: Vec<_> = report.copies.iter().map(|copied| copied.copy.as_str()).collect();
            let (packs, told) = (report.plan.packs.len(), copies.join(", "));
            let waiting = if copies.is_empty() { String::new() } else { format!(", to be drilled: {told}") };
            Ok(done(report.has_debts(), format!("{packs} packs left by {} copies{waiting}", copies.len())))
        }
        Work::Bundle { target, older_than } => {
            let older_than = older_than.unwrap_or(bundle::OLDER_THAN);
            let options = bundle::Options { target: target.clone(), older_than, execute: true };
            let report = bundle::run(context, &options).await?;
            for note in &report.notes {
                tracing::warn!(note, "WAL is not bundled");
            }
            let detail = format!("{} frames in {} bundles", report.frames, report.bundles);
            Ok(done(report.owed > 0 || !report.notes.is_empty(), detail))
        }
    }
}

fn done(debts: bool, detail: String) -> Done {
    Done { outcome: if debts { Outcome::Debts } else { Outcome::Success }, detail }
}

/// What was not proven is no success, whatever the reason; the report tells failure and doubt apart.
fn drilled(report: &drill::Report) -> Result<Done> {
    let stored = report.stored_as.as_ref().map_or_else(String::new, |id| format!(", report {id}"));
    let (target, region) = (&report.target, &report.region);
    let told = format!("drill of {target} from {region}{stored}");
    // Records of runs are in clear text: the reasons, which may quote the data, stand in the sealed report.
    let unproven = |error: Error| error.because(report.summary());
    match report.outcome {
        drill::Outcome::Pass => Ok(done(false, told)),
        drill::Outcome::Fail => Err(unproven(Error::failed(format!("{told}: failed")))),
        drill::Outcome::Inconclusive => {
            Err(unproven(Error::new(Kind::Unavailable, format!("{told}: nothing was found out"))))
        }
    }
}

/// A refusal is a failure of the slot: whoever is told looks at why. An unproven backup that goes is a debt of drills, and one that
/// stays for want of a known signer is a debt of the configuration: without `signers` nothing might ever go.
fn pruned(report: &prune::Report) -> Result<Done> {
    if !report.refusals.is_empty() {
        let error = Error::refused("nothing was pruned");
        let error = report.refusals.iter().take(5).fold(error, Error::because);
        return Err(error.hint("drctl prune --dry-run shows the plan and every refusal"));
    }
    let gone = report.swept.as_ref().map(|swept| {
        let (backups, objects, retained) = (swept.backups.len(), swept.objects, swept.retained);
        format!("{backups} backups and {objects} objects removed, {retained} locked; ")
    });
    let (unproven, waiting) = (report.alarms().count(), report.planned.amount.objects);
    let mut alarm =
        if unproven == 0 { String::new() } else { format!("; {unproven} backups that go were never drilled") };
    let doubted = report.doubted().count();
    if doubted > 0 {
        alarm += &format!(
            "; {doubted} backups stay whose signers prune does not rely on: drctl prune names them, list them in `signers`"
        );
    }
    let told = format!("{}{waiting} objects found that nobody needs{alarm}", gone.unwrap_or_default());
    Ok(done(unproven + doubted > 0, told))
}

fn verified(report: &verify::Report) -> Result<Done> {
    let (count, level) = (report.backups.len(), report.level);
    if report.is_of_nothing() {
        return Err(Error::not_found("nothing was verified").because("no region holds a backup"));
    }
    match report.is_clean() || report.has_only_debts() {
        true => Ok(done(!report.is_clean(), format!("{count} backups verified at {level:?}"))),
        false => {
            let lost = report.backups.iter().filter(|backup| !backup.restorable).map(|backup| backup.id.to_string());
            let lost = lost.chain(report.unreadable.iter().cloned()).collect::<Vec<_>>();
            let error = Error::damaged(format!("verification of {count} backups at {level:?} found damage"));
            let error = if lost.is_empty() { error } else { error.because(lost.join(", ")) };
            Err(error.hint("drctl verify shows every problem; drctl repair mends what another region holds"))
        }
    }
}
