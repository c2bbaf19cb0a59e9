//! Memory stays bounded, whatever the size of a cluster and however many files it has.
//!
//! Memory depends on how many files there are and on how fast bytes move, not on what they mean. So these tests do not
//! create tables: names are linked to one file of a relation, under numbers that PostgreSQL has not used. It ignores
//! them, and a backup reads whatever has the name of a relation.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::support::dirs::{Scratch, give_to_postgres};
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;

/// What a backup and a restore may take, in KiB.
const BOUND: u64 = 256 * 1024;

/// Runs a command to its end; gives its peak resident memory in KiB and what it printed.
async fn measured(config: &Path, arguments: &[&str]) -> (u64, Value) {
    let running = Drctl::new(arguments).config(config).spawn();
    let status = format!("/proc/{}/status", running.pid());
    // The kernel keeps the peak itself, so looking now and then misses only what happens after the last look.
    let watch = std::thread::spawn(move || {
        let mut peak = 0;
        while let Some(now) = fs::read_to_string(&status).ok().and_then(|text| high_water_mark(&text)) {
            peak = now.max(peak);
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let finished = running.wait().await.ok();
    (watch.join().unwrap(), finished.json())
}

/// A process that has ended has no such line.
fn high_water_mark(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// Restores the newest backup and measures it; what is written is removed again.
async fn restored(config: &Path, directory: &Path) -> (u64, Value) {
    let shown = directory.display().to_string();
    let plan = ["restore", "many", "--json", "--target-dir", &shown];
    let (planning, plan) = measured(config, &plan).await;
    let digest = plan["digest"].as_str().unwrap();
    let run = ["restore", "many", "--json", "--target-dir", &shown, "--execute", "--plan", digest];
    let (running, report) = measured(config, &run).await;
    assert!(directory.join("global/pg_control").exists(), "{report:#}");
    assert_eq!(report["phases"][0]["name"], "fetch", "{report:#}");
    fs::remove_dir_all(directory).unwrap();
    (planning.max(running), report)
}

async fn protected(cluster: &Cluster, scratch: &Scratch) -> PathBuf {
    let directory = scratch.join("dr");
    Drctl::new(["init", directory.to_str().unwrap()]).run().await.ok();
    let config = directory.join("drctl.toml");
    let conninfo = cluster.conninfo();
    let target = format!("\n[targets.many]\nsource = \"postgres\"\nmethod = \"local\"\nconninfo = \"{conninfo}\"\n");
    fs::write(&config, fs::read_to_string(&config).unwrap() + &target).unwrap();
    config
}

/// Gives `count` further names to a file of a relation.
fn link(relation: &Path, count: u32) {
    let directory = relation.parent().unwrap();
    for node in 0..count {
        fs::hard_link(relation, directory.join((1_000_000 + node).to_string())).unwrap();
    }
}

/// The first file of a table with `rows` rows, whose pages are on disk.
async fn table_file(cluster: &Cluster, rows: &str) -> PathBuf {
    let client = cluster.client().await;
    client.batch_execute(&format!("CREATE TABLE t AS {rows}; CHECKPOINT")).await.unwrap();
    let row = client.query_one("SELECT pg_relation_filepath('t')", &[]).await.unwrap();
    cluster.data_dir().join(row.get::<_, String>(0))
}

#[tokio::test]
async fn fifty_thousand_relation_files_stay_within_the_bound() {
    let (cluster, scratch) = (Cluster::start_new(15).await, Scratch::new());
    let config = protected(&cluster, &scratch).await;
    link(&table_file(&cluster, "SELECT 1 AS a").await, 50_000);
    let (peak, report) = measured(&config, &["backup", "many", "--fast", "--json"]).await;
    assert!(report["backup"]["size_bytes"].as_u64().unwrap() > 50_000 * 8192, "{report:#}");
    assert!(peak < BOUND, "the backup took {peak} KiB");
    let (peak, report) = restored(&config, &scratch.join("restored")).await;
    assert!(report["phases"][0]["bytes"].as_u64().unwrap() > 50_000 * 8192, "{report:#}");
    assert!(peak < BOUND, "the restore took {peak} KiB");
    // The next one remembers all of them.
    cluster.execute("UPDATE t SET a = 2; CHECKPOINT").await;
    let (peak, report) = measured(&config, &["backup", "many", "--fast", "--json"]).await;
    assert_eq!((report["backup"]["kind"].as_str(), &report["full_because"]), (Some("incremental"), &Value::Null));
    assert!(peak < BOUND, "the incremental backup took {peak} KiB");
}

/// Nothing of it can be compressed, so every pack is full while both regions write: the worst case in flight.
#[tokio::test]
async fn what_does_not_compress_stays_within_the_bound() {
    let (cluster, scratch) = (Cluster::builder(15).checksums(false).start().await, Scratch::new());
    let config = protected(&cluster, &scratch).await;
    let relation = table_file(&cluster, "SELECT 1 AS a").await;
    let noise = relation.with_file_name("999999");
    fs::write(&noise, noise_of(64 << 20)).unwrap();
    give_to_postgres(&noise);
    link(&noise, 7);
    let (peak, report) = measured(&config, &["backup", "many", "--fast", "--json"]).await;
    assert!(report["backup"]["stored_bytes"].as_u64().unwrap() > 500 << 20, "{report:#}");
    assert!(peak < BOUND, "the backup took {peak} KiB");
    let (peak, report) = restored(&config, &scratch.join("restored")).await;
    assert!(report["phases"][0]["fetched_bytes"].as_u64().unwrap() > 500 << 20, "{report:#}");
    assert!(peak < BOUND, "the restore took {peak} KiB");
}

/// Bytes that no compressor shortens; the same ones every time.
fn noise_of(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
