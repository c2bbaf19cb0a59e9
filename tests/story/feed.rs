//! Recovery from a stream of stored WAL: a restore that stages nothing, and a standby that goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::model::Lsn;
use serde_json::Value;

use crate::restore::Protected;
use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::ledger::Ledger;
use crate::support::pg::Cluster;
use crate::support::process;
use crate::support::tmpfs::Tmpfs;

const SOON: Duration = Duration::from_secs(30);

/// Stops a server that a restore left running.
async fn stop(directory: &Path, pid: u32) {
    process::signal(pid, rustix::process::Signal::INT);
    process::eventually("the server ends", Duration::from_secs(30), async || {
        !process::is_alive(pid) || !directory.join("postmaster.pid").exists()
    })
    .await;
}

#[tokio::test]
async fn a_restore_streams_what_it_does_not_stage() {
    for major in [15, 18] {
        let builder = Cluster::builder(major).setting("wal_level", "replica").setting("max_wal_size", "64MB");
        let mut protected = Protected::of(builder).await;
        let stream = protected.stream();
        let ledger = Ledger::start(&protected.cluster, 2).await;
        ledger.wait_for(50).await;
        protected.backup().await;
        ledger.wait_for(100).await;
        protected.cluster.switch_wal().await;
        // More WAL than one of the targets has room for, and no more data.
        if major == 18 {
            let emit =
                "SELECT count(pg_logical_emit_message(false, '', repeat('x', 1 << 20))) FROM generate_series(1, 240)";
            protected.cluster.execute(emit).await;
        }
        ledger.wait_for(100).await;
        let durable = protected.durable().await;
        protected.cluster.kill9().await;
        let book = ledger.stop().await;
        stream.kill9();

        let small = (major == 18).then(|| Tmpfs::mount(protected.scratch.join("small"), 230));
        let target =
            small.as_ref().map_or_else(|| protected.scratch.join("restored"), |small| small.path().join("restored"));
        let options = ["--start", "--run-as", "postgres", "--feed", "stream"];
        // On the small disk nobody says how, and what does not fit is streamed.
        let options = if small.is_some() { &options[..3] } else { &options[..] };
        let plan = protected.plan(&target, options).await.ok().json();
        let warned = plan["warnings"].to_string().contains("there is no room to stage");
        assert_eq!(warned, small.is_some(), "{plan:#}");
        let report = protected.execute(&target, options).await.ok().json();
        let phases: Vec<_> =
            report["phases"].as_array().unwrap().iter().map(|phase| phase["name"].as_str().unwrap()).collect();
        assert_eq!(phases, ["fetch", "replay", "open"], "{report:#}");
        stop(&target, u32::try_from(report["started"]["pid"].as_u64().unwrap()).unwrap()).await;
        let names: Vec<_> =
            fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| name.starts_with("drctl-feed") || name == "standby.signal"), "{names:?}");
        assert!(!fs::read_to_string(target.join("postgresql.auto.conf")).unwrap().contains("primary_conninfo"));
        let restored = Cluster::start_restored(&target, major).await;
        book.verify(&restored, durable).await.unwrap();
        restored.amcheck().await;
    }
}

/// A standby that drctl keeps, beside what it protects.
struct Warm {
    protected: Protected,
    directory: PathBuf,
}

impl Warm {
    async fn new(major: u32, settings: &[(&str, &str)]) -> Self {
        let builder = Cluster::builder(major).setting("wal_level", "replica");
        let builder = settings.iter().fold(builder, |builder, (name, value)| builder.setting(name, value));
        let protected = Protected::of(builder).await;
        let directory = protected.scratch.join("warm");
        Self { protected, directory }
    }

    /// What feeds it, in the background.
    fn start(&self) -> Background {
        let directory = self.directory.display().to_string();
        let line = ["standby", "start", "ledger", "--to", &directory, "--run-as", "postgres"];
        self.protected.drctl(line).expect_log("region is left behind").spawn()
    }

    async fn status(&self) -> Value {
        let status = self.protected.drctl(["standby", "status", "--json"]).run().await;
        let one = status.json()["standbys"][0].clone();
        assert_eq!(status.code, Some(i32::from(one["state"] != "following" && !one.is_null())), "{status}");
        one
    }

    async fn wait(&self, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let deadline = std::time::Instant::now() + SOON;
        while !reached(&last) {
            let log = fs::read_to_string(self.directory.join("drctl-standby.log")).unwrap_or_default();
            assert!(std::time::Instant::now() < deadline, "{what}: {last:#}\n{log}");
            tokio::time::sleep(Duration::from_millis(200)).await;
            last = self.status().await;
        }
        last
    }

    /// Waits until everything up to there is replayed.
    async fn wait_replayed(&self, lsn: Lsn) -> Value {
        self.wait(&format!("replayed to {lsn}"), |status| {
            let replayed = status["replayed"].as_str().and_then(|text| text.parse::<Lsn>().ok());
            replayed.is_some_and(|replayed| replayed >= lsn) && status["state"] == "following"
        })
        .await
    }

    async fn query(&self, sql: &str) -> i64 {
        let place = format!("host={} port=5432 user=postgres dbname=postgres", self.directory.display());
        let (client, connection) = tokio_postgres::connect(&place, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.query_one(sql, &[]).await.unwrap().get(0)
    }

    async fn plan(&self, options: &[&str]) -> Finished {
        self.protected.drctl(["standby", "promote", "ledger", "--json"].iter().chain(options)).run().await
    }

    /// Runs the command that the plan prints.
    async fn promote(&self, options: &[&str]) -> Value {
        let plan = self.plan(options).await.ok().json();
        self.protected.here(Drctl::pasted(plan["command"].as_str().unwrap())).run().await.ok().json()
    }

    /// Killed while it gives out what was just written, the feed begins again, and every row is what it was.
    async fn killed_while_it_gives(&self, feed: Background) -> Background {
        let primary = &self.protected.cluster;
        primary.execute("CREATE TABLE many AS SELECT n, md5(n::text) text FROM generate_series(1, 100000) n").await;
        feed.kill9();
        let feed = self.start();
        self.wait_replayed(self.protected.durable().await).await;
        let digest = "SELECT (sum(hash_record_extended(many.*, 0)::numeric) % 9007199254740881)::bigint FROM many";
        assert_eq!(self.query(digest).await.to_string(), primary.query(digest).await);
        feed
    }

    /// Whoever gave the order dies before the server has followed it. The server follows it all the same: beside a feed that
    /// began anew, or alone until it is ordered again.
    async fn promote_and_die(&self, feed: Background, is_fed_again: bool) {
        let plan = self.plan(&[]).await.ok().json();
        let again = || self.protected.here(Drctl::pasted(plan["command"].as_str().unwrap()));
        // Recovery ends when the walreceiver has.
        let receiver = self.query("SELECT pid::bigint FROM pg_stat_wal_receiver").await;
        let receiver = u32::try_from(receiver).unwrap();
        process::signal(receiver, rustix::process::Signal::STOP);
        let ordered = again().spawn();
        let log = self.directory.join("drctl-standby.log");
        process::eventually("the order is taken", SOON, async || {
            fs::read_to_string(&log).unwrap().contains("received promote request")
        })
        .await;
        feed.kill9();
        ordered.wait().await.code(1);
        if is_fed_again {
            let feed = self.start();
            self.wait("fed again", |status| status["state"] != "not_fed").await;
            process::signal(receiver, rustix::process::Signal::CONT);
            let told = feed.wait().await.code(5);
            assert!(told.stderr.contains("was promoted on") && told.stderr.contains("on timeline 3"), "{told}");
        } else {
            process::signal(receiver, rustix::process::Signal::CONT);
            let promoted = again().run().await.ok().json();
            assert_eq!((&promoted["timeline"], &promoted["old_timeline"]), (&3.into(), &2.into()), "{promoted:#}");
            assert!(promoted["lost_to"].is_null() && promoted["stored_as"].is_string(), "{promoted:#}");
        }
        assert!(self.status().await.is_null());
        let report = self.protected.drctl(["report", "show", "latest", "--json"]).run().await.ok().json();
        assert_eq!((&report["head"]["job"], &report["head"]["outcome"]), (&"promotion".into(), &"pass".into()));
        crate::reports::assert_fits(&report["body"]["report"]);
    }

    /// What was promoted, as a cluster that is stopped and started by its own configuration.
    async fn cluster(&self) -> Cluster {
        let pid = fs::read_to_string(self.directory.join("postmaster.pid")).unwrap();
        stop(&self.directory, pid.lines().next().unwrap().parse().unwrap()).await;
        let names: Vec<_> = fs::read_dir(&self.directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let ours = ["drctl-feed", "drctl-standby.json", "drctl-standby.lock", "standby.signal"];
        assert!(!names.iter().any(|name| ours.iter().any(|ours| name.starts_with(ours))), "{names:?}");
        assert!(!fs::read_to_string(self.directory.join("postgresql.auto.conf")).unwrap().contains("primary_conninfo"));
        Cluster::start_restored(&self.directory, self.protected.cluster.major()).await
    }
}

#[tokio::test]
async fn a_standby_follows_survives_its_feed_and_a_region_and_is_promoted_with_every_row() {
    let mut warm = Warm::new(18, &[]).await;
    let stream = warm.protected.stream();
    let ledger = Ledger::start(&warm.protected.cluster, 2).await;
    ledger.wait_for(50).await;
    warm.protected.backup().await;
    let feed = warm.start();
    ledger.wait_for(100).await;
    let status = warm.wait("following", |status| status["state"] == "following").await;
    let first_pid = status["server_pid"].as_u64().unwrap();
    let before = warm.query("SELECT count(*) FROM transfer").await;
    ledger.wait_for(200).await;
    process::eventually("rows arrive while they are written", SOON, async || {
        warm.query("SELECT count(*) FROM transfer").await > before
    })
    .await;
    let lag = warm.status().await["lag_seconds"].as_f64().unwrap();
    assert!(lag < 10.0, "{lag}");
    let figures = warm.protected.drctl(["metrics"]).run().await.ok().stdout;
    let lines: Vec<_> = figures.lines().filter(|line| line.starts_with("drctl_standby_")).collect();
    assert!(lines.len() == 3 && lines.contains(&"drctl_standby_up{target=\"ledger\"} 1"), "{lines:?}");
    assert_eq!(warm.query("SELECT pg_is_in_recovery()::int::bigint").await, 1);

    // Not while the primary lives.
    let refused = warm.plan(&["--execute"]).await.code(5);
    assert!(refused.stdout.contains("primary still answers"), "{refused}");

    feed.kill9();
    assert_eq!(warm.status().await["state"], "not_fed");
    ledger.wait_for(200).await;
    let durable = warm.protected.durable().await;
    warm.protected.cluster.kill9().await;
    let book = ledger.stop().await;
    stream.kill9();
    fs::rename(warm.protected.home().join("region-a"), warm.protected.home().join("lost")).unwrap();

    let feed = warm.start();
    let status = warm.wait_replayed(durable).await;
    assert_eq!(status["server_pid"].as_u64().unwrap(), first_pid, "the server went on: {status:#}");
    // Nobody closed the stream, and it may be less than half a minute old: as far as drctl knows the primary streams on.
    assert!(status["streamed_at"].is_string(), "{status:#}");
    let promoted = warm.promote(&["--primary-is-fenced"]).await;
    assert!(promoted["lost_to"].is_null(), "{promoted:#}");
    assert!(promoted["last_commit"].is_string() && promoted["stored_at"].is_string(), "{promoted:#}");
    assert_eq!((&promoted["timeline"], &promoted["old_timeline"]), (&2.into(), &1.into()), "{promoted:#}");
    let told = feed.wait().await.ok();
    assert!(told.stdout.contains("is open, on timeline 2"), "{told}");
    let id = promoted["stored_as"].as_str().unwrap();
    let stored = warm.protected.drctl(["report", "show", id, "--json"]).run().await.ok().json();
    let report = &stored["body"]["report"];
    crate::reports::assert_fits(report);
    assert_eq!((&report["job"], &report["timeline"]), (&"promotion".into(), &2.into()), "{stored:#}");
    assert_eq!((&stored["head"]["outcome"], &stored["head"]["level"]), (&"pass".into(), &"L4".into()), "{stored:#}");
    assert!(warm.status().await.is_null());
    let back = warm.cluster().await;
    let verdict = book.verify(&back, durable).await.unwrap();
    assert!(verdict.durable >= 500, "{verdict:?}");
    back.amcheck().await;
}

#[tokio::test]
async fn a_standby_follows_a_timeline_switch() {
    for major in [14, 15] {
        let mut warm = Warm::new(major, &[("restore_command", "/bin/false")]).await;
        warm.protected.cluster.execute("CREATE TABLE mark AS SELECT 0 n").await;
        let stream = warm.protected.stream();
        warm.protected.backup().await;
        let feed = warm.start();
        warm.wait("following", |status| status["state"] == "following").await;
        warm.protected.cluster.execute("INSERT INTO mark VALUES (1)").await;
        warm.protected.durable().await;
        warm.protected.cluster.stop().await;
        fs::write(warm.protected.cluster.data_dir().join("recovery.signal"), "").unwrap();
        crate::support::dirs::give_to_postgres(warm.protected.cluster.data_dir());
        warm.protected.cluster.start().await;
        warm.protected.cluster.wait_promoted(SOON).await.unwrap();
        // Larger than the standby's server was started with.
        warm.protected.cluster.execute("INSERT INTO mark VALUES (2)").await;
        warm.protected.cluster.execute("ALTER SYSTEM SET max_connections = 140").await;
        warm.protected.cluster.restart().await;
        warm.protected.cluster.execute("INSERT INTO mark VALUES (3)").await;
        let durable = warm.protected.durable().await;
        let status = warm.wait_replayed(durable).await;
        assert_eq!(status["timeline"], 2, "{status:#}");
        assert_eq!(warm.query("SELECT sum(n) FROM mark").await, 6);
        let feed = if major == 15 { warm.killed_while_it_gives(feed).await } else { feed };
        stream.terminate().await.ok();
        // A stop leaves a standby that goes on.
        warm.protected.drctl(["standby", "stop", "ledger"]).run().await.ok();
        feed.wait().await.ok();
        assert!(!warm.directory.join("postmaster.pid").exists());
        warm.protected.cluster.stop().await;
        let feed = warm.start();
        warm.wait("following", |status| status["state"] == "following").await;
        warm.promote_and_die(feed, major == 14).await;
        assert_eq!(warm.cluster().await.query("SELECT sum(n) FROM mark").await, "6");
    }
}

#[tokio::test]
async fn what_is_damaged_is_never_applied() {
    let mut warm = Warm::new(16, &[]).await;
    warm.protected.cluster.execute("CREATE TABLE mark AS SELECT 0 n").await;
    let stream = warm.protected.stream();
    warm.protected.backup().await;
    let feed = warm.start();
    warm.protected.cluster.execute("INSERT INTO mark VALUES (1)").await;
    let good = warm.protected.durable().await;
    warm.wait_replayed(good).await;
    feed.terminate().await.ok();

    let region = warm.protected.home().join("region-a");
    let frames = move || {
        crate::rig3::files_below(&region)
            .into_keys()
            .filter(|n| n.starts_with("wal/"))
            .collect::<std::collections::BTreeSet<_>>()
    };
    let known = frames();
    for n in 2..6 {
        warm.protected.cluster.execute(&format!("INSERT INTO mark VALUES ({n})")).await;
        warm.protected.durable().await;
    }
    let durable = warm.protected.durable().await;
    stream.terminate().await.ok();
    warm.protected.cluster.stop().await;
    let hit = frames().difference(&known).next().unwrap().clone();
    let paths = ["region-a", "region-b"].map(|region| warm.protected.home().join(region).join(&hit));
    let whole = fs::read(&paths[0]).unwrap();
    let mut flipped = whole.clone();
    let last = flipped.len() - 9;
    flipped[last] ^= 1;
    for path in &paths {
        fs::write(path, &flipped).unwrap();
    }

    let feed = warm.start();
    let status = warm.wait("in doubt", |status| status["state"] == "in_doubt").await;
    assert!(status["why"].as_str().unwrap().contains("WAL from"), "{status:#}");
    let refused = warm.plan(&[]).await.code(5);
    assert!(refused.stdout.contains("stored WAL is not all replayed"), "{refused}");
    assert_eq!(warm.query("SELECT max(n)::bigint FROM mark").await, 1);
    assert!(warm.status().await["replayed"].as_str().unwrap().parse::<Lsn>().unwrap() < durable);

    // One good copy is enough.
    fs::write(&paths[1], &whole).unwrap();
    warm.wait_replayed(durable).await;
    assert_eq!(warm.query("SELECT max(n)::bigint FROM mark").await, 5);
    what_others_promote_is_left_alone(&warm, feed).await;
}

/// A standby that somebody promoted by other means is a primary: nobody feeds it, and drctl neither stops nor starts it.
async fn what_others_promote_is_left_alone(warm: &Warm, feed: Background) {
    assert_eq!(warm.query("SELECT pg_promote()::int::bigint").await, 1);
    let told = feed.wait().await.code(5);
    assert!(told.stderr.contains("no standby any more"), "{told}");
    assert_eq!(warm.query("SELECT pg_is_in_recovery()::int::bigint").await, 0);
    let pid = fs::read_to_string(warm.directory.join("postmaster.pid")).unwrap();
    let pid: u32 = pid.lines().next().unwrap().parse().unwrap();
    warm.protected.drctl(["standby", "stop", "ledger"]).run().await.code(5);
    warm.start().wait().await.code(5);
    assert!(process::is_alive(pid));
    stop(&warm.directory, pid).await;
    warm.start().wait().await.code(5);
    assert!(!warm.directory.join("postmaster.pid").exists());

    // One that drctl promoted, and whose end it did not live to see, is tidied up behind and left alone as well.
    let record = warm.directory.join("drctl-standby.json");
    let noted = fs::read_to_string(&record).unwrap().replacen('{', "{\"promotion\": \"2026-01-01T00:00:00Z\",", 1);
    fs::write(&record, noted).unwrap();
    let told = warm.start().wait().await.code(5);
    assert!(told.stderr.contains("was promoted on 2026-01-01"), "{told}");
    assert!(!record.exists() && !warm.directory.join("postmaster.pid").exists());
    assert!(!fs::read_to_string(warm.directory.join("postgresql.auto.conf")).unwrap().contains("primary_conninfo"));
}
