//! Restores at any moment, judged by the client's ledger and by what drctl had said before.

use std::collections::BTreeSet;
use std::time::Instant;

use drctl::model::{Lsn, Timeline};
use rand::Rng as _;
use serde_json::Value;

use super::evidence::{Judge, Promise};
use super::{Mode, Soak};
use crate::support::drctl::Drctl;
use crate::support::ledger::Verdict;
use crate::support::pg::{Cluster, Until};

/// When a restore is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// While somebody is dead, asleep or away.
    During,
    /// When everybody is back.
    After,
}

/// What is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// All that there is.
    End,
    /// Up to any byte of WAL that was called durable.
    Random,
}

impl Soak {
    pub(super) async fn restore(&mut self, point: Point) {
        let promise = self.witness.promise();
        let until = match point {
            Point::End => None,
            Point::Random => {
                let (low, high) = (self.floor.0 + 1, promise.reach(&self.past).0);
                Some(Lsn(self.chance.random_range(low..=high.max(low))))
            }
        };
        let all = self.mode == Mode::Synchronous && point == Point::End;
        let acknowledged = self.ledger.book().entries.iter().filter(|_| all).map(|entry| entry.number).collect();
        let shown = until.map(|until| until.to_string());
        let options: Vec<&str> = shown.iter().flat_map(|until| ["--to-lsn", until]).collect();
        let tip = Timeline::FIRST;
        let judge = Judge { past: &self.past, tip, until, promise, acknowledged };
        let verdict = self.bring_back(&format!("{point:?}"), &options, judge).await;
        self.count(format!("{point:?}"), verdict);
    }

    /// The end of a timeline that was left earlier than drctl had followed it.
    pub(super) async fn restore_tail(&mut self, timeline: Timeline, promise: Promise) {
        let shown = timeline.0.to_string();
        let options = ["--timeline", shown.as_str()];
        let judge = Judge { past: &self.past, tip: timeline, until: None, promise, acknowledged: BTreeSet::new() };
        let verdict = self.bring_back("Tail", &options, judge).await;
        self.count("Tail".to_owned(), verdict);
    }

    fn count(&mut self, kind: String, verdict: Verdict) {
        *self.tally.restores.entry(kind).or_default() += 1;
        self.tally.required += verdict.durable;
        self.tally.refused += verdict.absent;
    }

    async fn bring_back(&self, kind: &str, options: &[&str], mut judge: Judge<'_>) -> Verdict {
        let (begun, directory) = (Instant::now(), self.rig.scratch.join("restored"));
        let shown = directory.display().to_string();
        let line = [&["restore", "ledger", "--json", "--target-dir", &shown], options].concat();
        let plan = self.receivers.drctl(&line).run().await.ok().json();
        judge.tip = tip(&plan);
        assert!(kind != "End" || judge.tip >= judge.promise.tip(&self.past), "{:?}\n{plan:#}", judge.promise);
        // WAL grows meanwhile; the command that a plan prints names the end that was shown.
        self.receivers.here(Drctl::pasted(plan["command"].as_str().unwrap())).run().await.ok();
        let settings = [("synchronous_standby_names", ""), ("listen_addresses", "")];
        let major = self.pair.primary().major();
        let restored = Cluster::try_start_restored(&directory, major, &settings, Until::Promoted).await;
        let restored = restored.unwrap_or_else(|log| panic!("{kind} {options:?}: {log}"));
        // The book is closed after the restore: what came back must have been sent by then.
        let verdict = self.ledger.book().judge(&restored, |entry| judge.fate(entry)).await;
        let verdict = verdict.unwrap_or_else(|wrong| {
            panic!("{kind} {options:?}: {wrong}\n{:?}\n{:?}\n{plan:#}", judge.promise, self.past)
        });
        println!("       {kind} {options:?}: {verdict:?}, {:.1?}", begun.elapsed());
        if kind == "End" && self.tally.restores.is_empty() {
            restored.amcheck().await;
        }
        drop(restored);
        std::fs::remove_dir_all(&directory).unwrap();
        verdict
    }
}

/// The timeline at whose end a restore ends. Of a new one nothing may be stored but its history: that ends where the new
/// one begins, and what the old one holds behind that is no part of it.
fn tip(plan: &Value) -> Timeline {
    let last = u32::try_from(plan["timeline"].as_u64().unwrap()).unwrap();
    let begun = format!("timeline {} has no WAL from {}", last + 1, plan["end_lsn"].as_str().unwrap());
    let is_begun = plan["unreachable"].as_str().is_some_and(|why| why.starts_with(&begun));
    Timeline(last + u32::from(is_begun))
}
