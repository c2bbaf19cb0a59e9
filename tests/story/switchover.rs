//! Two servers change roles, twice, and the log goes on: from the primary, from a standby, and across its promotion. Every
//! point of every branch comes back as it was.

use drctl::jobs::wal::{Position, State};
use drctl::model::{Lsn, Timeline};

use crate::archive::SOON;
use crate::support::dirs::Scratch;
use crate::support::drctl::Background;
use crate::support::pg::Cluster;
use crate::support::process;
use crate::timelines::{promote, replayed, standby_of};
use crate::wal::{DIRECTORIES, Rig};

const MAJOR: u32 = 17;

/// A row, and the end of its commit.
struct Row {
    text: &'static str,
    timeline: u32,
    lsn: Lsn,
}

/// What was committed, and where timelines 1 and 2 were left.
#[derive(Default)]
struct Book {
    rows: Vec<Row>,
    switches: Vec<Lsn>,
}

impl Book {
    /// What there is on a timeline at a position.
    fn at(&self, timeline: u32, lsn: Lsn) -> String {
        let is_there = |row: &&Row| {
            let left = self.switches.get(row.timeline as usize - 1).copied().filter(|_| row.timeline < timeline);
            row.timeline <= timeline && row.lsn <= lsn && left.is_none_or(|left| row.lsn <= left)
        };
        let mut texts: Vec<_> = self.rows.iter().filter(is_there).map(|row| row.text).collect();
        texts.sort_unstable();
        texts.join(" ")
    }
}

/// Lets a server that was stopped follow another one.
fn follow(server: &Cluster, primary: &Cluster) {
    let settings = format!("primary_conninfo = '{}'\n", primary.conninfo());
    std::fs::write(server.data_dir().join("postgresql.auto.conf"), settings).unwrap();
    std::fs::write(server.data_dir().join("standby.signal"), "").unwrap();
}

async fn checkpoint_of(server: &Cluster) -> Lsn {
    let mut control = server.tool("pg_controldata");
    control.arg("-D").arg(server.data_dir());
    let text = process::run_async(control).await;
    assert!(text.contains("shut down"), "{text}");
    let line = text.lines().find_map(|line| line.strip_prefix("Latest checkpoint location:"));
    line.unwrap().trim().parse().unwrap()
}

/// Where a timeline left the one before.
fn left(server: &Cluster, timeline: u32) -> Lsn {
    let name = Timeline(timeline).history_file_name();
    let text = std::fs::read_to_string(server.data_dir().join("pg_wal").join(name)).unwrap();
    text.lines().rfind(|line| !line.is_empty()).unwrap().split('\t').nth(1).unwrap().parse().unwrap()
}

fn hosts(servers: [&Cluster; 2], wanted: &str) -> String {
    let [a, b] = servers.map(|server| (server.socket_dir().display().to_string(), server.port()));
    format!("host={},{} port={},{} user=postgres dbname=postgres target_session_attrs={wanted}", a.0, b.0, a.1, b.1)
}

impl Rig {
    fn aim(&self, conninfo: &str) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        let line = |line: &str| match line.starts_with("conninfo") {
            true => format!("conninfo = \"{conninfo}\"\n"),
            false => format!("{line}\n"),
        };
        std::fs::write(&self.config, text.lines().map(line).collect::<String>()).unwrap();
    }

    async fn begin(&self) -> Background {
        let stream = self.stream().spawn();
        self.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        stream
    }

    async fn add(&self, server: &Cluster, text: &'static str, timeline: u32) -> Row {
        server.execute(&format!("INSERT INTO t VALUES ('{text}')")).await;
        let lsn = server.flush_lsn().await;
        let reached = |position: &Position| position.timeline == Some(Timeline(timeline)) && position.reaches(lsn);
        self.wait(text, SOON, reached).await;
        Row { text, timeline, lsn }
    }

    /// Restores to a position of a timeline, or to its end, and compares with the book.
    async fn compare(&self, book: &Book, backup: &str, (timeline, lsn): (u32, Option<Lsn>)) {
        let directory = self.scratch.join(&format!("{timeline}-{}", lsn.unwrap_or_default().0));
        let (shown, number) = (directory.display().to_string(), timeline.to_string());
        let to = lsn.map(|lsn| lsn.to_string());
        let mut options = vec!["restore", backup, "--json", "--target-dir", &shown, "--timeline", &number];
        options.extend(to.iter().flat_map(|lsn| ["--to-lsn", lsn]));
        let plan = self.drctl(&options).run().await.ok().json();
        options.extend(["--execute", "--plan", plan["digest"].as_str().unwrap()]);
        self.drctl(&options).run().await.ok();
        let restored = Cluster::start_restored(&directory, MAJOR).await;
        let rows = restored.query("SELECT string_agg(text, ' ' ORDER BY text COLLATE \"C\") FROM t").await;
        assert_eq!(rows, book.at(timeline, lsn.unwrap_or(Lsn(u64::MAX))), "timeline {timeline} to {lsn:?}");
        drop(restored);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}

/// The primary is stopped in order, the other takes over, and the first comes back as its standby.
async fn switch_over(rig: &Rig, (a, b): (&mut Cluster, &mut Cluster), book: &mut Book) {
    book.rows.push(rig.add(a, "one", 1).await);
    a.stop().await;
    let checkpoint = checkpoint_of(a).await;
    promote(b).await;
    rig.wait("the stream follows", SOON, |position| position.timeline == Some(Timeline(2))).await;
    let switch = left(b, 2);
    assert!(switch > checkpoint, "{switch} is not behind the shutdown checkpoint at {checkpoint}");
    book.switches.push(switch);
    for (timeline, windows) in rig.windows().await {
        let whole = windows.len() == 1 && (timeline > Timeline(1) || windows[0].1 > checkpoint);
        assert!(whole, "the shutdown checkpoint at {checkpoint} is not stored: {windows:?}");
    }
    follow(a, b);
    a.start().await;
    book.rows.push(rig.add(b, "two", 2).await);
    replayed(a, book.rows[1].lsn).await;
    let status = rig.status().await;
    assert!(status.is_whole() && status.targets[0].branches.iter().all(|branch| branch.diverged.is_empty()));
}

/// WAL comes from a standby, and what it does not have yet is exposed all the same.
async fn stream_from_standby(rig: &Rig, (standby, primary): (&Cluster, &Cluster), book: &mut Book) {
    let position = rig.wait("streaming", SOON, |position| position.exposure_seconds.is_some()).await;
    assert!(position.from_standby && position.timeline == Some(Timeline(2)), "{position:?}");
    book.rows.push(rig.add(primary, "three", 2).await);
    let slot = "SELECT active FROM pg_replication_slots WHERE slot_name = 'drctl_ledger'";
    assert_eq!(standby.query(slot).await, "t");
    process::eventually("the primary keeps the slot", SOON, async || primary.query(slot).await == "f").await;

    standby.execute("ALTER SYSTEM SET primary_conninfo = ''").await;
    standby.execute("SELECT pg_reload_conf()").await;
    process::eventually("it receives nothing", SOON, async || {
        standby.query("SELECT count(*) FROM pg_stat_wal_receiver").await == "0"
    })
    .await;
    primary.execute("INSERT INTO t VALUES ('late')").await;
    let lsn = primary.flush_lsn().await;
    let exposed = |position: &Position| position.exposure_seconds.is_some_and(|seconds| seconds > 1.5);
    let position = rig.wait("what is not stored is exposed", SOON, exposed).await;
    assert!(!position.reaches(lsn), "{position:?}");
    standby.execute(&format!("ALTER SYSTEM SET primary_conninfo = '{}'", primary.conninfo())).await;
    standby.execute("SELECT pg_reload_conf()").await;
    rig.wait_durable(lsn).await;
    book.rows.push(Row { text: "late", timeline: 2, lsn });

    // Whatever needs a primary finds it behind the standby.
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    let plan = rig.drctl(&["restore", "ledger", "--json", "--target-dir", "/nowhere/yet"]).run().await;
    assert!(plan.stdout.contains("still answers with this system identifier"), "{plan}");
    let check = rig.drctl(&["check", "ledger", "--json"]).run().await;
    assert!(check.stdout.contains("WAL is streamed from a standby; exposure counts from its primary"), "{check}");
}

#[tokio::test]
async fn roles_change_while_wal_streams_and_every_branch_comes_back_exactly() {
    let quiet = Cluster::builder(MAJOR).setting("wal_keep_size", "1GB").setting("autovacuum", "off");
    let mut a = quiet.start().await;
    let place = Scratch::new();
    let mut b = standby_of(&a, MAJOR, &place, "b").await;
    let more = "heartbeat = false\nstandby_slots = true\n";
    let rig = Rig::with_more(&hosts([&a, &b], "primary"), DIRECTORIES, more).await;
    let stream = rig.begin().await;
    let backup = rig.drctl(&["backup", "ledger", "--fast", "--json"]).run().await.ok().json();
    let backup = backup["backup"]["id"].as_str().unwrap().to_owned();
    a.execute("CREATE TABLE t (text text)").await;
    let mut book = Book::default();
    switch_over(&rig, (&mut a, &mut b), &mut book).await;
    stream.terminate().await.ok();

    rig.aim(&hosts([&a, &b], "any"));
    let stream = rig.begin().await;
    stream_from_standby(&rig, (&a, &b), &mut book).await;
    // The primary dies, and the standby that streams is promoted under the stream.
    b.kill9().await;
    promote(&mut a).await;
    book.rows.push(rig.add(&a, "four", 3).await);
    let position = rig.wait("the primary itself", SOON, |position| !position.from_standby).await;
    assert_eq!(position.timeline, Some(Timeline(3)));
    book.switches.push(left(&a, 3));

    // Nobody fenced the dead one: it comes back, writes on, and archives. It is kept apart, and it is not streamed again.
    b.start().await;
    b.execute("INSERT INTO t VALUES ('divergent')").await;
    let lsn = b.flush_lsn().await;
    book.rows.push(Row { text: "divergent", timeline: 2, lsn });
    let segment = b.query(&format!("SELECT pg_walfile_name('{lsn}'), pg_switch_wal()")).await;
    let segment = b.data_dir().join("pg_wal").join(segment.split('|').next().unwrap());
    rig.drctl(&["wal", "push", "--socket", &rig.socket.display().to_string(), &segment.display().to_string()])
        .run()
        .await
        .ok();
    stream.terminate().await.ok();
    rig.aim(&b.conninfo());
    let why = "timeline 2 was left at";
    let stream = rig.stream().expect_log(why).spawn();
    let refused = |position: &Position| position.last_error.as_ref().is_some_and(|told| told.contains(why));
    let position = rig.wait("it is refused", SOON, refused).await;
    assert!(!position.reaches(lsn), "{position:?}");
    stream.terminate().await.ok();
    let status = rig.status().await;
    assert!(status.is_whole(), "{status:?}");
    let branches = &status.targets[0].branches;
    let diverged: Vec<_> =
        branches.iter().map(|branch| branch.diverged.iter().map(|tail| tail.from).collect::<Vec<_>>()).collect();
    assert_eq!(diverged, [vec![], vec![book.switches[1]], vec![]]);
    let text = rig.drctl(&["wal", "status", "ledger"]).run().await.ok().stdout;
    assert!(text.contains("DIVERGED"), "{text}");

    let (before, [one, two]) = (book.rows[0].lsn, [book.switches[0], book.switches[1]]);
    for points in [
        [(3, Some(before)), (3, Some(one))],
        [(3, Some(two)), (3, None)],
        [(2, Some(two)), (2, None)],
        [(2, Some(book.rows[2].lsn)), (1, None)],
    ] {
        let [first, second] = points.map(|point| rig.compare(&book, &backup, point));
        tokio::join!(first, second);
    }
}
