//! Commits that wait for the regions, and what becomes of them when regions are away.

use std::time::{Duration, Instant};

use drctl::jobs::wal::{Position, State};
use drctl::repository::wal::frame::Frame;
use drctl::repository::wal::index::{WalIndex, branches};

use crate::support::pg::Cluster;
use crate::support::process;
use crate::wal::{DIRECTORIES, Rig};

const SOON: Duration = Duration::from_secs(20);

/// Begins a commit; it ends when the server says so.
async fn commit(cluster: &Cluster, n: u32) -> tokio::task::JoinHandle<Duration> {
    let client = cluster.client().await;
    tokio::spawn(async move {
        let begun = Instant::now();
        client.batch_execute(&format!("INSERT INTO t VALUES ({n})")).await.unwrap();
        begun.elapsed()
    })
}

async fn streams(rig: &Rig, cluster: &Cluster) -> Position {
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    process::eventually("the server waits for it", SOON, async || {
        cluster.query("SELECT string_agg(sync_state, ',') FROM pg_stat_replication").await == "sync"
    })
    .await;
    rig.position().await.unwrap()
}

/// The quorums that frames were written with.
async fn quorums(rig: &Rig, cluster: &Cluster) -> std::collections::BTreeSet<u8> {
    let context = rig.context().await;
    let system = cluster.query("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
    let mut quorums = std::collections::BTreeSet::new();
    for branch in branches(&context.repository.regions, system).await.unwrap() {
        let index = WalIndex::load(&context.repository.regions, branch).await;
        for (place, _) in index.frames() {
            let check = |bytes| Frame::decode(&bytes, &context.repository.id, &place, &context.repository.trust);
            let (frame, _) = context.repository.regions.read(&place.key(), None, check).await.unwrap();
            quorums.insert(frame.header.quorum);
        }
    }
    quorums
}

#[tokio::test]
async fn a_synchronous_commit_waits_for_the_quorum_or_for_the_word_to_go_on_without() {
    let names = "'FIRST 1 (\"drctl wal ledger\")'";
    let cluster = Cluster::builder(16).setting("autovacuum", "off").start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "sync = true\n").await;
    let report = rig.drctl(&["check", "ledger", "--json"]).run().await.code(1);
    assert!(report.stdout.contains("no commit waits"), "{report}");
    cluster.execute(&format!("ALTER SYSTEM SET synchronous_standby_names = {names}")).await;
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("SELECT pg_reload_conf()").await;
    streams(&rig, &cluster).await;
    let mut slowest = Duration::ZERO;
    for n in 0..10 {
        slowest = slowest.max(commit(&cluster, n).await.await.unwrap());
    }
    assert!(slowest < Duration::from_millis(900), "a commit took {slowest:?}: none waits for an interval");

    rig.take_away(&["b", "c"]);
    let waiting = commit(&cluster, 10).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!waiting.is_finished(), "it returned though one region alone holds it");
    rig.give_back(&["b", "c"]);
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it goes on").unwrap();
    assert!(waited >= Duration::from_secs(3), "{waited:?}");
    let finished = stream.terminate().await;
    assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
    assert_eq!(quorums(&rig, &cluster).await, [2].into());

    // The same outage with leave to go on after three seconds.
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let degrade = "min_wraps = 1\ndegrade = { to = 1, after = \"3s\" }\n";
    std::fs::write(&rig.config, text.replacen("min_wraps = 1\n", degrade, 1)).unwrap();
    let stream = rig.stream().expect_log("region").expect_log("write quorum").spawn();
    streams(&rig, &cluster).await;
    rig.take_away(&["b", "c"]);
    let waited = tokio::time::timeout(Duration::from_secs(20), commit(&cluster, 11).await).await.unwrap().unwrap();
    assert!(waited >= Duration::from_millis(2800), "{waited:?}");
    let position = rig.position().await.unwrap();
    assert_eq!(position.degraded_to, Some(1));
    let quickly = commit(&cluster, 12).await.await.unwrap();
    assert!(quickly < Duration::from_secs(2), "{quickly:?}: only the first one waits for the others");
    rig.give_back(&["b", "c"]);
    let deadline = Instant::now() + SOON;
    for n in 13.. {
        commit(&cluster, n).await.await.unwrap();
        if rig.position().await.unwrap().degraded_to.is_none() {
            break;
        }
        assert!(Instant::now() < deadline, "the full quorum is not used again");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let finished = stream.terminate().await.code(4);
    for words in ["the write quorum is lowered", "the write quorum is the full one again"] {
        assert!(finished.stderr.contains(words), "{finished}");
    }
    assert_eq!(quorums(&rig, &cluster).await, [1, 2].into());
    assert!(cluster.query("SELECT count(*) FROM t").await.parse::<u32>().unwrap() >= 13);
}
