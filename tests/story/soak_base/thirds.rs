//! A random third of the backups goes, by the same commands that an operator types: drills make them count, pins keep what
//! the lot spares, and prune removes the rest in two runs. Between the two runs the soak goes on.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::Value;
use tokio::time::Instant;

use super::Survivor;
use crate::restore::Protected;

/// Configuration that lets everything go which is neither pinned nor among the two newest that a drill proved.
pub(super) const RULES: &str =
    "[prune]\ngrace = \"1s\"\nshort_grace = true\n[targets.ledger.retention]\nkeep_last = 2\n";

/// The grace period, and the second to which a plan's age is rounded.
const RIPENS: Duration = Duration::from_millis(2200);

/// Who was drawn so far.
#[derive(Debug, Default)]
pub(super) struct Thirds {
    /// Backups that there ever were.
    pub taken: usize,
    /// Backups that are gone.
    pub pruned: usize,
    /// Those of them that compaction made.
    pub copies: usize,
    /// Drills.
    pub drills: usize,
    drilled: BTreeSet<String>,
    /// When what is planned may go.
    ripe_at: Option<Instant>,
    pinned: BTreeSet<String>,
    doomed: BTreeSet<String>,
}

impl Thirds {
    /// The first run: draws so many of `survivors` that a third of all is gone, and plans. The two newest are never drawn.
    pub(super) async fn plan(&mut self, protected: &Protected, survivors: &[Survivor], chance: &mut StdRng) {
        let (old, newest) = survivors.split_at(survivors.len().saturating_sub(2));
        let wanted = (self.taken / 3).saturating_sub(self.pruned).min(old.len());
        while self.doomed.len() < wanted {
            self.doomed.insert(old[chance.random_range(0..old.len())].id.clone());
        }
        if self.doomed.is_empty() {
            return;
        }
        let doomed: Vec<_> = old.iter().filter(|survivor| self.doomed.contains(&survivor.id)).collect();
        for survivor in newest.iter().chain(doomed) {
            self.drill(protected, survivor).await;
        }
        for survivor in old {
            self.pin(protected, &survivor.id).await;
        }
        let plan = protected.drctl(["prune", "--json"]).run().await.ok().json();
        assert!(plan["planned"]["amount"]["objects"].as_u64().unwrap() > 0, "{plan:#}");
        self.ripe_at = Some(Instant::now() + RIPENS);
        println!("  to go: {:?}", self.doomed);
    }

    /// The second run: exactly the drawn ones go.
    pub(super) async fn sweep(&mut self, protected: &Protected, survivors: &mut Vec<Survivor>) {
        let Some(ripe_at) = self.ripe_at.take() else { return };
        tokio::time::sleep_until(ripe_at).await;
        let found = protected.drctl(["prune", "--json"]).run().await.ok().json();
        let digest = found["ripe"]["digest"].as_str().unwrap_or_else(|| panic!("nothing is ripe: {found:#}"));
        let swept = protected.drctl(["prune", "--plan", digest, "--execute", "--json"]).run().await.ok().json();
        let gone: BTreeSet<_> = ids(&swept["swept"]["backups"]).collect();
        assert_eq!(gone, self.doomed, "{swept:#}");
        survivors.retain(|survivor| !gone.contains(&survivor.id));
        self.pruned += gone.len();
        self.pinned.retain(|id| !gone.contains(id));
        self.doomed.clear();
        let listed = protected.drctl(["list", "--json"]).run().await.ok().json();
        let listed: BTreeSet<_> =
            listed["backups"].as_array().unwrap().iter().map(|backup| text(&backup["id"])).collect();
        assert_eq!(listed, survivors.iter().map(|survivor| survivor.id.clone()).collect());
        self.compact(protected, survivors).await;
        protected.drctl(["verify", "ledger", "--scrub"]).run().await.ok();
    }

    /// What the sweep left half empty is copied out. A copy is a survivor like any other: it may be drawn, or its original.
    async fn compact(&mut self, protected: &Protected, survivors: &mut Vec<Survivor>) {
        let done = protected.drctl(["compact", "ledger", "--execute", "--json"]).run().await.ok().json();
        for copied in done["copies"].as_array().unwrap() {
            let at =
                survivors.iter().position(|survivor| *survivor.id == *copied["original"].as_str().unwrap()).unwrap();
            let Survivor { finished_at, digests, .. } = &survivors[at];
            let copy = Survivor { id: text(&copied["copy"]), finished_at: *finished_at, digests: digests.clone() };
            println!("  {} is a copy of {}", copy.id, survivors[at].id);
            survivors.insert(at + 1, copy);
            self.copies += 1;
            self.taken += 1;
        }
    }

    /// Only what a drill proved gives up its place.
    async fn drill(&mut self, protected: &Protected, survivor: &Survivor) {
        if self.drilled.insert(survivor.id.clone()) {
            let time = (survivor.finished_at + TimeDelta::milliseconds(300)).to_rfc3339();
            let line = ["drill", "ledger", "--backup", &survivor.id, "--to-time", &time, "--json"];
            let report = protected.drctl(line).run().await.ok().json();
            assert!(report["level"].as_str() >= Some("L5"), "{report:#}");
            self.drills += 1;
        }
    }

    async fn pin(&mut self, protected: &Protected, id: &str) {
        let verb = match (self.doomed.contains(id), self.pinned.contains(id)) {
            (false, false) => "pin",
            (true, true) => "unpin",
            _ => return,
        };
        protected.drctl([verb, id, "--reason", "by lot"]).run().await.ok();
        match verb {
            "pin" => self.pinned.insert(id.to_owned()),
            _ => self.pinned.remove(id),
        };
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn ids(list: &Value) -> impl Iterator<Item = String> {
    list.as_array().into_iter().flatten().map(text)
}

/// When a backup was complete, by its COMMIT.
pub(super) fn finished_at(commit: &Value) -> DateTime<chrono::Utc> {
    commit["finished_at"].as_str().unwrap().parse().unwrap()
}
