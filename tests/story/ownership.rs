//! One owner of a target's WAL at a time, whoever sleeps and wakes; and records that no frame can hold.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drctl::jobs::wal::{Position, State, control};
use drctl::model::{Error, Lsn, SegmentName, WalSegmentSize};
use drctl::repository::survey::scrub;
use drctl::repository::wal::index::branches;
use drctl::repository::wal::reader::BranchLog;
use rustix::process::Signal;

use crate::archive::{archiving, fill_segment};
use crate::support::drctl::Drctl;
use crate::support::ledger::Ledger;
use crate::support::pg::{Builder, Cluster};
use crate::support::process;
use crate::wal::{DIRECTORIES, Rig};

const SOON: Duration = Duration::from_secs(20);

/// Another host: the same regions and server, a state directory of its own.
struct Elsewhere {
    config: PathBuf,
    socket: PathBuf,
}

impl Elsewhere {
    fn of(rig: &Rig) -> Self {
        let config = rig.scratch.join("elsewhere.toml");
        let text = std::fs::read_to_string(&rig.config).unwrap();
        std::fs::write(&config, text.replace("state_dir = \"state\"", "state_dir = \"elsewhere\"")).unwrap();
        Self { config, socket: rig.scratch.join("elsewhere/ledger.sock") }
    }

    fn stream(&self) -> Drctl {
        Drctl::new(["wal", "stream", "ledger"]).config(&self.config).expect_log("config file overridden")
    }

    async fn wait(&self, what: &str, reached: impl Fn(&Position) -> bool) -> Position {
        let deadline = Instant::now() + SOON;
        loop {
            let position = control::position(&self.socket, &"ledger".parse().unwrap()).await.unwrap();
            match position {
                Some(position) if reached(&position) => return position,
                last => assert!(Instant::now() < deadline, "{what}: not within {SOON:?}: {last:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn quiet(major: u32) -> Builder {
    Cluster::builder(major).setting("autovacuum", "off").setting("wal_keep_size", "2GB")
}

#[tokio::test]
async fn a_receiver_that_slept_is_sealed_out_and_loses_nothing() {
    let cluster = quiet(17).setting("wal_sender_timeout", "3s").start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let other = Elsewhere::of(&rig);
    let ledger = Ledger::start(&cluster, 2).await;
    let first = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    // A second one stands by: it seals nobody as long as the slot is in use.
    let second = other.stream().expect_log("region").spawn();
    other.wait("standing by", |position| position.last_error.as_ref().is_some_and(|why| why.contains("in use"))).await;
    ledger.wait_for(50).await;
    let held = rig.wait_durable(cluster.flush_lsn().await).await.durable_lsn;

    // Frames are on their way, in one region each, when the first falls asleep.
    rig.take_away(&["b", "c"]);
    let before = rig.objects("a");
    process::eventually("frames are on their way", SOON, async || rig.objects("a") > before).await;
    ledger.wait_for(100).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    process::signal(first.pid(), Signal::STOP);
    rig.give_back(&["b", "c"]);
    let position = other.wait("the second streams", |position| position.state == State::Streaming).await;
    assert!(position.start_lsn.unwrap() > held, "it goes on behind the frames that it adopted: {position:?}");
    ledger.wait_for(50).await;

    process::signal(first.pid(), Signal::CONT);
    let finished = first.wait().await.code(5);
    assert!(finished.stderr.contains("the WAL of ledger was taken over by another writer"), "{finished}");
    assert!(finished.stderr.contains("one receiver per target"), "{finished}");
    ledger.wait_for(20).await;
    ledger.stop().await;
    let flushed = cluster.flush_lsn().await;
    other.wait("everything is durable", |position| position.reaches(flushed)).await;
    second.terminate().await.ok();
    rig.assert_one_window(flushed).await;
    assert!(rig.assert_equals_pg_wal(&cluster).await > 10_000);
    // Started again, the first one goes on where the second ended.
    let first = rig.stream().spawn();
    let position = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    assert!(position.start_lsn.unwrap() >= flushed, "{position:?}");
    cluster.execute("CREATE TABLE after (n int)").await;
    let flushed = cluster.flush_lsn().await;
    rig.wait_durable(flushed).await;
    first.terminate().await.ok();
    rig.assert_one_window(flushed).await;
}

#[tokio::test]
async fn what_an_absent_region_may_hold_is_given_up_only_by_word() {
    let cluster = quiet(15).start().await;
    let regions = format!("degrade = {{ to = 1, after = \"1h\" }}\n{DIRECTORIES}");
    let rig = Rig::with_regions(&cluster.conninfo(), &regions).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    stream.kill9();
    // One region alone may have been enough for an acknowledgement.
    let (region, away) = (rig.scratch.join("c"), rig.scratch.join("c.away"));
    std::fs::rename(&region, &away).unwrap();
    let refused = rig.drctl(&["wal", "takeover", "ledger"]).expect_log("region").run().await.code(1);
    assert!(refused.stderr.contains("needs 3 of 3 regions"), "{refused}");
    let takeover = ["wal", "takeover", "ledger", "--accept-loss", "--json"];
    let taken = rig.drctl(&takeover).expect_log("region").expect_log("given up").run().await.ok().json();
    assert_eq!((&taken["sealed"], &taken["given_up"]), (&1.into(), &serde_json::json!(["c"])), "{taken}");
    let stream = rig.stream().expect_log("region").expect_log("given up").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("CREATE TABLE after (n int)").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    let finished = stream.terminate().await;
    assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
    std::fs::rename(&away, &region).unwrap();
}

/// Its digest stands in the book of whoever streamed it, and no region has a byte of it any more.
#[tokio::test]
async fn archive_command_is_not_told_that_wal_is_stored_which_went_with_its_only_region() {
    let (cluster, rig) = archiving(17, true).await;
    cluster.execute("ALTER SYSTEM SET archive_command = 'false'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let degraded = "min_wraps = 1\ndegrade = { to = 1, after = \"500ms\" }\n";
    std::fs::write(&rig.config, text.replace("min_wraps = 1\n", degraded)).unwrap();
    let stream = rig.stream().expect_log("region").expect_log("the write quorum is lowered").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    fill_segment(&cluster).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    let there = |region| rig.scratch.join(region).join("wal").exists();
    process::eventually("every region takes WAL", SOON, async || there("b") && there("c")).await;
    rig.take_away(&["b", "c"]);
    let segment = fill_segment(&cluster).await;
    cluster.execute("INSERT INTO t (text) VALUES ('in the next one')").await;
    let position = rig.wait_durable(cluster.flush_lsn().await).await;
    assert_eq!(position.degraded_to, Some(1), "{position:?}");
    stream.kill9();
    rig.give_back(&["b", "c"]);
    std::fs::rename(rig.scratch.join("a"), rig.scratch.join("a.lost")).unwrap();

    let text = std::fs::read_to_string(&rig.config).unwrap();
    std::fs::write(&rig.config, text.replace("stream = true", "stream = false")).unwrap();
    let serve = rig.stream().expect_log("region").spawn();
    rig.wait("somebody takes WAL", SOON, |position| position.state == State::Archiving).await;
    let path = cluster.data_dir().join("pg_wal").join(&segment);
    rig.push(&path).await.ok();
    let size = WalSegmentSize::try_from(1 << 20).unwrap();
    let start = SegmentName::parse(&segment, size).unwrap().start(size);
    let stored = rig.stored_wal(&cluster, (start, Lsn(start.0 + size.bytes()))).await;
    assert!(stored == std::fs::read(&path).unwrap(), "PostgreSQL may remove it now");
    // Now it is known, and stored once.
    let before = rig.objects("b");
    rig.push(&path).await.ok();
    assert_eq!((rig.objects("b"), rig.position().await.unwrap().pushes.known), (before, 1));
    let finished = serve.terminate().await;
    assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
}

/// One record of 40 MiB: three frames, none of which but the last ends with a record.
#[tokio::test]
async fn a_record_larger_than_a_frame_is_cut_and_comes_back_whole() {
    let cluster = quiet(16).start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    let before = rig.wait_durable(cluster.flush_lsn().await).await.durable_lsn;
    cluster.execute("SELECT pg_logical_emit_message(false, 'giant', repeat('x', 40 * 1024 * 1024))").await;
    cluster.execute("CREATE TABLE behind (n int)").await;
    let flushed = cluster.flush_lsn().await;
    assert!(flushed.0 - before.0 > 40 << 20);
    rig.wait_durable(flushed).await;
    stream.kill9();
    rig.assert_one_window(flushed).await;
    assert_eq!(rig.stored_wal(&cluster, (before, flushed)).await, rig.server_wal(&cluster, (before, flushed)));
    lose_a_name_to_a_seal(&rig, &cluster, (before, flushed)).await;
}

/// The last frame of a receiver that died wins two regions, and the SEAL of its successor the third: that one cannot be
/// read across the place until it is repaired, and says so.
async fn lose_a_name_to_a_seal(rig: &Rig, cluster: &Cluster, range: (Lsn, Lsn)) {
    let frame = last_frame(&rig.scratch.join("a/wal"));
    let name = frame.strip_prefix(rig.scratch.join("a")).unwrap();
    let of = |region: &str| rig.scratch.join(region).join(name);
    let bytes = std::fs::read(&frame).unwrap();
    let take_over = async || rig.drctl(&["wal", "takeover", "ledger", "--json"]).run().await.ok().json();
    ["a", "b", "c"].iter().for_each(|region| std::fs::remove_file(of(region)).unwrap());
    assert_eq!(take_over().await["sealed"], 1);
    ["b", "c"].iter().for_each(|region| std::fs::remove_file(of(region)).unwrap());
    std::fs::write(of("b"), &bytes).unwrap();
    let taken = take_over().await;
    assert_eq!((&taken["sealed"], &taken["adopted"]), (&1.into(), &1.into()), "{taken}");
    let seal = std::fs::read(&frame).unwrap();
    assert!(seal != bytes && std::fs::read(of("c")).unwrap() == bytes);

    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    stream.terminate().await.ok();
    let windows = async || rig.windows().await.iter().map(|(_, windows)| windows.len()).collect::<Vec<_>>();
    assert_eq!(windows().await, [2, 1, 1]);
    let text = rig.drctl(&["wal", "status", "ledger"]).run().await.ok().stdout;
    assert!(text.contains("a  owes 1 frames  →  drctl repair"), "{text}");
    let told = rig.drctl(&["verify", "ledger"]).run().await.code(4).stdout;
    assert!(told.contains("a SEAL has the name of this WAL frame"), "{told}");
    assert!(rig.wal_of("a", cluster, range).await.is_err());

    rig.drctl(&["repair"]).run().await.ok();
    assert_eq!(windows().await, [1, 1, 1]);
    assert!(rig.status().await.is_whole());
    rig.drctl(&["verify", "ledger", "--scrub"]).run().await.ok();
    assert_eq!(rig.wal_of("a", cluster, range).await.unwrap(), rig.server_wal(cluster, range));
    assert_eq!(std::fs::read(&frame).unwrap(), seal, "nothing is overwritten");
}

/// The last object of the only epoch.
fn last_frame(directory: &Path) -> PathBuf {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let last = entries.max().unwrap();
    if last.is_dir() { last_frame(&last) } else { last }
}

impl Rig {
    /// What one region alone gives of timeline 1.
    async fn wal_of(&self, region: &str, cluster: &Cluster, range: (Lsn, Lsn)) -> Result<Vec<u8>, Error> {
        let context = self.context().await;
        let alone = scrub::alone(&context.repository, &region.parse().unwrap()).unwrap();
        let system = cluster.query("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let branch = branches(&alone.regions, system).await.unwrap().remove(0);
        let (log, mut wal) = (BranchLog::load(&alone, branch).await, Vec::new());
        let mut sink = |_, bytes: &[u8]| {
            wal.extend_from_slice(bytes);
            Ok(ControlFlow::Continue(()))
        };
        log.read(&alone, &context.ring.within(alone.regions.clone()), range, &mut sink).await?;
        Ok(wal)
    }
}
