//! Failover: every history is stored apart, and nobody chooses silently between two of them.

use std::path::Path;

use drctl::jobs::wal::State;
use drctl::model::{Lsn, Timeline};

use crate::archive::SOON;
use crate::support::dirs::Scratch;
use crate::support::drctl::{Background, Finished};
use crate::support::pg::{Cluster, Until};
use crate::support::process;
use crate::wal::{DIRECTORIES, Rig};

const MAJOR: u32 = 16;

pub async fn standby_of(primary: &Cluster, major: u32, place: &Scratch, name: &str) -> Cluster {
    let data = place.postgres_dir(name);
    let mut basebackup = primary.tool("pg_basebackup");
    basebackup.arg("-D").arg(&data).args(["-R", "-c", "fast"]);
    process::run_async(basebackup).await;
    Cluster::try_start_restored(&data, major, &[], Until::Ready).await.unwrap()
}

pub async fn replayed(standby: &Cluster, lsn: Lsn) {
    process::eventually("the standby has it", SOON, async || {
        standby.query("SELECT pg_last_wal_replay_lsn()").await.parse::<Lsn>().is_ok_and(|at| at >= lsn)
    })
    .await;
}

pub async fn promote(standby: &mut Cluster) {
    standby.execute("SELECT pg_promote()").await;
    standby.wait_promoted(SOON).await.unwrap();
}

impl Rig {
    /// From now on the target is another server.
    fn point(&self, from: &Cluster, to: &Cluster) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        std::fs::write(&self.config, text.replace(&from.conninfo(), &to.conninfo())).unwrap();
    }

    async fn streaming(&self) -> Background {
        let stream = self.stream().expect_log("replication slot is gone").spawn();
        self.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        stream
    }

    /// Writes a row and waits until it is durable; gives the branch that it is on.
    async fn write(&self, server: &Cluster, text: &str, timeline: u32) -> (Lsn, String) {
        server.execute(&format!("INSERT INTO t VALUES ('{text}')")).await;
        let lsn = server.flush_lsn().await;
        let reached = |position: &drctl::jobs::wal::Position| {
            position.timeline == Some(Timeline(timeline)) && position.reaches(lsn)
        };
        let position = self.wait(text, SOON, reached).await;
        (lsn, format!("{timeline}-{}", position.branch.unwrap()))
    }

    async fn plan(&self, directory: &Path, options: &[&str]) -> Finished {
        let shown = directory.display().to_string();
        let fixed = ["restore", "ledger", "--json", "--target-dir", &shown];
        self.drctl(&fixed.into_iter().chain(options.iter().copied()).collect::<Vec<_>>()).run().await
    }

    async fn rows(&self, name: &str, options: &[&str]) -> String {
        let directory = self.scratch.join(name);
        let plan = self.plan(&directory, options).await.ok().json();
        let run = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
        self.plan(&directory, &[options, &run].concat()).await.ok();
        let restored = Cluster::start_restored(&directory, MAJOR).await;
        restored.query("SELECT string_agg(text, ' ' ORDER BY text) FROM t").await
    }

    async fn problems(&self) -> String {
        let status = self.drctl(&["status", "--json"]).run().await.json();
        status["targets"][0]["problems"].to_string()
    }
}

#[tokio::test]
async fn servers_that_were_promoted_independently_are_stored_apart_and_a_person_chooses() {
    let primary = Cluster::builder(MAJOR).setting("wal_keep_size", "1GB").start().await;
    let place = Scratch::new();
    let mut first = standby_of(&primary, MAJOR, &place, "first").await;
    let mut second = standby_of(&primary, MAJOR, &place, "second").await;
    let rig = Rig::with_more(&primary.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    let stream = rig.streaming().await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    primary.execute("CREATE TABLE t (text text)").await;
    let (before, _) = rig.write(&primary, "before", 1).await;
    replayed(&second, before).await;
    second.stop().await;
    let (more, root) = rig.write(&primary, "more", 1).await;
    assert_eq!(root, "1-0");
    replayed(&first, more).await;
    promote(&mut first).await;
    // Nobody fenced it.
    rig.write(&primary, "divergent", 1).await;
    stream.terminate().await.ok();

    rig.point(&primary, &first);
    let stream = rig.streaming().await;
    let (_, one) = rig.write(&first, "one", 2).await;
    stream.terminate().await.ok();
    assert!(!rig.problems().await.contains("independently"));

    // A receiver that begins again at the old primary may not acknowledge beside it.
    rig.point(&first, &primary);
    let stream = rig.stream().spawn();
    let left = "timeline 1 was left at";
    rig.wait(left, SOON, |position| position.last_error.as_ref().is_some_and(|why| why.contains(left))).await;
    primary.execute("INSERT INTO t VALUES ('unheard')").await;
    let position = rig.position().await.unwrap();
    assert!(!position.reaches(primary.flush_lsn().await), "{position:?}");
    stream.terminate().await.ok();
    rig.point(&primary, &first);

    // The second has never heard of the first.
    let settings = second.data_dir().join("postgresql.auto.conf");
    std::fs::write(&settings, "").unwrap();
    second.start().await;
    promote(&mut second).await;
    rig.point(&first, &second);
    let stream = rig.streaming().await;
    let (_, two) = rig.write(&second, "two", 2).await;
    stream.terminate().await.ok();
    assert_ne!(one, two);
    assert!(rig.status().await.is_whole());

    let problems = rig.problems().await;
    assert!(problems.contains("independently") && problems.contains(&one) && problems.contains(&two), "{problems}");
    let refused = rig.plan(&rig.scratch.join("never"), &[]).await.code(5);
    assert!(refused.stdout.contains(&one) && refused.stdout.contains(&two), "{refused}");
    assert_eq!(rig.rows("one", &["--timeline", &one]).await, "before more one");
    assert_eq!(rig.rows("two", &["--timeline", &two]).await, "before two");
    assert_eq!(rig.rows("old", &["--timeline", "1"]).await, "before divergent more");
    assert_eq!(rig.rows("at", &["--timeline", &one, "--to-lsn", &more.to_string()]).await, "before more");

    // A backup says which one counts from now on.
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    assert!(!rig.problems().await.contains("independently"));
    assert_eq!(rig.rows("new", &[]).await, "before two");
}

/// They have one history, and their records lie in the same places. Only their commits were not in the same moments.
#[tokio::test]
async fn of_two_servers_that_were_promoted_in_one_place_and_write_alike_one_is_streamed() {
    let mut primary = Cluster::builder(MAJOR).setting("autovacuum", "off").start().await;
    let place = Scratch::new();
    let mut first = standby_of(&primary, MAJOR, &place, "first").await;
    let rig = Rig::with_more(&primary.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    let stream = rig.streaming().await;
    primary.execute("CREATE TABLE t (text text)").await;
    rig.write(&primary, "before", 1).await;
    primary.stop().await;
    stream.terminate().await.ok();
    first.stop().await;
    let copy = place.join("second");
    let copied = std::process::Command::new("cp").arg("-a").arg(first.data_dir()).arg(&copy).status().unwrap();
    assert!(copied.success());
    first.start().await;
    let mut second = Cluster::try_start_restored(&copy, MAJOR, &[], Until::Ready).await.unwrap();
    for server in [&mut first, &mut second] {
        promote(server).await;
        server.execute("CHECKPOINT").await;
    }
    rig.point(&primary, &first);
    let stream = rig.streaming().await;
    let (stored, _) = rig.write(&first, "alike", 2).await;
    stream.terminate().await.ok();

    second.execute("INSERT INTO t VALUES ('alike')").await;
    second.execute("INSERT INTO t VALUES ('and more')").await;
    let flushed = second.flush_lsn().await;
    assert!(flushed > stored, "{flushed} {stored}");
    rig.point(&first, &second);
    let stream =
        rig.stream().expect_log("replication slot is gone").expect_log("two servers write one timeline").spawn();
    let why = "does not continue what is stored";
    let refused =
        |position: &drctl::jobs::wal::Position| position.last_error.as_ref().is_some_and(|told| told.contains(why));
    let position = rig.wait("it is refused", SOON, refused).await;
    assert!(!position.reaches(flushed), "{position:?}");
    stream.terminate().await.ok();
    let status = rig.drctl(&["wal", "status", "ledger"]).run().await.ok().stdout;
    assert!(status.contains("CONTRADICTION"), "{status}");
}

#[tokio::test]
async fn a_standby_that_is_promoted_still_has_what_is_not_stored() {
    let builder = Cluster::builder(MAJOR).wal_segsize(1).setting("autovacuum", "off");
    let builder = builder.setting("min_wal_size", "2MB").setting("max_wal_size", "4MB").setting("wal_keep_size", "0");
    let mut primary = builder.start().await;
    let place = Scratch::new();
    let mut standby = standby_of(&primary, MAJOR, &place, "standby").await;
    let (a, b) = (primary.socket_dir(), standby.socket_dir());
    let both = format!(
        "host={},{} port={},{} user=postgres dbname=postgres target_session_attrs=primary",
        a.display(),
        b.display(),
        primary.port(),
        standby.port()
    );
    let rig = Rig::with_more(&both, DIRECTORIES, "heartbeat = false\nstandby_slots = true\n").await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    primary.execute("CREATE TABLE t (text text)").await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    let (stored, _) = rig.write(&primary, "before", 1).await;
    process::eventually("the slot on the standby follows", SOON, async || {
        let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'drctl_ledger'";
        standby.query(slot).await.parse::<Lsn>().is_ok_and(|at| at >= stored)
    })
    .await;
    stream.terminate().await.ok();

    // While drctl is down much is written, and the primary dies.
    primary.execute("INSERT INTO t VALUES ('unstored')").await;
    crate::wal::forget_wal(&primary).await;
    replayed(&standby, primary.flush_lsn().await).await;
    primary.kill9().await;
    standby.execute("CHECKPOINT").await;
    promote(&mut standby).await;
    standby.execute("CHECKPOINT").await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| matches!(position.state, State::Streaming | State::Gap)).await;
    rig.write(&standby, "after", 2).await;
    stream.terminate().await.ok();
    assert!(rig.status().await.is_whole(), "{:?}", rig.status().await);
    assert_eq!(rig.rows("back", &[]).await, "after before unstored");
}
