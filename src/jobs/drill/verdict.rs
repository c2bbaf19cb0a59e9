//! What everything that was found comes to.

use chrono::{DateTime, Utc};

use crate::jobs::drill::report::{Check, Level, Outcome, Report};
use crate::jobs::drill::stop::{Stop, is_inconclusive};
use crate::model::Error;

/// The levels that may be called verified.
const VERIFIED: [Level; 3] = [Level::L4, Level::L5, Level::L6];

impl Report {
    /// Notes a check; an error that says nothing about the data is inconclusive.
    pub(super) fn check(&mut self, name: impl Into<String>, level: Level, seen: Result<String, Error>) {
        let (outcome, detail) = match seen {
            Ok(detail) => (Outcome::Pass, detail),
            Err(error) if is_inconclusive(&error) => (Outcome::Inconclusive, error.to_string()),
            Err(error) => (Outcome::Fail, error.to_string()),
        };
        self.checks.push(Check { name: name.into(), level, outcome, detail });
    }

    /// The disk is full, so no check behind the first `seen` ones speaks against the backup any more, and no control that
    /// caught nothing against its check. Whether there was one.
    pub(super) fn excuse(&mut self, seen: usize) -> bool {
        let failed = self.checks.iter_mut().skip(seen).filter(|check| check.outcome != Outcome::Pass);
        let failed = failed.map(|check| check.outcome = Outcome::Inconclusive).count();
        let idle = self.idle_controls().len();
        self.control = self.control.take().filter(|control| control.caught);
        self.controls.retain(|control| control.caught);
        failed + idle > 0
    }

    /// What kept the drill from going on.
    pub(super) fn stopped_by(&mut self, stop: &Stop) {
        self.outcome = if stop.judges { Outcome::Fail } else { Outcome::Inconclusive };
        let Stop { error, level, what, .. } = stop;
        self.reasons.push(error.to_string());
        let check = Check { name: (*what).to_owned(), level: *level, outcome: self.outcome, detail: error.to_string() };
        self.checks.push(check);
    }

    /// Judges everything that was found.
    pub(super) fn conclude(&mut self, now: DateTime<Utc>) {
        self.finished_at = now;
        let stopped = !self.reasons.is_empty();
        let seen = if stopped { self.checks.split_last().map_or(&[][..], |(_, before)| before) } else { &self.checks };
        let named = |check: &Check| format!("{}: {}", check.name, check.detail);
        let of = |outcome| seen.iter().filter(move |check| check.outcome == outcome).map(named).collect::<Vec<_>>();
        let (mut failures, open) = (of(Outcome::Fail), of(Outcome::Inconclusive));
        self.level = VERIFIED.into_iter().take_while(|level| self.proves(*level)).last();
        failures.extend(self.idle_controls());
        if !stopped {
            // `stage` runs beside `replay` and is contained in it.
            let sequential = self.phases.iter().filter(|phase| phase.name != "stage");
            self.rto.measured_seconds = Some(sequential.map(|phase| phase.seconds).sum());
            failures.extend(self.unmeasured());
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

    /// Checks that were given something wrong on purpose, and did not notice.
    fn idle_controls(&self) -> Vec<String> {
        let all = self.control.iter().chain(&self.controls);
        let idle = all.filter(|control| !control.caught);
        idle.map(|control| {
            format!("{} cannot fail, so it proves nothing: it did not notice {}", control.name, control.expectation)
        })
        .collect()
    }

    /// What a drill that went to its end must have measured, and has not, or not well enough.
    fn unmeasured(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if self.rpo.measured_seconds.is_none() && self.asked.is_newest() {
            failures.push(
                "no recovery point was measured: no heartbeat came back (does `drctl wal stream` run?)".to_owned(),
            );
        }
        if self.control.is_none() {
            failures.push("there was no check to give a wrong expectation to".to_owned());
        }
        let missed = [("RPO", &self.rpo), ("technical recovery time", &self.rto)];
        let missed = missed.into_iter().filter(|(_, measured)| measured.is_missed());
        failures.extend(missed.map(|(name, _)| format!("the objective for {name} was missed")));
        failures
    }

    /// In words that say nothing of what is in the data: they are stored in clear text.
    pub fn summary(&self) -> String {
        let failed = self.checks.iter().filter(|check| check.outcome != Outcome::Pass);
        let idle = self.control.iter().chain(&self.controls).filter(|control| !control.caught);
        let names = failed.map(|check| check.name.as_str()).chain(idle.map(|control| control.name.as_str()));
        let missed = [("RPO", &self.rpo), ("recovery time", &self.rto)];
        let missed = missed.into_iter().filter(|(_, measured)| measured.is_missed()).map(|(name, _)| name);
        let all: Vec<_> = names.chain(missed).collect();
        if all.is_empty() { "it did not get that far".to_owned() } else { all.join(", ") }
    }

    /// Whether something was looked at on this level, and nothing was wrong there or below.
    fn proves(&self, level: Level) -> bool {
        let whole = self.checks.iter().filter(|check| check.level <= level);
        let looked = self.checks.iter().any(|check| check.level == level);
        looked && whole.into_iter().all(|check| check.outcome == Outcome::Pass)
    }
}
