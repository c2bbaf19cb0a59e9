//! Gaps: recorded, alarmed, filled where that is possible, and never crossed.

use std::collections::BTreeMap;

use drctl::jobs::wal::State;

use crate::archive::SOON;
use crate::support::drctl::Background;
use crate::support::pg::{Cluster, Until};
use crate::support::process::eventually;
use crate::wal::{DIRECTORIES, Rig, forget_wal};

/// A server that forgets its WAL soon.
async fn forgetful(major: u32) -> Cluster {
    let cluster = Cluster::builder(major).wal_segsize(1).setting("autovacuum", "off");
    cluster.setting("min_wal_size", "2MB").setting("max_wal_size", "4MB").start().await
}

impl Rig {
    async fn daemon(&self, expected: &[&str]) -> Background {
        let daemon = self.drctl(&["daemon", "--only", "wal,backup"]).expect_log("outcome=");
        let daemon = expected.iter().fold(daemon, |daemon, words| daemon.expect_log(words)).spawn();
        self.wait("WAL flows", SOON, |position| matches!(position.state, State::Streaming | State::Gap)).await;
        daemon
    }
}

#[tokio::test]
async fn a_gap_is_alarmed_and_never_crossed_and_a_base_backup_is_taken_behind_it() {
    let cluster = forgetful(17).await;
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    std::fs::create_dir_all(rig.scratch.join("schedules")).unwrap();
    let base =
        "job = \"backup\"\ntarget = \"ledger\"\ncron = \"0 0 1 1 *\"\ncatch_up = \"none\"\nparams = { fast = true }\n";
    std::fs::write(rig.scratch.join("schedules/ledger-base.toml"), base).unwrap();
    let daemon = rig.daemon(&[]).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    cluster.execute("CREATE TABLE t AS SELECT 'before' AS text").await;
    let before = cluster.flush_lsn().await;
    rig.wait_durable(before).await;
    daemon.terminate().await.ok();

    // While drctl is down its slot is dropped, and the WAL goes.
    cluster.execute("SELECT pg_drop_replication_slot('drctl_ledger')").await;
    cluster.execute("INSERT INTO t VALUES ('lost')").await;
    cluster.switch_wal().await;
    let inside = cluster.flush_lsn().await;
    forget_wal(&cluster).await;
    let expected =
        ["replication slot is gone", "WAL is missing", "a base backup is taken now", "directory does not hold"];
    let daemon = rig.daemon(&expected).await;
    let position = rig.wait("a gap", SOON, |position| position.state == State::Gap).await;
    assert!(position.last_error.unwrap().contains("gap from"));
    let backups = async || {
        let listed = rig.drctl(&["list", "ledger", "--json"]).run().await.ok().json();
        listed["backups"].as_array().unwrap().len()
    };
    eventually("a backup is taken without anybody asking", SOON, async || backups().await == 2).await;
    cluster.execute("INSERT INTO t VALUES ('behind')").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    daemon.terminate().await.ok();

    // Neither into the gap nor across it, and what remains is said.
    let status = rig.status().await;
    let [gap] = status.targets[0].branches[0].gaps.as_slice() else { panic!("{status:?}") };
    assert!(gap.from < inside && inside < gap.to && !gap.filled, "{gap:?}");
    let directory = rig.scratch.join("never").display().to_string();
    for into in [inside, gap.to] {
        let at = into.to_string();
        let words = ["restore", "ledger", "--target-dir", &directory, "--to-lsn", &at];
        let refused = rig.drctl(&words).run().await.code(5);
        let windows: Vec<_> = status.targets[0].branches[0].regions[0].recoverable.clone();
        assert_eq!(windows.len(), 2, "{windows:?}");
        for window in windows {
            assert!(refused.stderr.contains(&format!("{} to {}", window.from, window.to)), "{window:?}: {refused}");
        }
    }
    // One line per region, and the hole is seen.
    let text = rig.drctl(&["wal", "status"]).run().await.ok().stdout;
    for region in ["a", "b", "c"] {
        let lines: Vec<_> = text.lines().filter(|line| line.trim_start().starts_with(&format!("{region}  "))).collect();
        assert!(lines.len() == 1 && lines[0].contains("2 windows"), "{text}");
        assert!(lines[0].contains('█') && lines[0].contains('·') && lines[0].chars().count() <= 110, "{text}");
    }
    let status = rig.drctl(&["status", "--json"]).run().await.json();
    assert_eq!(status["targets"][0]["gaps"], serde_json::json!([]), "a backup begins behind it: {status:#}");

    let back = rig.restored("back").await;
    let back = Cluster::try_start_restored(&back, 17, &[], Until::Promoted).await.unwrap();
    assert_eq!(back.query("SELECT string_agg(text, ' ' ORDER BY text) FROM t").await, "before behind lost");
}

#[tokio::test]
async fn files_that_the_server_does_not_stream_any_more_fill_a_gap() {
    let cluster = forgetful(16).await;
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    cluster.execute("CREATE TABLE t (n int)").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    stream.terminate().await.ok();
    cluster.execute("SELECT pg_drop_replication_slot('drctl_ledger')").await;

    // Somebody saves what the server removes.
    let directory = cluster.data_dir().join("pg_wal");
    let mut saved = BTreeMap::new();
    for n in 0..8 {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        cluster.switch_wal().await;
        for entry in std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_file() {
                saved.insert(entry.file_name().unwrap().to_owned(), std::fs::read(&entry).unwrap());
            }
        }
        cluster.execute("CHECKPOINT").await;
    }
    let current = cluster.query("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let mut put_back = 0;
    for (name, bytes) in saved.iter().filter(|(name, _)| *name.to_string_lossy() < *current) {
        let path = directory.join(name);
        if !path.exists() {
            std::fs::write(&path, bytes).unwrap();
            crate::support::dirs::give_to_postgres(&path);
            put_back += 1;
        }
    }
    assert!(put_back > 2, "the server still has what was streamed");
    let stream = rig.stream().expect_log("replication slot is gone").expect_log("files were read of WAL").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("INSERT INTO t VALUES (100)").await;
    let flushed = cluster.flush_lsn().await;
    rig.wait_durable(flushed).await;
    stream.terminate().await.ok();
    rig.assert_one_window(flushed).await;
    let back = rig.restored("back").await;
    let back = Cluster::try_start_restored(&back, 16, &[], Until::Promoted).await.unwrap();
    assert_eq!(back.query("SELECT count(*) FROM t").await, "9");
}
