//! Long waits, in which nothing may happen but what was promised. They cost no processor, and run beside everything else.

use std::time::{Duration, Instant};

use drctl::jobs::wal::{Position, State};
use drctl::model::Lsn;

use crate::archive::SOON;
use crate::lies::Doubtful;
use crate::support::http;
use crate::support::http_proxy::Deed;
use crate::support::pg::Cluster;
use crate::support::process::{eventually, free_ports};
use crate::support::proxy::{Mode, TcpProxy};
use crate::support::s3::Endpoint;
use crate::wal::{DIRECTORIES, Rig};

const OUTAGE: Duration = Duration::from_secs(60);
const IDLE: Duration = Duration::from_secs(180);

/// What the server says of whoever takes its WAL: its process, what it was told to be durable, what the slot keeps, and
/// for how long it has heard nothing.
async fn heard(cluster: &Cluster) -> (String, Lsn, Lsn, f64) {
    let sql = "SELECT pid, flush_lsn, (SELECT restart_lsn FROM pg_replication_slots),
                      extract(epoch FROM clock_timestamp() - reply_time) FROM pg_stat_replication";
    let row = cluster.query(sql).await;
    let [pid, flushed, kept, silence] = row.split('|').collect::<Vec<_>>()[..] else { panic!("nobody streams: {row}") };
    (pid.to_owned(), flushed.parse().unwrap(), kept.parse().unwrap(), silence.parse().unwrap())
}

#[tokio::test]
async fn a_minute_without_any_region_freezes_what_is_acknowledged_and_nothing_else() {
    let cluster = Cluster::builder(15).setting("autovacuum", "off").setting("wal_keep_size", "1GB");
    let cluster = cluster.setting("wal_sender_timeout", "15s").start().await;
    cluster.execute("CREATE TABLE t (n serial)").await;
    let regions = [
        Doubtful::new("a", &Endpoint::localstack_a(), "10s").await,
        Doubtful::new("b", &Endpoint::localstack_b(), "10s").await,
    ];
    let tables = regions.each_ref().map(|region| region.table.as_str()).concat();
    let rig = Rig::with_more(&cluster.conninfo(), &tables, "heartbeat = false\n").await;
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    let (sender, ..) = heard(&cluster).await;

    regions.iter().for_each(|region| region.proxy.set("*", "", Deed::Refuse(503)));
    cluster.execute("INSERT INTO t DEFAULT VALUES").await;
    let held = rig.wait("waiting", SOON, |position| position.state == State::WaitingForRegions).await.durable_lsn;
    let begun = Instant::now();
    let mut exposed = 0.0;
    while begun.elapsed() < OUTAGE {
        cluster.execute("INSERT INTO t DEFAULT VALUES").await;
        let (pid, flushed, kept, silence) = heard(&cluster).await;
        assert_eq!(pid, sender, "the server gave the connection up");
        assert!(silence < 10.0, "{silence} s without a status");
        assert!(flushed <= held && kept <= held, "told {flushed}, kept from {kept}, durable {held}");
        let position = rig.position().await.unwrap();
        assert!(position.durable_lsn == held && position.received_lsn > held, "{position:?}");
        let seconds = position.exposure_seconds.unwrap();
        assert!(seconds >= exposed, "{position:?}");
        exposed = seconds;
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    assert!(exposed > OUTAGE.as_secs_f64() - 10.0, "{exposed} s");
    assert!(regions.iter().all(|region| region.proxy.hits("PUT", "/wal/") > 1));

    regions.iter().for_each(|region| region.proxy.heal());
    let flushed = cluster.flush_lsn().await;
    rig.wait("catching up", OUTAGE, |position| position.reaches(flushed)).await;
    assert_eq!(heard(&cluster).await.0, sender);
    assert!(!cluster.log().contains("replication timeout"), "{}", cluster.log());
    let ended = stream.terminate().await;
    assert!(matches!(ended.code, Some(0 | 4)), "{ended}");
    let windows = rig.windows().await;
    let whole = windows.iter().filter(|(_, windows)| windows.len() == 1 && windows[0].1 >= flushed).count();
    assert_eq!(whole, 2, "{windows:?}");
    assert!(rig.assert_equals_pg_wal(&cluster).await > 0);
}

/// Seconds of exposure of each region, as the daemon's metrics tell them; a region of which they are unknown is left out.
async fn exposures(port: u16) -> Vec<f64> {
    let (status, page) = http::get(port, "/metrics").await.unwrap();
    assert_eq!(status, 200, "{page}");
    let lines = page.lines().filter(|line| line.starts_with("drctl_rpo_exposure_seconds{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn after_long_silence_one_commit_comes_back_and_the_exposure_was_known_all_the_time() {
    let mut cluster = Cluster::builder(18).start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let (server, port) = (TcpProxy::before(cluster.port()).await, free_ports(1));
    let more = format!("rpo = \"10s\"\n[daemon]\nlisten = \"127.0.0.1:{port}\"\n");
    let rig = Rig::with_more(&cluster.tcp_conninfo(server.port()), DIRECTORIES, &more).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    // The backup's own receiver leaves no slot behind.
    let daemon = rig.drctl(&["daemon", "--only", "wal"]).expect_log("outcome=").expect_log("replication slot is gone");
    let daemon = daemon.expect_log("no heartbeat").expect_log("slot").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    eventually("metrics tell the exposure", SOON, async || exposures(port).await == [0.0; 3]).await;

    let (begun, objects) = (Instant::now(), rig.objects("a"));
    while begun.elapsed() < IDLE {
        let told = exposures(port).await;
        // The server answers every second; a sample that is older than ten says nothing, and then nothing is said.
        assert!(told.len() == 3 && told.iter().all(|seconds| *seconds < 10.0), "{told:?} after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let put = rig.objects("a") - objects;
    assert!(put < 12, "{put} objects in {IDLE:?} of idleness");

    // Nobody hears the server any more: what is exposed is unknown, and never 0.
    server.set(Mode::Hang).await;
    eventually("nothing is known", SOON, async || exposures(port).await.is_empty()).await;
    let status = rig.drctl(&["status", "--json"]).expect_log("slot").run().await.json();
    let region = &status["targets"][0]["regions"][0];
    assert!(region["exposure_seconds"].is_null() && region["unknown_since"].is_string(), "{status:#}");
    server.set(Mode::Pass).await;
    eventually("it is known again", SOON, async || exposures(port).await.len() == 3).await;

    cluster.execute("INSERT INTO t VALUES (1)").await;
    rig.wait("the commit is durable", Duration::from_secs(10), {
        let committed = cluster.flush_lsn().await;
        move |position| position.reaches(committed)
    })
    .await;
    cluster.kill9().await;
    std::fs::remove_dir_all(cluster.data_dir()).unwrap();
    daemon.kill9();
    let back = Cluster::start_restored(&rig.restored("back").await, 18).await;
    assert_eq!(back.query("SELECT n FROM t").await, "1");
}

/// How long a commit takes.
async fn commit(cluster: &Cluster) -> Duration {
    let begun = Instant::now();
    cluster.execute("INSERT INTO t DEFAULT VALUES").await;
    begun.elapsed()
}

#[tokio::test]
async fn commits_wait_for_slow_regions_or_go_on_as_it_was_decided() {
    const LATENCY: Duration = Duration::from_secs(5);
    let cluster = Cluster::builder(14).setting("autovacuum", "off").start().await;
    cluster.execute("CREATE TABLE t (n serial)").await;
    let regions = [
        Doubtful::new("b", &Endpoint::localstack_a(), "30s").await,
        Doubtful::new("c", &Endpoint::localstack_b(), "30s").await,
    ];
    let tables = regions.each_ref().map(|region| region.table.as_str()).concat();
    let tables = format!("[regions.a]\nurl = \"a\"\n{tables}");
    let rig = Rig::with_more(&cluster.conninfo(), &tables, "sync = true\nheartbeat = false\n").await;
    let crawl = |slow: bool| {
        for region in &regions {
            if slow { region.proxy.set("PUT", "/wal/", Deed::Delay(LATENCY)) } else { region.proxy.heal() }
        }
    };
    let streaming = async |position: State| {
        rig.wait("streaming", SOON, |it| it.state == position).await;
        eventually("the server waits for it", SOON, async || {
            cluster.query("SELECT string_agg(sync_state, ',') FROM pg_stat_replication").await == "sync"
        })
        .await;
    };
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (\"drctl wal ledger\")'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    streaming(State::Streaming).await;
    assert!(commit(&cluster).await < LATENCY);

    // It waits as long as it takes, and is told only what the quorum holds.
    crawl(true);
    for _ in 0..2 {
        let waited = commit(&cluster).await;
        assert!(waited >= LATENCY && waited < LATENCY * 3, "{waited:?}");
        let position = rig.position().await.unwrap();
        assert!(position.degraded_to.is_none() && position.reaches(cluster.flush_lsn().await), "{position:?}");
    }
    crawl(false);
    let ended = stream.terminate().await;
    assert!(matches!(ended.code, Some(0 | 4)) && !ended.stderr.contains("write quorum is lowered"), "{ended}");

    // With leave to go on after two seconds it waits for these alone.
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let leave = "min_wraps = 1\ndegrade = { to = 1, after = \"2s\" }\n";
    std::fs::write(&rig.config, text.replacen("min_wraps = 1\n", leave, 1)).unwrap();
    let stream = rig.stream().expect_log("region").expect_log("write quorum").spawn();
    streaming(State::Streaming).await;
    crawl(true);
    let waited = commit(&cluster).await;
    assert!(waited >= Duration::from_millis(1800) && waited < LATENCY, "{waited:?}");
    assert_eq!(
        rig.wait("lowered", SOON, |position: &Position| position.degraded_to.is_some()).await.degraded_to,
        Some(1)
    );
    crawl(false);
    let ended = stream.terminate().await.code(4);
    assert!(ended.stderr.contains("the write quorum is lowered"), "{ended}");

    // What waits for a replay would wait for ever.
    cluster.execute("ALTER SYSTEM SET synchronous_commit = remote_apply").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let report = rig.drctl(&["check", "ledger", "--json"]).run().await.code(1).json();
    let failed = report["checks"].as_array().unwrap().iter().filter(|check| check["level"] == "fail");
    assert!(failed.into_iter().any(|check| check["what"].as_str().unwrap().contains("remote_apply")), "{report:#}");
}
