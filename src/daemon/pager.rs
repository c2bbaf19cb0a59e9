//! What somebody is woken for: each problem once when it begins, once when it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::app::{self, World};
use crate::config::Occasion;
use crate::daemon::standing::Answer;
use crate::jobs::metrics::receivers::Positions;
use crate::jobs::problems::Problems;
use crate::jobs::verdict;
use crate::jobs::wal::pressure::TOLD_AT;
use crate::jobs::wal::{Position, State};
use crate::model::RegionName;
use crate::model::run::{Outcome, Run};
use crate::model::schedule::Job;
use crate::observe::metrics::{Page, table};

/// A region that is away for a moment is mended by itself.
const AWAY_FOR_LONG: Duration = Duration::from_secs(600);

/// Decides what is told, and remembers what was.
#[derive(Debug)]
pub(super) struct Pager {
    on: BTreeSet<Occasion>,
    problems: Mutex<Problems>,
    /// Targets without a gap when the regions were read last.
    whole: Mutex<BTreeSet<String>>,
    world: World,
}

impl Pager {
    pub(super) fn new(on: BTreeSet<Occasion>, state_dir: &Path, world: World) -> Self {
        Self { on, problems: Mutex::new(Problems::open(state_dir)), whole: Mutex::default(), world }
    }

    /// A slot has ended.
    pub(super) fn recorded(&self, run: &Run) {
        let occasion = if run.job == Job::Drill { Occasion::Drills } else { Occasion::Runs };
        let problem = format!("schedule/{}", run.schedule);
        let detail = run.detail.as_deref().unwrap_or_default();
        match run.outcome {
            Outcome::Success | Outcome::Debts => self.resolve(&problem, detail),
            Outcome::Failed | Outcome::Timeout | Outcome::Missed | Outcome::Interrupted => {
                let target = run.target.as_ref().map_or_else(String::new, |target| format!(" of {target}"));
                let title = format!("{} ({}{target}): {}", run.schedule, run.job, run.outcome.as_str());
                self.raise(occasion, &problem, &title, detail);
            }
            // Somebody wanted it so, or the slot before it will tell.
            Outcome::SkippedOverlap | Outcome::SkippedPaused => {}
        }
    }

    /// Whether the state directory can be written; why not.
    pub(super) fn state_dir(&self, trouble: Option<&str>) {
        let problem = "state-directory";
        let title = "the state directory cannot be written: a restart forgets what ran";
        match trouble {
            Some(why) => self.raise(Occasion::State, problem, title, why),
            None => self.resolve(problem, "it is written again"),
        }
    }

    /// How the regions and the receivers of this host stand.
    pub(super) fn look(&self, regions: &BTreeMap<RegionName, Answer>, positions: &Positions, now: Duration) {
        for (region, answer) in regions {
            let problem = format!("region/{region}");
            let away = now.saturating_sub(answer.since);
            match &answer.trouble {
                None => self.resolve(&problem, "it answers again; bring back what it lacks: drctl repair"),
                Some(why) if away >= AWAY_FOR_LONG => {
                    let title = format!("region {region} does not answer for {} min", away.as_secs() / 60);
                    self.raise(Occasion::Regions, &problem, &title, why);
                }
                Some(_) => {}
            }
        }
        for (target, position) in positions {
            self.slot(target.as_str(), position);
        }
        // A receiver remembers a gap for as long as it lives; the regions know when a backup has begun behind it.
        let whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (target, position) in positions.iter().filter(|(target, _)| !whole.contains(target.as_str())) {
            if position.state == State::Gap {
                self.gap(target.as_str(), position.last_error.as_deref().unwrap_or_default());
            }
        }
    }

    /// What the regions say of gaps.
    pub(super) fn gaps(&self, page: &Page) {
        for (labels, gaps) in page.series(&table::WAL_GAPS) {
            let target = labels.first().map(String::as_str).unwrap_or_default();
            let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
            match *gaps > 0.0 {
                true => {
                    whole.remove(target);
                    self.gap(target, "");
                }
                false => {
                    whole.insert(target.to_owned());
                    self.resolve(&format!("gap/{target}"), "a backup was begun behind it");
                }
            }
        }
    }

    fn slot(&self, target: &str, position: &Position) {
        let [_, urgent] = TOLD_AT;
        let filled =
            position.slot.as_ref().map(|slot| slot.filled_percent().max(slot.disk_percent()).unwrap_or_default());
        let (filling, dropped) = (format!("slot/{target}"), format!("dropped/{target}"));
        match filled {
            Some(percent) if percent >= urgent => {
                let title = format!("the slot of {target} takes {percent} % of the server's space for WAL");
                let text = position.last_error.as_deref().unwrap_or("let WAL flow: drctl wal status");
                self.raise(Occasion::Slots, &filling, &title, text);
            }
            Some(_) => self.resolve(&filling, "there is room again"),
            None => {}
        }
        match position.state {
            State::GivenUp => {
                let title = format!("the slot of {target} was dropped: it filled the server's disk");
                let text = "until regions take WAL again, what is committed is on the server alone";
                self.raise(Occasion::Slots, &dropped, &title, text);
            }
            State::Streaming | State::Gap => self.resolve(&dropped, "WAL flows again; a gap is told by itself"),
            _ => {}
        }
    }

    fn gap(&self, target: &str, why: &str) {
        let title = format!("WAL of {target} has a gap: nothing behind it can be restored");
        let text = format!("{why}\ntake a new base backup now: drctl backup {target}");
        self.raise(Occasion::Gaps, &format!("gap/{target}"), &title, text.trim());
    }

    fn raise(&self, occasion: Occasion, problem: &str, title: &str, text: &str) {
        if !self.on.contains(&occasion) {
            return;
        }
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        if problems.raise(problem, title, self.world.clock.now()) {
            self.tell(problem, false, (title, text));
        }
    }

    fn resolve(&self, problem: &str, text: &str) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(over) = problems.resolve(problem) {
            self.tell(problem, true, (&over.title, text));
        }
    }

    fn tell(&self, problem: &str, resolved: bool, (title, text): (&str, &str)) {
        let told = verdict::page(problem, resolved, (title, text), (self.world.clock.now(), app::host_name()));
        self.world.courier.tell(&told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_state_directory_is_one_problem_until_it_is_written_again() {
        let state = tempfile::tempdir().unwrap();
        let pager = Pager::new(BTreeSet::from([Occasion::State]), &state.path().join("gone"), World::real());
        let since = || pager.problems.lock().unwrap().since("state-directory");
        pager.state_dir(Some("no space left"));
        let told = since();
        assert!(told.is_some());
        pager.state_dir(Some("no space left"));
        assert_eq!(since(), told, "the same problem, told once");
        pager.state_dir(None);
        assert_eq!(since(), None);
    }

    #[test]
    fn a_slot_is_told_at_three_quarters_and_when_it_goes_until_it_is_over() {
        let state = tempfile::tempdir().unwrap();
        let pager = Pager::new(BTreeSet::from([Occasion::Slots]), state.path(), World::real());
        let look = |state: &str, slot: Option<(u64, u64)>| {
            let slot = slot.map(|(retained, room)| {
                serde_json::json!({ "name": "s", "active": true, "wal_status": null, "retained_bytes": retained, "room_bytes": room })
            });
            let position: Position = serde_json::from_value(serde_json::json!({
                "target": "ledger", "state": state, "received_lsn": "0/3000000", "durable_lsn": "0/3000000",
                "regions": [], "slot": slot,
            }))
            .unwrap();
            pager.look(&BTreeMap::new(), &Positions::from([(position.target.clone(), position)]), Duration::ZERO);
            let problems = pager.problems.lock().unwrap();
            (problems.since("slot/ledger").is_some(), problems.since("dropped/ledger").is_some())
        };
        assert_eq!(look("streaming", Some((74, 26))), (false, false));
        assert_eq!(look("waiting_for_regions", Some((75, 25))), (true, false));
        assert_eq!(look("given_up", None), (true, true));
        assert_eq!(look("reconnecting", None), (true, true), "a moment without an answer ends nothing");
        assert_eq!(look("streaming", Some((1, 99))), (false, false));
    }

    /// The receiver goes on telling of a gap that it met; a backup behind it ends the matter all the same, once.
    #[test]
    fn a_gap_is_one_problem_until_a_backup_is_behind_it() {
        let state = tempfile::tempdir().unwrap();
        let pager = Pager::new(BTreeSet::from([Occasion::Gaps]), state.path(), World::real());
        let position = serde_json::json!({
            "target": "ledger", "state": "gap", "received_lsn": "0/3000000", "durable_lsn": "0/3000000",
            "regions": [], "last_error": "the server removed it",
        });
        let position: Position = serde_json::from_value(position).unwrap();
        let positions = Positions::from([(position.target.clone(), position)]);
        let look = || pager.look(&BTreeMap::new(), &positions, Duration::ZERO);
        let read = |gaps: f64| {
            let mut page = Page::default();
            page.set(&table::WAL_GAPS, ["ledger"], gaps);
            pager.gaps(&page);
        };
        let since = || pager.problems.lock().unwrap().since("gap/ledger");
        look();
        let told = since();
        assert!(told.is_some());
        for _ in 0..3 {
            read(1.0);
            look();
            assert_eq!(since(), told, "the same problem, told once");
        }
        read(0.0);
        for _ in 0..3 {
            look();
            assert_eq!(since(), None, "what is over does not begin again");
            read(0.0);
        }
        read(1.0);
        assert!(since().is_some_and(|again| Some(again) > told), "another gap is another problem");
    }
}
