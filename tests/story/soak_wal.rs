//! Whoever writes, receives or stores WAL dies, sleeps, hangs or is replaced, again and again and at random moments, under
//! a load that a client keeps a ledger of; at random moments all of it is restored, or up to a random position.
//!
//! In synchronous mode no acknowledged commit is ever missing. In asynchronous mode nothing is missing that drctl called
//! durable, or that is older than the exposure that it told. The suite runs five minutes, `scripts/soak wal` as many as you
//! like.

#![allow(clippy::print_stdout, reason = "the runner shows it when the story fails")]

use std::time::{Duration, Instant};

use drctl::model::Lsn;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use serde_json::Value;

use crate::support::ledger::Ledger;
use crate::support::pg::{Cluster, MAJORS, Pair};
use crate::support::seed::{self, Seed};
use crate::wal::Rig;

mod blows;
mod evidence;
mod receivers;
mod regions;
mod restores;

use blows::Blow;
use evidence::{Past, Promise, SAMPLE_AGE, Witness};
use receivers::Receivers;
use regions::Sky;
use restores::{Moment, Point};

/// A recovery from a blow, with everything that it has to wait for on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

/// Whether commits wait for the regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Asynchronous,
    Synchronous,
}

/// What was done and found.
#[derive(Debug, Default)]
struct Tally {
    blows: std::collections::BTreeMap<String, usize>,
    restores: std::collections::BTreeMap<String, usize>,
    /// Commits that a restore had to bring back, and those that it must not bring back, over all restores.
    required: usize,
    refused: usize,
    /// Receivers that woke up behind their successor and were told so.
    sealed_out: usize,
}

/// Two servers, two receivers, three regions, and who watches them.
struct Soak {
    mode: Mode,
    pair: Pair,
    rig: Rig,
    receivers: Receivers,
    sky: Sky,
    ledger: Ledger,
    witness: Witness,
    past: Past,
    chance: StdRng,
    tally: Tally,
    /// No restore reaches further back.
    floor: Lsn,
    began: Instant,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_no_commit_is_lost_that_was_called_durable() {
    soak(Mode::Asynchronous).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_no_synchronous_commit_is_lost_that_was_acknowledged() {
    soak(Mode::Synchronous).await;
}

/// Each of the two modes has half of the time, and a blow of each kind at least.
async fn soak(mode: Mode) {
    let minutes: f64 = seed::number("DRCTL_SOAK_WAL_MINUTES").unwrap_or(5.0);
    let seed = Seed::of_run(&format!("scripts/soak wal --minutes {minutes}"));
    let mut soak = Soak::new(mode, seed.chance()).await;
    let mut first = true;
    'time: loop {
        for (blow, point) in soak.deal() {
            if !first && soak.began.elapsed().as_secs_f64() >= minutes * 30.0 {
                break 'time;
            }
            soak.strike(blow, point).await;
        }
        soak.back_up().await;
        first = false;
    }
    soak.end().await;
}

impl Soak {
    async fn new(mode: Mode, mut chance: StdRng) -> Self {
        let major = MAJORS[chance.random_range(0..MAJORS.len())];
        println!("{mode:?}, PostgreSQL {major}");
        let mut primary = Cluster::builder(major)
            .wal_segsize(1)
            .setting("min_wal_size", "2MB")
            .setting("max_wal_size", "32MB")
            // A standby that was just made has no slot of ours yet.
            .setting("wal_keep_size", "512MB")
            .setting("wal_sender_timeout", "3s")
            .setting("wal_retrieve_retry_interval", "500ms")
            .override_with("listen_addresses", "")
            .start()
            .await;
        Ledger::make_tables(&primary).await;
        if mode == Mode::Synchronous {
            let names = "FIRST 2 (\"drctl wal ledger\", mirror)";
            primary.execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await;
            primary.restart().await;
        }
        let pair = Pair::of(primary).await;
        let (sky, regions) = Sky::new().await;
        let more = format!("standby_slots = true\nsync = {}\n", mode == Mode::Synchronous);
        let rig = Rig::with_more(&pair.conninfo(), &regions, &more).await;
        let mut receivers = Receivers::of(&rig);
        receivers.start();
        // Writers that wait hold each other up, and each of their commits is shipped alone.
        let (writers, pause) = if mode == Mode::Synchronous { (3, 120) } else { (4, 40) };
        let ledger = Ledger::write_at(&pair.conninfo(), writers, Duration::from_millis(pause));
        let witness = Witness::listen(receivers.sockets(), ledger.glance());
        let (past, tally, began) = (Past::default(), Tally::default(), Instant::now());
        let floor = Lsn::INVALID;
        let mut soak = Self { mode, pair, rig, receivers, sky, ledger, witness, past, chance, tally, floor, began };
        soak.settle().await;
        soak.floor = soak.back_up().await;
        soak
    }

    /// Every blow once, in random order, and a restore during or after half of them.
    fn deal(&mut self) -> Vec<(Blow, Option<(Moment, Point)>)> {
        let mut points = vec![None; Blow::ALL.len()];
        for (place, point) in points.iter_mut().zip([Point::End, Point::Random, Point::End, Point::Random]) {
            let moment = if self.chance.random_bool(0.5) { Moment::During } else { Moment::After };
            *place = Some((moment, point));
        }
        let mut blows = Blow::ALL.to_vec();
        blows.shuffle(&mut self.chance);
        points.shuffle(&mut self.chance);
        blows.into_iter().zip(points).collect()
    }

    /// From `low` to `high` milliseconds.
    fn draw(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.chance.random_range(low..high))
    }

    async fn strike(&mut self, blow: Blow, point: Option<(Moment, Point)>) {
        println!("{:>4.0} s: {blow:?}, {point:?}", self.began.elapsed().as_secs_f64());
        *self.tally.blows.entry(format!("{blow:?}")).or_default() += 1;
        let rest = self.blow(blow, point).await;
        self.settle().await;
        if let Some((_, point)) = rest {
            self.restore(point).await;
        }
    }

    /// Everybody is back: commits are acknowledged, and what is committed now becomes durable.
    async fn settle(&mut self) {
        self.ledger.wait_for(10).await;
        let primary = self.pair.primary();
        let (timeline, flushed) = (primary.timeline().await, primary.flush_lsn().await);
        let reached =
            |position: &drctl::jobs::wal::Position| position.timeline == Some(timeline) && position.reaches(flushed);
        let what = format!("durable up to {flushed} of timeline {timeline}");
        self.receivers.wait(&what, self.receivers.owner, LIMIT, reached).await;
    }

    /// Tells from where on it can be restored.
    async fn back_up(&mut self) -> Lsn {
        let backup = self.receivers.drctl(&["backup", "ledger", "--fast", "--json"]).run().await;
        assert!(matches!(backup.code, Some(0 | 4)), "{backup}");
        let stop = backup.json()["backup"]["wal"]["stop_lsn"].as_str().unwrap().parse().unwrap();
        println!("{:>4.0} s: a backup to {stop}", self.began.elapsed().as_secs_f64());
        stop
    }

    /// Nobody is away: all of it comes back, every region is brought to what the others have, and there is no hole.
    async fn end(mut self) {
        self.settle().await;
        self.restore(Point::End).await;
        self.restore(Point::Random).await;
        let acknowledged = self.ledger.stop().await.entries.len();
        self.receivers.stop().await;
        self.receivers.drctl(&["repair"]).run().await.ok();
        assert_whole(&self.receivers, &self.past).await;
        let Tally { blows, restores, required, refused, sealed_out } = &self.tally;
        let struck: usize = blows.values().sum();
        let Promise { heard, understated, .. } = self.witness.promise();
        println!(
            "{:.0?} {:.0?}: {acknowledged} commits acknowledged; {struck} blows {blows:?}; restores {restores:?}, in which \
             {required} commits had to be there and {refused} had to be missing; {sealed_out} receivers sealed out; \
             {heard} positions heard, exposure told {understated:.1?} too small at worst",
            self.mode,
            self.began.elapsed(),
        );
        assert!(understated <= SAMPLE_AGE, "exposure was told {understated:?} too small");
        assert!(struck >= Blow::ALL.len() && *required > 0 && *refused > 0);
    }
}

/// Every region has all of every timeline, in one piece, and nobody ever recorded a gap.
async fn assert_whole(receivers: &Receivers, past: &Past) {
    let status = receivers.drctl(&["wal", "status", "ledger", "--json"]).run().await.ok().json();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let branches = list(&status["targets"][0]["branches"]);
    let whole = |region: &Value| {
        list(&region["windows"]).len() == 1 && region["missing_frames"] == 0 && region["unreadable"].is_null()
    };
    for branch in &branches {
        assert!(list(&branch["gaps"]).is_empty() && list(&branch["errors"]).is_empty(), "{branch:#}");
        assert!(list(&branch["regions"]).iter().all(whole), "{branch:#}");
    }
    assert_eq!(branches.len(), past.left.len() + 1, "{status:#}");
}
