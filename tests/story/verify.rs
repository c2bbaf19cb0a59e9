//! `verify`, `repair`, `list`, `show` and `status` over real backups in two directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use drctl::model::Lsn;
use drctl::repository::wal::frame::{FrameHeader, FrameKind};
use serde_json::Value;

use super::check::first_configuration;
use crate::support::dirs::Scratch;
use crate::support::drctl::{Drctl, Finished};
use crate::support::pg::Cluster;
use crate::support::process;

/// Two regions and one backup of a small cluster.
struct Vault {
    scratch: Scratch,
    config: PathBuf,
    cluster: Cluster,
    id: String,
}

impl Vault {
    async fn new() -> Self {
        let scratch = Scratch::new();
        let cluster = Cluster::start_new(15).await;
        cluster.execute("CREATE TABLE t AS SELECT g, repeat('x', 100) FROM generate_series(1, 5000) g").await;
        let more = "rpo = \"5s\"\nmethod = \"local\"\nship_interval = \"100ms\"\n";
        let config = first_configuration(&scratch, &cluster, more).await;
        let report = Drctl::new(["backup", "ledger", "--fast", "--json"]).config(&config).run().await.ok().json();
        let id = report["backup"]["id"].as_str().unwrap().to_owned();
        Self { scratch, config, cluster, id }
    }

    fn drctl(&self, arguments: &[&str]) -> Drctl {
        Drctl::new(arguments).config(&self.config)
    }

    async fn json(&self, arguments: &[&str], code: i32) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        let quiet = self.drctl(&arguments).expect_log("taken from another region").expect_log("is not readable");
        quiet.expect_log("wrap is not readable").run().await.code(code).json()
    }

    fn region(&self, name: &str) -> PathBuf {
        self.scratch.join("dr").join(name)
    }

    /// Every object of a region but intents, which are no part of a backup.
    fn objects(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let mut objects = BTreeMap::new();
        collect(&self.region(name), "", &mut objects);
        objects.retain(|key, _| !key.starts_with("intents/") && !key.starts_with('.'));
        objects
    }

    /// Every data frame of the log by its first byte, with its name and its header.
    fn frames(&self) -> BTreeMap<Lsn, (String, FrameHeader)> {
        let frames = self.objects("region-b").into_iter().filter(|(key, _)| key.starts_with("wal/"));
        let frames = frames.map(|(key, body)| {
            // Eight bytes that name the format, four that say how long the header is.
            let length = u32::from_le_bytes(body[8..12].try_into().unwrap()) as usize;
            let header: FrameHeader = serde_json::from_slice(&body[12..12 + length]).unwrap();
            (header.span.start, (key, header))
        });
        frames.filter(|(_, (_, header))| header.kind == FrameKind::Data).collect()
    }

    /// The WAL that the backup needs.
    async fn need(&self) -> (Lsn, Lsn) {
        let shown = self.json(&["show", &self.id], 0).await;
        let lsn = |name: &str| shown["wal"][name].as_str().unwrap().parse().unwrap();
        (lsn("start_lsn"), lsn("stop_lsn"))
    }

    /// How the backup stands in each region, as `list` and `show` agree, and up to when it goes forward there.
    async fn stands(&self) -> Vec<(String, Option<DateTime<Utc>>)> {
        let list = self.json(&["list"], 0).await["backups"][0]["regions"].clone();
        assert_eq!(list, self.json(&["show", &self.id], 0).await["regions"]);
        let text = |region: &Value, name: &str| region[name].as_str().map(str::to_owned);
        let stand = |region: &Value| {
            (text(region, "state").unwrap(), text(region, "recoverable_until").map(|time| time.parse().unwrap()))
        };
        list.as_array().unwrap().iter().map(stand).collect()
    }

    fn first(&self, class: &str) -> (String, PathBuf) {
        let key = self.objects("region-b").into_keys().find(|key| key.starts_with(class)).unwrap();
        let path = self.region("region-a").join(&key);
        (key, path)
    }
}

fn collect(directory: &Path, prefix: &str, objects: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let key = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => collect(&entry.path(), &format!("{key}/"), objects),
            false => drop(objects.insert(key, fs::read(entry.path()).unwrap())),
        }
    }
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn narrow(finished: &Finished) {
    let line = finished.stdout.lines().find(|line| line.chars().count() > 120);
    assert!(line.is_none(), "{finished}");
}

#[tokio::test]
async fn a_whole_backup_passes_every_level_and_is_told_in_full() {
    let vault = Vault::new().await;
    for level in ["l0", "l1", "l2"] {
        let report = vault.json(&["verify", "--level", level, "--scrub"], 0).await;
        assert_eq!(report["backups"][0]["regions"][1]["level"], level.to_uppercase(), "{report:#}");
    }
    let report = vault.json(&["verify", &vault.id], 0).await;
    assert_eq!(report["level"], "L2");

    let list = vault.json(&["list", "ledger"], 0).await;
    let backup = &list["backups"][0];
    assert_eq!((&backup["id"], &backup["kind"]), (&vault.id.clone().into(), &"full".into()));
    for key in ["target", "source", "started_at", "finished_at", "start_lsn", "stop_lsn", "recoverable_until"] {
        assert!(backup[key].is_string(), "{key}: {list:#}");
    }
    for key in ["size_bytes", "stored_bytes", "timeline"] {
        assert!(backup[key].is_u64(), "{key}: {list:#}");
    }
    let regions = backup["regions"].as_array().unwrap();
    assert!(regions.len() == 2 && regions.iter().all(|region| region["state"] == "complete"), "{list:#}");
    assert!(regions.iter().all(|region| region["recoverable_until"].is_string()), "{list:#}");

    let table = vault.drctl(&["list"]).run().await.ok();
    assert!(table.stdout.contains(&vault.id) && table.stdout.contains("2 of 2"), "{table}");
    assert!(table.stdout.contains("Restorable: from "), "{table}");
    narrow(&table);
    let shown = vault.drctl(&["show", "latest"]).run().await.ok();
    assert!(shown.stdout.contains("opens with") && shown.stdout.contains("age1"), "{shown}");
    narrow(&shown);
    assert_eq!(vault.json(&["show", &vault.id], 0).await["wraps"].as_array().unwrap().len(), 1);

    // No receiver runs: after five seconds nobody can say what is exposed.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let status = vault.json(&["status"], 1).await;
    assert!(status["targets"][0]["regions"][0]["exposure_seconds"].is_null(), "{status:#}");
    assert!(status["targets"][0]["next"].as_str().unwrap().contains("wal stream"), "{status:#}");
    let told = vault.drctl(&["status"]).run().await.code(1);
    assert!(told.stdout.starts_with("WORST  ledger"), "{told}");
    narrow(&told);
}

#[tokio::test]
async fn what_rots_and_what_is_lost_is_named_and_repaired_without_a_key() {
    let vault = Vault::new().await;
    let good = vault.objects("region-b");
    assert!(vault.objects("region-a") == good);
    fs::rename(vault.scratch.join("dr/recovery.age"), vault.scratch.join("far-away")).unwrap();

    for class in ["packs/", "manifests/", "inventories/", "wal/", "commits/", "signers/"] {
        let (key, path) = vault.first(class);
        flip(&path);
        if class != "signers/" {
            let report = vault.json(&["verify", "--scrub"], 1).await;
            assert!(report.to_string().contains(&key), "{class}: {report:#}");
            assert_eq!(report["backups"][0]["restorable"], true, "{class}");
        }
        let plan = vault.json(&["repair", "--dry-run"], 0).await;
        assert_eq!(plan["regions"][0]["replaced"][0], key.as_str(), "{plan:#}");
        assert!(vault.objects("region-a") != good);
        let report = vault.json(&["repair", "ledger"], 0).await;
        assert_eq!(report["regions"][0]["replaced"][0], key.as_str(), "{report:#}");
        assert!(vault.objects("region-a") == good, "{class}");
    }

    let (start, stop) = vault.need().await;
    let frames = vault.frames();
    let needed = |header: &FrameHeader| header.span.start < stop && start < header.span.end;
    let (frame, _) = frames.values().find(|(_, header)| needed(header)).unwrap();
    for class in ["packs/", frame.as_str(), "commits/"] {
        let (key, path) = vault.first(class);
        fs::remove_file(&path).unwrap();
        let report = vault.json(&["verify"], 4).await;
        assert!(report.to_string().contains(class), "{key}: {report:#}");
        let stands = vault.stands().await;
        assert_eq!((stands[0].0.as_str(), stands[0].1), ("debt", None), "{key}");
        assert_eq!(stands[1].0, "complete", "{key}");
        vault.json(&["repair", "--region", "region-a", "--quick"], 0).await;
        assert!(vault.objects("region-a") == good, "{key}");
    }
    vault.json(&["verify", "--scrub"], 0).await;
}

#[tokio::test]
async fn wal_lost_behind_a_backup_takes_the_region_back_in_time() {
    let vault = Vault::new().await;
    let (_, stop) = vault.need().await;
    // The backup's own receiver leaves no slot behind.
    let stream = vault.drctl(&["wal", "stream", "ledger"]).expect_log("the replication slot is gone").spawn();
    for n in 0..4 {
        vault.cluster.execute(&format!("CREATE TABLE later_{n} (n int)")).await;
        let wanted = vault.cluster.flush_lsn().await;
        process::eventually("WAL is stored", Duration::from_secs(30), async || {
            vault.frames().values().any(|(_, header)| header.span.end >= wanted)
                && vault.objects("region-a") == vault.objects("region-b")
        })
        .await;
    }
    stream.terminate().await.ok();
    let frames = vault.frames();
    let with_commit: Vec<_> =
        frames.range(stop..).map(|(_, frame)| frame).filter(|(_, header)| header.span.last_commit.is_some()).collect();
    assert!(with_commit.len() >= 4, "{with_commit:?}");
    let (lost, before, last) = (with_commit[2], with_commit[1], with_commit[with_commit.len() - 1]);
    let whole = vault.stands().await;
    assert!(whole.iter().all(|stand| *stand == ("complete".to_owned(), last.1.span.last_commit)), "{whole:?}");

    fs::remove_file(vault.region("region-a").join(&lost.0)).unwrap();
    let stands = vault.stands().await;
    assert_eq!(stands[0], ("complete".to_owned(), before.1.span.last_commit), "what the backup needs is there");
    assert_eq!(stands[1], whole[1]);
    let status = vault.json(&["wal", "status", "ledger"], 0).await;
    let region = &status["targets"][0]["branches"][0]["regions"][0];
    let windows = region["windows"].as_array().unwrap();
    assert_eq!((windows.len(), region["missing_frames"].as_u64()), (2, Some(1)), "{status:#}");
    assert_eq!(windows[0]["end"], lost.1.span.start.to_string(), "{status:#}");
    let verified = vault.json(&["verify"], 4).await;
    assert!(verified.to_string().contains(&lost.0), "{verified:#}");
    vault.json(&["repair", "--quick"], 0).await;
    assert_eq!(vault.stands().await, whole);
    vault.json(&["verify", "--scrub"], 0).await;
}

#[tokio::test]
async fn a_directory_that_vanished_is_made_and_filled_again() {
    let vault = Vault::new().await;
    let good = vault.objects("region-b");
    fs::remove_dir_all(vault.region("region-a")).unwrap();
    let list = vault.json(&["list"], 0).await;
    assert_eq!(list["backups"][0]["regions"][0]["state"], "unreachable", "{list:#}");
    vault.json(&["verify"], 1).await;
    let report = vault.json(&["repair"], 0).await;
    assert_eq!(report["regions"][0]["copied"], good.len(), "{report:#}");
    assert!(vault.objects("region-a") == good);
    let again = vault.json(&["repair"], 0).await;
    assert_eq!((&again["regions"][0]["copied"], &again["regions"][0]["bytes"]), (&0.into(), &0.into()));
    vault.json(&["verify", "latest"], 0).await;
}
