//! What a drill found, as `--json` shows it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::context::{Context, Objectives, Target};
use crate::jobs::drill::is_inconclusive;
use crate::jobs::drill::scratch::{Scratch, sorted};
use crate::jobs::restore::{self, PhaseTime, Plan};
use crate::model::{BackupId, Error, Lsn, RegionName, ReportId, TargetName};
use crate::repository::fan_out::LaneOutcome;
use crate::repository::regions::Incident;
use crate::source::postgres::heartbeat::Beat;

/// How a drill ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Recovery works, within the objectives.
    Pass,
    /// It does not, or not within the objectives.
    Fail,
    /// Nothing was found out about the backup: a region, a key holder, a program or space was missing.
    Inconclusive,
}

/// How deep a backup was proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Level {
    /// PostgreSQL started, replayed WAL to the target and was promoted.
    L4,
    /// Every index agrees with its table, every page with its checksum.
    L5,
    /// The heartbeat is there, and what the owner asserts is true.
    L6,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// The level that it belongs to.
    pub level: Level,
    /// How it came out.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
}

/// A check that was given a wrong expectation on purpose.
#[derive(Debug, Clone, Serialize)]
pub struct Control {
    /// The check.
    pub name: String,
    /// The wrong expectation.
    pub expectation: String,
    /// Whether it was told; if not, the check cannot fail and proves nothing.
    pub caught: bool,
}

/// A figure and what was promised.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    /// What was promised, in seconds.
    pub objective_seconds: Option<f64>,
    /// What was measured, in seconds; `null` = nothing was.
    pub measured_seconds: Option<f64>,
}

impl Measured {
    fn of(objective: Option<Duration>) -> Self {
        Self { objective_seconds: objective.map(|duration| duration.as_secs_f64()), measured_seconds: None }
    }

    /// Whether the objective is missed.
    pub fn is_missed(&self) -> bool {
        self.objective_seconds.zip(self.measured_seconds).is_some_and(|(objective, measured)| measured > objective)
    }
}

/// What was found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this record.
    pub format: u32,
    /// What was rehearsed.
    pub target: TargetName,
    /// The region that it was restored from, alone.
    pub region: RegionName,
    /// How it ended.
    pub outcome: Outcome,
    /// The deepest level all of whose checks passed.
    pub level: Option<Level>,
    /// Why it did not pass.
    pub reasons: Vec<String>,
    /// The backup.
    pub backup: Option<BackupId>,
    /// When the drill began.
    pub started_at: DateTime<Utc>,
    /// When it was over.
    pub finished_at: DateTime<Utc>,
    /// The moment at which the source was taken for lost.
    pub fault_at: Option<DateTime<Utc>>,
    /// Where replay ended.
    pub recovered_to: Option<Lsn>,
    /// Recovery point: from the newest heartbeat that came back to the fault.
    pub rpo: Measured,
    /// The heartbeat that came back.
    pub heartbeat: Option<Beat>,
    /// Technical recovery time: the sum of the phases. Without the time to detect, decide and fence.
    pub rto: Measured,
    /// The phases, in their order; `stage` runs beside `replay`.
    pub phases: Vec<PhaseTime>,
    /// What was looked at.
    pub checks: Vec<Check>,
    /// The deliberately wrong expectation.
    pub control: Option<Control>,
    /// Objects that the region did not give.
    pub incidents: Vec<Incident>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// The machine.
    pub environment: Environment,
    /// Why the scratch cluster, a copy of production, is still there; `null` = it is gone.
    pub left_behind: Option<String>,
    /// What opened the keys; those of other regions counted as lost.
    pub opened_with: Option<String>,
    /// How far the primary's clock was ahead of ours when the beat was written; the recovery point is corrected by it.
    pub clock_skew_seconds: Option<f64>,
    /// The name of this report in the regions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_as: Option<ReportId>,
    /// Which region owes it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stored_in: Vec<LaneOutcome>,
}

/// Where a drill ran; figures of different machines are not to be compared.
#[derive(Debug, Clone, Serialize)]
pub struct Environment {
    /// The host.
    pub host: String,
    /// Its cores.
    pub cores: usize,
    /// The directory of the scratch cluster.
    pub directory: String,
    /// `isolated` in a network namespace of its own, else `shared`; the scratch cluster listens on no network either way.
    pub network: &'static str,
}

impl Report {
    pub(super) fn new(context: &Context, target: &Target, region: RegionName, scratch: &Scratch) -> Self {
        let Objectives { rpo, rto_restore, .. } = target.objectives;
        let now = context.clock.now();
        Self {
            format: 1,
            target: target.name.clone(),
            region,
            outcome: Outcome::Inconclusive,
            level: None,
            reasons: Vec::new(),
            backup: None,
            started_at: now,
            finished_at: now,
            fault_at: None,
            recovered_to: None,
            rpo: Measured::of(rpo),
            heartbeat: None,
            rto: Measured::of(rto_restore),
            phases: Vec::new(),
            checks: Vec::new(),
            control: None,
            incidents: Vec::new(),
            warnings: Vec::new(),
            environment: Environment {
                host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                directory: scratch.root().display().to_string(),
                network: "shared",
            },
            left_behind: None,
            opened_with: None,
            clock_skew_seconds: None,
            stored_as: None,
            stored_in: Vec::new(),
        }
    }

    pub(super) fn faulted(&mut self, at: DateTime<Utc>, plan: &Plan) {
        (self.fault_at, self.backup, self.recovered_to) = (Some(at), Some(plan.backup.clone()), Some(plan.end_lsn));
        self.opened_with.clone_from(&plan.opens_with);
        self.warnings.extend(plan.unreachable.iter().cloned());
        let (_, left_out) = sorted(&plan.needs.preload);
        if !left_out.is_empty() {
            let names = left_out.join(", ");
            self.warnings.push(format!("not loaded, because they may act by themselves: {names}"));
        }
    }

    /// The server wrote `at` between the two moments of ours.
    pub(super) fn compare_clocks(&mut self, (before, after): (DateTime<Utc>, DateTime<Utc>), at: DateTime<Utc>) {
        self.clock_skew_seconds = Some((at - (before + (after - before) / 2)).as_seconds_f64());
    }

    pub(super) fn restored(&mut self, restored: restore::Report) {
        // What no phase counts: making everything durable, changing owners, starting the server.
        let counted: f64 =
            restored.phases.iter().filter(|phase| phase.name != "stage").map(|phase| phase.seconds).sum();
        let rest = Duration::try_from_secs_f64(restored.seconds - counted).unwrap_or_default();
        let at = self.phases.len() + 1;
        self.phases.extend(restored.phases);
        self.phases.insert(at.min(self.phases.len()), PhaseTime::new("complete", rest));
        self.incidents = restored.incidents;
        self.check("started, replayed and promoted", Level::L4, Ok(format!("to {}", restored.recovered_to)));
    }

    /// The newest beat that came back. Its time is the primary's; the fault is on our clock.
    pub(super) fn found(&mut self, beat: Beat) {
        let skew = self.clock_skew_seconds.unwrap_or(0.0);
        let lost = self.fault_at.map(|fault_at| (fault_at - beat.at).as_seconds_f64());
        self.rpo.measured_seconds = lost.map(|lost| (lost + skew).max(0.0));
        if self.clock_skew_seconds.is_none() {
            self.warnings
                .push("the primary's clock was not compared with ours: the RPO may be off by as much".to_owned());
        }
        self.heartbeat = Some(beat);
    }

    /// Notes a check; an error that says nothing about the data is inconclusive.
    pub(super) fn check(&mut self, name: impl Into<String>, level: Level, seen: Result<String, Error>) {
        let (outcome, detail) = match seen {
            Ok(detail) => (Outcome::Pass, detail),
            Err(error) if is_inconclusive(&error) => (Outcome::Inconclusive, error.to_string()),
            Err(error) => (Outcome::Fail, error.to_string()),
        };
        self.checks.push(Check { name: name.into(), level, outcome, detail });
    }

    /// What kept the drill from going on.
    pub(super) fn stopped_by(&mut self, error: &Error) {
        self.outcome = if is_inconclusive(error) { Outcome::Inconclusive } else { Outcome::Fail };
        self.reasons.push(error.to_string());
    }

    /// Judges everything that was found.
    pub(super) fn conclude(&mut self, now: DateTime<Utc>) {
        self.finished_at = now;
        let stopped = !self.reasons.is_empty();
        let of = |outcome| self.checks.iter().filter(move |check| check.outcome == outcome);
        let named = |check: &Check| format!("{}: {}", check.name, check.detail);
        let mut failures: Vec<_> = of(Outcome::Fail).map(named).collect();
        let open: Vec<_> = of(Outcome::Inconclusive).map(named).collect();
        self.level = [Level::L4, Level::L5, Level::L6].into_iter().take_while(|level| self.proves(*level)).last();
        if !stopped {
            // `stage` runs beside `replay` and is contained in it.
            let sequential = self.phases.iter().filter(|phase| phase.name != "stage");
            self.rto.measured_seconds = Some(sequential.map(|phase| phase.seconds).sum());
            if self.rpo.measured_seconds.is_none() {
                failures.push(
                    "no recovery point was measured: no heartbeat came back (does `drctl wal stream` run?)".to_owned(),
                );
            }
            let told = self.control.as_ref().map(|control| control.caught);
            failures.extend(match told {
                Some(true) => None,
                Some(false) => {
                    Some("the negative control was not caught: a check that cannot fail proves nothing".to_owned())
                }
                None => Some("there was no check to give a wrong expectation to".to_owned()),
            });
            let missed = [("RPO", &self.rpo), ("technical recovery time", &self.rto)];
            let missed = missed.into_iter().filter(|(_, measured)| measured.is_missed());
            failures.extend(missed.map(|(name, _)| format!("the objective for {name} was missed")));
        }
        failures.extend(self.left_behind.iter().map(|why| format!("a copy of production remains: {why}")));
        if !failures.is_empty() {
            self.outcome = Outcome::Fail;
        } else if !stopped {
            self.outcome = if open.is_empty() { Outcome::Pass } else { Outcome::Inconclusive };
        }
        self.reasons.extend(failures);
        self.reasons.extend(open);
    }

    /// In words that say nothing of what is in the data: they are stored in clear text.
    pub fn summary(&self) -> String {
        let failed = self.checks.iter().filter(|check| check.outcome != Outcome::Pass);
        let names: Vec<_> = failed.map(|check| check.name.as_str()).collect();
        let missed = [("RPO", &self.rpo), ("recovery time", &self.rto)];
        let missed = missed.into_iter().filter(|(_, measured)| measured.is_missed()).map(|(name, _)| name);
        let all: Vec<_> = names.into_iter().chain(missed).collect();
        if all.is_empty() { "it did not get that far".to_owned() } else { all.join(", ") }
    }

    /// Whether something was looked at on this level, and nothing was wrong.
    fn proves(&self, level: Level) -> bool {
        let mut checks = self.checks.iter().filter(|check| check.level == level).peekable();
        checks.peek().is_some() && checks.all(|check| check.outcome == Outcome::Pass)
    }
}
