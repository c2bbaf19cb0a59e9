//! List: which backups there are, where they are whole, and up to when they can be rolled forward.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::backup::streams::left_out;
use crate::model::commit::Commit;
use crate::model::{BackupId, Lsn, RegionName, Result, TargetName};
use crate::repository::catalog;
use crate::repository::survey::shares::Generation;
use crate::repository::survey::{self, Reach, State, Survey};

/// Manifests that are read at the same time.
const COUNTED_AT_ONCE: usize = 8;

/// Everything that can be restored.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The backups, newest first.
    pub backups: Vec<Listed>,
    /// What can be restored of each target.
    pub windows: Vec<Restorable>,
    /// Bytes of the backups of each target in each region, each object once.
    pub stored: BTreeMap<TargetName, u64>,
    /// COMMITs that no region holds intact.
    pub unreadable: Vec<String>,
}

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: BackupId,
    /// What was backed up.
    pub target: TargetName,
    /// The kind of the target.
    pub source: String,
    /// Full, incremental, dump, files.
    pub kind: &'static str,
    /// Of a copy that compaction made: the backup whose moment it is of.
    pub copy_of: Option<BackupId>,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it was complete.
    pub finished_at: DateTime<Utc>,
    /// Bytes that a restore writes, without WAL.
    pub size_bytes: u64,
    /// Bytes that it added to each region.
    pub stored_bytes: u64,
    /// Bytes that it needs in each region; `null` if its inventory is not intact.
    pub needs_bytes: Option<u64>,
    /// Bytes that no other backup needs: so much becomes free in each region when it goes.
    pub frees_bytes: Option<u64>,
    /// Its packs, by the backup that wrote them; oldest first.
    pub generations: Vec<Generation>,
    /// Where its WAL begins.
    pub start_lsn: Option<Lsn>,
    /// Where it is consistent.
    pub stop_lsn: Option<Lsn>,
    /// Its timeline.
    pub timeline: Option<u32>,
    /// Up to when it can be rolled forward: from the best region, or from all together if none is whole.
    pub recoverable_until: Option<DateTime<Utc>>,
    /// Things that should be in it and are not; `null` = not known: no key at hand opens what it says of itself.
    pub left_out_count: Option<u64>,
    /// How it stands in each region.
    pub regions: Vec<RegionState>,
}

/// One backup in one region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionState {
    /// The region.
    pub name: RegionName,
    /// How it stands there.
    pub state: State,
    /// Up to when it can be rolled forward from there alone.
    pub recoverable_until: Option<DateTime<Utc>>,
}

/// The time that can be restored of one target.
#[derive(Debug, Clone, Serialize)]
pub struct Restorable {
    /// The target.
    pub target: TargetName,
    /// From the end of the oldest backup whose WAL is whole.
    pub from: Option<DateTime<Utc>>,
    /// To the newest commit that is reached from a backup.
    pub to: Option<DateTime<Utc>>,
    /// Times in between that cannot be restored.
    pub gaps: Vec<(DateTime<Utc>, DateTime<Utc>)>,
    /// Single moments that can be restored, of a target without WAL: as many as it has backups.
    pub moments: u64,
}

/// Lists.
///
/// # Errors
/// No region answers.
pub async fn run(context: &Context, target: Option<&TargetName>) -> Result<Report> {
    let repository = &context.repository;
    let (backups, unreadable) = catalog::backups(repository, target).await?;
    let surveys = survey::survey(repository, &backups).await?;
    let mut listed: Vec<_> = surveys.iter().flat_map(list).collect();
    let commits = surveys.iter().flat_map(|survey| &survey.backups).map(|(backup, _)| backup.commit.clone());
    let commits: Vec<_> = commits.collect();
    let counts = stream::iter(commits).map(|commit| count(context, commit)).buffered(COUNTED_AT_ONCE);
    for (backup, left_out) in listed.iter_mut().zip(counts.collect::<Vec<_>>().await) {
        backup.left_out_count = left_out;
    }
    listed.sort_by(|a, b| (b.started_at, &b.id).cmp(&(a.started_at, &a.id)));
    let windows = surveys.iter().map(restorable).collect();
    let stored = surveys.iter().map(|survey| (survey.target.clone(), survey.stored_bytes)).collect();
    Ok(Report { backups: listed, windows, stored, unreadable: unreadable.iter().map(ToString::to_string).collect() })
}

async fn count(context: &Context, commit: Commit) -> Option<u64> {
    left_out(context, &commit).await.map(|list| list.len() as u64)
}

/// The backups of one target, oldest first, without what only their sealed parts tell.
pub fn list(survey: &Survey) -> Vec<Listed> {
    let one = |(backup, debts): &(catalog::Backup, Vec<(RegionName, catalog::Debt)>)| {
        let commit = &backup.commit;
        let state = |(name, debt): &(RegionName, catalog::Debt)| {
            let state = survey.state(commit, name, debt);
            let recoverable_until = match state {
                State::Complete => survey.recoverable_until(commit, Some(name)),
                State::Debt | State::Damaged | State::Unreachable => None,
            };
            RegionState { name: name.clone(), state, recoverable_until }
        };
        let regions: Vec<_> = debts.iter().map(state).collect();
        let wal = commit.wal.as_ref();
        let share = survey.shares.get(&commit.id);
        let best = regions.iter().filter_map(|region| region.recoverable_until).max();
        // When no region is whole the regions may still be whole together: a restore takes each object where it is good.
        let together = || survey.is_restorable(commit, debts).then(|| survey.recoverable_until(commit, None)).flatten();
        Listed {
            id: commit.id.clone(),
            target: commit.target.clone(),
            source: commit.source.clone(),
            kind: commit.kind.as_str(),
            copy_of: commit.copy.as_ref().map(|copy| copy.backup.clone()),
            started_at: commit.started_at,
            finished_at: commit.finished_at,
            size_bytes: commit.size_bytes,
            stored_bytes: commit.stored_bytes,
            needs_bytes: share.map(|share| share.needs_bytes),
            frees_bytes: share.map(|share| share.unique_bytes),
            generations: share.map(|share| share.generations.clone()).unwrap_or_default(),
            start_lsn: wal.map(|need| need.start_lsn),
            stop_lsn: wal.map(|need| need.stop_lsn),
            timeline: wal.map(|need| need.timeline.0),
            recoverable_until: best.or_else(together),
            left_out_count: None,
            regions,
        }
    };
    survey.backups.iter().map(one).collect()
}

/// From the oldest backup on; a window that no backup leads into restores nothing.
fn restorable(survey: &Survey) -> Restorable {
    if survey.backups.iter().all(|(backup, _)| backup.commit.wal.is_none()) {
        return moments(survey);
    }
    let mut spans: Vec<(DateTime<Utc>, DateTime<Utc>)> = Vec::new();
    for (backup, debts) in &survey.backups {
        let commit = &backup.commit;
        let Some(until) = survey.recoverable_until(commit, None) else { continue };
        if !survey.is_restorable(commit, debts) {
            continue;
        }
        let span = (commit.finished_at, until.max(commit.finished_at));
        match spans.last_mut() {
            Some(last) if leads_into(survey, commit) || span.0 <= last.1 => last.1 = last.1.max(span.1),
            _ => spans.push(span),
        }
    }
    let gaps = spans.windows(2).filter_map(|pair| Some((pair.first()?.1, pair.get(1)?.0))).collect();
    let (from, to) = (spans.first().map(|span| span.0), spans.last().map(|span| span.1));
    Restorable { target: survey.target.clone(), from, to, gaps, moments: 0 }
}

/// Each backup without WAL brings the moment back at which it began.
fn moments(survey: &Survey) -> Restorable {
    let whole = survey.backups.iter().filter(|(backup, debts)| survey.is_restorable(&backup.commit, debts));
    let times: Vec<_> = whole.map(|(backup, _)| backup.commit.started_at).collect();
    let (from, to) = (times.iter().min().copied(), times.iter().max().copied());
    Restorable { target: survey.target.clone(), from, to, gaps: Vec::new(), moments: times.len() as u64 }
}

/// Whether the WAL of `commit` lies in one window with that of an older backup, which then leads up to it.
fn leads_into(survey: &Survey, commit: &Commit) -> bool {
    let Some(need) = &commit.wal else { return false };
    let windows: Vec<&Reach> = survey.branches.iter().flat_map(|branch| &branch.union).collect();
    let older =
        survey.backups.iter().filter_map(|(backup, _)| backup.commit.wal.as_ref().map(|wal| (&backup.commit, wal)));
    let mut older = older.filter(|(other, _)| other.started_at < commit.started_at);
    older.any(|(_, other)| {
        let same = (other.system_id, other.timeline, &other.branch) == (need.system_id, need.timeline, &need.branch);
        same && windows.iter().any(|reach| {
            reach.window.covers(other.start_lsn, other.stop_lsn) && reach.window.covers(need.start_lsn, need.stop_lsn)
        })
    })
}
