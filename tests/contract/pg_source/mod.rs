//! Physical sources against a real server: what they yield is a backup that the server itself accepts.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use drctl::model::{Clock, Kind};
use drctl::source::postgres::capture::{CaptureOptions, Captured, CapturedFile, capture};
use drctl::source::postgres::conffiles::Contents;
use drctl::source::postgres::{self, Method, Options};
use drctl::source::{Begun, Finished, PAGE_SIZE, PhysicalSource};
use tokio::sync::mpsc;

use self::cluster::{Cluster, give, room};
use self::sink::{Sunk, complete, sink};

mod cluster;
mod sink;

#[derive(Debug)]
struct RealClock(Instant);

impl Clock for RealClock {
    #[allow(clippy::disallowed_methods)]
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

#[allow(clippy::disallowed_methods)]
fn options(cluster: &Cluster, method: Method) -> Options {
    let role = if method == Method::Stream { "stream_backup" } else { "local_backup" };
    Options {
        conninfo: cluster.conninfo(role),
        method,
        standby: None,
        data_directory: None,
        fast: true,
        label: "drctl test\nSTART TIMELINE: 7".to_owned(),
        max_read_rate: None,
        reader_threads: Some(2),
        clock: Arc::new(RealClock(Instant::now())),
    }
}

struct Taken {
    begun: Begun,
    finished: Finished,
    sunk: Sunk,
    /// Holds `data`.
    dir: tempfile::TempDir,
}

async fn take(mut source: Box<dyn PhysicalSource>) -> Taken {
    let dir = room();
    let target = dir.path().join("data");
    drctl::disk::empty::create_empty(&target).unwrap();
    let begun = source.begin().await.unwrap();
    // A short queue: the source must cope with a slow receiver.
    let (sender, receiver) = mpsc::channel(2);
    let receiving = tokio::task::spawn_blocking(move || sink(receiver, &target));
    source.copy(sender).await.unwrap();
    let sunk = receiving.await.unwrap();
    let finished = source.finish().await.unwrap();
    Taken { begun, finished, sunk, dir }
}

/// Changes the cluster in every way until it is told to stop.
#[allow(clippy::disallowed_methods)]
async fn disturb(cluster: &Cluster, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<u64> {
    let client = cluster.sql().await;
    tokio::spawn(async move {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            for statement in [
                "INSERT INTO ledger (note) SELECT md5(g::text) FROM generate_series(1, 50) g",
                "UPDATE steady SET text = text WHERE id % 400 = 7",
                "CREATE TABLE churn AS SELECT generate_series(1, 500) AS id",
                "CHECKPOINT",
                "DROP TABLE churn",
                "CREATE TABLE churn TABLESPACE outside AS SELECT generate_series(1, 500) AS id",
                "TRUNCATE churn",
                "DROP TABLE churn",
            ] {
                client.batch_execute(statement).await.unwrap();
            }
            rounds += 1;
        }
        rounds
    })
}

const STEADY: &str = "SELECT md5(string_agg(id || text, ',' ORDER BY id)) FROM steady";
const LEDGER: &str = "SELECT count(*) || ' ' || max(id) FROM ledger";

async fn a_backup_taken_under_load_is_accepted(method: Method) {
    let source = Cluster::create().await;
    source.furnish().await;
    source.least_privilege().await;
    let temporary = source.sql().await;
    temporary.batch_execute("CREATE TEMP TABLE passing AS SELECT generate_series(1, 100) AS id").await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let load = disturb(&source, Arc::clone(&stop)).await;

    let taken = take(postgres::open(options(&source, method)).await.unwrap()).await;
    stop.store(true, Ordering::Relaxed);
    assert!(load.await.unwrap() > 0);

    assert_eq!(taken.begun.timeline, taken.finished.timeline);
    assert!(taken.begun.start_lsn < taken.finished.stop_lsn);
    assert!(taken.begun.cluster.checksums);
    assert_eq!(taken.begun.cluster.version / 10_000, 15);
    assert!(taken.begun.estimated_bytes > 10 << 20);
    assert!(taken.sunk.damaged.is_empty(), "{:?}", taken.sunk.damaged);
    assert_eq!(taken.sunk.files.last().unwrap(), "global/pg_control");
    assert_eq!(taken.sunk.tablespaces.len(), 1);
    for path in ["pg_wal", "pg_wal/archive_status", "pg_replslot", "pg_notify", "log", "pg_tblspc"] {
        assert!(taken.sunk.directories.iter().any(|known| known == path), "{path}");
    }
    for path in &taken.sunk.files {
        let name = path.rsplit('/').next().unwrap();
        let unwanted = ["postmaster.pid", "standby.signal", "core", "core.17", "backup_label", "tablespace_map"];
        assert!(!unwanted.contains(&name) && !name.starts_with("pg_internal.init"), "{path}");
        assert!(!path.starts_with("log/") && !path.starts_with("pg_wal/"), "{path}");
        assert!(!(name.starts_with('t') && name.contains('_') && path.starts_with("base/")), "{path}");
    }
    let map = taken.finished.files.iter().find(|file| file.path == "tablespace_map").unwrap();
    assert!(String::from_utf8_lossy(&map.bytes).contains("outside"));

    source.value("SELECT pg_switch_wal()").await;
    complete(&taken.dir.path().join("data"), &taken.finished, &source.data().join("pg_wal"));
    give(taken.dir.path());
    let restored = Cluster::start(taken.dir).await;
    for query in
        [STEADY, LEDGER, "SELECT count(*) FROM far", "SELECT count(*) FROM near", "SELECT count(*) FROM empty_one"]
    {
        assert_eq!(restored.value(query).await, source.value(query).await, "{query}");
    }
    assert_eq!(restored.value("SELECT count(*) FROM fleeting").await, "0");
    restored.sql().await.batch_execute("SELECT bt_index_check('steady_pkey', true)").await.unwrap();
    restored.sql().await.batch_execute("SELECT * FROM verify_heapam('steady')").await.unwrap();

    // The restored server runs, has the same identity, and is another one all the same.
    let mut confused = options(&source, Method::Local);
    confused.data_directory = Some(restored.data());
    let refusal = postgres::open(confused).await.map(drop).unwrap_err();
    assert_eq!(refusal.kind(), Kind::Refused, "{refusal}");
    restored.stop_and_check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_backup_taken_under_load_is_accepted() {
    a_backup_taken_under_load_is_accepted(Method::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_backup_taken_under_load_is_accepted() {
    a_backup_taken_under_load_is_accepted(Method::Stream).await;
}

async fn damage_is_reported_with_its_blocks(method: Method) {
    let source = Cluster::create().await;
    source.least_privilege().await;
    let client = source.sql().await;
    let table = "CREATE TABLE brittle AS SELECT repeat('x', 1000) FROM generate_series(1, 1000); CHECKPOINT";
    client.batch_execute(table).await.unwrap();
    let path = source.value("SELECT pg_relation_filepath('brittle')").await;
    let file = OpenOptions::new().write(true).open(source.data().join(&path)).unwrap();
    let page = |number: u64| number * PAGE_SIZE as u64;
    // One in its rows; one in its LSN, which then claims a future that never was; one that claims to be empty.
    file.write_all_at(b"?", page(3) + 4000).unwrap();
    file.write_all_at(&[0xFF; 8], page(5)).unwrap();
    file.write_all_at(&[0; 2], page(101) + 14).unwrap();
    let taken = take(postgres::open(options(&source, method)).await.unwrap()).await;
    let found: Vec<_> = taken.sunk.damaged.into_iter().collect();
    assert_eq!(found, [(path.clone(), vec![3, 5, 101])]);
    let copied = fs::read(taken.dir.path().join("data").join(&path)).unwrap();
    assert_eq!(copied, fs::read(source.data().join(&path)).unwrap(), "the bytes are kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_backup_reports_damage_with_its_blocks() {
    damage_is_reported_with_its_blocks(Method::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_backup_reports_damage_with_its_blocks() {
    damage_is_reported_with_its_blocks(Method::Stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_grant_is_named() {
    let source = Cluster::create().await;
    source.least_privilege().await;
    let mut unprivileged = options(&source, Method::Local);
    unprivileged.conninfo = source.conninfo("nobody_special");
    let error = postgres::open(unprivileged.clone()).await.map(drop).unwrap_err();
    assert!(error.hint_text().unwrap().contains("pg_read_all_settings"), "{error}");
    unprivileged.data_directory = Some(source.data());
    let error = postgres::open(unprivileged).await.unwrap().begin().await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("pg_backup_start"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn losing_the_session_or_the_receiver_fails_the_backup() {
    let source = Cluster::create().await;
    source.least_privilege().await;

    let mut backup = postgres::open(options(&source, Method::Local)).await.unwrap();
    assert!(backup.finish().await.is_err(), "nothing to finish yet");
    backup.begin().await.unwrap();
    let (sender, receiver) = mpsc::channel(1);
    drop(receiver);
    assert_eq!(backup.copy(sender).await.unwrap_err().kind(), Kind::Cancelled);
    assert!(backup.finish().await.is_err());

    let mut backup = postgres::open(options(&source, Method::Local)).await.unwrap();
    backup.begin().await.unwrap();
    source.value("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'local_backup'").await;
    // Nobody receives: without its session the source must end by itself.
    let (sender, _receiver) = mpsc::channel(1);
    let error = tokio::time::timeout(Duration::from_secs(20), backup.copy(sender)).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    drop(backup);
    let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'local_backup'";
    for _ in 0..100 {
        if source.value(left).await == "0" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("a session stayed behind");
}

/// The names of everything in a quiet cluster.
async fn names(cluster: &Cluster, method: Method) -> BTreeSet<String> {
    let sunk = take(postgres::open(options(cluster, method)).await.unwrap()).await.sunk;
    sunk.files.into_iter().chain(sunk.directories).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ways_find_the_same_files() {
    let source = Cluster::create().await;
    source.furnish().await;
    source.least_privilege().await;
    let (local, streamed) = (names(&source, Method::Local).await, names(&source, Method::Stream).await);
    let difference: Vec<&String> = local.symmetric_difference(&streamed).collect();
    assert!(difference.is_empty(), "{difference:?}");
    assert!(local.iter().any(|name| name.starts_with("pg_tblspc/")));
}

async fn captured(cluster: &Cluster, role: &str, local: bool) -> Captured {
    let client = drctl::pg::sql::connect(&cluster.conninfo(role)).await.unwrap();
    let captured = capture(&client, &CaptureOptions { local, extra: Vec::new() }).await.unwrap();
    let text = serde_json::to_string(&captured).unwrap();
    assert!(!text.contains("SCRAM-SHA-256") && !text.contains("hunter2"), "no password and no digest of one");
    assert_eq!(serde_json::from_str::<Captured>(&text).unwrap(), captured);
    captured
}

#[tokio::test(flavor = "multi_thread")]
async fn the_surroundings_are_captured_as_far_as_the_role_sees() {
    let source = Cluster::create().await;
    source.furnish().await;
    source.least_privilege().await;
    for statement in [
        "CREATE ROLE \"o'dd\" LOGIN PASSWORD 'hunter2' CONNECTION LIMIT 3 VALID UNTIL '2030-01-01 00:00:00+00'",
        "GRANT pg_monitor TO \"o'dd\" WITH ADMIN OPTION",
        "ALTER ROLE \"o'dd\" SET work_mem TO '5MB'",
        "ALTER ROLE \"o'dd\" IN DATABASE postgres SET search_path TO \"$user\", public",
    ] {
        source.sql().await.batch_execute(statement).await.unwrap();
    }

    let seen = captured(&source, "local_backup", true).await;
    assert_eq!(seen.version / 10_000, 15);
    let names: Vec<&str> = seen.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["config_file", "hba_file", "ident_file"]);
    let is_read = |file: &CapturedFile| matches!(file.contents, Contents::Bytes(_));
    assert!(seen.files.iter().all(is_read));
    assert!(seen.settings.iter().any(|setting| setting.name == "wal_keep_size" && setting.value == "4GB"));
    for statement in [
        "CREATE ROLE \"o'dd\" WITH NOSUPERUSER INHERIT NOCREATEROLE NOCREATEDB LOGIN NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 3 VALID UNTIL '2030-01-01 00:00:00+00';",
        "GRANT pg_monitor TO \"o'dd\" WITH ADMIN OPTION;",
        "ALTER ROLE \"o'dd\" SET work_mem TO '5MB';",
        "ALTER ROLE \"o'dd\" IN DATABASE postgres SET search_path TO \"$user\", public;",
    ] {
        assert!(seen.roles.iter().any(|known| known == statement), "{statement} not in {:#?}", seen.roles);
    }
    assert!(seen.databases.iter().any(|database| database.name == "postgres" && database.provider == "c"));
    assert!(seen.extensions.iter().any(|extension| extension.name == "amcheck"));
    assert!(seen.tablespaces.iter().any(|space| space.name == "outside" && space.location.ends_with("/outside")));
    assert!(seen.missing.iter().any(|missing| missing.grant.contains("pg_file_settings")));

    let remote = captured(&source, "local_backup", false).await;
    let is_named = |contents: &Contents| matches!(contents, Contents::Missing { grant: Some(grant), .. } if grant.contains("pg_read_server_files"));
    assert!(remote.files.iter().all(|file| is_named(&file.contents)), "{:?}", remote.files);
    let grants = "GRANT EXECUTE ON FUNCTION pg_read_binary_file(text), pg_show_all_file_settings() TO local_backup;
        GRANT SELECT ON pg_file_settings TO local_backup; GRANT pg_read_server_files TO local_backup";
    source.sql().await.batch_execute(grants).await.unwrap();
    let allowed = captured(&source, "local_backup", false).await;
    assert!(allowed.files.iter().all(is_read) && allowed.missing.is_empty(), "{:?}", allowed.missing);
    assert_eq!(allowed.files, seen.files);

    let blind = captured(&source, "nobody_special", false).await;
    assert!(blind.missing.iter().any(|missing| missing.grant.contains("pg_read_all_settings")));
}
