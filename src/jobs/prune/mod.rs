//! Prune: take away what retention no longer wants, in two runs with a grace period between them.
//!
//! Each run looks at everything, writes a plan, and sweeps what an earlier plan whose grace period is over found as well.
//! Whatever is in doubt refuses the whole run: nothing is lost by pruning tomorrow.

use std::collections::{BTreeMap, BTreeSet};

use crate::disk::lock::Lock;
use crate::jobs::Context;
use crate::model::retention::{Keep, Rules, Verdict, judge};
use crate::model::{BackupId, Error, KeysetId, PruneId, Result, SignerId, TargetName};
use crate::repository::handle::Repository;
use crate::repository::prune::facts::Facts;
use crate::repository::prune::garbage::{Garbage, Item, Search};
use crate::repository::prune::locked::{self, Locked};
use crate::repository::prune::plan::{self, Doomed, Plan};
use crate::repository::prune::spare;
use crate::repository::prune::sweep::Sweep;
use chrono::{DateTime, TimeDelta, Utc};

pub mod alarm;
pub mod report;
pub mod show;
#[cfg(test)]
mod tests;

pub use report::{Amount, Judged, Planned, Report, Ripe, TargetReport};

/// Who says that a sweep may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Consent {
    /// Nobody: a plan is written, nothing is removed.
    None,
    /// A schedule: within every limit.
    Scheduled,
    /// A person, who names the digest of what is to be removed; the share of backups that go is then theirs to judge.
    Digest(String),
}

/// How it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Only look: no plan is stored, and nothing removed.
    pub dry_run: bool,
    /// Who says that what is ripe may be swept.
    pub consent: Consent,
}

/// Prunes.
///
/// # Errors
/// A region does not answer, another prune runs, or the sweep was stopped. Refusals of the plan are in the report.
pub async fn run(context: &Context, options: &Options) -> Result<Report> {
    let repository = Repository { regions: context.repository.regions.unanimous(), ..context.repository.clone() };
    let context = &Context { repository, ..context.clone() };
    let writer = context.writer()?;
    let alone = Lock::acquire(&context.state_dir.join("prune.lock"))
        .map_err(|error| Error::from(error).during("another prune runs on this host"))?;
    let lock = alone.identity();
    let looking = context.progress.begin("look at every region", None);
    if !options.dry_run {
        // Before the look, which must not take what a dead sweep wrote for a pruned backup.
        let spared = spare::after_dead_sweeps(&context.repository, writer, lock.as_deref()).await?;
        if !spared.is_empty() {
            tracing::warn!(?spared, "an earlier sweep died before it took these backups: they stay as they were");
        }
    }
    let mut look = Look::begin(context).await?;
    drop(looking);
    let plan = Plan::new(writer, look.doomed.clone(), std::mem::take(&mut look.garbage.items))?;
    let mut report = look.report(context, &plan, options.dry_run);
    let old = look.ripe(context).await;
    let old = old.unwrap_or_else(|error| {
        report.refusals.push(error.to_string());
        None
    });
    let (items, left) = match &old {
        Some(old) => {
            let limits = &context.prune;
            plan::within(plan::intersection(old, &plan), (limits.objects, limits.bytes))
        }
        None => (Vec::new(), false),
    };
    report.ripe = old.as_ref().filter(|_| !items.is_empty()).map(|old| ripe(old, &items, left));
    if options.dry_run || !report.refusals.is_empty() {
        return Ok(report);
    }
    if look.is_news(&plan) {
        plan.store(&context.repository, writer).await?;
        report.planned.id = Some(plan.head.id.clone());
    }
    if let (Some(old), false) = (&old, items.is_empty()) {
        if let Some(why) = withheld(&report, &options.consent, context.prune.percent) {
            report.refusals.extend(why);
            return Ok(report);
        }
        let sweep = Sweep {
            repository: &context.repository,
            writer,
            rules: &context.retention,
            grace: context.prune.grace,
            ripe: old,
            keysets: &look.keysets,
            lock: lock.as_deref(),
        };
        let phase = context.progress.begin("remove", Some(items.iter().map(|item| item.size).sum()));
        let mut swept = sweep.run(items, std::mem::take(&mut look.facts.inventories), &phase).await?;
        look.locked.values().for_each(|locked| swept.tell_locked(locked));
        report.refusals.extend(swept.doubts.iter().cloned());
        report.swept = Some(swept);
    }
    Ok(report)
}

/// One look at everything, and what is to go by it.
struct Look {
    facts: Facts,
    garbage: Garbage,
    doomed: Vec<Doomed>,
    /// What the rules let go as well, and locks keep.
    locked: BTreeMap<BackupId, Locked>,
    verdicts: BTreeMap<TargetName, BTreeMap<BackupId, Verdict>>,
    keysets: BTreeSet<(TargetName, KeysetId)>,
    newest: Option<Plan>,
}

impl Look {
    async fn begin(context: &Context) -> Result<Self> {
        let (repository, grace) = (&context.repository, context.prune.grace);
        let mut facts = Facts::gather(repository, context.writer()?, (grace, BTreeMap::new())).await?;
        let mut verdicts = BTreeMap::new();
        for (target, rules) in &context.retention {
            verdicts.insert(target.clone(), judge(&facts.candidates(target, rules), rules));
        }
        let mut doomed = doomed(&facts, &verdicts);
        let mut ids: BTreeSet<_> = doomed.iter().map(|doomed| doomed.id.clone()).collect();
        let locked = locked::commits(repository, &facts, &ids).await.unwrap_or_else(|error| {
            facts.refusals.push(error.to_string());
            BTreeMap::new()
        });
        for (id, Locked { region, until, .. }) in &locked {
            let verdict = verdicts.values_mut().find_map(|of| of.get_mut(id));
            verdict.into_iter().for_each(|verdict| {
                *verdict = Verdict::Retained { region: region.clone(), until: *until };
            });
        }
        doomed.retain(|doomed| !locked.contains_key(&doomed.id));
        ids.retain(|id| !locked.contains_key(id));
        let survivors = facts.backups.iter().filter(|backup| !ids.contains(&backup.commit.id)).cloned();
        let survivors: Vec<_> = survivors.collect();
        facts.refuse_gaps(repository, &survivors).await?;
        let newest = newest_plan(context).await;
        let keysets = newest.as_ref().map(Plan::keysets).unwrap_or_default();
        let search = Search { rules: &context.retention, doomed: &ids, grace, keysets: &keysets };
        let garbage = search.run(repository, &facts).await?;
        Ok(Self { facts, garbage, doomed, locked, verdicts, keysets, newest })
    }

    async fn ripe(&self, context: &Context) -> Result<Option<Plan>> {
        let when = (self.facts.now, context.prune.grace);
        plan::ripe(&context.repository, when, |signer| is_known(context, signer)).await
    }

    /// A plan that says the same as the newest one is not stored again: its grace period has begun already. One that finds
    /// nothing takes back what was planned before: whatever stops being kept later has its whole grace period then.
    fn is_news(&self, plan: &Plan) -> bool {
        match &self.newest {
            Some(newest) => newest.items != plan.items,
            None => !plan.items.is_empty(),
        }
    }

    fn report(&self, context: &Context, plan: &Plan, dry_run: bool) -> Report {
        let free = report::freed(&self.facts, &plan.items);
        let targets = context.retention.iter().map(|(target, rules)| {
            let judged = self.verdicts.get(target).cloned().unwrap_or_default();
            report::target(&self.facts, (target, rules), judged, &free)
        });
        Report {
            dry_run,
            targets: targets.collect(),
            unruled: self.unruled(&context.retention),
            refusals: self.facts.refusals.clone(),
            notes: self.doubts(&context.retention).into_iter().chain(self.garbage.notes.clone()).collect(),
            planned: report::planned(plan),
            ripe: None,
            swept: None,
        }
    }

    /// Backups that stay because of who says that they are proven; target by target.
    fn doubts(&self, rules: &BTreeMap<TargetName, Rules>) -> Vec<String> {
        let doubted = |id: &BackupId| {
            let verdicts = self.verdicts.values().find_map(|of| of.get(id));
            verdicts.is_some_and(|verdict| matches!(verdict, Verdict::Keep(why) if why.contains(&Keep::Doubted)))
        };
        let told = rules.keys().filter_map(|target| {
            let own = self.facts.backups.iter().filter(|backup| backup.commit.target == *target);
            let own: Vec<_> = own.filter(|backup| doubted(&backup.commit.id)).collect();
            let strangers: BTreeSet<_> = own.iter().flat_map(|backup| self.facts.proofs.strangers(backup)).collect();
            let names = strangers.iter().map(SignerId::as_str).collect::<Vec<_>>().join(", ");
            let count = own.len();
            (count > 0).then(|| {
                format!("{target}: {count} backups stay and take no place: only {names} says that they are proven; `signers` names whom prune relies on")
            })
        });
        told.collect()
    }

    /// Targets that have backups and no rules: nothing of them ever goes.
    fn unruled(&self, rules: &BTreeMap<TargetName, Rules>) -> Vec<TargetName> {
        let targets: BTreeSet<_> = self.facts.backups.iter().map(|backup| backup.commit.target.clone()).collect();
        targets.into_iter().filter(|target| rules.get(target).is_none_or(Rules::keep_everything)).collect()
    }
}

fn doomed(facts: &Facts, verdicts: &BTreeMap<TargetName, BTreeMap<BackupId, Verdict>>) -> Vec<Doomed> {
    let judged = verdicts.iter().flat_map(|(target, of)| of.iter().map(move |(id, verdict)| (target, id, verdict)));
    let gone = judged.filter(|(_, _, verdict)| !verdict.keeps());
    let doomed = gone.map(|(target, id, verdict)| Doomed {
        id: id.clone(),
        target: target.clone(),
        proven: facts.proven.contains(id),
        why: match verdict {
            Verdict::NeverProven => "never drilled, and older than every drilled backup that stays".to_owned(),
            Verdict::Replaced => "a drilled copy of it stays".to_owned(),
            _ => "no rule keeps it".to_owned(),
        },
    });
    doomed.collect()
}

/// The newest plan of a known signer; without one, nothing is known of earlier runs.
async fn newest_plan(context: &Context) -> Option<Plan> {
    let stored = plan::stored(&context.repository).await.ok()?;
    let (id, _) = stored.last_key_value()?;
    Plan::read(&context.repository, id, |signer| is_known(context, signer)).await.ok()
}

/// Whoever may write could forge a plan, and with it the grace period.
fn is_known(context: &Context, signer: &SignerId) -> bool {
    let own = context.writer.as_ref().map(|writer| writer.signer.id());
    context.repository.trust.relies_on(own, signer)
}

fn ripe(old: &Plan, items: &[Item], left: bool) -> Ripe {
    let backups = report::commits(items);
    Ripe { plan: old.head.id.clone(), digest: plan::digest(items), amount: Amount::of(items), backups, more: left }
}

/// Why a sweep that could be done is not; `None` if it may begin.
fn withheld(report: &Report, consent: &Consent, percent: u8) -> Option<Option<String>> {
    let ripe = report.ripe.as_ref()?;
    let too_many = report.targets.iter().find_map(|target| target.too_many(&ripe.backups, percent));
    match (consent, too_many) {
        (Consent::None, _) => Some(None),
        (Consent::Scheduled, None) => None,
        (Consent::Scheduled, Some(why)) => {
            Some(Some(format!("{why}; if that is right: drctl prune --plan {} --execute", ripe.digest)))
        }
        (Consent::Digest(digest), _) if *digest == ripe.digest => None,
        (Consent::Digest(digest), _) => {
            Some(Some(format!("what would be removed has the digest {}, not {digest}: look at it again", ripe.digest)))
        }
    }
}

/// When the plan that a run has just stored is ripe.
pub fn ripe_at(plan: &PruneId, grace: TimeDelta) -> DateTime<Utc> {
    plan.began() + grace
}
