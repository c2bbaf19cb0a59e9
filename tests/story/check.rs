//! `init` and `check`, on directories and real servers.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::s3::Endpoint;
use crate::support::{kms, unique};

/// `init DIR`, and a target that protects `cluster`.
pub async fn first_configuration(scratch: &Scratch, cluster: &Cluster, more: &str) -> PathBuf {
    let dir = scratch.join("dr");
    Drctl::new(["init", dir.to_str().unwrap()]).run().await.ok();
    let config = dir.join("drctl.toml");
    let mut text = std::fs::read_to_string(&config).unwrap();
    let conninfo = cluster.conninfo();
    text.push_str(&format!("\n[targets.ledger]\nsource = \"postgres\"\nconninfo = \"{conninfo}\"\n{more}"));
    std::fs::write(&config, text).unwrap();
    config
}

/// The lines of a level whose text contains `words`.
fn lines<'a>(report: &'a Value, level: &str, words: &str) -> Vec<&'a Value> {
    let checks = report["checks"].as_array().unwrap();
    let fits = |check: &&Value| check["level"] == level && check["what"].as_str().unwrap().contains(words);
    checks.iter().filter(fits).collect()
}

#[track_caller]
fn one<'a>(report: &'a Value, level: &str, words: &str) -> &'a Value {
    let found = lines(report, level, words);
    assert_eq!(found.len(), 1, "{level} {words}: {report:#}");
    found[0]
}

#[tokio::test]
async fn init_makes_two_regions_and_a_key_and_can_be_repeated() {
    let scratch = Scratch::new();
    let dir = scratch.join("dr");
    let made = Drctl::new(["init", dir.to_str().unwrap()]).run().await.ok();
    assert!(made.stdout.contains("AWAY FROM THIS MACHINE"), "{made}");
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("recovery.age"), mode("state")), (0o600, 0o700));
    for region in ["region-a", "region-b"] {
        for file in ["readme.md", "format.md", "drctl_open.py", "floe.py"] {
            assert!(dir.join(region).join("escape/1").join(file).is_file(), "{region} {file}");
        }
    }
    let again = Drctl::new(["init", dir.to_str().unwrap()]).run().await.code(5);
    assert!(again.stderr.contains("drctl.toml exists already"), "{again}");

    let config = dir.join("drctl.toml");
    let repeated = || async { Drctl::new(["init", "--json"]).config(&config).run().await.ok().json() };
    let (first, second) = (repeated().await, repeated().await);
    assert_eq!(first, second);
    assert!(made.stdout.contains(first["repository"].as_str().unwrap()), "{made}");
    assert!(made.stdout.contains(first["signer"].as_str().unwrap()), "{made}");
}

#[tokio::test]
async fn init_refuses_a_configuration_that_only_a_kms_could_open() {
    let scratch = Scratch::new();
    let config = scratch.join("drctl.toml");
    std::fs::write(&config, "[repository]\nstate_dir = \"state\"\n[regions.a]\nurl = \"a\"\n").unwrap();
    let refused = Drctl::new(["init"]).config(&config).run().await.code(2);
    assert!(refused.stderr.contains("--recovery-key"), "{refused}");

    let key = scratch.join("recovery.age");
    let made = Drctl::new(["init", "--recovery-key", key.to_str().unwrap()]).run().await.ok();
    let lines: String =
        made.stdout.lines().skip_while(|line| !line.starts_with('[')).map(|l| format!("{l}\n")).collect();
    let text = std::fs::read_to_string(&config).unwrap() + &lines;
    std::fs::write(&config, text).unwrap();
    Drctl::new(["init"]).config(&config).run().await.ok();
    assert!(scratch.join("a/drctl.json").is_file());
}

#[tokio::test]
async fn check_finds_the_unguarded_slot_and_what_lies_about() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let config = first_configuration(&scratch, &cluster, "").await;
    let report = Drctl::new(["check", "--json"]).config(&config).run().await.code(1).json();
    let slot = one(&report, "fail", "max_slot_wal_keep_size is -1");
    assert!(slot["fix"].as_str().unwrap().contains("on_pressure = \"drop-slot\""), "{slot}");
    one(&report, "warn", "recovery.age opens every backup");
    one(&report, "warn", "superuser");
    assert_eq!(lines(&report, "fail", "").len(), 1, "{report:#}");

    cluster.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let text = Drctl::new(["check", "ledger"]).config(&config).run().await.ok();
    assert!(text.stdout.contains("(--all to see them)") && !text.stdout.contains("FAIL"), "{text}");
    let unknown = Drctl::new(["check", "leger"]).config(&config).run().await.code(2);
    assert!(unknown.stderr.contains("ledger"), "{unknown}");
}

#[tokio::test]
async fn the_grants_that_check_prints_are_the_ones_that_are_missing() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let config = first_configuration(&scratch, &cluster, "method = \"local\"\non_pressure = \"keep\"\n").await;
    cluster.execute("CREATE ROLE \"Dr\" LOGIN").await;
    let text = std::fs::read_to_string(&config).unwrap().replace("user=postgres", "user=Dr");
    std::fs::write(&config, text).unwrap();
    let failures = async || {
        let report = Drctl::new(["check", "--json"]).config(&config).run().await.json();
        let fixes = lines(&report, "fail", "").into_iter().map(|check| check["fix"].as_str().unwrap().to_owned());
        fixes.collect::<Vec<_>>()
    };
    // One grant may uncover another: without the settings nobody knows where the data directory is.
    for _ in 0..3 {
        for fix in failures().await.iter().filter(|fix| fix.starts_with("GRANT") || fix.starts_with("ALTER ROLE")) {
            let (sql, _) = fix.split_once(';').unwrap();
            cluster.execute(sql).await;
        }
    }
    assert_eq!(failures().await, Vec::<String>::new());
    Drctl::new(["backup", "ledger", "--fast"]).config(&config).run().await.ok();
}

#[tokio::test]
async fn a_region_that_is_down_is_a_finding_and_hangs_nothing() {
    let scratch = Scratch::new();
    let endpoint = Endpoint::localstack_a();
    let bucket = endpoint.bucket().await;
    let key = kms::create_key(&endpoint, &unique()).await;
    let config = regions(&scratch, &endpoint, &bucket.name, &key).await;
    Drctl::new(["init"]).config(&config).run().await.ok();
    let report = Drctl::new(["check", "--json"]).config(&config).run().await.ok().json();
    one(&report, "warn", "one set of credentials serves write and restore and prune");
    assert_eq!(lines(&report, "ok", "encrypts for us").len(), 2, "{report:#}");
    assert_eq!(lines(&report, "ok", "a second put of one name is refused").len(), 2, "{report:#}");

    let text = std::fs::read_to_string(&config).unwrap();
    let url = format!("endpoint = \"http://127.0.0.1:{}\"", endpoint.port());
    std::fs::write(&config, text.replacen(&url, "endpoint = \"http://127.0.0.1:1\"", 1)).unwrap();
    let started = std::time::Instant::now();
    let report = Drctl::new(["check", "--json"]).config(&config).run().await.code(1).json();
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    assert_eq!(one(&report, "fail", "cannot be reached")["object"], "a");
    one(&report, "ok", "holds repository");
}

/// An S3 region with a KMS key, and a directory.
async fn regions(scratch: &Scratch, endpoint: &Endpoint, bucket: &str, key: &str) -> PathBuf {
    let age = scratch.join("recovery.age");
    let made = Drctl::new(["init", "--json", "--recovery-key", age.to_str().unwrap()]).run().await.ok().json();
    let url = format!("http://127.0.0.1:{}", endpoint.port());
    let text = format!(
        "[repository]\nstate_dir = \"state\"\nmin_wraps = 1\n\
         [regions.a]\nurl = \"s3://{bucket}/prefix\"\nendpoint = \"{url}\"\naws_region = \"us-east-1\"\npath_style = true\n\
         kms = {{ key = \"{key}\", endpoint = \"{url}\" }}\n\
         [regions.b]\nurl = \"b\"\n[keys.recovery]\nage = \"{}\"\n",
        made["recipient"].as_str().unwrap()
    );
    let config = scratch.join("drctl.toml");
    write(&config, &text);
    config
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}
