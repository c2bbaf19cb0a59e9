//! WAL into several regions: nothing acknowledged is lost, nothing is skipped in silence.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drctl::app::{self, Role, World};
use drctl::config;
use drctl::jobs::Context;
use drctl::jobs::wal::{Position, State, WalStatus, control, wal_status};
use drctl::keys::generate_identity;
use drctl::model::{Lsn, SegmentName, Timeline, WalSegmentSize};
use drctl::repository::wal::frame::{Frame, FrameKind};
use drctl::repository::wal::index::{WalIndex, branches};
use drctl::repository::wal::reader::BranchLog;

use crate::support::dirs::Scratch;
use crate::support::drctl::{Background, Drctl};
use crate::support::ledger::Ledger;
use crate::support::pg::{Builder, Cluster, Until};
use crate::support::process;
use crate::support::proxy::Mode;
use crate::support::s3::Endpoint;

const SOON: Duration = Duration::from_secs(20);

/// Three regions.
pub const DIRECTORIES: &str = "[regions.a]\nurl = \"a\"\n[regions.b]\nurl = \"b\"\n[regions.c]\nurl = \"c\"\n";

/// A repository of one target, `ledger`.
pub struct Rig {
    pub scratch: Scratch,
    pub config: PathBuf,
    /// Where its WAL is asked about.
    pub socket: PathBuf,
}

impl Rig {
    /// Three directories, quorum two.
    pub async fn new(conninfo: &str) -> Self {
        Self::with_regions(conninfo, DIRECTORIES).await
    }

    pub async fn with_regions(conninfo: &str, regions: &str) -> Self {
        Self::with_more(conninfo, regions, "").await
    }

    /// The same with further lines, of the target first.
    pub async fn with_more(conninfo: &str, regions: &str, more: &str) -> Self {
        let scratch = Scratch::new();
        let (identity, recipient) = generate_identity(chrono::DateTime::default());
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(scratch.join("recovery.age")).unwrap();
        file.write_all(identity.as_bytes()).unwrap();
        let config = scratch.join("drctl.toml");
        let text = format!(
            "[repository]\nstate_dir = \"state\"\nmin_wraps = 1\n{regions}[keys.recovery]\nage = \"{recipient}\"\nidentity = \
             \"file:recovery.age\"\n[targets.ledger]\nsource = \"postgres\"\nconninfo = \"{conninfo}\"\n{more}"
        );
        std::fs::write(&config, text).unwrap();
        let socket = scratch.join("state/ledger.sock");
        let rig = Self { scratch, config, socket };
        rig.drctl(&["init"]).run().await.ok();
        rig
    }

    pub fn drctl(&self, arguments: &[&str]) -> Drctl {
        Drctl::new(arguments).config(&self.config).expect_log("config file overridden")
    }

    pub fn stream(&self) -> Drctl {
        self.drctl(&["wal", "stream", "ledger"])
    }

    pub async fn position(&self) -> Option<Position> {
        control::position(&self.socket, &"ledger".parse().unwrap()).await.unwrap()
    }

    pub async fn wait(&self, what: &str, limit: Duration, reached: impl Fn(&Position) -> bool) -> Position {
        let deadline = Instant::now() + limit;
        loop {
            let position = self.position().await;
            match position {
                Some(position) if reached(&position) => return position,
                last => assert!(Instant::now() < deadline, "{what}: not within {limit:?}: {last:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn wait_durable(&self, lsn: Lsn) -> Position {
        self.wait(&format!("durable up to {lsn}"), SOON, |position| position.reaches(lsn)).await
    }

    pub async fn context(&self) -> Context {
        app::context(&config::load(&self.config).unwrap(), Role::Restore, &World::real()).await.unwrap()
    }

    pub async fn status(&self) -> WalStatus {
        wal_status(&self.context().await, Some(&"ledger".parse().unwrap())).await.unwrap()
    }

    /// Every window of every region, by timeline.
    pub async fn windows(&self) -> Vec<(Timeline, Vec<(Lsn, Lsn)>)> {
        let status = self.status().await;
        let branches = status.targets.iter().flat_map(|target| &target.branches);
        let windows = branches.flat_map(|branch| {
            assert!(branch.errors.is_empty(), "{:?}", branch.errors);
            branch.regions.iter().map(|region| {
                (branch.timeline, region.windows.iter().map(|window| (window.start, window.end)).collect::<Vec<_>>())
            })
        });
        windows.collect()
    }

    /// One window per region that reaches `lsn`, and no gap.
    pub async fn assert_one_window(&self, lsn: Lsn) {
        let windows = self.windows().await;
        assert_eq!(windows.len(), 3, "{windows:?}");
        for (_, windows) in windows {
            assert_eq!(windows.len(), 1, "{windows:?}");
            assert!(windows[0].1 >= lsn, "{windows:?} does not reach {lsn}");
        }
        assert!(self.status().await.is_whole());
    }

    /// Regions go away for WAL: what was a directory is a file, in one step, so that nobody makes a new directory between.
    pub fn take_away(&self, regions: &[&str]) {
        for region in regions {
            let wal = self.scratch.join(&format!("{region}/wal"));
            std::fs::write(wal.with_extension("away"), "").unwrap();
            exchange(&wal, &wal.with_extension("away"));
        }
    }

    pub fn give_back(&self, regions: &[&str]) {
        for region in regions {
            let wal = self.scratch.join(&format!("{region}/wal"));
            exchange(&wal, &wal.with_extension("away"));
            std::fs::remove_file(wal.with_extension("away")).unwrap();
        }
    }

    /// How many objects a directory region has. What is still being written is none.
    pub fn objects(&self, region: &str) -> usize {
        fn count(path: &std::path::Path) -> usize {
            if path.ends_with("+tmp") {
                return 0;
            }
            let Ok(entries) = std::fs::read_dir(path) else { return 1 };
            entries.map(|entry| count(&entry.unwrap().path())).sum()
        }
        count(&self.scratch.join(region))
    }

    /// What the regions hold of timeline 1, read as a restore reads it.
    pub async fn stored_wal(&self, cluster: &Cluster, range: (Lsn, Lsn)) -> Vec<u8> {
        let context = self.context().await;
        let system = cluster.query("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let branch = branches(&context.repository.regions, system).await.unwrap().remove(0);
        let log = BranchLog::load(&context.repository, branch).await;
        let mut wal = Vec::new();
        let mut sink = |_, bytes: &[u8]| {
            wal.extend_from_slice(bytes);
            Ok(std::ops::ControlFlow::Continue(()))
        };
        log.read(&context.repository, &context.ring, range, &mut sink).await.unwrap();
        wal
    }

    /// The same bytes in the server's own files.
    pub fn server_wal(&self, cluster: &Cluster, (from, to): (Lsn, Lsn)) -> Vec<u8> {
        pg_wal(cluster, Timeline(1), from, to, WalSegmentSize::DEFAULT)
    }

    /// Every stored byte is the byte that the server wrote there, frames end with records, and closed epochs are closed.
    pub async fn assert_equals_pg_wal(&self, cluster: &Cluster) -> u64 {
        let context = self.context().await;
        let system = cluster.query("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let mut compared = 0;
        for branch in branches(&context.repository.regions, system).await.unwrap() {
            let index = WalIndex::load(&context.repository.regions, branch).await;
            for (place, _) in index.frames() {
                let check = |bytes| Frame::decode(&bytes, &context.repository.id, &place, &context.repository.trust);
                let (frame, _) = context.repository.regions.read(&place.key(), None, check).await.unwrap();
                if frame.header.kind != FrameKind::Data {
                    continue;
                }
                let keyset = context.ring.open(&frame.header.target, &frame.header.keyset).await.unwrap();
                let wal = frame.open(keyset.data().unwrap()).unwrap();
                let span = frame.header.span;
                assert_eq!(span.last_record_end, Some(span.end), "a frame ends with a record: {span:?}");
                assert_eq!(wal, pg_wal(cluster, place.timeline, span.start, span.end, frame.header.wal_segment_size));
                compared += wal.len() as u64;
            }
        }
        compared
    }
}

fn exchange(one: &std::path::Path, other: &std::path::Path) {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

/// The server's own files.
fn pg_wal(cluster: &Cluster, timeline: Timeline, from: Lsn, to: Lsn, size: WalSegmentSize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut at = from;
    while at < to {
        let name = SegmentName::containing(timeline, at, size);
        let file = std::fs::read(cluster.data_dir().join("pg_wal").join(name.file_name(size))).unwrap();
        let offset = usize::try_from(at.0 - name.start(size).0).unwrap();
        let end = usize::try_from((to.0 - name.start(size).0).min(size.bytes())).unwrap();
        bytes.extend_from_slice(&file[offset..end]);
        at = Lsn(name.start(size).0 + end as u64);
    }
    bytes
}

/// Quiet unless the test writes, and keeps its WAL for comparison.
fn quiet(major: u32) -> Builder {
    Cluster::builder(major).setting("autovacuum", "off").setting("wal_keep_size", "2GB")
}

/// Stops it and asserts that everything that the server had flushed before is durable.
async fn stop(rig: &Rig, stream: Background, cluster: &Cluster) -> Lsn {
    let flushed = cluster.flush_lsn().await;
    rig.wait_durable(flushed).await;
    let finished = stream.terminate().await.ok();
    assert!(finished.stdout.contains("is durable"), "{finished}");
    flushed
}

#[tokio::test]
async fn what_was_streamed_is_what_the_server_wrote() {
    let cluster = quiet(15).start().await;
    cluster.pgbench_init(1).await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().spawn();
    let first = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    assert_eq!(first.start_lsn.unwrap().0 % (16 << 20), 0, "a first run begins with a whole segment");
    let load = cluster.pgbench(2);
    tokio::time::sleep(Duration::from_secs(3)).await;

    let second = rig.stream().run().await.code(5);
    assert!(second.stderr.contains(&format!("process {}", stream.pid())), "{second}");
    let position = rig.position().await.unwrap();
    assert!(position.exposure_seconds.unwrap() < 5.0 && position.last_commit_at.is_some(), "{position:?}");
    let status = rig.drctl(&["wal", "status", "--json"]).run().await.ok().json();
    assert_eq!(status["targets"][0]["receiver"]["state"], "streaming", "{status}");
    drop(load);

    let flushed = stop(&rig, stream, &cluster).await;
    assert!(rig.position().await.is_none(), "the socket is gone");
    rig.assert_one_window(flushed).await;
    assert!(rig.assert_equals_pg_wal(&cluster).await > 1_000_000);
    // Nothing of it needs to be kept by the server any more.
    let restart = cluster.query("SELECT restart_lsn FROM pg_replication_slots").await;
    assert!(restart.parse::<Lsn>().unwrap() >= flushed, "{restart} is behind {flushed}");
    let text = rig.drctl(&["wal", "status", "ledger"]).run().await.ok().stdout;
    assert!(text.contains("commits to") && text.lines().all(|line| line.chars().count() <= 110), "{text}");
}

#[tokio::test]
async fn an_idle_server_costs_nothing_and_a_commit_is_shipped_within_the_interval() {
    let cluster = quiet(17).start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().spawn();
    rig.wait_durable(cluster.flush_lsn().await).await;
    let mut slowest = Duration::ZERO;
    for n in 0..5 {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        let committed = Instant::now();
        rig.wait_durable(cluster.flush_lsn().await).await;
        slowest = slowest.max(committed.elapsed());
    }
    assert!(slowest < Duration::from_millis(2500), "{slowest:?}");
    // The server itself writes a record now and then.
    let mut quiet_spell = false;
    for _ in 0..4 {
        let (lsn, objects) = (cluster.flush_lsn().await, rig.objects("a"));
        rig.wait_durable(lsn).await;
        let settled = rig.objects("a");
        tokio::time::sleep(Duration::from_secs(5)).await;
        if cluster.flush_lsn().await == lsn {
            assert_eq!(rig.objects("a"), settled, "{objects}");
            assert_eq!(rig.position().await.unwrap().exposure_seconds, Some(0.0));
            quiet_spell = true;
            break;
        }
    }
    assert!(quiet_spell, "the server is never idle");
    stop(&rig, stream, &cluster).await;
}

#[tokio::test]
async fn a_server_that_works_beats_every_second_and_an_idle_one_not_at_all() {
    let cluster = quiet(16).start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    for n in 0..30 {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let beats = async || cluster.query("SELECT seq FROM drctl.heartbeat").await.parse::<u32>().unwrap();
    assert!((3..=8).contains(&beats().await), "{} beats in about five seconds", beats().await);
    // The last commit of somebody else is followed by one beat, and that by none; nor do two drctl keep each other awake.
    let other = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "slot = \"drctl_other\"\n").await;
    let second = other.stream().spawn();
    other.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("INSERT INTO t VALUES (30)").await;
    let beating = |position: &Position| position.heartbeat.as_ref().is_some_and(|beat| beat.written_at.is_some());
    other.wait("a beat", SOON, beating).await;
    let written = |position: &Position| position.heartbeat.as_ref().and_then(|beat| beat.written_at);
    let durable = |position: &Position| position.heartbeat.as_ref().and_then(|beat| beat.durable_at);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (seq, lsn) = (beats().await, cluster.flush_lsn().await);
    let settled = rig.wait_durable(lsn).await;
    assert!(durable(&settled).is_some() && durable(&settled) == written(&settled), "{settled:?}");
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(beats().await, seq);
    let grown = cluster.flush_lsn().await.bytes_since(lsn);
    assert!(grown < 2_000, "an idle server wrote {grown} bytes of WAL");
    second.terminate().await.ok();
    stream.terminate().await.ok();

    // Where no row can be written that is said once, and WAL is streamed all the same.
    cluster.execute("ALTER DATABASE postgres SET default_transaction_read_only = on").await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    cluster.execute("BEGIN READ WRITE; INSERT INTO t VALUES (0); COMMIT").await;
    let troubled = |position: &Position| position.heartbeat.as_ref().is_some_and(|beat| beat.trouble.is_some());
    rig.wait("the trouble is told", SOON, troubled).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    stream.terminate().await.ok();
}

#[tokio::test]
async fn a_killed_receiver_goes_on_where_it_was() {
    let cluster = quiet(16).start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let ledger = Ledger::start(&cluster, 3).await;
    let mut durable = Lsn::INVALID;
    let mut stream = rig.stream().spawn();
    for round in 0..5_u64 {
        let begun = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        assert!(begun.durable_lsn >= durable, "durable went back from {durable} to {}", begun.durable_lsn);
        tokio::time::sleep(Duration::from_millis(150 + rand::random::<u64>() % 1500)).await;
        durable = rig.position().await.unwrap().durable_lsn.max(durable);
        stream.kill9();
        if round == 2 {
            // Meanwhile whole segments pass.
            cluster.switch_wal().await;
            ledger.wait_for(50).await;
            cluster.execute("CHECKPOINT").await;
        }
        let exposed = cluster.flush_lsn().await;
        stream = rig.stream().spawn();
        rig.wait("what waited is durable", Duration::from_secs(5), |position| position.reaches(exposed)).await;
    }
    ledger.wait_for(20).await;
    ledger.stop().await;
    let flushed = stop(&rig, stream, &cluster).await;
    rig.assert_one_window(flushed).await;
    rig.assert_equals_pg_wal(&cluster).await;
}

#[tokio::test]
async fn acknowledgement_waits_for_the_quorum_and_the_server_keeps_its_wal() {
    let cluster = quiet(15).setting("wal_sender_timeout", "4s").start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let ledger = Ledger::start(&cluster, 2).await;
    let stream = rig.stream().expect_log("left behind").expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    let sender = cluster.query("SELECT pid FROM pg_stat_replication").await;
    rig.take_away(&["b", "c"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let held = rig.wait("waiting", SOON, |position| position.state == State::WaitingForRegions).await.durable_lsn;
    ledger.wait_for(200).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let position = rig.position().await.unwrap();
    assert_eq!(position.durable_lsn, held, "nothing is acknowledged below the quorum");
    assert!(position.received_lsn > held && position.exposure_seconds.unwrap() > 5.0, "{position:?}");
    assert_eq!(cluster.query("SELECT pid FROM pg_stat_replication").await, sender, "status goes on");
    let restart: Lsn = cluster.query("SELECT restart_lsn FROM pg_replication_slots").await.parse().unwrap();
    assert!(restart <= held, "the server was told {restart}, durable is {held}");
    rig.give_back(&["b", "c"]);
    ledger.stop().await;
    let flushed = cluster.flush_lsn().await;
    rig.wait("catching up", Duration::from_secs(40), |position| position.reaches(flushed)).await;
    let finished = stream.terminate().await;
    assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
    let windows = rig.windows().await;
    let whole = windows.iter().filter(|(_, windows)| windows.len() == 1 && windows[0].1 >= flushed).count();
    assert!(whole >= 2, "{windows:?}");
    rig.assert_equals_pg_wal(&cluster).await;
}

#[tokio::test]
async fn a_frame_that_only_one_region_holds_is_adopted() {
    let cluster = quiet(17).start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    let held = rig.wait_durable(cluster.flush_lsn().await).await.durable_lsn;
    rig.take_away(&["b", "c"]);
    let before = rig.objects("a");
    cluster.execute("CREATE TABLE seen_by_one (n int)").await;
    process::eventually("one region has the frame", SOON, async || rig.objects("a") > before).await;
    assert_eq!(rig.position().await.unwrap().durable_lsn, held);
    stream.kill9();
    // Two of three cannot be read: the end of what was acknowledged is unknown, so nothing is streamed.
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("waiting", SOON, |position| position.state == State::WaitingForRegions).await;
    rig.give_back(&["b", "c"]);
    let position = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    assert!(position.start_lsn.unwrap() > held, "it continues behind the adopted frame");
    let flushed = stop(&rig, stream, &cluster).await;
    rig.assert_one_window(flushed).await;
    rig.assert_equals_pg_wal(&cluster).await;
}

#[tokio::test]
async fn a_hanging_quorum_holds_the_acknowledgement_and_nothing_else() {
    let cluster = quiet(18).setting("wal_sender_timeout", "5s").start().await;
    let mut regions = "[regions.a]\nurl = \"a\"\n".to_owned();
    let mut proxies = Vec::new();
    for (name, endpoint) in [("b", Endpoint::localstack_a()), ("c", Endpoint::localstack_b())] {
        let bucket = endpoint.bucket().await;
        let (proxy, through) = endpoint.proxied().await;
        regions += &format!(
            "[regions.{name}]\nurl = \"s3://{}\"\nendpoint = \"{}\"\naws_region = \"{}\"\npath_style = true\n",
            bucket.name, through.url, through.region
        );
        proxies.push(proxy);
    }
    let rig = Rig::with_regions(&cluster.conninfo(), &regions).await;
    let ledger = Ledger::start(&cluster, 2).await;
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    let sender = cluster.query("SELECT pid FROM pg_stat_replication").await;
    for proxy in &proxies {
        proxy.set(Mode::Hang).await;
    }
    let held = rig.wait("waiting", SOON, |position| position.state == State::WaitingForRegions).await.durable_lsn;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(rig.position().await.unwrap().durable_lsn, held);
    assert_eq!(cluster.query("SELECT pid FROM pg_stat_replication").await, sender, "status goes on");
    for proxy in &proxies {
        proxy.set(Mode::Pass).await;
    }
    ledger.stop().await;
    let flushed = cluster.flush_lsn().await;
    rig.wait("catching up", Duration::from_secs(60), |position| position.reaches(flushed)).await;
    let finished = stream.terminate().await;
    assert!(matches!(finished.code, Some(0 | 4)), "{finished}");
    rig.assert_equals_pg_wal(&cluster).await;
}

#[tokio::test]
async fn a_crashed_server_is_met_again_without_a_hole() {
    let mut cluster = quiet(14).start().await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let ledger = Ledger::start(&cluster, 3).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    for _ in 0..2 {
        ledger.wait_for(100).await;
        cluster.kill9().await;
        rig.wait("noticing", SOON, |position| position.state == State::Reconnecting).await;
        cluster.start().await;
        rig.wait("streaming again", SOON, |position| position.state == State::Streaming).await;
    }
    ledger.wait_for(50).await;
    ledger.stop().await;
    let flushed = stop(&rig, stream, &cluster).await;
    rig.assert_one_window(flushed).await;
    rig.assert_equals_pg_wal(&cluster).await;
}

#[tokio::test]
async fn a_promoted_standby_is_followed_onto_its_timeline() {
    let mut primary = quiet(16).start().await;
    let copy = Scratch::new();
    let data = copy.postgres_dir("standby");
    let mut basebackup = primary.tool("pg_basebackup");
    basebackup.arg("-D").arg(&data).args(["-R", "-c", "fast"]);
    process::run_async(basebackup).await;
    let mut standby = Cluster::try_start_restored(&data, 16, &[], Until::Ready).await.unwrap();
    let (a, b) = (primary.socket_dir(), standby.socket_dir());
    let conninfo = format!(
        "host={},{} port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
        a.display(),
        b.display(),
        primary.port(),
        standby.port()
    );
    let rig = Rig::new(&conninfo).await;
    let ledger = Ledger::start(&primary, 2).await;
    let stream = rig.stream().expect_log("the replication slot is gone").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    ledger.wait_for(100).await;
    ledger.stop().await;
    let last = primary.flush_lsn().await;
    rig.wait_durable(last).await;
    process::eventually("the standby has everything", SOON, async || {
        let received: Lsn = standby.query("SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
        received >= last
    })
    .await;
    primary.kill9().await;
    standby.execute("SELECT pg_promote()").await;
    standby.wait_promoted(SOON).await.unwrap();
    standby.execute("CREATE TABLE after (n int)").await;
    let written = standby.flush_lsn().await;
    let position = rig.wait_durable_on(Timeline(2), written).await;
    assert_ne!(position.branch.unwrap().as_str(), "0");
    stream.terminate().await.ok();
    let status = rig.status().await;
    assert!(status.is_whole(), "{status:?}");
    let windows = rig.windows().await;
    let timelines: BTreeSet<u32> = windows.iter().map(|(timeline, _)| timeline.0).collect();
    assert_eq!(timelines.into_iter().collect::<Vec<_>>(), [1, 2]);
    let history = std::fs::read_to_string(data.join("pg_wal/00000002.history")).unwrap();
    let switch: Lsn = history.split_whitespace().nth(1).unwrap().parse().unwrap();
    for (timeline, windows) in windows {
        let (start, end) = windows[0];
        if timeline.0 == 1 { assert!(end >= switch.min(last)) } else { assert!(start <= switch && end >= written) }
    }
}

impl Rig {
    async fn wait_durable_on(&self, timeline: Timeline, lsn: Lsn) -> Position {
        let reached = |position: &Position| position.timeline == Some(timeline) && position.reaches(lsn);
        self.wait(&format!("durable up to {lsn} on timeline {timeline}"), SOON, reached).await
    }
}

/// Writes so much that nothing of the present is left in `pg_wal`.
pub async fn forget_wal(cluster: &Cluster) {
    for _ in 0..8 {
        cluster.execute("CREATE TABLE IF NOT EXISTS filler (t text); INSERT INTO filler SELECT repeat('x', 500) FROM generate_series(1, 3000)").await;
        cluster.switch_wal().await;
        cluster.execute("CHECKPOINT").await;
    }
}

#[tokio::test]
async fn a_lost_slot_is_a_recorded_gap_and_never_silence() {
    // On 15 a lost slot goes back to work as if nothing had happened; 18 refuses it with words of its own.
    for major in [15, 18] {
        let cluster = Cluster::builder(major)
            .wal_segsize(1)
            .setting("autovacuum", "off")
            .setting("max_slot_wal_keep_size", "1MB")
            .setting("min_wal_size", "2MB")
            .setting("max_wal_size", "4MB")
            .start()
            .await;
        let rig = Rig::new(&cluster.conninfo()).await;
        let stream = rig.stream().spawn();
        rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        cluster.execute("CREATE TABLE before (n int)").await;
        let before = stop(&rig, stream, &cluster).await;
        forget_wal(&cluster).await;
        assert_eq!(cluster.query("SELECT wal_status FROM pg_replication_slots").await, "lost");

        let stream = rig.stream().expect_log("WAL is missing").expect_log("replication slot was lost").spawn();
        let position = rig.wait("a gap", SOON, |position| position.state == State::Gap).await;
        assert!(position.last_error.unwrap().contains("gap"));
        cluster.execute("CREATE TABLE behind (n int)").await;
        let flushed = cluster.flush_lsn().await;
        rig.wait_durable(flushed).await;
        stream.terminate().await.ok();

        let status = rig.status().await;
        assert!(!status.is_whole());
        let branch = &status.targets[0].branches[0];
        let [gap] = branch.gaps.as_slice() else { panic!("{:?}", branch.gaps) };
        for region in &branch.regions {
            let [old, new] = region.windows.as_slice() else { panic!("{:?}", region.windows) };
            assert!(old.end >= before && old.end == gap.from && new.start == gap.to && new.end >= flushed);
        }
        let text = rig.drctl(&["wal", "status"]).run().await.ok().stdout;
        assert!(text.contains("GAP"), "{text}");
    }
}

#[tokio::test]
async fn a_slot_that_somebody_made_again_does_not_hide_a_gap() {
    let cluster = Cluster::builder(17)
        .wal_segsize(1)
        .setting("autovacuum", "off")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "4MB")
        .start()
        .await;
    let rig = Rig::new(&cluster.conninfo()).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    stop(&rig, stream, &cluster).await;
    cluster.execute("SELECT pg_drop_replication_slot('drctl_ledger')").await;
    forget_wal(&cluster).await;
    cluster.execute("SELECT pg_create_physical_replication_slot('drctl_ledger', true)").await;
    let stream = rig.stream().expect_log("WAL is missing").spawn();
    rig.wait("a gap", SOON, |position| position.state == State::Gap).await;
    stream.terminate().await.ok();
    assert_eq!(rig.status().await.targets[0].branches[0].gaps.len(), 1);
}
