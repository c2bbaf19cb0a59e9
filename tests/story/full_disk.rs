//! Full disks: a region, the directory of a restore, the state directory. Nothing half-written counts, the error says
//! where there is no space, and with more room the next run ends well.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::app::{World, new_recovery_key};
use drctl::disk::space::free_bytes;
use serde_json::Value;

use crate::rig3::{MAJOR, debts, files_below};
use crate::support::dirs::Scratch;
use crate::support::drctl::{Drctl, Finished};
use crate::support::http;
use crate::support::pg::{Cluster, Until};
use crate::support::process;
use crate::support::tmpfs::Tmpfs;

/// A cluster protected into directories, some of which may be small.
struct Rig {
    // Unmounted before the scratch directory goes.
    small: Tmpfs,
    cluster: Cluster,
    scratch: Scratch,
}

impl Rig {
    /// `regions` besides `small`, which is not a region if `small` is not among them.
    async fn new(regions: &[&str], mib: u32) -> Self {
        let scratch = Scratch::new();
        let small = Tmpfs::mount(scratch.join("small"), mib);
        let rig = Self { small, cluster: Cluster::start_new(MAJOR).await, scratch };
        let recipient = new_recovery_key(&rig.scratch.join("recovery.age"), &World::real()).unwrap();
        let tables =
            regions.iter().map(|name| format!("[regions.{name}]\nurl = \"dir://{}\"\n", rig.region(name).display()));
        let text = format!(
            "[repository]\nstate_dir = \"{}\"\ndetach_after = \"2s\"\n\n{}\n\
             [keys.recovery]\nage = \"{recipient}\"\nidentity = \"file:{}\"\n\n\
             [targets.ledger]\nsource = \"postgres\"\nconninfo = \"{}\"\nmethod = \"local\"\n",
            rig.state().display(),
            tables.collect::<String>(),
            rig.scratch.join("recovery.age").display(),
            rig.cluster.conninfo()
        );
        fs::write(rig.scratch.join("drctl.toml"), text).unwrap();
        rig
    }

    /// Rows of about `mib` MiB that do not compress.
    async fn fill(&self, mib: u32) {
        let bytes = "decode(string_agg(md5(n || '.' || i), ''), 'hex')";
        let rows = mib * 625;
        let sql = format!(
            "CREATE TABLE noise AS SELECT n, (SELECT {bytes} FROM generate_series(1, 100) i) AS bytes
               FROM generate_series(1, {rows}) n"
        );
        self.cluster.execute(&sql).await;
        self.cluster.switch_wal().await;
    }

    fn region(&self, name: &str) -> PathBuf {
        self.scratch.join(name).join("region")
    }

    fn state(&self) -> PathBuf {
        self.scratch.join("state")
    }

    fn drctl<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Drctl {
        let bin = self.cluster.bin_dir();
        let config = self.scratch.join("drctl.toml");
        Drctl::new(arguments).config(&config).env(&format!("DRCTL_PG_BIN_{MAJOR}"), bin)
    }

    async fn backup(&self) -> Finished {
        let backup = self.drctl(["backup", "ledger", "--fast", "--json"]);
        backup.expect_log("region is left behind").run().await
    }

    async fn json(&self, arguments: &[&str], code: i32) -> Value {
        self.drctl(arguments.iter().chain(&["--json"]))
            .expect_log("taken from another region")
            .run()
            .await
            .code(code)
            .json()
    }

    /// Every object of a region by name.
    fn objects(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let mut objects = files_below(&self.region(name));
        objects.retain(|key, _| !key.starts_with('.') && !key.starts_with("intents/"));
        objects
    }

    fn restore(&self, directory: &Path, options: &[&str]) -> Drctl {
        let shown = directory.display().to_string();
        self.drctl(["restore", "ledger", "--json", "--target-dir", &shown].iter().chain(options))
    }
}

#[tokio::test]
async fn a_region_whose_disk_is_full_owes_and_holds_nothing_by_halves() {
    let rig = Rig::new(&["small", "large", "third"], 6).await;
    rig.drctl(["init"]).run().await.ok();
    rig.fill(8).await;
    let report = rig.backup().await.code(4).json();
    assert_eq!(debts(&report).into_keys().collect::<Vec<_>>(), ["small"], "{report:#}");
    let said = report["regions"][0]["last_error"].as_str().unwrap();
    assert!(said.contains("No space left"), "{said}");
    let (small, large) = (rig.objects("small"), rig.objects("large"));
    assert!(small.len() < large.len(), "the region was not full");
    for (key, body) in &small {
        assert!(large.get(key) == Some(body), "{key} is in the full region with other bytes");
    }
    assert!(!small.keys().any(|key| key.starts_with("commits/") || key.contains('+')), "{:?}", small.keys());
    let list = rig.json(&["list"], 0).await;
    let states: Vec<_> = list["backups"][0]["regions"].as_array().unwrap().iter().map(|r| &r["state"]).collect();
    assert_eq!(states, ["debt", "complete", "complete"], "{list:#}");
    rig.json(&["verify"], 4).await;

    rig.small.resize(64);
    rig.json(&["repair"], 0).await;
    assert!(rig.objects("small") == rig.objects("large"));
    assert_eq!(debts(&rig.backup().await.ok().json()), BTreeMap::new());
    rig.json(&["verify", "--scrub"], 0).await;
}

#[tokio::test]
async fn the_only_region_being_full_fails_the_backup_and_says_so() {
    let rig = Rig::new(&["small"], 6).await;
    rig.drctl(["init"]).run().await.ok();
    rig.fill(8).await;
    let failed = rig.backup().await.code(1);
    let told = failed.json()["error"].to_string();
    assert!(told.contains("No space left") && told.contains("small: "), "{failed}");
    assert_eq!(rig.json(&["list"], 0).await["backups"].as_array().unwrap().len(), 0);

    rig.small.resize(64);
    let report = rig.backup().await.ok().json();
    let kept: BTreeSet<_> = rig.objects("small").into_keys().filter(|key| key.starts_with("commits/")).collect();
    assert_eq!(kept.len(), 1, "{report:#}");
    let verified = rig.json(&["verify", "--level", "l2", "--scrub"], 0).await;
    assert_eq!(verified["backups"][0]["regions"][0]["level"], "L2", "{verified:#}");
    rig.json(&["repair"], 0).await;
}

#[tokio::test]
async fn a_restore_without_space_refuses_or_stops_and_ends_well_later() {
    let rig = Rig::new(&["large"], 32).await;
    rig.drctl(["init"]).run().await.ok();
    rig.fill(48).await;
    rig.backup().await.ok();
    let directory = rig.small.path().join("data");
    let refused = rig.restore(&directory, &[]).run().await.code(5).json();
    assert!(refused["refused"][0]["what"].as_str().unwrap().contains("too little space"), "{refused:#}");
    let digest = refused["digest"].as_str().unwrap().to_owned();
    let run = ["--execute", "--plan", &digest];
    rig.restore(&directory, &run).run().await.code(5);
    assert_eq!(fs::read_dir(rig.small.path()).unwrap().count(), 0, "a refused plan wrote something");

    // Enough, and not for two.
    let wanted: u64 = refused["write_bytes"].as_array().unwrap().iter().map(|bytes| bytes.as_u64().unwrap()).sum();
    rig.small.resize(u32::try_from(wanted >> 20).unwrap() + 6);
    let running = rig.restore(&directory, &run).spawn();
    process::eventually("the restore begins", Duration::from_secs(30), async || directory.join("base").exists()).await;
    rig.small.fill();
    let failed = running.wait().await.code(1);
    let told = failed.json()["error"].to_string();
    assert!(told.contains("no space left") && told.contains("small/data"), "{failed}");
    assert!(!directory.join("global/pg_control").exists());
    Cluster::try_start_restored(&directory, MAJOR, &[], Until::Ready).await.map(drop).unwrap_err();

    rig.small.free();
    // What the run before left is in the way, and goes first.
    fs::write(directory.join("base/stray"), vec![1; 8 << 20]).unwrap();
    assert!(free_bytes(&directory).unwrap() < wanted);
    rig.restore(&directory, &run).run().await.ok();
    rig.small.resize(u32::try_from(wanted >> 20).unwrap() + 128);
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    let digest = "SELECT count(*), md5(string_agg(md5(bytes), '' ORDER BY n)) FROM noise";
    assert_eq!(restored.query(digest).await, rig.cluster.query(digest).await);
    restored.amcheck().await;
    rig.json(&["verify"], 0).await;
}

#[tokio::test]
async fn a_full_state_directory_stops_init_and_no_backup() {
    let rig = Rig::new(&["large"], 1).await;
    let config = rig.scratch.join("drctl.toml");
    let text = fs::read_to_string(&config).unwrap();
    let state = rig.small.path().join("state");
    fs::write(&config, text.replace(&rig.state().display().to_string(), &state.display().to_string())).unwrap();
    rig.small.fill();
    let failed = rig.drctl(["init", "--json"]).run().await.code(1);
    assert!(failed.json()["error"].to_string().contains("no space left"), "{failed}");
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "half a key");
    rig.small.free();
    rig.drctl(["init"]).run().await.ok();

    rig.small.fill();
    // It is safe in the regions; only what the next one would need to be incremental has no room.
    let backup = rig.drctl(["backup", "ledger", "--fast", "--json"]).expect_log("the page map is not kept");
    let report = backup.run().await.ok().json();
    assert!(report["not_remembered"].as_str().unwrap().contains("no space left"), "{report}");
    rig.json(&["verify", "--scrub"], 0).await;
    let directory = rig.scratch.join("restored");
    let plan = rig.restore(&directory, &[]).run().await.ok().json();
    rig.restore(&directory, &["--execute", "--plan", plan["digest"].as_str().unwrap()]).run().await.ok();
    assert!(directory.join("global/pg_control").exists());
}

#[tokio::test]
async fn a_full_state_directory_stops_no_job_of_a_daemon_and_is_told() {
    const SOON: Duration = Duration::from_secs(40);
    let rig = Rig::new(&["large"], 1).await;
    let (config, port) = (rig.scratch.join("drctl.toml"), process::free_ports(1));
    let state = rig.small.path().join("state");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace(&rig.state().display().to_string(), &state.display().to_string());
    fs::write(&config, format!("{text}\n[daemon]\nlisten = \"127.0.0.1:{port}\"\n")).unwrap();
    let schedules = rig.scratch.join("schedules");
    fs::create_dir_all(&schedules).unwrap();
    fs::write(schedules.join("all-repair.toml"), "job = \"repair\"\ncron = \"0 0 1 1 *\"\n").unwrap();
    rig.drctl(["init"]).run().await.ok();
    rig.drctl(["backup", "ledger", "--fast"]).expect_log("the page map is not kept").run().await.ok();

    let daemon = rig.drctl(["daemon", "--only", "repair", "--grace", "5s"]);
    let daemon = daemon.expect_log("the state directory cannot be written").expect_log("open problems are not kept");
    let daemon = daemon.spawn();
    let ready = async || http::get(port, "/readyz").await.unwrap_or_default();
    process::eventually("the daemon is ready", SOON, async || ready().await.0 == 200).await;
    rig.small.fill();
    // A slot has its second: that of the start is accounted for.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    rig.drctl(["run", "all-repair"]).run().await.ok();
    let recorded = rig.region("large").join("runs/all-repair");
    process::eventually("its outcome is in the region", SOON, async || recorded.exists()).await;
    let (status, reasons) = ready().await;
    assert!(status == 503 && reasons.contains("the state directory cannot be written"), "{status} {reasons}");
    rig.drctl(["jobs"]).run().await.ok();

    rig.small.free();
    process::eventually("the daemon is ready again", SOON, async || ready().await.0 == 200).await;
    daemon.terminate().await.ok();
    assert_eq!(fs::read_dir(state.join("runs/open")).unwrap().count(), 0, "a slot that ended is open");
}
