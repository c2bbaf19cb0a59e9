//! What a prune found and did.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::retention::{Keep, Rules, Verdict};
use crate::model::{BackupId, PruneId, RegionName, TargetName};
use crate::repository::layout;
use crate::repository::prune::facts::Facts;
use crate::repository::prune::garbage::Item;
use crate::repository::prune::plan::Plan;
use crate::repository::prune::sweep::Swept;

/// What a prune found and did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Target by target, those that have rules.
    pub targets: Vec<TargetReport>,
    /// Targets that have backups and no rules.
    pub unruled: Vec<TargetName>,
    /// Why nothing is removed.
    pub refusals: Vec<String>,
    /// What was left alone, and why.
    pub notes: Vec<String>,
    /// What nobody needs, as of now.
    pub planned: Planned,
    /// What an earlier plan found as well, whose grace period is over.
    pub ripe: Option<Ripe>,
    /// What was removed.
    pub swept: Option<Swept>,
}

impl Report {
    /// Backups that go without ever having been proven: whoever drills would have known whether they are good.
    pub fn alarms(&self) -> impl Iterator<Item = &Judged> {
        let backups = self.targets.iter().flat_map(|target| &target.backups);
        backups.filter(|backup| backup.verdict == Verdict::NeverProven)
    }

    /// Backups that stay and take no place, because prune does not rely on who says that they are proven.
    pub fn doubted(&self) -> impl Iterator<Item = &Judged> {
        let backups = self.targets.iter().flat_map(|target| &target.backups);
        backups.filter(|backup| matches!(&backup.verdict, Verdict::Keep(reasons) if reasons.contains(&Keep::Doubted)))
    }
}

/// One target.
#[derive(Debug, Clone, Serialize)]
pub struct TargetReport {
    /// Its name.
    pub target: TargetName,
    /// Whether its rules keep everything.
    pub keeps_everything: bool,
    /// Whether a hold keeps all of it.
    pub held: bool,
    /// Its backups, newest first.
    pub backups: Vec<Judged>,
}

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct Judged {
    /// Which.
    pub id: BackupId,
    /// When it began.
    pub at: DateTime<Utc>,
    /// Whether a drill proved it.
    pub proven: bool,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Bytes that go with it, over all regions.
    pub frees: u64,
}

impl Judged {
    /// Why it stays or goes, in words.
    pub fn words(&self) -> String {
        match &self.verdict {
            Verdict::Keep(reasons) => reasons.iter().map(Keep::to_string).collect::<Vec<_>>().join(", "),
            Verdict::Expired => "GOES: no rule keeps it".to_owned(),
            Verdict::NeverProven => "GOES, NEVER DRILLED".to_owned(),
            Verdict::Retained { region, until: Some(until) } => {
                format!("RETAINED: no rule keeps it, locked in {region} until {}", until.format("%F %T UTC"))
            }
            Verdict::Retained { region, until: None } => {
                format!("RETAINED: no rule keeps it, held in {region} until somebody lifts the legal hold")
            }
            Verdict::Replaced => "GOES: a drilled copy took its place".to_owned(),
        }
    }
}

impl TargetReport {
    /// Whether more of its backups go at once than a schedule may remove; a target of two may lose one.
    pub(super) fn too_many(&self, going: &[BackupId], percent: u8) -> Option<String> {
        let own = self.backups.iter().filter(|backup| going.contains(&backup.id)).count();
        let all = self.backups.len();
        let allowed = (all * usize::from(percent) / 100).max(1);
        (own > allowed)
            .then(|| format!("{own} of the {all} backups of {} would go at once, and {allowed} may", self.target))
    }
}

/// How much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Versions of objects, over all regions.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Amount {
    /// Of these items.
    pub fn of<'i>(items: impl IntoIterator<Item = &'i Item>) -> Self {
        let add = |sum: Self, item: &Item| Self { objects: sum.objects + 1, bytes: sum.bytes + item.size };
        items.into_iter().fold(Self::default(), add)
    }
}

/// What nobody needs.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// The stored plan; `null` if it was not stored, or says the same as the newest one.
    pub id: Option<PruneId>,
    /// All of it.
    pub amount: Amount,
    /// By reason.
    pub by_reason: BTreeMap<&'static str, Amount>,
    /// By region.
    pub by_region: BTreeMap<RegionName, Amount>,
}

/// What may be removed now.
#[derive(Debug, Clone, Serialize)]
pub struct Ripe {
    /// The plan whose grace period is over.
    pub plan: PruneId,
    /// What a person names to have exactly this removed.
    pub digest: String,
    /// How much.
    pub amount: Amount,
    /// The backups among it.
    pub backups: Vec<BackupId>,
    /// Whether more is ripe than one run removes.
    pub more: bool,
}

pub(super) fn planned(plan: &Plan) -> Planned {
    let (mut by_reason, mut by_region) = (BTreeMap::new(), BTreeMap::new());
    for item in &plan.items {
        let reason: &mut Amount = by_reason.entry(item.why.as_str()).or_default();
        let region: &mut Amount = by_region.entry(item.region.clone()).or_default();
        for amount in [reason, region] {
            amount.objects += 1;
            amount.bytes += item.size;
        }
    }
    Planned { id: None, amount: Amount::of(&plan.items), by_reason, by_region }
}

/// The backups whose COMMIT is among `items`.
pub(super) fn commits(items: &[Item]) -> Vec<BackupId> {
    let commits = items.iter().filter(|item| item.key.starts_with(layout::COMMITS));
    commits.filter_map(|item| item.of.parse().ok()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Bytes that go with each backup: of objects that it was born with, and of older ones that it alone still needs.
pub(super) fn freed(facts: &Facts, items: &[Item]) -> BTreeMap<BackupId, u64> {
    let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
    for item in items {
        *sizes.entry(&item.key).or_default() += item.size;
    }
    let sum = |id: &BackupId| {
        let listed = facts.inventories.get(id).into_iter().flatten().map(|line| line.key.as_str());
        let own = facts.backups.iter().find(|backup| backup.commit.id == *id);
        let own = own.map(|backup| crate::repository::catalog::own_records(&backup.commit)).unwrap_or_default();
        let names: BTreeSet<_> = listed.chain(own.iter().map(String::as_str)).collect();
        names.into_iter().filter_map(|key| sizes.get(key)).sum::<u64>()
    };
    facts.backups.iter().map(|backup| (backup.commit.id.clone(), sum(&backup.commit.id))).collect()
}

pub(super) fn target(
    facts: &Facts,
    (target, rules): (&TargetName, &Rules),
    verdicts: BTreeMap<BackupId, Verdict>,
    frees: &BTreeMap<BackupId, u64>,
) -> TargetReport {
    let own = facts.backups.iter().rev().map(|backup| &backup.commit).filter(|commit| commit.target == *target);
    let judged = own.filter_map(|commit| {
        let verdict = verdicts.get(&commit.id)?.clone();
        let gone = if verdict.keeps() { 0 } else { frees.get(&commit.id).copied().unwrap_or_default() };
        let proven = facts.proven.contains(&commit.id);
        Some(Judged { id: commit.id.clone(), at: commit.started_at, proven, verdict, frees: gone })
    });
    let backups = judged.collect();
    TargetReport {
        target: target.clone(),
        keeps_everything: rules.keep_everything(),
        held: facts.is_held(target),
        backups,
    }
}
