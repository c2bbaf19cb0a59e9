//! The escape hatch: a backup made by drctl comes back with Python and stock tools alone.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use drctl::model::Lsn;

use crate::check::first_configuration;
use crate::support::dirs::{Scratch, give_to_postgres};
use crate::support::drctl::Drctl;
use crate::support::from_environment;
use crate::support::ledger::Ledger;
use crate::support::pg::Cluster;
use crate::support::process::eventually;

/// Runs the program that lies in the region, not the one of the source tree.
pub fn open(region: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(from_environment("DRCTL_TEST_PYTHON"));
    command.arg(region.join("escape/1/drctl_open.py")).arg(region).args(arguments);
    // Python would leave compiled files in the region.
    command.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap()
}

#[track_caller]
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test]
async fn a_backup_comes_back_without_drctl() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let (old, new) = (cluster.extra_dir("fast"), scratch.postgres_dir("fast"));
    cluster.execute(&format!("CREATE TABLESPACE fast LOCATION '{}'", old.display())).await;
    cluster
        .execute(
            "CREATE TABLE wide TABLESPACE fast AS SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 20000) n",
        )
        .await;
    let config = first_configuration(&scratch, &cluster, "").await;
    let ledger = Ledger::start(&cluster, 2).await;
    ledger.wait_for(50).await;
    let report = Drctl::new(["backup", "ledger", "--fast", "--json"]).config(&config).run().await.ok().json();
    ledger.wait_for(50).await;
    // A second backup: its WAL is another epoch, and `ledger` means the newer one.
    let newer = Drctl::new(["backup", "ledger", "--fast", "--json"]).config(&config).run().await.ok().json();
    let book = ledger.stop().await;

    let dir = config.parent().unwrap();
    let region = dir.join("region-a");
    let listed = succeeded(&open(&region, &[]));
    let ids = [&report, &newer].map(|report| report["backup"]["id"].as_str().unwrap().to_owned());
    assert!(listed.lines().count() == 2 && ids.iter().all(|id| listed.contains(id)), "{listed}");

    let restored = scratch.join("restored");
    let (key, signer) = (dir.join("recovery.age"), trusted_signer(&config).await);
    let tablespace = format!("{}={}", old.display(), new.display());
    let keyless = open(&region, &["ledger", restored.to_str().unwrap()]);
    assert!(!keyless.status.success() && String::from_utf8_lossy(&keyless.stderr).contains("--age-identity"));
    assert!(!restored.exists(), "something was written without a key");
    let arguments = ["ledger", restored.to_str().unwrap(), "--age-identity", key.to_str().unwrap()];
    let options = ["--tablespace", &tablespace, "--trust-signer", &signer];
    let told = succeeded(&open(&region, &[&arguments[..], &options].concat()));
    assert!(told.contains(&ids[1]), "{told}");

    follow_the_last_lines(&restored, &told);
    give_to_postgres(&new);
    let server = Cluster::start_restored(&restored, 15).await;
    let durable: Lsn = newer["backup"]["wal"]["stop_lsn"].as_str().unwrap().parse().unwrap();
    let verdict = book.verify(&server, durable).await.unwrap();
    assert!(verdict.durable >= 100, "{verdict:?}");
    assert_eq!(server.query("SELECT count(*) FROM wide").await, "20000");
    server.amcheck().await;
}

/// Streams until everything that the server has written is durable.
async fn stream_everything(config: &Path, cluster: &Cluster, sql: &str, expected_log: &str) {
    let stream = Drctl::new(["wal", "stream", "ledger"]).config(config).expect_log(expected_log).spawn();
    let receiver = async || {
        let status = Drctl::new(["wal", "status", "--json"]).config(config).run().await.ok().json();
        status["targets"][0]["receiver"].clone()
    };
    eventually("streaming", Duration::from_secs(20), async || receiver().await["state"] == "streaming").await;
    if cluster.query("SELECT to_regclass('kept')").await.is_empty() {
        Drctl::new(["backup", "ledger", "--fast"]).config(config).run().await.ok();
    }
    cluster.execute(sql).await;
    let written = cluster.flush_lsn().await;
    eventually("durable", Duration::from_secs(20), async || {
        receiver().await["durable_lsn"].as_str().is_some_and(|lsn| lsn.parse::<Lsn>().unwrap() >= written)
    })
    .await;
    stream.terminate().await.ok();
}

#[tokio::test]
async fn the_newest_timeline_is_followed() {
    let (scratch, mut cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let config = first_configuration(&scratch, &cluster, "").await;
    let dir = config.parent().unwrap();
    let key = dir.join("recovery.age");
    let restore = async |name: &str| {
        let target = scratch.join(name);
        let options = ["ledger", target.to_str().unwrap(), "--age-identity", key.to_str().unwrap()];
        follow_the_last_lines(&target, &succeeded(&open(&dir.join("region-b"), &options)));
        Cluster::start_restored(&target, 15).await
    };
    stream_everything(&config, &cluster, "CREATE TABLE kept AS SELECT generate_series(1, 1000) n", "-").await;
    cluster.kill9().await;

    // The successor protects itself under the same name; its base backup is still that of its predecessor.
    let mut promoted = restore("second").await;
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(&cluster.conninfo(), &promoted.conninfo())).unwrap();
    stream_everything(&config, &promoted, "INSERT INTO kept SELECT generate_series(1, 500)", "slot is gone").await;
    promoted.kill9().await;
    assert_eq!(restore("third").await.query("SELECT count(*) FROM kept").await, "1500");
}

#[tokio::test]
async fn damage_is_named_and_never_restored() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let config = first_configuration(&scratch, &cluster, "").await;
    Drctl::new(["backup", "ledger", "--fast"]).config(&config).run().await.ok();
    let dir = config.parent().unwrap();
    let (region, key) = (dir.join("region-a"), dir.join("recovery.age"));
    let damages = [
        ("commits", "signature"),
        ("inventories", "its COMMIT signed"),
        ("manifests", "its COMMIT signed"),
        ("packs", "does not authenticate"),
        ("wal", "before the backup is consistent"),
    ];
    for (number, (kind, reason)) in damages.into_iter().enumerate() {
        flip_below(&region.join(kind));
        let target = scratch.join(&format!("out{number}"));
        let output = open(&region, &["ledger", target.to_str().unwrap(), "--age-identity", key.to_str().unwrap()]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(reason), "{kind}: {told}");
        assert!(kind == "wal" || !target.join("global/pg_control").exists(), "{kind}: it could be started");
        flip_below(&region.join(kind));
    }
}

/// Flips a bit in the middle of every object below a directory; again, and all are as before.
fn flip_below(path: &Path) {
    for entry in std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            flip_below(&entry);
        } else {
            let mut bytes = std::fs::read(&entry).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&entry, bytes).unwrap();
        }
    }
}

async fn trusted_signer(config: &Path) -> String {
    let made = Drctl::new(["init", "--json"]).config(config).run().await.ok().json();
    made["signer"].as_str().unwrap().to_owned()
}

/// Does what the program says a person should do before `pg_ctl start`.
pub fn follow_the_last_lines(restored: &Path, told: &str) {
    let (_, script) = told.split_once("as the user that owns").unwrap();
    let (_, script) = script.split_once('\n').unwrap();
    let script: Vec<_> = script.lines().map(str::trim).filter(|line| !line.starts_with("pg_ctl")).collect();
    let status = Command::new("sh").args(["-ec", &script.join("\n")]).status().unwrap();
    assert!(status.success() && restored.join("recovery.signal").exists());
}
