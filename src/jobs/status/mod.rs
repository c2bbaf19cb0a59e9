//! Status: the worst first.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::list;
use crate::jobs::wal::{Position, control};
use crate::model::{BackupId, Lsn, RegionName, ReportId, Result, TargetName};
use crate::repository::catalog;
use crate::repository::reports::{self, ReportHead};
use crate::repository::survey::{self, State, Survey};

/// How things stand.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Every target, the worst first.
    pub targets: Vec<TargetStatus>,
    /// COMMITs that no region holds intact.
    pub unreadable: Vec<String>,
}

impl Report {
    /// Whether an objective is violated.
    pub fn is_violated(&self) -> bool {
        !self.unreadable.is_empty() || self.targets.iter().any(|target| target.violated)
    }
}

/// One target.
#[derive(Debug, Clone, Serialize)]
pub struct TargetStatus {
    /// Its name.
    pub target: TargetName,
    /// The newest backup that some region can restore.
    pub last_backup: Option<BackupId>,
    /// When it was complete.
    pub last_backup_at: Option<DateTime<Utc>>,
    /// The newest restore that was proven to work.
    pub proven: Option<Proven>,
    /// How much may be lost, in seconds.
    pub rpo_seconds: Option<u64>,
    /// Whether an objective is violated, or cannot be shown to be kept.
    pub violated: bool,
    /// Region by region.
    pub regions: Vec<RegionStatus>,
    /// What is wrong, in words; the worst first.
    pub problems: Vec<String>,
    /// What to type next.
    pub next: Option<String>,
}

/// A drill that passed.
#[derive(Debug, Clone, Serialize)]
pub struct Proven {
    /// Its report.
    pub report: ReportId,
    /// The deepest level that it proved.
    pub level: Option<String>,
    /// The region that it read, alone.
    pub region: Option<RegionName>,
    /// When it was over.
    pub at: DateTime<Utc>,
}

/// One target in one region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionStatus {
    /// The region.
    pub name: RegionName,
    /// The worst state of a backup there.
    pub state: State,
    /// Objects that it lacks.
    pub debt_objects: u64,
    /// The end of its newest WAL.
    pub wal_end: Option<Lsn>,
    /// When its newest WAL was written.
    pub wal_at: Option<DateTime<Utc>>,
    /// Seconds of commits that are not durable there, rounded up; of a target without WAL, the age of its newest backup
    /// there. `null` = unknown: no WAL receiver answers on this machine, or the region lags behind it. Never 0 for want of
    /// knowledge.
    pub exposure_seconds: Option<u64>,
    /// Since when the exposure is unknown.
    pub unknown_since: Option<DateTime<Utc>>,
}

/// Looks at everything.
///
/// # Errors
/// No region answers.
pub async fn run(context: &Context) -> Result<Report> {
    let repository = &context.repository;
    let (backups, unreadable) = catalog::backups(repository, None).await?;
    let surveys = survey::survey(repository, &backups).await?;
    // Oldest first.
    let (drills, damaged) = reports::list(repository, None).await?;
    for error in &damaged {
        tracing::warn!(%error, "a report is not readable");
    }
    let mut targets = Vec::new();
    for survey in &surveys {
        let mut status = status(context, survey, receiver(context, &survey.target).await);
        status.judge_drills(drills.iter().filter(|head| head.job == "drill" && head.target == survey.target));
        targets.push(status);
    }
    for (name, objectives) in context.promises() {
        if !targets.iter().any(|status| status.target == *name) {
            targets.push(without_backup(context, name, objectives.rpo));
        }
    }
    targets.sort_by_key(|status| (!status.violated, status.problems.is_empty(), status.target.clone()));
    Ok(Report { targets, unreadable: unreadable.iter().map(ToString::to_string).collect() })
}

impl TargetStatus {
    /// The newest pass is what is proven; a newer failure is a violation, whatever was proven before.
    fn judge_drills<'a>(&mut self, drills: impl Iterator<Item = &'a ReportHead>) {
        let mut failed = None;
        for head in drills {
            match head.outcome.as_str() {
                "pass" => {
                    let ReportHead { id, level, region, finished_at, .. } = head.clone();
                    (self.proven, failed) = (Some(Proven { report: id, level, region, at: finished_at }), None);
                }
                "fail" => failed = Some(head.id.clone()),
                _ => {}
            }
        }
        if let Some(report) = failed {
            self.violated = true;
            self.problems.push("the last drill failed".to_owned());
            self.next.get_or_insert_with(|| format!("drctl report show {report}"));
        }
    }
}

fn without_backup(context: &Context, name: &TargetName, rpo: Option<Duration>) -> TargetStatus {
    let region = |name: &RegionName| RegionStatus {
        name: name.clone(),
        state: State::Debt,
        debt_objects: 0,
        wal_end: None,
        wal_at: None,
        exposure_seconds: None,
        unknown_since: None,
    };
    TargetStatus {
        target: name.clone(),
        last_backup: None,
        last_backup_at: None,
        proven: None,
        rpo_seconds: rpo.map(|rpo| rpo.as_secs()),
        violated: true,
        regions: context.repository.regions.all().iter().map(|found| region(&found.name)).collect(),
        problems: vec!["there is no backup".to_owned()],
        next: Some(format!("drctl backup {name}")),
    }
}

/// Where the WAL receiver of a target stands, if one runs on this machine.
async fn receiver(context: &Context, name: &TargetName) -> Option<Position> {
    let target = context.targets.iter().find(|target| target.name == *name)?;
    match control::position(&target.control_socket, name).await {
        Ok(position) => position,
        Err(error) => {
            tracing::warn!(%error, "the WAL receiver does not tell where it stands");
            None
        }
    }
}

fn exposure(receiver: Option<&Position>, region: &RegionName) -> Option<u64> {
    let seconds = receiver?.exposure_of(region)?;
    // Rounded up: what is exposed for a moment is not 0.
    Duration::try_from_secs_f64(seconds).ok().map(|exposed| exposed.as_secs() + u64::from(exposed.subsec_nanos() > 0))
}

fn status(context: &Context, survey: &Survey, receiver: Option<Position>) -> TargetStatus {
    let now = context.clock.now();
    let rpo = context.promises().find(|(name, _)| **name == survey.target).and_then(|(_, objectives)| objectives.rpo);
    let listed = list::list(survey);
    let usable = listed.iter().rev().find(|backup| backup.recoverable_until.is_some());
    let debts = survey.debts();
    let has_wal = survey.backups.last().is_some_and(|(backup, _)| backup.commit.wal.is_some());
    let names = context.repository.regions.all().iter().map(|region| &region.name);
    let region = |name: &RegionName| {
        let states = listed.iter().flat_map(|backup| &backup.regions).filter(|region| region.name == *name);
        let newest = survey.newest_window(name);
        let exposure_seconds = match has_wal {
            true => exposure(receiver.as_ref(), name),
            false => age_of_newest(now, &listed, name),
        };
        let since = newest.map(|reach| reach.window.written_at).or(usable.map(|backup| backup.finished_at));
        RegionStatus {
            name: name.clone(),
            state: states.map(|region| region.state).max_by_key(|state| *state as u8).unwrap_or(State::Debt),
            debt_objects: debts.get(name).map_or(0, |(objects, _)| objects.len() as u64),
            wal_end: newest.map(|reach| reach.window.end),
            wal_at: newest.map(|reach| reach.window.written_at),
            exposure_seconds,
            unknown_since: since.filter(|_| exposure_seconds.is_none()),
        }
    };
    let regions: Vec<_> = names.map(region).collect();
    let mut problems = Vec::new();
    let late = |region: &&RegionStatus| rpo.is_some_and(|rpo| is_late(now, region, rpo));
    let violated_in: Vec<_> = regions.iter().filter(late).map(|region| region.name.to_string()).collect();
    if usable.is_none() {
        problems.push("no backup can be restored".to_owned());
    }
    if !violated_in.is_empty() {
        let what = if has_wal { "WAL" } else { "backup" };
        problems.push(format!("no recent {what} in {}", violated_in.join(", ")));
    }
    for region in regions.iter().filter(|region| region.state != State::Complete) {
        problems.push(match region.state {
            State::Unreachable => format!("{} does not answer", region.name),
            _ => format!("debt in {}: {} objects", region.name, region.debt_objects),
        });
    }
    let late = (!violated_in.is_empty()).then(|| match has_wal {
        true => format!("drctl wal stream {}", survey.target),
        false => format!("drctl backup {}", survey.target),
    });
    let next = next(&survey.target, usable.is_some(), late, &regions);
    TargetStatus {
        target: survey.target.clone(),
        last_backup: usable.map(|backup| backup.id.clone()),
        last_backup_at: usable.map(|backup| backup.finished_at),
        proven: None,
        rpo_seconds: rpo.map(|rpo| rpo.as_secs()),
        violated: usable.is_none() || !violated_in.is_empty(),
        regions,
        problems,
        next,
    }
}

/// Without a receiver that tells the exposure, the age of the newest WAL is all there is, and no WAL at all is late.
fn is_late(now: DateTime<Utc>, region: &RegionStatus, rpo: Duration) -> bool {
    match (region.exposure_seconds, region.unknown_since) {
        (Some(seconds), _) => Duration::from_secs(seconds) > rpo,
        (None, Some(since)) => (now - since).to_std().unwrap_or_default() > rpo,
        (None, None) => true,
    }
}

/// Where there is no WAL, what was written since the newest backup began is exposed, whether or not anything was.
fn age_of_newest(now: DateTime<Utc>, listed: &[list::Listed], region: &RegionName) -> Option<u64> {
    let whole_there = |backup: &&list::Listed| {
        backup.regions.iter().any(|held| held.name == *region && held.recoverable_until.is_some())
    };
    let newest = listed.iter().rev().find(whole_there)?;
    (now - newest.started_at).to_std().ok().map(|age| age.as_secs() + 1)
}

fn next(target: &TargetName, usable: bool, late: Option<String>, regions: &[RegionStatus]) -> Option<String> {
    let behind = regions.iter().find(|region| matches!(region.state, State::Debt | State::Damaged));
    match behind {
        _ if !usable => Some(format!("drctl verify {target}")),
        Some(region) => Some(format!("drctl repair {target} --region {}", region.name)),
        None => late,
    }
}
