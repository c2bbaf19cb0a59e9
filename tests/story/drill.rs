//! Drills: a restore that starts, is checked and measured, and leaves nothing behind.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::bank::{Bank, largest};
use crate::support::drctl::Drctl;
use crate::support::process;

fn checks(report: &Value, outcome: &str) -> Vec<String> {
    let checks = report["checks"].as_array().unwrap().iter().filter(|check| check["outcome"] == outcome);
    checks.map(|check| check["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_drill_proves_a_recovery_and_measures_it() {
    let bank = Bank::new().await;
    let space = bank.cluster.extra_dir("space").display().to_string();
    bank.cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{space}'")).await;
    bank.cluster.execute("CREATE TABLE elsewhere TABLESPACE space AS SELECT generate_series(1, 100) n").await;
    let stream = bank.stream().await;
    bank.backup().await;
    bank.cluster.execute("INSERT INTO account VALUES (1001, 5), (1002, -5)").await;
    let report = bank.drill(&[]).await.ok().json();
    assert_eq!((&report["outcome"], &report["level"]), (&"pass".into(), &"L6".into()), "{report:#}");
    assert_eq!(report["region"], "region-b", "the region that a restore would not take first");
    let passed = checks(&report, "pass");
    for name in
        ["started, replayed and promoted", "amcheck with heapallindexed", "page checksums", "heartbeat", "balances"]
    {
        assert!(passed.iter().any(|check| check == name), "{name}: {report:#}");
    }
    let (rpo, rto) = (&report["rpo"]["measured_seconds"], &report["rto"]["measured_seconds"]);
    assert!(rpo.as_f64().unwrap() < 30.0 && rto.as_f64().unwrap() > 0.0, "{report:#}");
    let phases: Vec<_> = report["phases"].as_array().unwrap().iter().map(|phase| phase["name"].clone()).collect();
    assert_eq!(phases, ["provision", "fetch", "complete", "stage", "replay", "open", "validate"]);
    assert_eq!(report["control"]["caught"], true);
    assert!(report["left_behind"].is_null() && bank.left().is_empty(), "{:?}", bank.left());

    // Without --json it reads like a verdict.
    let text = bank.drctl(["drill", "ledger", "--region", "region-a"]).run().await.ok().stdout;
    assert!(text.starts_with("PASS  drill of ledger from region-a alone, level L6"), "{text}");
    stream.terminate().await.ok();
    assert_eq!(bank.cluster.query("SELECT sum(amount) FROM account").await, "0", "the source is as it was");

    // Both reports lie in every region: their heads for everybody, the rest for whoever has a key.
    let listed = bank.drctl(["report", "list", "ledger", "--json"]).run().await.ok().json();
    assert_eq!(listed["reports"].as_array().unwrap().len(), 2, "{listed:#}");
    // What was mistyped is no drill that failed.
    bank.drctl(["drill", "ledger", "--backup", "nosuch"]).run().await.code(2);
    let early = bank.drctl(["drill", "ledger", "--to-time", "2020-01-01 00:00"]).run().await.code(5);
    assert!(early.stderr.contains("no backup of ledger leads to 2020-01-01"), "{early}");
    let again = bank.drctl(["report", "list", "ledger", "--json"]).run().await.ok().json();
    assert_eq!(again["reports"], listed["reports"]);
    assert_eq!(listed["reports"][1]["id"], report["stored_as"]);
    let id = report["stored_as"].as_str().unwrap();
    let shown = bank.drctl(["report", "show", id, "--json"]).run().await.ok().json();
    assert_eq!(shown["body"]["report"]["checks"], report["checks"], "{shown:#}");
    let page = bank.drctl(["report", "show", id]).run().await.ok().stdout;
    assert!(page.starts_with("# Drill of ledger: pass") && page.contains("| balances | L6 | pass | 0 |"), "{page}");
    let status = bank.drctl(["status", "--json"]).run().await.json();
    let proven = &status["targets"][0]["proven"];
    assert_eq!((&proven["level"], &proven["region"]), (&"L6".into(), &"region-a".into()), "{status:#}");
    let region = bank.home().join("region-b").display().to_string();
    let keyless = Drctl::new(["--repo", &region, "report", "show", id]).run().await.ok().stdout;
    assert!(keyless.contains("level L6") && keyless.contains("sealed") && !keyless.contains("balances"), "{keyless}");
}

#[tokio::test]
async fn what_is_wrong_fails_and_what_is_unknown_is_neither() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    // A deploy breaks the books: the restore works, and the drill says that the data is wrong.
    bank.cluster.execute("INSERT INTO account VALUES (1003, 1)").await;
    let report = bank.drill(&[]).await.code(1).json();
    assert_eq!((checks(&report, "fail"), &report["level"]), (vec!["balances".to_owned()], &"L5".into()), "{report:#}");
    assert!(report["reasons"].to_string().contains("expected 0, got 1"), "{report:#}");
    let status = bank.drctl(["status"]).run().await.code(1);
    assert!(status.stdout.contains("the last drill failed  →  drctl report show ledger-"), "{status}");
    bank.cluster.execute("DELETE FROM account WHERE n = 1003").await;

    // Damage in the region that is drilled is a failure, although another region is well.
    let pack = largest(&bank.home().join("region-b/packs"));
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&pack, bad).unwrap();
    let report = bank.drill(&[]).await.code(1).json();
    assert!(report["reasons"].to_string().contains("packs/"), "{report:#}");
    assert!(report["level"].is_null() && bank.left().is_empty(), "{report:#}");
    fs::write(&pack, good).unwrap();

    // A region that is away proves nothing.
    let (region, away) = (bank.home().join("region-b"), bank.scratch.join("away"));
    fs::rename(&region, &away).unwrap();
    let report = bank.drill(&[]).await.code(3).json();
    assert_eq!(report["outcome"], "inconclusive", "{report:#}");
    fs::rename(&away, &region).unwrap();
    stream.terminate().await;

    // Without a receiver nothing new is durable: what came back is older than the fault allows, or no beat at all.
    let text = fs::read_to_string(bank.config()).unwrap();
    fs::write(bank.config(), text.replace("rpo = \"30s\"", "rpo = \"1s\"")).unwrap();
    let report = bank.drill(&[]).await.code(1).json();
    assert!(report["reasons"].to_string().contains("RPO"), "{report:#}");
    let measured = report["rpo"]["measured_seconds"].as_f64().unwrap();
    assert!(measured > 1.0, "{report:#}");
}

#[tokio::test]
async fn an_interrupted_drill_takes_its_server_and_its_files_along() {
    let bank = Bank::new().await;
    bank.backup().await;
    let drill = bank.drctl(["drill", "ledger"]).spawn();
    process::eventually("the scratch cluster runs", Duration::from_secs(60), async || {
        bank.left().iter().any(|root| root.join("data/postmaster.pid").exists())
    })
    .await;
    let root = bank.left().remove(0);
    let text = fs::read_to_string(root.join("data/postmaster.pid")).unwrap_or_default();
    let pid = text.lines().next().and_then(|line| line.parse().ok());
    let ended = drill.terminate().await.code(1);
    assert!(ended.stderr.contains("interrupted"), "{ended}");
    assert_eq!(bank.left(), Vec::<PathBuf>::new());
    assert!(pid.is_none_or(|pid| !process::is_alive(pid)));
}

#[tokio::test]
async fn a_killed_drill_leaves_nothing_for_long() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    let drill = bank.drctl(["drill", "ledger"]).expect_log("drill left").spawn();
    process::eventually("the scratch cluster runs", Duration::from_secs(60), async || {
        bank.left().iter().any(|root| root.join("data/postmaster.pid").exists())
    })
    .await;
    drill.kill9();
    let root = bank.left().remove(0);
    assert!(root.exists());
    let text = fs::read_to_string(root.join("data/postmaster.pid")).unwrap_or_default();
    let pid = text.lines().next().and_then(|line| line.parse().ok());
    bank.drill(&[]).await.ok();
    stream.terminate().await.ok();
    assert_eq!(bank.left(), Vec::<PathBuf>::new());
    assert!(pid.is_none_or(|pid| !process::is_alive(pid)));
}
