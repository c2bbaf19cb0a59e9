//! A slot that fills the server's disk: production lives, and what that costs is known.

use std::time::Duration;

use drctl::jobs::wal::State;

use crate::support::dirs::{Scratch, give_to_postgres};
use crate::support::pg::Cluster;
use crate::support::process::eventually;
use crate::support::tmpfs::Tmpfs;
use crate::wal::{DIRECTORIES, Rig};

const SOON: Duration = Duration::from_secs(60);

/// A server whose `pg_wal` is a small file system of its own.
struct Cramped {
    cluster: Cluster,
    // Unmounted when the server has ended, before its directory goes.
    _disk: Tmpfs,
    _scratch: Scratch,
}

impl Cramped {
    async fn new(major: u32, mib: u32) -> Self {
        let cluster = Cluster::builder(major).wal_segsize(1).setting("autovacuum", "off");
        let cluster = cluster.setting("min_wal_size", "2MB").setting("max_wal_size", "8MB");
        let mut cluster = cluster.setting("wal_recycle", "off").start().await;
        cluster.stop().await;
        let scratch = Scratch::new();
        let disk = Tmpfs::mount(scratch.join("wal"), mib);
        let (place, link) = (disk.path().join("pg_wal"), cluster.data_dir().join("pg_wal"));
        std::fs::create_dir(&place).unwrap();
        copy(&link, &place);
        std::fs::remove_dir_all(&link).unwrap();
        std::os::unix::fs::symlink(&place, &link).unwrap();
        give_to_postgres(&place);
        cluster.start().await;
        Self { cluster, _disk: disk, _scratch: scratch }
    }

    async fn slots(&self) -> String {
        self.cluster.query("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'drctl_ledger'").await
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let place = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            std::fs::create_dir(&place).unwrap();
            copy(&entry, &place);
        } else {
            std::fs::copy(&entry, &place).unwrap();
        }
    }
}

#[tokio::test]
async fn a_slot_that_fills_the_disk_goes_before_production_stops_and_the_gap_is_known() {
    let server = Cramped::new(17, 192).await;
    let cluster = &server.cluster;
    cluster.pgbench_init(1).await;
    let more = "heartbeat = false\non_pressure = \"drop-slot\"\npressure_percent = 70\n";
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, more).await;
    std::fs::create_dir_all(rig.scratch.join("schedules")).unwrap();
    let base =
        "job = \"backup\"\ntarget = \"ledger\"\ncron = \"0 0 1 1 *\"\ncatch_up = \"none\"\nparams = { fast = true }\n";
    std::fs::write(rig.scratch.join("schedules/ledger-base.toml"), base).unwrap();
    let daemon = rig.drctl(&["daemon", "--only", "wal,backup"]).expect_log("outcome=").expect_log("region");
    let daemon = daemon.expect_log("fills the space for WAL").expect_log("the replication slot was dropped");
    let daemon = daemon.expect_log("replication slot is gone").expect_log("WAL is missing").expect_log("WAL has a gap");
    let daemon = daemon.expect_log("files do not fill the gap").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    cluster.execute("CREATE TABLE t AS SELECT 'before' AS text").await;
    rig.wait_durable(cluster.flush_lsn().await).await;

    // Every region is away, and people go on working.
    rig.take_away(&["a", "b", "c"]);
    let load = cluster.pgbench(2);
    let position = rig.wait("the slot is given up", SOON * 2, |position| position.state == State::GivenUp).await;
    assert!(position.last_error.unwrap().contains("on_pressure"));
    assert_eq!(server.slots().await, "0");
    let status = rig.drctl(&["status", "--json"]).expect_log("region").run().await.json();
    let problems = status["targets"][0]["problems"].to_string();
    assert!(problems.contains("the slot was dropped") && status["targets"][0]["violated"] == true, "{status:#}");
    let wal_mib = "SELECT sum(size) / 1048576 FROM pg_ls_waldir()";
    let roomy = async || cluster.query(wal_mib).await.parse::<f64>().unwrap() < 80.0;
    eventually("the server has room again", SOON, roomy).await;
    // While nobody takes WAL no slot keeps it, and no room is needed for it.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((server.slots().await.as_str(), roomy().await), ("0", true));
    drop(load);
    assert!(!cluster.log().contains("No space left"), "{}", cluster.log());

    rig.give_back(&["a", "b", "c"]);
    rig.wait("a gap", SOON, |position| position.state == State::Gap).await;
    assert_eq!(server.slots().await, "1");
    let backups = async || {
        let listed = rig.drctl(&["list", "ledger", "--json"]).run().await.ok().json();
        listed["backups"].as_array().unwrap().len()
    };
    eventually("a backup is taken without anybody asking", SOON, async || backups().await == 2).await;
    cluster.execute("INSERT INTO t VALUES ('behind')").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    daemon.terminate().await.ok();
    let status = rig.status().await;
    let [gap] = status.targets[0].branches[0].gaps.as_slice() else { panic!("{status:?}") };
    assert!(gap.reason.contains("on_pressure") && !gap.filled, "{gap:?}");
    let back = Cluster::start_restored(&rig.restored("back").await, 17).await;
    let (texts, sums) =
        ("SELECT string_agg(text, ' ' ORDER BY text) FROM t", "SELECT sum(abalance) FROM pgbench_accounts");
    assert_eq!(back.query(texts).await, "before behind");
    assert_eq!(back.query(sums).await, cluster.query(sums).await);
}

#[tokio::test]
async fn a_slot_is_kept_where_that_was_decided_and_where_dropping_it_would_gain_nothing() {
    let quiet = "heartbeat = false\npressure_percent = 50\n";
    for (policy, other) in [("keep", false), ("drop-slot", true)] {
        let server = Cramped::new(15, 64).await;
        let cluster = &server.cluster;
        let more = format!("on_pressure = \"{policy}\"\n{quiet}");
        let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, &more).await;
        let stream = rig.stream().expect_log("region").expect_log("fills the space for WAL");
        let stream = if other { stream.expect_log("another replication slot keeps the same WAL") } else { stream };
        let stream = stream.spawn();
        rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        cluster.execute("CREATE TABLE t (n int)").await;
        rig.wait_durable(cluster.flush_lsn().await).await;
        if other {
            cluster.execute("SELECT pg_create_physical_replication_slot('standby', true)").await;
        }
        rig.take_away(&["a", "b", "c"]);
        for n in 0..50 {
            cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
            cluster.switch_wal().await;
        }
        let full = |position: &drctl::jobs::wal::Position| {
            position.slot.as_ref().is_some_and(|slot| slot.disk_percent().is_some_and(|percent| percent >= 75))
        };
        rig.wait("three quarters", SOON, full).await;
        let status = rig.drctl(&["status", "--json"]).expect_log("region").run().await.json();
        assert!(status["targets"][0]["problems"].to_string().contains("% of the space for WAL"), "{status:#}");
        // Looked at again and again by now.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(server.slots().await, "1", "{policy}");
        rig.give_back(&["a", "b", "c"]);
        let flushed = cluster.flush_lsn().await;
        rig.wait_durable(flushed).await;
        let ended = stream.terminate().await.ok();
        assert_eq!(ended.stderr.contains("keeps the same WAL"), other, "{ended}");
        rig.assert_one_window(flushed).await;
    }
}
