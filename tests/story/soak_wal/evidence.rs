//! What drctl said of its own work, and what became of the timelines: by both a restore is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use drctl::jobs::wal::{Position, control};
use drctl::model::{Lsn, TargetName, Timeline};
use tokio::task::JoinHandle;

use crate::support::ledger::{Entry, Fate, Glance};

/// Exposure is measured against samples of the server, which come every second on a machine that has the time.
pub(super) const SAMPLE_AGE: Duration = Duration::from_secs(4);

/// What receivers have promised so far, and never take back.
#[derive(Debug, Clone)]
pub(super) struct Promise {
    /// By timeline, up to where records are durable.
    pub(super) durable: BTreeMap<Timeline, Lsn>,
    /// By the exposure that was told, everything is durable that was acknowledged before.
    pub(super) point: SystemTime,
    /// How many times somebody answered.
    pub(super) heard: u64,
    /// By how much an exposure was told too small, at worst.
    pub(super) understated: Duration,
}

/// Listens to receivers all the time.
#[derive(Debug)]
pub(super) struct Witness {
    promise: Arc<Mutex<Promise>>,
    task: JoinHandle<()>,
}

impl Witness {
    pub(super) fn listen(sockets: Vec<PathBuf>, ledger: Glance) -> Self {
        let (durable, point) = (BTreeMap::new(), SystemTime::UNIX_EPOCH);
        let promise = Promise { durable, point, heard: 0, understated: Duration::ZERO };
        let promise = Arc::new(Mutex::new(promise));
        let task = tokio::spawn(listen(sockets, Arc::clone(&promise), ledger));
        Self { promise, task }
    }

    pub(super) fn promise(&self) -> Promise {
        self.promise.lock().unwrap().clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(sockets: Vec<PathBuf>, promise: Arc<Mutex<Promise>>, ledger: Glance) {
    let target: TargetName = "ledger".parse().unwrap();
    loop {
        for socket in &sockets {
            let asked_at = SystemTime::now();
            // Whoever sleeps does not answer, and whoever dies breaks off.
            let answer = tokio::time::timeout(Duration::from_secs(1), control::position(socket, &target)).await;
            if let Ok(Ok(Some(position))) = answer {
                promise.lock().unwrap().add(&position, asked_at, &ledger);
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Promise {
    fn add(&mut self, position: &Position, asked_at: SystemTime, ledger: &Glance) {
        self.heard += 1;
        if let Some(timeline) = position.timeline {
            let durable = self.durable.entry(timeline).or_insert(Lsn::INVALID);
            *durable = position.durable_lsn.max(*durable);
        }
        let (Some(exposure), Some(timeline)) = (position.exposure_seconds, position.timeline) else { return };
        // A stream that begins again a little earlier tells what is durable of that server's own WAL; what was durable is.
        let ever = Position { durable_lsn: self.durable[&timeline], ..position.clone() };
        let told = asked_at - Duration::from_secs_f64(exposure);
        self.point = self.point.max(told - SAMPLE_AGE);
        // The others may be on a timeline that was left before it was followed to its end, and then nobody has them. Where a
        // commit is that a dying server still acknowledged, nobody knows.
        let covered = |entry: &Entry| {
            let (at, lsn) = (entry.timeline, entry.lsn);
            at < timeline || at == timeline && ever.reaches(lsn) || lsn == Lsn(u64::MAX)
        };
        let behind = ledger.oldest(covered).and_then(|oldest| told.duration_since(oldest.acknowledged_at).ok());
        if let Some(behind) = behind.filter(|behind| *behind > self.understated) {
            self.understated = behind;
            if behind > SAMPLE_AGE {
                println!("       an exposure of {exposure:.1} s was told {behind:.1?} too small: {position:?}");
            }
        }
    }
}

/// Which timelines were left, and where.
#[derive(Debug, Default)]
pub(super) struct Past {
    pub(super) left: BTreeMap<Timeline, Lsn>,
}

/// Whether a commit is part of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Of,
    NotOf,
    /// Its timeline was left somewhere between its two bounds.
    Perhaps,
}

/// What a restore is judged by.
#[derive(Debug)]
pub(super) struct Judge<'p> {
    pub(super) past: &'p Past,
    /// The timeline at whose end, or in whose history, the restore ends.
    pub(super) tip: Timeline,
    /// Everything behind this position must be missing.
    pub(super) until: Option<Lsn>,
    pub(super) promise: Promise,
    /// Commits that must be there because they were acknowledged before the restore began, whatever drctl said.
    pub(super) acknowledged: BTreeSet<u64>,
}

impl Judge<'_> {
    pub(super) fn fate(&self, entry: &Entry) -> Fate {
        if self.acknowledged.contains(&entry.number) {
            return Fate::There;
        }
        match (self.until, self.part(entry)) {
            (_, Part::NotOf) => Fate::Absent,
            (Some(until), _) if entry.from >= until => Fate::Absent,
            (_, Part::Perhaps) => Fate::Unknown,
            (Some(until), Part::Of) if entry.lsn <= until => Fate::There,
            (None, Part::Of) if self.is_promised(entry) => Fate::There,
            (_, Part::Of) => Fate::Open,
        }
    }

    fn part(&self, entry: &Entry) -> Part {
        match self.left(entry.timeline) {
            _ if entry.timeline > self.tip => Part::NotOf,
            left if entry.lsn <= left => Part::Of,
            left if entry.from >= left => Part::NotOf,
            _ => Part::Perhaps,
        }
    }

    /// Where this history leaves a timeline.
    fn left(&self, timeline: Timeline) -> Lsn {
        let left = self.past.left.get(&timeline).filter(|_| timeline < self.tip);
        left.copied().unwrap_or(Lsn(u64::MAX))
    }

    fn is_promised(&self, entry: &Entry) -> bool {
        entry.lsn <= self.durable(entry.timeline) || entry.acknowledged_at < self.promise.point
    }

    /// Up to where a timeline was called durable. Whoever streams a later one of this history has all of it.
    fn durable(&self, timeline: Timeline) -> Lsn {
        let later = self.promise.durable.keys().any(|other| *other > timeline && *other <= self.tip);
        let told = self.promise.durable.get(&timeline).copied().unwrap_or(Lsn::INVALID);
        if later { Lsn(u64::MAX) } else { told }
    }
}

impl Promise {
    /// The newest timeline of which something is durable.
    pub(super) fn tip(&self, past: &Past) -> Timeline {
        let begins =
            |timeline: &Timeline| past.left.range(..timeline).next_back().map_or(Lsn::INVALID, |(_, left)| *left);
        let begun = self.durable.iter().filter(|(timeline, durable)| **durable > begins(timeline));
        begun.map(|(timeline, _)| *timeline).max().unwrap_or(Timeline::FIRST)
    }

    /// Up to where the present history was called durable.
    pub(super) fn reach(&self, past: &Past) -> Lsn {
        let left = |timeline: &Timeline| past.left.get(timeline).copied().unwrap_or(Lsn(u64::MAX));
        let reached = self.durable.iter().map(|(timeline, durable)| (*durable).min(left(timeline)));
        reached.max().unwrap_or(Lsn::INVALID)
    }
}
