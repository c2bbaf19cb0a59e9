//! The folders that are shipped for whole platforms: what they say is right, and what they ask for fits into the day.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::drctl::Drctl;

fn folders() -> Vec<PathBuf> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("schedules");
    let entries = std::fs::read_dir(shipped).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

async fn json(folder: &Path, words: &[&str]) -> Value {
    let run = Drctl::new(words.iter().chain(&["--json"])).config(&folder.join("drctl.toml")).run().await.ok();
    serde_json::from_str(&run.stdout).unwrap()
}

fn names<'v>(list: &'v Value, key: &str) -> BTreeSet<&'v str> {
    list.as_array().unwrap().iter().filter_map(|item| item[key].as_str()).collect()
}

#[tokio::test]
async fn every_platform_is_protected_proven_and_in_time() {
    let folders = folders();
    assert_eq!(folders.len(), 5, "{folders:?}");
    for folder in folders {
        json(&folder, &["schedule", "lint"]).await;
        let (config, schedules) =
            (json(&folder, &["config", "show"]).await, json(&folder, &["schedule", "list"]).await);
        let is_done = |job: &str, target: &str| {
            let fits = |schedule: &Value| schedule["job"] == job && schedule["target"] == target;
            schedules.as_array().unwrap().iter().any(fits)
        };
        for (name, target) in config["targets"].as_object().unwrap() {
            let jobs: &[&str] = match target["source"].as_str().unwrap() {
                "postgres" => &["backup", "drill"],
                "dump" => &["dump"],
                other => &[other],
            };
            for job in jobs {
                assert!(is_done(job, name), "{}: no {job} of {name}", folder.display());
            }
            assert!(target["rpo"].is_string(), "{}: {name} was promised nothing", folder.display());
            assert!(target["retention"].is_object(), "{}: {name} is kept for ever", folder.display());
        }
        assert!(
            ["verify", "repair", "prune"].iter().all(|job| names(&schedules, "job").contains(job)),
            "{}",
            folder.display()
        );

        // Two months that hold both nights in which clocks are moved.
        for from in ["2026-03-01 00:00", "2026-10-01 00:00"] {
            let words = ["schedule", "dry-run", "--for", "60d", "--from", from, "--takes", "25m"];
            for of in json(&folder, &words).await["schedules"].as_array().unwrap() {
                assert!(of["done"].as_u64().unwrap() > 0 && of["done"] == of["slots"], "{}: {of:#}", folder.display());
            }
        }
    }
}

#[tokio::test]
async fn a_dry_run_tells_what_does_not_fit() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schedules/crypto-exchange");
    let words = ["schedule", "dry-run", "--for", "2d", "--from", "2026-11-20 00:00", "--takes", "90m"];
    let run = Drctl::new(words).config(&folder.join("drctl.toml")).run().await.code(1);
    let row = |name: &str| run.stdout.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    let cells = |name: &str| row(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    // 48 slots of an hour, each taking two: every other one is skipped.
    assert_eq!(cells("all-repair ")[2..6], ["48", "24", "24", "0"], "{run}");
    // A job of half an hour at most is cut off.
    assert_eq!(cells("manifests ")[2..6], ["48", "0", "0", "48"], "{run}");
    assert!(row("manifests").contains("OLDER THAN max_age") && run.stdout.contains("Nothing was run."), "{run}");
}
