//! The record of a restore that was executed, for whoever asks afterwards what was done.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::context::Context;
use crate::jobs::reports::page;
use crate::jobs::reports::place::{self, Place};
use crate::jobs::restore::report::{PhaseTime, Report};
use crate::jobs::restore::target::Point;
use crate::jobs::restore::words::Plan;
use crate::jobs::verdict::Verdict;
use crate::model::{BackupId, Error, Lsn, RegionName, ReportId, Result, TargetName, Timeline};
use crate::repository::FORMAT;
use crate::repository::records::reports::{ReportBody, ReportHead};
use crate::repository::regions::Incident;

/// What was restored and how it went, by `docs/report.schema.json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Record {
    format: u32,
    job: &'static str,
    target: TargetName,
    backup: BackupId,
    /// The region that was to be read first.
    region: Option<RegionName>,
    /// `pass` or `fail`.
    outcome: &'static str,
    /// Why it failed.
    error: Option<String>,
    point: Point,
    plan: String,
    directory: PathBuf,
    started_at: DateTime<Utc>,
    finished_at: DateTime<Utc>,
    /// Whether PostgreSQL was started and promoted; else WAL is staged and a person starts it.
    opened: bool,
    recovered_to: Lsn,
    timeline: Timeline,
    last_commit: Option<DateTime<Utc>>,
    /// Commits that the regions hold and that were left out on purpose, in seconds from the last that came back.
    left_out_seconds: Option<f64>,
    rpo_objective_seconds: Option<f64>,
    rto_objective_seconds: Option<f64>,
    /// From the plan to the end of it; without the time to detect, decide and fence.
    technical_recovery_seconds: Option<f64>,
    phases: Vec<PhaseTime>,
    incidents: Vec<Incident>,
    warnings: Vec<String>,
    host: String,
}

impl Record {
    /// What is known before the run.
    pub(super) fn begin(context: &Context, plan: &Plan, region: Option<&RegionName>) -> Self {
        let objectives = context.target(&plan.target).map(|target| target.objectives).unwrap_or_default();
        let left_out = plan.newest_commit.zip(plan.last_commit).map(|(newest, last)| (newest - last).as_seconds_f64());
        let now = context.clock.now();
        Self {
            format: 1,
            job: "restore",
            target: plan.target.clone(),
            backup: plan.backup.clone(),
            region: region.cloned(),
            outcome: "fail",
            error: None,
            point: plan.point.clone(),
            plan: plan.digest.clone(),
            directory: plan.directory.clone(),
            started_at: now,
            finished_at: now,
            opened: false,
            recovered_to: plan.end_lsn,
            timeline: plan.timeline,
            last_commit: plan.last_commit,
            left_out_seconds: left_out,
            rpo_objective_seconds: objectives.rpo.map(|rpo| rpo.as_secs_f64()),
            rto_objective_seconds: objectives.rto_restore.map(|rto| rto.as_secs_f64()),
            technical_recovery_seconds: None,
            phases: Vec::new(),
            incidents: Vec::new(),
            warnings: Vec::new(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }

    /// What it came to.
    pub(super) fn end(&mut self, now: DateTime<Utc>, result: &Result<Report>) {
        self.finished_at = now;
        match result {
            Ok(report) => {
                self.outcome = "pass";
                self.opened = report.started.is_some();
                self.technical_recovery_seconds = self.opened.then_some(report.seconds);
                self.phases.clone_from(&report.phases);
                self.incidents.clone_from(&report.incidents);
                self.warnings.clone_from(&report.warnings);
            }
            Err(error) => self.error = Some(error.to_string()),
        }
    }

    /// Keeps it where it can be found again.
    ///
    /// # Errors
    /// Nowhere.
    pub(super) async fn keep(&self, context: &Context) -> Result<Place> {
        let id = ReportId::new(&self.target, self.started_at, context.rng.as_ref())?;
        let (head, body) = (self.head(&id), self.body(&id)?);
        place::keep(context, &self.directory, (&head, &body)).await
    }

    /// Tells whoever listens outside.
    pub(super) fn tell(&self, context: &Context, kept: Option<&Place>) {
        let stored = kept.and_then(Place::stored_as);
        let verdict = Verdict {
            job: self.job,
            target: Some(&self.target),
            region: self.region.as_ref(),
            outcome: self.outcome,
            level: self.opened.then(|| "L4".to_owned()),
            rpo_seconds: None,
            rto_seconds: self.technical_recovery_seconds,
            report: stored,
            phases: self.phases.iter().map(|phase| (phase.name, phase.seconds)).collect(),
            began: self.started_at,
            ended: self.finished_at,
        };
        verdict.tell(context);
    }

    fn head(&self, id: &ReportId) -> ReportHead {
        ReportHead {
            format: FORMAT,
            id: id.clone(),
            job: self.job.to_owned(),
            target: self.target.clone(),
            backup: Some(self.backup.clone()),
            region: self.region.clone(),
            outcome: self.outcome.to_owned(),
            level: self.opened.then(|| "L4".to_owned()),
            started_at: self.started_at,
            finished_at: self.finished_at,
            rpo: (self.rpo_objective_seconds, None),
            rto: (self.rto_objective_seconds, self.technical_recovery_seconds),
            phases: self.phases.iter().map(|phase| (phase.name.to_owned(), phase.seconds)).collect(),
            checks: Vec::new(),
            same_as: Vec::new(),
            host: self.host.clone(),
            drctl: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn body(&self, id: &ReportId) -> Result<ReportBody> {
        Ok(ReportBody { report: serde_json::to_value(self).map_err(not_json)?, markdown: self.markdown(id) })
    }

    fn markdown(&self, id: &ReportId) -> String {
        let point = serde_json::to_string(&self.point).unwrap_or_default();
        let commit = self.last_commit.map_or_else(|| "unknown".to_owned(), |at| at.to_string());
        let left_out = self.left_out_seconds.map_or_else(|| "unknown".to_owned(), |left| format!("{left:.1} s"));
        let rows = [
            ("report", id.to_string()),
            ("backup", self.backup.to_string()),
            ("to", point),
            ("recovered to", format!("{}, timeline {}", self.recovered_to, self.timeline)),
            ("newest commit there", commit),
            ("left out on purpose", left_out),
            ("directory", self.directory.display().to_string()),
            ("opened", self.opened.to_string()),
            ("began", self.started_at.to_string()),
            ("ended", self.finished_at.to_string()),
            ("on", self.host.clone()),
        ];
        let title = format!("Restore of {}: {}", self.target, self.outcome);
        let phases = self.phases.iter().map(|phase| (phase.name, phase.seconds));
        page::markdown(&title, self.error.as_deref(), &rows, phases)
    }
}

/// Tells where the record is.
pub(super) fn note(report: &mut Report, kept: Result<Place>) {
    match kept {
        Ok(Place::Regions(id)) => report.stored_as = Some(id),
        Ok(Place::File(path, why)) => {
            report.warnings.extend(why.map(|why| format!("the record of this is in no region: {why}")));
            report.record = Some(path);
        }
        Err(error) => report.warnings.push(format!("there is no record of this: {error}")),
    }
}

fn not_json(error: serde_json::Error) -> Error {
    Error::failed("a report is not JSON").because(error)
}
