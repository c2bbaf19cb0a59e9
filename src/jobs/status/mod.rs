//! Status: the worst first.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::status::overdue::Otherwise;
use crate::jobs::wal::{Heartbeat, Position, Pushes, State as Receiving, control};
use crate::jobs::{list, prune};
use crate::model::schedule::Schedule;
use crate::model::{BackupId, Lsn, RegionName, ReportId, Result, TargetName, Timeline};
use crate::repository::catalog;
use crate::repository::records::reports::{self, ReportHead};
use crate::repository::survey::{self, State, Survey};
use crate::repository::wal::gaps;
use crate::source::postgres::room::Slot;

mod contents;
mod overdue;
mod rto;
mod slot;

pub use overdue::Overdue;
pub use rto::{Prediction, Present, predict_restore};

/// Clocks of hosts that work together differ by less.
const CLOCK_SLACK: TimeDelta = TimeDelta::minutes(5);

/// How things stand.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Every target, the worst first.
    pub targets: Vec<TargetStatus>,
    /// Schedules without a success for longer than they allow.
    pub overdue: Vec<Overdue>,
    /// COMMITs that no region holds intact.
    pub unreadable: Vec<String>,
}

impl Report {
    /// Whether an objective is violated.
    pub fn is_violated(&self) -> bool {
        !self.unreadable.is_empty() || !self.overdue.is_empty() || self.targets.iter().any(|target| target.violated)
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
    /// How long a restore may take, in seconds.
    pub rto_seconds: Option<u64>,
    /// How long it would take now; `null` = no drill has passed yet.
    pub rto_predicted: Option<Prediction>,
    /// Holes in the WAL behind the newest backup: nothing beyond them can be restored.
    pub gaps: Vec<OpenGap>,
    /// Its replication slot, if the server answered.
    pub slot: Option<Slot>,
    /// What `archive_command` handed over, if somebody takes WAL on this machine.
    pub pushes: Option<Pushes>,
    /// The heartbeat row, if somebody writes it on this machine.
    pub heartbeat: Option<Heartbeat>,
    /// Whether an objective is violated, or cannot be shown to be kept.
    pub violated: bool,
    /// Region by region.
    pub regions: Vec<RegionStatus>,
    /// What is wrong, in words; the worst first.
    pub problems: Vec<String>,
    /// What to type next.
    pub next: Option<String>,
}

/// A hole in the WAL that nothing has filled.
#[derive(Debug, Clone, Serialize)]
pub struct OpenGap {
    /// The timeline.
    pub timeline: Timeline,
    /// The end of the WAL before it.
    pub from: Lsn,
    /// Where WAL begins again.
    pub to: Lsn,
    /// When it was met.
    pub at: DateTime<Utc>,
    /// Whether nothing is missing and two versions are stored.
    pub contradiction: bool,
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
pub async fn run(context: &Context, schedules: &[Schedule]) -> Result<Report> {
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
        let receiver = receiver(context, &survey.target).await;
        let mut status = status(context, survey, receiver.as_ref());
        let own: Vec<_> = drills.iter().filter(|head| head.job == "drill" && head.target == survey.target).collect();
        status.judge_drills(own.iter().copied());
        status.judge_gaps(context, survey).await?;
        status.judge_time(context, survey, &own).await;
        status.judge_contents(context, survey).await;
        status.judge_receiver(receiver);
        let unproven = prune::alarm::unproven(context, survey, &drills).unwrap_or_default();
        if unproven > 0 {
            status.problems.push(format!("{unproven} backups expire that no drill ever proved"));
            status.next.get_or_insert_with(|| format!("drctl drill {}", survey.target));
        }
        targets.push(status);
    }
    for (name, objectives) in context.promises() {
        if !targets.iter().any(|status| status.target == *name) {
            let mut status = without_backup(context, name, objectives.rpo);
            status.judge_receiver(receiver(context, name).await);
            targets.push(status);
        }
    }
    for (target, slot) in slot::slots(context).await {
        if let Some(status) = targets.iter_mut().find(|status| status.target == target) {
            status.problems.extend(slot::problem(&slot));
            status.slot = Some(slot);
        }
    }
    let otherwise = |target: &TargetName| {
        let status = targets.iter().find(|status| status.target == *target);
        let drill = status.and_then(|status| status.proven.as_ref()).map(|proven| proven.at);
        Otherwise { backup: status.and_then(|status| status.last_backup_at), drill }
    };
    let overdue = overdue::overdue(context, schedules, otherwise).await?;
    for late in &overdue {
        for status in targets.iter_mut().filter(|status| late.target.as_ref() == Some(&status.target)) {
            status.violated = true;
            status.problems.push(format!("{} is overdue", late.schedule));
            status.next.get_or_insert_with(|| format!("drctl run {}", late.schedule));
        }
    }
    targets.sort_by_key(|status| (!status.violated, status.problems.is_empty(), status.target.clone()));
    Ok(Report { targets, overdue, unreadable: unreadable.iter().map(ToString::to_string).collect() })
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

impl TargetStatus {
    /// A gap behind the newest backup cuts off everything that was committed since.
    async fn judge_gaps(&mut self, context: &Context, survey: &Survey) -> Result<()> {
        let newest = survey.backups.iter().rev().map(|(backup, _)| &backup.commit);
        let newest = newest.filter(|commit| self.last_backup.as_ref() == Some(&commit.id));
        let newest = newest.filter_map(|commit| Some((commit.wal.as_ref()?, commit.started_at))).next();
        for branch in &survey.branches {
            let (gaps, unknown) = gaps::read(&context.repository, &branch.branch).await?;
            self.problems.extend(unknown.iter().map(|error| format!("a recorded gap is not readable: {error}")));
            let is_stored = |from, to| branch.union.iter().any(|reach| reach.window.covers(from, to));
            let open = gaps.into_iter().chain(branch.lost.iter().cloned()).filter(|gap| gap.is_open(is_stored));
            let open = open.filter(|gap| newest.is_none_or(|(need, began)| !gap.is_before(need, began)));
            self.gaps.extend(open.map(|gap| OpenGap {
                timeline: gap.timeline,
                from: gap.from,
                to: gap.to,
                at: gap.at,
                contradiction: gap.contradiction,
            }));
        }
        for (timeline, branches) in survey.conflicts() {
            self.violated = true;
            let names: Vec<_> = branches.iter().map(|branch| format!("{}-{branch}", timeline.0)).collect();
            let text = format!("servers were promoted independently to timeline {}: {}", timeline.0, names.join(", "));
            self.problems.insert(0, text + "; a restore must be told which one counts");
            self.next = Some(format!("drctl backup {}", self.target));
        }
        if let Some(gap) = self.gaps.last() {
            self.violated = true;
            let what = if gap.contradiction { "is stored in two versions from" } else { "has a gap at" };
            self.problems.insert(0, format!("WAL {what} {}: nothing after it can be restored", gap.from));
            self.next = Some(format!("drctl backup {}", self.target));
        }
        Ok(())
    }

    /// Whether a restore would keep its objective.
    async fn judge_time(&mut self, context: &Context, survey: &Survey, drills: &[&ReportHead]) {
        let objective = context.targets.iter().find(|target| target.name == self.target);
        let objective = objective.and_then(|target| target.objectives.rto_restore);
        self.rto_seconds = objective.map(|objective| objective.as_secs());
        let passed: Vec<_> = drills.iter().copied().filter(|head| head.outcome == "pass").collect();
        let newest = survey.backups.iter().find(|(backup, _)| self.last_backup.as_ref() == Some(&backup.commit.id));
        let Some(commit) = newest.map(|(backup, _)| &backup.commit) else { return };
        let ends = self.regions.iter().filter_map(|region| region.wal_end).max();
        let wal_bytes = commit.wal.as_ref().zip(ends).map_or(0, |(need, end)| end.bytes_since(need.start_lsn));
        let present = Present { base_bytes: commit.size_bytes, wal_bytes };
        self.rto_predicted = rto::predict(context, &passed, present).await;
        let late = objective.zip(self.rto_predicted.as_ref());
        if late.is_some_and(|(objective, predicted)| predicted.seconds > objective.as_secs_f64()) {
            self.violated = true;
            self.problems.push("a restore would take longer than its objective".to_owned());
            self.next.get_or_insert_with(|| format!("drctl backup {}", self.target));
        }
    }

    fn judge_receiver(&mut self, receiver: Option<Position>) {
        let Some(Position { pushes, heartbeat, state, last_error, .. }) = receiver else { return };
        if state == Receiving::GivenUp {
            self.violated = true;
            self.problems.insert(0, last_error.unwrap_or_else(|| state.words().to_owned()));
        }
        if pushes.is_refusing() {
            self.violated = true;
            let refusal = pushes.last_refusal.as_deref().unwrap_or_default();
            self.problems.push(format!("archive_command was refused: {refusal}"));
        }
        (self.pushes, self.heartbeat) = (Some(pushes), heartbeat);
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
        rto_seconds: None,
        rto_predicted: None,
        gaps: Vec::new(),
        slot: None,
        pushes: None,
        heartbeat: None,
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

fn status(context: &Context, survey: &Survey, receiver: Option<&Position>) -> TargetStatus {
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
            true => exposure(receiver, name),
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
    // Of a backup from the future nobody can say how old it is, and the next ones seem older than it.
    let ahead = listed.iter().max_by_key(|backup| backup.finished_at);
    let ahead = ahead.filter(|backup| is_ahead(now, backup.finished_at)).map(|backup| &backup.id);
    if let Some(id) = ahead {
        let what = "is dated in the future: the clock of this host is wrong, or that of the one that took it was";
        problems.insert(0, format!("clock: {id} {what}"));
    }
    let late = (!violated_in.is_empty()).then(|| match has_wal {
        true => format!("drctl wal stream {}", survey.target),
        false => format!("drctl backup {}", survey.target),
    });
    let next = next(&survey.target, usable.is_some(), late, &regions);
    let next = next.or_else(|| ahead.map(|id| format!("drctl show {id}")));
    TargetStatus {
        target: survey.target.clone(),
        last_backup: usable.map(|backup| backup.id.clone()),
        last_backup_at: usable.map(|backup| backup.finished_at),
        proven: None,
        rpo_seconds: rpo.map(|rpo| rpo.as_secs()),
        rto_seconds: None,
        rto_predicted: None,
        gaps: Vec::new(),
        slot: None,
        pushes: None,
        heartbeat: None,
        violated: usable.is_none() || !violated_in.is_empty() || ahead.is_some(),
        regions,
        problems,
        next,
    }
}

fn is_ahead(now: DateTime<Utc>, finished_at: DateTime<Utc>) -> bool {
    finished_at - now > CLOCK_SLACK
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
