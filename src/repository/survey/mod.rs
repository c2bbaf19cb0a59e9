//! What can be restored, region by region: backups, the WAL that goes on from them, and how far it reaches in time.

pub mod beside;
mod lost;
pub mod scrub;
pub mod shares;

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};

use crate::model::commit::{Commit, WalNeed};
use crate::model::{BackupId, Branch, Error, RegionName, Result, TargetName, Timeline};
use crate::repository::catalog::{self, Backup, Debt, Held, held_everywhere};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::survey::scrub::branches_of;
use crate::repository::survey::shares::Share;
use crate::repository::wal::gaps::Gap;
use crate::repository::wal::index::{BranchId, Run, WalIndex, Window, windows};

/// Headers read backwards in search of a commit: a quiet server ships many frames without one.
const LOOK_BACK: u64 = 512;

/// A window and the newest commit that it is known to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The WAL.
    pub window: Window,
    /// The newest commit in it.
    pub newest_commit: Option<DateTime<Utc>>,
}

/// The WAL of one branch.
#[derive(Debug)]
pub struct BranchSurvey {
    /// The branch.
    pub branch: BranchId,
    /// Its windows in each region, in the order of the regions; an error for one that could not be listed.
    pub regions: Vec<(RegionName, std::result::Result<Vec<Reach>, String>)>,
    /// The windows of all regions together.
    pub union: Vec<Reach>,
    /// What was stored and is in no region any more.
    pub lost: Vec<Gap>,
}

/// Everything that is known of a target without opening anything.
#[derive(Debug)]
pub struct Survey {
    /// The target.
    pub target: TargetName,
    /// Its backups, oldest first, with what each region lacks.
    pub backups: Vec<(Backup, Vec<(RegionName, Debt)>)>,
    /// Its WAL, oldest timeline first.
    pub branches: Vec<BranchSurvey>,
    /// What each backup has to itself, of those whose inventory is intact.
    pub shares: BTreeMap<BackupId, Share>,
    /// Bytes of all backups together in each region, each object once.
    pub stored_bytes: u64,
}

/// How a backup stands in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Everything is there.
    Complete,
    /// Something is missing; repair brings it.
    Debt,
    /// Something is there with a wrong size.
    Damaged,
    /// The region could not be read.
    Unreachable,
}

/// Surveys every target of `backups`.
///
/// # Errors
/// No region answers.
pub async fn survey(repository: &Repository, backups: &[Backup]) -> Result<Vec<Survey>> {
    let targets: BTreeSet<_> = backups.iter().map(|backup| backup.commit.target.clone()).collect();
    let mut surveys = Vec::new();
    for target in targets {
        let own: Vec<_> = backups.iter().filter(|backup| backup.commit.target == target).cloned().collect();
        let held = held_everywhere(repository, &target).await;
        let (mut judged, mut known) = (Vec::new(), Vec::new());
        for backup in &own {
            let lines = catalog::inventory(repository, &backup.commit).await;
            judged.push((backup.clone(), debts(&backup.commit, &lines, &held)));
            known.extend(lines.ok().map(|lines| (&backup.commit, lines)));
        }
        let known: Vec<_> = known.iter().map(|(commit, lines)| (*commit, lines.as_slice())).collect();
        let (shares, stored_bytes) = (shares::of(&known), shares::stored(&known));
        let mut branches = Vec::new();
        for branch in branches_of(repository, &own).await? {
            branches.push(survey_branch(repository, branch).await);
        }
        surveys.push(Survey { target, backups: judged, branches, shares, stored_bytes });
    }
    Ok(surveys)
}

fn debts(commit: &Commit, lines: &Result<Vec<InventoryLine>>, held: &[(RegionName, Held)]) -> Vec<(RegionName, Debt)> {
    let of_region = |(name, held): &(RegionName, Held)| {
        let debt = match lines {
            Ok(lines) => held.debt(commit, lines),
            Err(error) => lost_inventory(held.debt(commit, &[]), error),
        };
        (name.clone(), debt)
    };
    held.iter().map(of_region).collect()
}

/// Without its inventory a backup cannot be restored from anywhere, whatever else is there.
fn lost_inventory(mut debt: Debt, error: &Error) -> Debt {
    debt.damaged.push(error.to_string());
    debt
}

async fn survey_branch(repository: &Repository, branch: BranchId) -> BranchSurvey {
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    let mut regions = Vec::new();
    for region in repository.regions.all() {
        let unreadable = index.unreadable().iter().find(|(name, _)| *name == region.name);
        let reach = match unreadable {
            Some((_, why)) => Err(why.clone()),
            None => Ok(reaches(repository, &index, Some(&region.name)).await),
        };
        regions.push((region.name.clone(), reach));
    }
    let union = reaches(repository, &index, None).await;
    let lost = lost::holes(repository, &index).await;
    BranchSurvey { branch, regions, union, lost }
}

async fn reaches(repository: &Repository, index: &WalIndex, region: Option<&RegionName>) -> Vec<Reach> {
    let (runs, errors) = index.runs(repository, region).await;
    for error in errors {
        tracing::warn!(%error, "WAL is not readable");
    }
    let mut reaches = Vec::new();
    for window in windows(&runs) {
        let inside: Vec<_> = runs.iter().filter(|run| window.covers(run.start(), run.end())).collect();
        let newest_commit = newest_commit(repository, index, &inside).await;
        reaches.push(Reach { window, newest_commit });
    }
    reaches
}

/// Looks backwards from the end, because the last frames may hold no commit.
async fn newest_commit(repository: &Repository, index: &WalIndex, runs: &[&Run]) -> Option<DateTime<Utc>> {
    let mut by_end = runs.to_vec();
    by_end.sort_by_key(|run| std::cmp::Reverse(run.end()));
    for run in by_end {
        let (first, last) = (run.first.place.seq, run.last.place.seq);
        for seq in (first..=last).rev().take(usize::try_from(LOOK_BACK).unwrap_or(usize::MAX)) {
            let header = index.header(repository, &run.first.place.epoch, seq).await.ok()?;
            if header.span.last_commit.is_some() {
                return header.span.last_commit;
            }
        }
    }
    None
}

impl Survey {
    /// Up to when a backup can be rolled forward in one region, or (`None`) in all of them together: the newest commit
    /// of the window that holds its WAL, and at least the moment at which it began. `None` if its WAL is not whole.
    pub fn recoverable_until(&self, commit: &Commit, region: Option<&RegionName>) -> Option<DateTime<Utc>> {
        let Some(need) = &commit.wal else { return Some(commit.started_at) };
        let reach =
            self.reaches(need, region)?.iter().find(|reach| reach.window.covers(need.start_lsn, need.stop_lsn))?;
        Some(reach.newest_commit.map_or(commit.started_at, |newest| newest.max(commit.started_at)))
    }

    /// Whether the regions that answer hold all of a backup together, whatever each of them lacks.
    pub fn is_restorable(&self, commit: &Commit, debts: &[(RegionName, Debt)]) -> bool {
        let answering: Vec<_> = debts.iter().map(|(_, debt)| debt).filter(|debt| debt.unreadable.is_none()).collect();
        let lacks = |debt: &Debt, key: &String| debt.missing.contains(key) || debt.damaged.contains(key);
        let Some(first) = answering.first() else { return false };
        let bad = first.missing.iter().chain(&first.damaged);
        let whole = !bad.into_iter().any(|key| answering.iter().all(|debt| lacks(debt, key)));
        whole && self.recoverable_until(commit, None).is_some()
    }

    fn reaches(&self, need: &WalNeed, region: Option<&RegionName>) -> Option<&Vec<Reach>> {
        let branch = BranchId { system_id: need.system_id, timeline: need.timeline, branch: need.branch.clone() };
        let survey = self.branches.iter().find(|survey| survey.branch == branch)?;
        match region {
            None => Some(&survey.union),
            Some(region) => survey.regions.iter().find(|(name, _)| name == region)?.1.as_ref().ok(),
        }
    }

    /// How a backup stands in a region, WAL included.
    pub fn state(&self, commit: &Commit, region: &RegionName, debt: &Debt) -> State {
        match () {
            () if debt.unreadable.is_some() => State::Unreachable,
            () if !debt.damaged.is_empty() => State::Damaged,
            () if debt.missing.is_empty() && self.recoverable_until(commit, Some(region)).is_some() => State::Complete,
            () => State::Debt,
        }
    }

    /// The newest frame of any branch in one region: until when it was written, and where it ends.
    pub fn newest_window(&self, region: &RegionName) -> Option<Reach> {
        let regions = self.branches.iter().flat_map(|branch| &branch.regions);
        let windows = regions.filter(|(name, _)| name == region).filter_map(|(_, reach)| reach.as_ref().ok()).flatten();
        windows.copied().max_by_key(|reach| reach.window.written_at)
    }

    /// Timelines that two servers chose, with their branches: a restore across has to be told which one counts. Once the
    /// newest backup is of one of them, or of a later one, nobody needs to be asked any more.
    pub fn conflicts(&self) -> Vec<(Timeline, Vec<Branch>)> {
        let newest = self.backups.iter().rev().find_map(|(backup, _)| backup.commit.wal.as_ref());
        let Some(newest) = newest else { return Vec::new() };
        let mut of: BTreeMap<Timeline, Vec<Branch>> = BTreeMap::new();
        let own =
            self.branches.iter().map(|survey| &survey.branch).filter(|branch| branch.system_id == newest.system_id);
        for branch in own.filter(|branch| branch.timeline > newest.timeline) {
            of.entry(branch.timeline).or_default().push(branch.branch.clone());
        }
        of.into_iter().filter(|(_, branches)| branches.len() > 1).collect()
    }

    /// Objects that each region lacks, over all backups, each once.
    pub fn debts(&self) -> BTreeMap<RegionName, (BTreeSet<&str>, Option<&str>)> {
        let mut sums: BTreeMap<RegionName, (BTreeSet<&str>, Option<&str>)> = BTreeMap::new();
        for (region, debt) in self.backups.iter().flat_map(|(_, debts)| debts) {
            let sum = sums.entry(region.clone()).or_default();
            sum.0.extend(debt.missing.iter().chain(&debt.damaged).map(String::as_str));
            sum.1 = sum.1.or(debt.unreadable.as_deref());
        }
        sums
    }
}
