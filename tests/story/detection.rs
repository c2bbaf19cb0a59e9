//! Change detection from WAL: it never misses a page, whatever happens to relations; it says when it cannot know; and what
//! it leaves out comes back.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use drctl::model::Lsn;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::restore::Protected;
use crate::support::drctl::{Background, Drctl};
use crate::support::pg::{Builder, Cluster};
use crate::support::process;

const PAGE: u64 = 8192;

/// A protected cluster whose backups detect changes in this way.
async fn detecting(builder: Builder, how: &str) -> Protected {
    let protected = Protected::of(builder).await;
    detect_by(&protected, how);
    protected
}

/// Without a heartbeat, which would be written between a backup and the dump that it is compared with.
fn detect_by(protected: &Protected, how: &str) {
    let path = protected.home().join("drctl.toml");
    let text = fs::read_to_string(&path).unwrap();
    let stays = |line: &&str| !line.starts_with("detection") && !line.starts_with("heartbeat");
    let mut lines: String = text.lines().filter(stays).map(|l| format!("{l}\n")).collect();
    lines.push_str(&format!("detection = \"{how}\"\nheartbeat = false\n"));
    let whole = path.with_extension("new");
    fs::write(&whole, lines).unwrap();
    fs::rename(whole, path).unwrap();
}

fn backup(protected: &Protected, options: &[&str]) -> Drctl {
    protected.drctl([&["backup", "ledger", "--fast", "--json"], options].concat())
}

/// A receiver; the first one makes its slot.
fn streaming(protected: &Protected) -> Background {
    protected.drctl(["wal", "stream", "ledger"]).expect_log("slot is gone").spawn()
}

async fn taken(protected: &Protected, options: &[&str]) -> Value {
    backup(protected, options).run().await.ok().json()
}

/// A command beside the cluster, in one of its databases.
async fn text_of(cluster: &Cluster, database: &str) -> String {
    let mut command = cluster.tool("pg_dump");
    // Unlogged tables begin anew after every recovery.
    command.args(["--no-sync", "--no-tablespaces", "--no-unlogged-table-data", database]);
    let text = process::run_async(command).await;
    text.lines().filter(|line| !line.contains("restrict ")).map(|line| format!("{line}\n")).collect()
}

/// What may happen between two backups. Each leaves the tables that the others need.
const EVENTS: [&[&str]; 16] = [
    &["UPDATE t SET body = body || 'x' WHERE id % 7 = 3"],
    &["DELETE FROM t WHERE id % 11 = 2", "VACUUM t"],
    &[
        "INSERT INTO t SELECT g, repeat(md5(g::text), 4), ARRAY[g % 9], point(g, 1) FROM generate_series(100000, 101500) g ON CONFLICT DO NOTHING",
    ],
    &["DELETE FROM t WHERE id > 90000", "VACUUM (TRUNCATE) t"],
    &["VACUUM FULL t"],
    &["CLUSTER t USING t_pkey"],
    &["REINDEX TABLE t"],
    &["DROP TABLE IF EXISTS emptied", "CREATE TABLE emptied AS SELECT g, md5(g::text) FROM generate_series(1, 3000) g"],
    &["TRUNCATE filled", "INSERT INTO filled SELECT g FROM generate_series(1, 4000) g"],
    &["SELECT nextval('s') FROM generate_series(1, 50)", "SELECT setval('s', 1000)"],
    &["BEGIN; TRUNCATE frozen; COPY frozen FROM PROGRAM 'seq 1 3000' WITH (FREEZE); COMMIT"],
    &["ALTER TABLE filled SET TABLESPACE space"],
    &["ALTER TABLE filled SET TABLESPACE pg_default"],
    &["DROP DATABASE IF EXISTS copied", "CREATE DATABASE copied TEMPLATE template1"],
    &[
        "CREATE UNLOGGED TABLE IF NOT EXISTS loose AS SELECT g FROM generate_series(1, 500) g",
        "ALTER TABLE loose SET LOGGED",
        "ALTER TABLE loose SET UNLOGGED",
    ],
    // Hint bits alone, which only clusters with checksums log.
    &["UPDATE filled SET a = a WHERE a < 500", "SELECT count(*) FROM filled", "CHECKPOINT", "SELECT count(*) FROM t"],
];

async fn populate(cluster: &Cluster) {
    let space = cluster.extra_dir("space");
    cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{}'", space.display())).await;
    cluster
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, body text, tags int[], place point) WITH (autovacuum_enabled = off);
             INSERT INTO t SELECT g, repeat(md5(g::text), 4), ARRAY[g % 9], point(g, 1) FROM generate_series(1, 20000) g;
             CREATE INDEX ON t USING hash (id); CREATE INDEX ON t USING gin (tags); CREATE INDEX ON t USING gist (place);
             CREATE INDEX ON t USING brin (id); CREATE INDEX ON t USING spgist (place);
             CREATE TABLE still AS SELECT g, repeat('still', 100) AS s FROM generate_series(1, 20000) g;
             CREATE TABLE filled (a int); INSERT INTO filled SELECT g FROM generate_series(1, 4000) g;
             CREATE TABLE frozen (a int); CREATE TABLE emptied AS TABLE filled; CREATE SEQUENCE s",
        )
        .await;
    cluster.execute("VACUUM still").await;
}

async fn happen(cluster: &Cluster, chance: &mut StdRng) {
    let mut events = EVENTS;
    events.shuffle(chance);
    for event in &events[..chance.random_range(1..=6)] {
        for statement in *event {
            cluster.execute(statement).await;
        }
    }
    if cluster.major() >= 15 && chance.random_bool(0.3) {
        cluster.execute("DROP DATABASE IF EXISTS cloned").await;
        cluster.execute("CREATE DATABASE cloned TEMPLATE template1 STRATEGY file_copy").await;
    }
}

async fn rounds(builder: Builder, ways: &[&str], rounds: usize) {
    let seed = std::env::var("DRCTL_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    let mut chance = StdRng::seed_from_u64(seed);
    let protected = detecting(builder, "auto").await;
    let cluster = &protected.cluster;
    populate(cluster).await;
    let mut stream = streaming(&protected);
    protected.durable().await;
    let first = taken(&protected, &[]).await;
    assert_eq!(first["detection"]["by"], Value::Null, "{first}");
    let mut unread = 0;
    for round in 0..rounds {
        let way = ways[round % ways.len()];
        detect_by(&protected, way);
        happen(cluster, &mut chance).await;
        if round == rounds / 2 {
            // What comes after it goes on where the killed one was.
            stream.kill9();
            stream = streaming(&protected);
            protected.durable().await;
        }
        let report = taken(&protected, if round % 2 == 0 { &["--verify-detection"] } else { &[] }).await;
        assert_eq!(report["detection"]["by"], way, "DRCTL_SEED={seed} round {round}: {report}");
        assert_eq!(report["detection"]["because"], Value::Null, "DRCTL_SEED={seed} round {round}: {report}");
        assert_eq!(report["backup"]["provenance"]["detection"], way, "{report}");
        if round % 2 == 0 {
            assert_eq!(report["detection"]["proof"]["pages"], 0, "DRCTL_SEED={seed} round {round}: {report}");
        } else {
            unread += report["pages"]["unread"].as_u64().unwrap();
        }
    }
    // `still` alone has more than a thousand pages.
    assert!(unread > 1000, "{unread}");
    happen(cluster, &mut chance).await;
    let last = taken(&protected, &[]).await;
    assert!(last["pages"]["unread"].as_u64().unwrap() > 1000, "{last}");
    let text = text_of(cluster, "postgres").await;
    let place = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'space'";
    let moved = format!("{}={}", cluster.query(place).await, protected.scratch.join("space").display());
    let restored = protected.restored("restored", &["--immediate", "--tablespace", &moved]).await;
    restored.amcheck().await;
    restored.execute("DROP EXTENSION amcheck").await;
    let came_back = text_of(&restored, "postgres").await;
    let other = came_back.lines().zip(text.lines()).find(|(restored, dumped)| restored != dumped);
    assert!(came_back == text, "DRCTL_SEED={seed}: another text: {other:?}");
    stream.terminate().await.ok();
}

#[tokio::test]
async fn the_receiver_misses_nothing_without_checksums() {
    rounds(Cluster::builder(15).checksums(false), &["wal"], 6).await;
}

#[tokio::test]
async fn neither_the_receiver_nor_the_summaries_miss_anything() {
    rounds(Cluster::builder(18).setting("summarize_wal", "on"), &["wal", "wal", "summaries", "summaries"], 8).await;
}

#[tokio::test]
async fn what_cannot_be_known_is_read_and_told() {
    let protected = detecting(Cluster::builder(17).setting("wal_keep_size", "1GB"), "auto").await;
    protected.cluster.execute("CREATE TABLE still AS SELECT g FROM generate_series(1, 200000) g").await;
    taken(&protected, &[]).await;
    let because = |report: &Value| {
        assert_eq!(
            (report["detection"]["by"].as_str(), report["pages"]["unread"].as_u64()),
            (Some("read"), Some(0)),
            "{report}"
        );
        report["detection"]["because"].as_str().unwrap().to_owned()
    };
    let told = because(&taken(&protected, &[]).await);
    assert!(told.contains("no receiver on this machine") && told.contains("summarize_wal is off"), "{told}");
    let stream = streaming(&protected);
    protected.durable().await;
    // A proof that was asked for and could not be made is owed.
    let owed = backup(&protected, &["--verify-detection"]).run().await.code(4).json();
    assert_eq!(
        (&owed["detection"]["unproved"], &owed["detection"]["proof"]),
        (&Value::Bool(true), &Value::Null),
        "{owed}"
    );
    let told = because(&owed);
    assert!(told.contains("WAL was read from"), "{told}");
    let report = taken(&protected, &[]).await;
    assert_eq!(report["detection"]["by"], "wal", "{report}");
    assert!(report["pages"]["read"].as_u64().unwrap() < report["pages"]["unread"].as_u64().unwrap(), "{report}");

    // A journal that lost its end knows nothing of what was in it.
    stream.terminate().await.ok();
    let journal = protected.home().join("state/ledger.changed");
    let bytes = fs::read(&journal).unwrap();
    fs::write(&journal, &bytes[..bytes.len() - 1]).unwrap();
    protected.cluster.execute("UPDATE still SET g = g WHERE g < 100").await;
    let told = because(&taken(&protected, &[]).await);
    assert!(told.contains("WAL was read up to"), "{told}");
    // By a base backup of the server every byte comes.
    let stream = streaming(&protected);
    protected.durable().await;
    taken(&protected, &[]).await;
    protected.set_method("stream");
    let told = because(&taken(&protected, &[]).await);
    assert!(told.contains("brings every page"), "{told}");
    stream.terminate().await.ok();

    detect_by(&protected, "read");
    let refused = backup(&protected, &["--verify-detection"]).run().await.code(2);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("no detection to verify"), "{refused}");
    protected.set_method("auto");
    let plain = taken(&protected, &[]).await;
    assert_eq!((plain["detection"]["by"].as_str(), &plain["detection"]["because"]), (Some("read"), &Value::Null));
    detect_by(&protected, "auto\"\nfull_every = \"1s");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let renewed = taken(&protected, &[]).await;
    assert_eq!(renewed["backup"]["kind"], "full", "{renewed}");
    assert!(renewed["full_because"].as_str().unwrap().starts_with("the last full backup began at"), "{renewed}");
}

/// Changes a page as a broken disk, or a bug, would: past WAL, and with a position that WAL should have.
fn change_behind_the_back_of_wal(cluster: &Cluster, path: &str, lsn: Lsn) {
    let file = fs::OpenOptions::new().read(true).write(true).open(cluster.data_dir().join(path)).unwrap();
    let mut page = vec![0; usize::try_from(PAGE).unwrap()];
    file.read_exact_at(&mut page, 3 * PAGE).unwrap();
    page[0..4].copy_from_slice(&u32::try_from(lsn.0 >> 32).unwrap().to_le_bytes());
    page[4..8].copy_from_slice(&u32::try_from(lsn.0 & 0xFFFF_FFFF).unwrap().to_le_bytes());
    // In the text of the first row, which lies at the end of the page, behind its padding.
    page[8180] ^= 1;
    file.write_all_at(&page, 3 * PAGE).unwrap();
}

#[tokio::test]
async fn a_missed_page_is_found_stored_and_switches_detection_off() {
    let mut protected = detecting(Cluster::builder(15).checksums(false), "wal").await;
    protected.cluster.execute("CREATE TABLE still AS SELECT repeat('s', 100) s FROM generate_series(1, 20000)").await;
    protected.cluster.execute("VACUUM FREEZE still").await;
    let stream = streaming(&protected);
    protected.durable().await;
    let first = taken(&protected, &[]).await;
    let start: Lsn = first["backup"]["wal"]["start_lsn"].as_str().unwrap().parse().unwrap();
    let path = protected.cluster.query("SELECT pg_relation_filepath('still')").await;
    protected.cluster.stop().await;
    change_behind_the_back_of_wal(&protected.cluster, &path, Lsn(start.0 + 8));
    protected.cluster.start().await;
    process::eventually("the receiver is back", Duration::from_secs(30), async || {
        let status = protected.drctl(["wal", "status", "ledger", "--json"]).run().await.ok().stdout;
        status.contains("\"streaming\"")
    })
    .await;
    let wrong =
        backup(&protected, &["--verify-detection"]).expect_log("change detection missed pages").run().await.code(1);
    let report = wrong.json();
    assert_eq!(report["detection"]["proof"]["pages"], 1, "{report}");
    let example = report["detection"]["proof"]["examples"][0].as_str().unwrap();
    assert!(example.starts_with(&format!("page 3 of {path} ")), "{example}");
    let restored = protected.restored("restored", &["--immediate"]).await;
    assert_eq!(restored.query("SELECT count(*) FROM still WHERE s <> repeat('s', 100)").await, "1");

    let off = protected.home().join("state/ledger.detection-off");
    let report = taken(&protected, &[]).await;
    let because = report["detection"]["because"].as_str().unwrap();
    assert!(because.contains("switched off") && because.contains(off.to_str().unwrap()), "{report}");
    fs::remove_file(off).unwrap();
    assert_eq!(taken(&protected, &[]).await["detection"]["by"], "wal");
    stream.terminate().await.ok();
}
