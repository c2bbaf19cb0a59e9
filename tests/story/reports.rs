//! Reports: what a drill or a restore found, as it is told, in every region, by a schema that others may rely on.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::bank::Bank;
use crate::support::drctl::Drctl;
use crate::support::process;
use crate::support::schema::validate;
use crate::support::tmpfs::Tmpfs;

fn schema() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/report.schema.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[track_caller]
pub fn assert_fits(report: &Value) {
    validate(&schema(), report).unwrap_or_else(|why| panic!("{why}\n{report:#}"));
    // A schema that everything fits would say nothing.
    let mut wrong = report.clone();
    wrong["outcome"] = "fine".into();
    validate(&schema(), &wrong).unwrap_err();
    let mut more = report.clone();
    more["unheard_of"] = 1.into();
    validate(&schema(), &more).unwrap_err();
}

impl Bank {
    /// The body of a stored report, with what the command line adds left out.
    async fn stored(&self, id: &Value) -> Value {
        let shown = self.drctl(["report", "show", id.as_str().unwrap(), "--json"]).run().await.ok().json();
        shown["body"]["report"].clone()
    }
}

#[tokio::test]
async fn whatever_came_of_it_a_report_fits_its_schema() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    // Something that happened between the backup and now, for a random point to fall into.
    tokio::time::sleep(Duration::from_millis(500)).await;
    bank.cluster.execute("INSERT INTO account VALUES (2001, 5), (2002, -5)").await;
    let small = Tmpfs::mount(bank.scratch.join("small"), 8);
    let place = small.path().join("d").display().to_string();
    let passed = bank.drill(&["--select", "oldest"]).await.ok().json();
    assert_eq!(passed["asked"]["select"], "oldest", "{passed:#}");
    assert!(passed["rpo"]["measured_seconds"].is_null(), "an old point tells nothing of today: {passed:#}");
    let random = bank.drill(&["--select", "random"]).await.ok().json();
    let unknown = bank.drill(&["--dir", &place]).await.code(3).json();
    bank.cluster.execute("INSERT INTO account VALUES (1001, 1)").await;
    let failed = bank.drill(&[]).await.code(1).json();
    for (report, outcome) in [(&passed, "pass"), (&random, "pass"), (&unknown, "inconclusive"), (&failed, "fail")] {
        assert_eq!(report["outcome"], outcome, "{report:#}");
        assert_fits(report);
        assert_fits(&bank.stored(&report["stored_as"]).await);
    }
    stream.terminate().await.ok();

    // A restore is on record as well; without a configuration beside what it restored.
    let directory = bank.scratch.join("restored").display().to_string();
    let line = ["restore", "ledger", "--json", "--target-dir", &directory];
    let plan = bank.drctl(line).run().await.ok().json();
    let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
    let restored = bank.drctl(line.iter().chain(&execute)).run().await.ok().json();
    let record = bank.stored(&restored["stored_as"]).await;
    assert_fits(&record);
    assert_eq!((&record["outcome"], &record["opened"]), (&"pass".into(), &false.into()), "{record:#}");
    let listed = bank.drctl(["report", "list", "ledger", "--json"]).run().await.ok().json();
    assert_eq!((&listed["reports"][0]["job"], &listed["reports"][0]["rpo"][0]), (&"restore".into(), &30.0.into()));

    let (region, key) = (bank.home().join("region-b"), bank.home().join("recovery.age"));
    let directory = bank.scratch.join("elsewhere").display().to_string();
    let line =
        ["--repo", region.to_str().unwrap(), "--age-identity", key.to_str().unwrap(), "--json", "restore", "ledger"];
    let place = ["--target-dir", &directory];
    let line = line.iter().chain(&place);
    let plan = Drctl::new(line.clone()).run().await.ok().json();
    let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
    let restored = Drctl::new(line.chain(&execute)).run().await.ok().json();
    let path = format!("{directory}.drctl-report.json");
    assert_eq!((&restored["record"], &restored["stored_as"]), (&path.as_str().into(), &Value::Null), "{restored:#}");
    assert_fits(&serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap());
}

#[tokio::test]
async fn a_report_waits_here_for_the_region_that_was_away() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    stream.terminate().await.ok();
    let drill = async || {
        let drill = bank.drctl(["drill", "ledger", "--json"]);
        drill.expect_log("the root is not in").expect_log("region is left behind").run().await
    };
    let (region, away) = (bank.home().join("region-a"), bank.scratch.join("away"));
    fs::rename(&region, &away).unwrap();
    let report = drill().await.json();
    let id = report["stored_as"].as_str().unwrap();
    let lanes = report["stored_in"].as_array().unwrap();
    let owes =
        |name: &str| lanes.iter().find(|lane| lane["region"] == name).unwrap()["missing_objects"].as_u64().unwrap();
    assert!(owes("region-a") > 0 && owes("region-b") == 0, "{report:#}");
    let waiting = || fs::read_dir(bank.home().join("state/reports")).unwrap().count();
    assert_eq!(waiting(), 1);

    fs::rename(&away, &region).unwrap();
    let listed = bank.drctl(["report", "list", "--json"]).run().await.ok().json();
    assert_eq!(listed["reports"][0]["id"], id, "{listed:#}");
    assert_eq!(waiting(), 0);
    let held = |region: &str| fs::read(bank.home().join(region).join("reports/ledger").join(id)).unwrap();
    assert_eq!(held("region-a"), held("region-b"));

    // No region at all takes it: it waits here, and a daemon brings it when they answer.
    for region in ["region-a", "region-b"] {
        let reports = bank.home().join(region).join("reports");
        fs::rename(&reports, bank.scratch.join(&format!("{region}-reports"))).unwrap();
        fs::write(&reports, "in the way").unwrap();
    }
    let report = drill().await.json();
    assert!(report["warnings"].to_string().contains("no region took the report"), "{report:#}");
    let id = report["stored_as"].as_str().unwrap();
    // A restore is recorded beside what it restored, too: its machine may be gone tomorrow.
    let directory = bank.scratch.join("unrecorded").display().to_string();
    let line = ["restore", "ledger", "--json", "--target-dir", &directory];
    let plan = bank.drctl(line).run().await.ok().json();
    let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
    let restored = bank.drctl(line.iter().chain(&execute)).expect_log("record").run().await.ok().json();
    let beside = format!("{directory}.drctl-report.json");
    assert_eq!((&restored["record"], &restored["stored_as"]), (&beside.as_str().into(), &Value::Null), "{restored:#}");
    assert_fits(&serde_json::from_str(&fs::read_to_string(beside).unwrap()).unwrap());
    assert_eq!(waiting(), 2);
    for region in ["region-a", "region-b"] {
        fs::remove_file(bank.home().join(region).join("reports")).unwrap();
        fs::rename(bank.scratch.join(&format!("{region}-reports")), bank.home().join(region).join("reports")).unwrap();
    }
    fs::create_dir_all(bank.home().join("schedules")).unwrap();
    let daemon = bank.drctl(["daemon", "--only", "verify"]).spawn();
    process::eventually("the daemon brings it", Duration::from_secs(60), async || waiting() == 0).await;
    daemon.terminate().await.ok();
    for region in ["region-a", "region-b"] {
        assert!(bank.home().join(region).join("reports/ledger").join(id).exists(), "{region}");
    }

    // No region answers when the drill begins: that is a report too, and the next drill brings it.
    for region in ["region-a", "region-b"] {
        fs::rename(bank.home().join(region), bank.scratch.join(&format!("{region}-away"))).unwrap();
    }
    let report = drill().await.code(3).json();
    assert_eq!(report["outcome"], "inconclusive", "{report:#}");
    assert_fits(&report);
    let id = report["stored_as"].as_str().unwrap();
    assert_eq!(waiting(), 1);
    for region in ["region-a", "region-b"] {
        fs::rename(bank.scratch.join(&format!("{region}-away")), bank.home().join(region)).unwrap();
    }
    let next = drill().await.json();
    assert_eq!((waiting(), next["warnings"].to_string().contains("no region")), (0, false), "{next:#}");
    for region in ["region-a", "region-b"] {
        let held = bank.home().join(region).join("reports/ledger");
        assert!(held.join(id).exists() && held.join(next["stored_as"].as_str().unwrap()).exists(), "{region}");
    }
}
