//! What a drill found, as `--json` shows it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::context::{Context, Objectives, Target};
use crate::jobs::drill::scratch::Scratch;
use crate::jobs::restore::{self, PhaseTime, Plan};
use crate::model::schedule::Pick;
use crate::model::{BackupId, Lsn, RegionName, ReportId, TargetName};
use crate::pg::instance::Network;
use crate::repository::regions::Incident;
use crate::repository::regions::fan_out::LaneOutcome;
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
    /// Every object and all WAL that the recovery needs is there.
    L1,
    /// Every frame is what was written, and a key opens it.
    L2,
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

/// Which point a drill recovers to.
#[derive(Debug, Clone, Serialize)]
pub struct Asked {
    /// How it was chosen.
    pub select: Pick,
    /// The backup that was named.
    pub backup: Option<String>,
    /// The time that was named or drawn.
    pub to_time: Option<DateTime<Utc>>,
}

impl Asked {
    /// Whether the newest point was meant: only that one tells what a disaster now would cost.
    pub(super) const fn is_newest(&self) -> bool {
        matches!(self.select, Pick::Latest) && self.to_time.is_none()
    }
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
    /// Version of this record, and of `docs/report.schema.json`.
    pub format: u32,
    /// `drill`.
    pub job: &'static str,
    /// What was rehearsed.
    pub target: TargetName,
    /// The region that it was restored from, alone.
    pub region: RegionName,
    /// Which point was to be recovered.
    pub asked: Asked,
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
    /// The newest commit up to there, by the clock of the source.
    pub last_commit: Option<DateTime<Utc>>,
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
    /// Of a copy: the backups that it is the same as. The head of the stored report says it, for prune.
    #[serde(skip)]
    pub same_as: Vec<BackupId>,
    /// The deliberately wrong expectation.
    pub control: Option<Control>,
    /// The assertions whose owner said how to break them, broken on purpose.
    pub controls: Vec<Control>,
    /// Objects that the region did not give.
    pub incidents: Vec<Incident>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// The machine.
    pub environment: Environment,
    /// Why the scratch cluster, a copy of production, is still there; `null` = it is gone.
    pub left_behind: Option<String>,
    /// Until when the scratch cluster was left to be looked at; `null` = it was not to be.
    pub kept_until: Option<DateTime<Utc>>,
    /// What opened the keys; those of other regions counted as lost.
    pub opened_with: Option<String>,
    /// How far the primary's clock was at most ahead of ours when the beat was written; the recovery point is corrected by
    /// it.
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
    pub network: Network,
}

impl Report {
    pub(super) fn new(
        context: &Context,
        target: &Target,
        (region, asked): (RegionName, Asked),
        scratch: &Scratch,
    ) -> Self {
        let Objectives { rpo, rto_restore, .. } = target.objectives;
        let now = context.clock.now();
        Self {
            format: 1,
            job: "drill",
            target: target.name.clone(),
            region,
            asked,
            outcome: Outcome::Inconclusive,
            level: None,
            reasons: Vec::new(),
            backup: None,
            started_at: now,
            finished_at: now,
            fault_at: None,
            recovered_to: None,
            last_commit: None,
            rpo: Measured::of(rpo),
            heartbeat: None,
            rto: Measured::of(rto_restore),
            phases: Vec::new(),
            checks: Vec::new(),
            same_as: Vec::new(),
            control: None,
            controls: Vec::new(),
            incidents: Vec::new(),
            warnings: Vec::new(),
            environment: Environment {
                host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                directory: scratch.root().display().to_string(),
                network: scratch.network(),
            },
            left_behind: None,
            kept_until: None,
            opened_with: None,
            clock_skew_seconds: None,
            stored_as: None,
            stored_in: Vec::new(),
        }
    }

    pub(super) fn faulted(&mut self, at: DateTime<Utc>, plan: &Plan, scratch: &Scratch) {
        (self.fault_at, self.backup, self.recovered_to) = (Some(at), Some(plan.backup.clone()), Some(plan.end_lsn));
        self.opened_with.clone_from(&plan.opens_with);
        self.last_commit = plan.last_commit;
        let (_, left_out) = scratch.sorted(&plan.needs.preload);
        if !left_out.is_empty() {
            let names = left_out.join(", ");
            self.warnings.push(format!("not loaded, because they may act by themselves: {names}"));
        }
    }

    /// The server wrote `at` after this moment of ours. What lies between the two is the most that its clock can be ahead:
    /// a recovery point that is corrected by it is never reported better than it was.
    pub(super) fn compare_clocks(&mut self, before: DateTime<Utc>, at: DateTime<Utc>) {
        self.clock_skew_seconds = Some((at - before).as_seconds_f64());
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
        if !self.asked.is_newest() {
            self.heartbeat = Some(beat);
            return;
        }
        let skew = self.clock_skew_seconds.unwrap_or(0.0);
        let lost = self.fault_at.map(|fault_at| (fault_at - beat.at).as_seconds_f64());
        self.rpo.measured_seconds = lost.map(|lost| (lost + skew).max(0.0));
        if self.clock_skew_seconds.is_none() {
            self.warnings
                .push("the primary's clock was not compared with ours: the RPO may be off by as much".to_owned());
        }
        self.heartbeat = Some(beat);
    }
}
