//! `archive_command`: what PostgreSQL hands over is safe when it is told so, and nothing doubtful is taken.

use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::jobs::wal::State;
use drctl::model::{Lsn, Timeline};
use drctl::repository::wal::frame::EpochKind;
use drctl::repository::wal::index::{WalIndex, branches};

use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::pg::{Cluster, Until};
use crate::support::process::eventually;
use crate::wal::{DIRECTORIES, Rig};

pub const SOON: Duration = Duration::from_secs(30);

/// A server with small segments that archives to whoever is at the rig's socket, and the rig.
pub async fn archiving(major: u32, stream: bool) -> (Cluster, Rig) {
    let cluster = Cluster::builder(major)
        .wal_segsize(1)
        .setting("autovacuum", "off")
        .setting("archive_mode", "on")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "4MB")
        .start()
        .await;
    let more = format!(
        "control_socket = \"ledger.sock\"\nstream = {stream}\nheartbeat = false\n[daemon]\nallow = [\"postgres\"]\n"
    );
    let mut rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, &more).await;
    rig.socket = rig.scratch.join("ledger.sock");
    let command = format!("{} wal push --socket {} %p", env!("CARGO_BIN_EXE_drctl"), rig.socket.display());
    cluster.execute(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await;
    cluster.execute("SELECT pg_reload_conf()").await;
    (cluster, rig)
}

/// A hundred rows and the end of their segment; its name.
pub async fn fill_segment(cluster: &Cluster) -> String {
    cluster.execute("CREATE TABLE IF NOT EXISTS t (n serial, text text)").await;
    cluster.execute("INSERT INTO t (text) SELECT md5(n::text) FROM generate_series(1, 100) n").await;
    let end: Lsn = cluster.query("SELECT pg_switch_wal()").await.parse().unwrap();
    cluster.query(&format!("SELECT pg_walfile_name('{end}'::pg_lsn)")).await
}

pub async fn until_archived(cluster: &Cluster, segment: &str) {
    let archived = "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver";
    eventually("the segment is archived", SOON, async || {
        let last = cluster.query(archived).await;
        last.len() == 24 && last.as_str() >= segment
    })
    .await;
}

const DIGEST: &str = "SELECT count(*), md5(string_agg(n || text, ',' ORDER BY n)) FROM t";

impl Rig {
    pub async fn serve(&self, state: State) -> Background {
        let serve = self
            .stream()
            .expect_log("was refused")
            .expect_log("replication slot is gone")
            .expect_log("not invited")
            .spawn();
        self.wait("somebody takes WAL", SOON, |position| position.state == state).await;
        serve
    }

    pub async fn push(&self, path: &Path) -> Finished {
        Drctl::new(
            ["wal", "push", "--socket"]
                .map(std::ffi::OsStr::new)
                .into_iter()
                .chain([self.socket.as_os_str(), path.as_os_str()]),
        )
        .run()
        .await
    }

    /// Frames by the kind of their epoch.
    async fn frames_of(&self, cluster: &Cluster, kind: EpochKind) -> usize {
        let context = self.context().await;
        let system = cluster.query("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let mut count = 0;
        for branch in branches(&context.repository.regions, system).await.unwrap() {
            let index = WalIndex::load(&context.repository.regions, branch).await;
            for (place, _) in index.frames() {
                let header = index.header(&context.repository, &place.epoch, place.seq).await.unwrap();
                count += usize::from(header.epoch_kind == kind);
            }
        }
        count
    }

    pub async fn restored(&self, name: &str) -> PathBuf {
        let directory = self.scratch.join(name);
        let shown = directory.display().to_string();
        let fixed = ["restore", "ledger", "--json", "--target-dir", &shown];
        let plan = self.drctl(&fixed).expect_log("region").run().await.ok().json();
        let digest = plan["digest"].as_str().unwrap();
        let words: Vec<_> = fixed.into_iter().chain(["--execute", "--plan", digest]).collect();
        self.drctl(&words).expect_log("region").run().await.ok();
        directory
    }
}

#[tokio::test]
async fn archive_command_alone_brings_everything_back() {
    let (cluster, rig) = archiving(16, false).await;
    let serve = rig.serve(State::Archiving).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    for _ in 0..3 {
        fill_segment(&cluster).await;
    }
    // Whoever takes WAL is killed in the middle of it: PostgreSQL keeps what it was not told to be safe.
    let killed = fill_segment(&cluster).await;
    serve.kill9();
    fill_segment(&cluster).await;
    let serve = rig.serve(State::Archiving).await;
    let last = fill_segment(&cluster).await;
    assert!(killed < last);
    until_archived(&cluster, &last).await;
    assert_eq!(cluster.query("SELECT count(*) FROM pg_replication_slots").await, "0");
    let expected = cluster.query(DIGEST).await;
    let pushes = rig.position().await.unwrap().pushes;
    assert!(pushes.stored + pushes.ahead > 0 && pushes.refused == 0 && !pushes.is_refusing(), "{pushes:?}");

    let directory = rig.restored("back").await;
    let off = [("archive_mode", "off")];
    let back = Cluster::try_start_restored(&directory, 16, &off, Until::Promoted).await.unwrap();
    assert_eq!(back.query(DIGEST).await, expected);
    serve.terminate().await.ok();
    assert!(rig.push(&cluster.data_dir().join("pg_wal").join(&last)).await.code(1).stderr.contains("nobody takes WAL"));
}

/// What waits in the server's directory is stored while PostgreSQL is still busy with the segment before.
#[tokio::test]
async fn segments_that_wait_are_stored_before_they_are_handed_over() {
    let (cluster, rig) = archiving(18, false).await;
    let serve = rig.serve(State::Archiving).await;
    let command = cluster.query("SHOW archive_command").await;
    cluster.execute("ALTER SYSTEM SET archive_command = 'false'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let mut segments = Vec::new();
    for _ in 0..20 {
        segments.push(fill_segment(&cluster).await);
    }
    cluster.execute(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await;
    cluster.execute("SELECT pg_reload_conf()").await;
    until_archived(&cluster, segments.last().unwrap()).await;
    let pushes = rig.position().await.unwrap().pushes;
    assert!(pushes.ahead >= 5 && pushes.refused == 0, "{pushes:?}");
    // Each was stored once, by whom ever.
    assert!(pushes.stored + pushes.ahead >= 20 && pushes.known >= pushes.ahead, "{pushes:?}");
    serve.terminate().await.ok();
    let windows = rig.windows().await;
    assert!(windows.iter().all(|(_, windows)| windows.len() == 1), "{windows:?}");
}

#[tokio::test]
async fn nothing_doubtful_is_taken() {
    let (cluster, rig) = archiving(17, false).await;
    let serve = rig.serve(State::Archiving).await;
    let segment = fill_segment(&cluster).await;
    until_archived(&cluster, &segment).await;
    let original = std::fs::read(cluster.data_dir().join("pg_wal").join(&segment)).unwrap();
    let made = |name: &str, bytes: &[u8]| {
        let path = rig.scratch.dir("made").join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let refused = async |path: PathBuf, why: &str| {
        let told = rig.push(&path).await.code(1);
        assert!(told.stderr.contains(why), "{told}");
    };
    // The same again is taken, and stored once.
    let before = (rig.objects("a"), rig.position().await.unwrap().pushes.known);
    rig.push(&made(&segment, &original)).await.ok();
    assert_eq!((rig.objects("a"), rig.position().await.unwrap().pushes.known), (before.0, before.1 + 1));

    // Other bytes where nobody reads them: every record is right, and the segment is another one.
    let mut other = original.clone();
    other[8192 + 20] ^= 1;
    refused(made(&segment, &other), "was another one").await;
    let mut broken = original.clone();
    broken[8192 + 300] ^= 1;
    refused(made(&segment, &broken), "damaged").await;
    // The number that stands at the head of every page.
    let mut headless = original.clone();
    headless[2 * 8192] ^= 1;
    refused(made(&segment, &headless), "damaged").await;
    refused(made(&segment, &original[..original.len() / 2]), "wrong size").await;
    refused(made("000000010000000000000099", &original), "belongs elsewhere").await;
    refused(made("pgcontrol", &original), "no file that PostgreSQL archives").await;
    let stranger = Cluster::builder(17).wal_segsize(1).setting("archive_mode", "on").start().await;
    let name = stranger.query("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let foreign = std::fs::read(stranger.data_dir().join("pg_wal").join(&name)).unwrap();
    refused(made(&name, &foreign), "this is WAL of system").await;
    // Nor does that server get rid of it by itself: it keeps what it is told that nobody took.
    let command = cluster.query("SHOW archive_command").await;
    stranger.execute(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await;
    stranger.execute("SELECT pg_reload_conf()").await;
    let theirs = fill_segment(&stranger).await;
    let tried = "SELECT failed_count > 0, archived_count, last_failed_wal FROM pg_stat_archiver";
    eventually("it was refused", SOON, async || stranger.query(tried).await == format!("t|0|{theirs}")).await;
    stranger.execute("ALTER SYSTEM RESET archive_command").await;
    stranger.execute("SELECT pg_reload_conf()").await;
    refused(made("00000002.history", b"1\t0/3000000\tno recovery target specified\n"), "another copy").await;
    // What PostgreSQL notes about a backup of somebody else is acknowledged and not kept.
    rig.push(&made(&format!("{segment}.00000028.backup"), b"START WAL LOCATION: 0/2000028\n")).await.ok();

    // Only root can be somebody else.
    if crate::support::dirs::postgres_user().is_some() {
        use std::os::unix::process::CommandExt as _;
        let nobody = 65_534;
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_drctl"));
        command.args(["wal", "push", "--socket"]).arg(&rig.socket).arg(made(&segment, &original)).uid(nobody);
        let told = Drctl::of(command).run().await.code(1);
        assert!(told.stderr.contains("user 65534 may not use this socket"), "{told}");
    }
    let pushes = rig.position().await.unwrap().pushes;
    let by_hand =
        pushes.refused - stranger.query("SELECT failed_count FROM pg_stat_archiver").await.parse::<u64>().unwrap();
    assert_eq!((by_hand, pushes.not_needed), (8, 1), "{pushes:?}");
    assert!(pushes.last_refusal.unwrap().contains("00000002.history"));
    assert_eq!(rig.objects("a"), before.0, "nothing of all that was stored");
    let ended = serve.terminate().await.ok();
    assert!(ended.stderr.contains("was refused"), "{ended}");
}

#[tokio::test]
async fn beside_streaming_a_segment_is_stored_once() {
    let (cluster, rig) = archiving(15, true).await;
    let serve = rig.serve(State::Streaming).await;
    let mut last = String::new();
    for _ in 0..3 {
        last = fill_segment(&cluster).await;
        until_archived(&cluster, &last).await;
    }
    let pushes = rig.position().await.unwrap().pushes;
    assert!(pushes.known >= 3 && pushes.stored == 0, "{pushes:?}");
    serve.terminate().await.ok();
    // What was streamed is known to the next process, too.
    let serve = rig.serve(State::Streaming).await;
    rig.push(&cluster.data_dir().join("pg_wal").join(&last)).await.ok();
    assert_eq!(rig.position().await.unwrap().pushes.known, 1);
    serve.terminate().await.ok();
    assert_eq!(rig.frames_of(&cluster, EpochKind::Push).await, 0);
}

#[tokio::test]
async fn archived_wal_fills_what_streaming_left_out() {
    let (cluster, rig) = archiving(16, true).await;
    let serve = rig.serve(State::Streaming).await;
    let streamed = cluster.flush_lsn().await;
    rig.wait_durable(streamed).await;
    serve.terminate().await.ok();
    cluster.execute("SELECT pg_drop_replication_slot('drctl_ledger')").await;
    let text = std::fs::read_to_string(&rig.config).unwrap();
    std::fs::write(&rig.config, text.replace("stream = true", "stream = false")).unwrap();
    let serve = rig.serve(State::Archiving).await;
    let mut last = String::new();
    for _ in 0..8 {
        last = fill_segment(&cluster).await;
    }
    until_archived(&cluster, &last).await;
    serve.terminate().await.ok();
    cluster.execute("CHECKPOINT").await;
    let oldest = "SELECT min(name) FROM pg_ls_waldir() WHERE length(name) = 24";
    let gone = cluster.query(&format!("SELECT ({oldest}) > pg_walfile_name('{streamed}'::pg_lsn)")).await;
    assert_eq!(gone, "t", "the server still has what was streamed");

    std::fs::write(&rig.config, text).unwrap();
    let serve = rig.serve(State::Streaming).await;
    cluster.execute("CREATE TABLE afterwards (n int)").await;
    let flushed = cluster.flush_lsn().await;
    rig.wait_durable(flushed).await;
    serve.terminate().await.ok();
    rig.assert_one_window(flushed).await;
    let windows = rig.windows().await;
    assert!(windows.iter().all(|(timeline, _)| *timeline == Timeline::FIRST), "{windows:?}");
    assert!(rig.frames_of(&cluster, EpochKind::Push).await > 0);
}

#[tokio::test]
async fn a_file_is_given_to_recovery_or_it_certainly_does_not_exist() {
    let cluster =
        Cluster::builder(16).wal_segsize(1).setting("autovacuum", "off").setting("wal_keep_size", "1GB").start().await;
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    let stream = rig.serve(State::Streaming).await;
    let whole = fill_segment(&cluster).await;
    fill_segment(&cluster).await;
    cluster.execute("INSERT INTO t (text) VALUES ('the last one')").await;
    let last = cluster.query("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    stream.terminate().await.ok();
    let beyond = cluster.query("SELECT pg_walfile_name(pg_current_wal_lsn() + 1024 * 1024)").await;
    // As PostgreSQL runs it: in a data directory, with a relative path.
    let data = rig.scratch.dir("data");
    std::fs::create_dir(data.join("global")).unwrap();
    std::fs::create_dir(data.join("pg_wal")).unwrap();
    std::fs::copy(cluster.data_dir().join("global/pg_control"), data.join("global/pg_control")).unwrap();
    let fetch = async |file: &str, code: i32| {
        let _absent = std::fs::remove_file(data.join("pg_wal/RECOVERYXLOG"));
        let words = ["wal", "fetch", file, "pg_wal/RECOVERYXLOG"];
        let fetch = rig.drctl(&words).expect_log("region").expect_log("readable");
        let told = fetch.current_dir(&data).run().await.code(code);
        let found = std::fs::read(data.join("pg_wal/RECOVERYXLOG")).ok();
        assert_eq!(found.is_some(), code == 0, "{told}");
        assert_eq!(std::fs::read_dir(data.join("pg_wal")).unwrap().count(), usize::from(code == 0), "nothing is left");
        found.unwrap_or_default()
    };
    let own = |file: &str| std::fs::read(cluster.data_dir().join("pg_wal").join(file)).unwrap();
    assert!(fetch(&whole, 0).await == own(&whole), "a whole segment is the server's");
    let partial = fetch(&last, 0).await;
    let end = partial.iter().rposition(|byte| *byte != 0).unwrap();
    assert!(partial.len() == 1 << 20 && partial[..=end] == own(&last)[..=end], "the last one ends in zeros");
    assert!(end > 0 && partial.windows(12).any(|bytes| bytes == b"the last one"));
    for absent in [beyond.as_str(), "00000001.history", "00000002.history", "000000090000000000000003"] {
        fetch(absent, 1).await;
    }
    fetch("pg_control", 255).await;

    // One region away: the others had to agree to every write.
    let region = |name: &str| rig.scratch.join(name);
    let take_away = |name: &str| std::fs::rename(region(name), region(name).with_extension("away")).unwrap();
    take_away("a");
    fetch(&whole, 0).await;
    fetch(&last, 0).await;
    fetch(&beyond, 1).await;
    // Two away: what is there is there, and nothing else is certain.
    take_away("b");
    fetch(&whole, 0).await;
    for doubtful in [last.as_str(), &beyond] {
        fetch(doubtful, 255).await;
    }
    // A place where nothing is mounted answers, and is no region that was asked.
    std::fs::create_dir(region("b")).unwrap();
    for doubtful in [last.as_str(), &beyond] {
        fetch(doubtful, 255).await;
    }
    std::fs::remove_dir(region("b")).unwrap();
    for name in ["a", "b"] {
        std::fs::rename(region(name).with_extension("away"), region(name)).unwrap();
    }

    let frames = |region: &str| {
        let mut frames = walk(&rig.scratch.join(region).join("wal"));
        frames.retain(|path| std::fs::metadata(path).unwrap().len() > 2_000);
        frames.sort();
        frames
    };
    // A hole is not the end, however long it is.
    let regions = ["a", "b", "c"];
    let first = regions.map(|region| frames(region).remove(0));
    let kept = regions.map(|region| rig.scratch.join(&format!("kept-{region}")));
    (0..3).for_each(|at| std::fs::rename(&first[at], &kept[at]).unwrap());
    fetch(&whole, 255).await;
    (0..3).for_each(|at| std::fs::rename(&kept[at], &first[at]).unwrap());
    fetch(&whole, 0).await;

    for (region, code) in [("a", 0), ("b", 0), ("c", 255)] {
        for frame in frames(region) {
            let mut bytes = std::fs::read(&frame).unwrap();
            let at = bytes.len() - 40;
            bytes[at] ^= 1;
            std::fs::write(&frame, bytes).unwrap();
        }
        fetch(&whole, code).await;
    }
}

pub fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
