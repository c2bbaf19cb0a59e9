//! The record of a promotion, for whoever asks afterwards what was done, and what it cost.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::context::Context;
use crate::jobs::reports::page;
use crate::jobs::reports::place::{self, Place};
use crate::jobs::standby::record::Record;
use crate::jobs::standby::words::{Promoted, Wish};
use crate::jobs::verdict::Verdict;
use crate::model::{BackupId, Error, Lsn, RegionName, ReportId, Result, TargetName, Timeline};
use crate::repository::FORMAT;
use crate::repository::records::reports::{ReportBody, ReportHead};

const JOB: &str = "promotion";

/// What was promoted and how it went, by `docs/report.schema.json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    format: u32,
    job: &'static str,
    target: TargetName,
    backup: BackupId,
    /// `pass` or `fail`.
    outcome: &'static str,
    error: Option<String>,
    directory: PathBuf,
    started_at: DateTime<Utc>,
    finished_at: DateTime<Utc>,
    accept_loss: bool,
    recovered_to: Option<Lsn>,
    switch: Option<Lsn>,
    old_timeline: Option<Timeline>,
    timeline: Option<Timeline>,
    last_commit: Option<DateTime<Utc>>,
    stored_at: Option<DateTime<Utc>>,
    silent: Vec<RegionName>,
    rto_objective_seconds: Option<f64>,
    /// From the order to the open server; without the time to detect, decide and fence.
    technical_recovery_seconds: Option<f64>,
    phases: Vec<Phase>,
    warnings: Vec<String>,
    host: String,
}

#[derive(Debug, Clone, Serialize)]
struct Phase {
    name: String,
    seconds: f64,
}

impl Report {
    /// What is known before the run.
    pub(super) fn begin(context: &Context, record: &Record, wish: Wish) -> Self {
        let objectives = context.target(&record.target).map(|target| target.objectives).unwrap_or_default();
        let now = context.clock.now();
        Self {
            format: 1,
            job: JOB,
            target: record.target.clone(),
            backup: record.backup.clone(),
            outcome: "fail",
            error: None,
            directory: record.directory.clone(),
            started_at: now,
            finished_at: now,
            accept_loss: wish.accept_loss,
            recovered_to: None,
            switch: None,
            old_timeline: None,
            timeline: None,
            last_commit: None,
            stored_at: None,
            silent: Vec::new(),
            rto_objective_seconds: objectives.rto_restore.map(|rto| rto.as_secs_f64()),
            technical_recovery_seconds: None,
            phases: Vec::new(),
            warnings: Vec::new(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }

    /// It was ordered before.
    pub(super) fn since(self, at: DateTime<Utc>) -> Self {
        Self { started_at: at, ..self }
    }

    /// Takes in what it came to, keeps it, and tells where: in what was promoted, and outside.
    pub(super) async fn end(mut self, context: &Context, promoted: &mut Result<Promoted>) {
        self.finished_at = context.clock.now();
        match promoted {
            Ok(promoted) => self.note(promoted),
            Err(error) => self.error = Some(error.to_string()),
        }
        let kept = self.keep(context).await;
        self.tell(context, kept.as_ref().ok());
        match (promoted, kept) {
            (Ok(promoted), Ok(Place::Regions(id))) => promoted.stored_as = Some(id),
            (Ok(promoted), Ok(Place::File(path, why))) => {
                promoted.warnings.extend(why.map(|why| format!("the record of this is in no region: {why}")));
                promoted.record = Some(path);
            }
            (Ok(promoted), Err(error)) => promoted.warnings.push(format!("there is no record of this: {error}")),
            (Err(_), Err(error)) => tracing::warn!(%error, "there is no record of a promotion that failed"),
            (Err(_), Ok(_)) => {}
        }
    }

    fn note(&mut self, promoted: &Promoted) {
        self.outcome = "pass";
        (self.recovered_to, self.switch) = (Some(promoted.recovered_to), Some(promoted.switch));
        (self.old_timeline, self.timeline) = (Some(promoted.old_timeline), Some(promoted.timeline));
        (self.last_commit, self.stored_at) = (promoted.last_commit, promoted.stored_at);
        self.silent.clone_from(&promoted.silent);
        self.technical_recovery_seconds = Some(promoted.seconds);
        let phase = |(name, seconds): &(String, f64)| Phase { name: name.clone(), seconds: *seconds };
        self.phases = promoted.phases.iter().map(phase).collect();
        self.warnings.clone_from(&promoted.warnings);
    }

    async fn keep(&self, context: &Context) -> Result<Place> {
        let id = ReportId::new(&self.target, self.started_at, context.rng.as_ref())?;
        let report =
            serde_json::to_value(self).map_err(|error| Error::failed("a report is not JSON").because(error))?;
        let body = ReportBody { report, markdown: self.markdown(&id) };
        place::keep(context, &self.directory, (&self.head(&id), &body)).await
    }

    fn tell(&self, context: &Context, kept: Option<&Place>) {
        let verdict = Verdict {
            job: self.job,
            target: Some(&self.target),
            region: None,
            outcome: self.outcome,
            level: self.level(),
            rpo_seconds: None,
            rto_seconds: self.technical_recovery_seconds,
            report: kept.and_then(Place::stored_as),
            phases: self.phases.iter().map(|phase| (phase.name.as_str(), phase.seconds)).collect(),
            began: self.started_at,
            ended: self.finished_at,
        };
        verdict.tell(context);
    }

    fn level(&self) -> Option<String> {
        self.timeline.is_some().then(|| "L4".to_owned())
    }

    fn head(&self, id: &ReportId) -> ReportHead {
        ReportHead {
            format: FORMAT,
            id: id.clone(),
            job: self.job.to_owned(),
            target: self.target.clone(),
            backup: Some(self.backup.clone()),
            region: None,
            outcome: self.outcome.to_owned(),
            level: self.level(),
            started_at: self.started_at,
            finished_at: self.finished_at,
            rpo: (None, None),
            rto: (self.rto_objective_seconds, self.technical_recovery_seconds),
            phases: self.phases.iter().map(|phase| (phase.name.clone(), phase.seconds)).collect(),
            checks: Vec::new(),
            same_as: Vec::new(),
            host: self.host.clone(),
            drctl: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn markdown(&self, id: &ReportId) -> String {
        let unknown = || "unknown".to_owned();
        let shown = |position: Option<Lsn>| position.map_or_else(unknown, |at| at.to_string());
        let time = |at: Option<DateTime<Utc>>| at.map_or_else(unknown, |at| at.to_string());
        let timeline = |of: Option<Timeline>| of.map_or_else(unknown, |of| of.to_string());
        let rows = [
            ("report", id.to_string()),
            ("backup", self.backup.to_string()),
            ("directory", self.directory.display().to_string()),
            ("recovered to", format!("{}, timeline {}", shown(self.recovered_to), timeline(self.old_timeline))),
            ("open since", format!("{}, timeline {}", shown(self.switch), timeline(self.timeline))),
            ("newest commit there", time(self.last_commit)),
            ("newest WAL stored", time(self.stored_at)),
            ("loss accepted", self.accept_loss.to_string()),
            ("began", self.started_at.to_string()),
            ("ended", self.finished_at.to_string()),
            ("on", self.host.clone()),
        ];
        let title = format!("Promotion of the standby of {}: {}", self.target, self.outcome);
        let phases = self.phases.iter().map(|phase| (phase.name.as_str(), phase.seconds));
        page::markdown(&title, self.error.as_deref(), &rows, phases)
    }
}
