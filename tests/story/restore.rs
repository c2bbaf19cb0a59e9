//! Restore: plan, run, recovery to every kind of point, and what it refuses.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::model::Lsn;
use serde_json::Value;

use crate::support::dirs::Scratch;
use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::ledger::Ledger;
use crate::support::pg::{Cluster, Until};
use crate::support::process;

const MAJOR: u32 = 15;

/// A cluster that is protected into two directory regions.
pub struct Protected {
    pub cluster: Cluster,
    pub scratch: Scratch,
}

impl Protected {
    pub async fn new() -> Self {
        Self::of(Cluster::builder(MAJOR).setting("wal_level", "replica")).await
    }

    pub async fn of(builder: crate::support::pg::Builder) -> Self {
        let cluster = builder.start().await;
        let protected = Self { cluster, scratch: Scratch::new() };
        let home = protected.home();
        Drctl::new(["init".as_ref(), home.as_os_str()]).run().await.ok();
        let mut text = fs::read_to_string(home.join("drctl.toml")).unwrap();
        let conninfo = protected.cluster.conninfo();
        text.push_str(&format!(
            "\n[targets.ledger]\nsource = \"postgres\"\nconninfo = \"{conninfo}\"\nmethod = \"auto\"\nship_interval = \"100ms\"\n"
        ));
        fs::write(home.join("drctl.toml"), text).unwrap();
        protected
    }

    /// How the next backup reads the cluster.
    pub fn set_method(&self, method: &str) {
        let path = self.home().join("drctl.toml");
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| match line.starts_with("method = ") {
            true => format!("method = \"{method}\"\n"),
            false => format!("{line}\n"),
        });
        // In one step: a receiver that starts may read it now.
        let whole = path.with_extension("new");
        fs::write(&whole, lines.collect::<String>()).unwrap();
        fs::rename(whole, path).unwrap();
    }

    pub fn home(&self) -> PathBuf {
        self.scratch.join("drctl")
    }

    pub fn drctl<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Drctl {
        self.here(Drctl::new(arguments))
    }

    /// With the configuration and PostgreSQL of this cluster.
    pub fn here(&self, drctl: Drctl) -> Drctl {
        let bin = self.cluster.bin_dir();
        let drctl = drctl.config(&self.home().join("drctl.toml"));
        // While WAL streams beside it, a frame on its way is in one region before it is in the other.
        drctl.env(&format!("DRCTL_PG_BIN_{}", self.cluster.major()), bin).expect_log("taken from another region")
    }

    pub async fn backup(&self) -> Value {
        self.drctl(["backup", "ledger", "--fast", "--json"]).run().await.ok().json()["backup"].clone()
    }

    pub fn stream(&self) -> Background {
        self.drctl(["wal", "stream", "ledger"]).spawn()
    }

    /// Waits until everything written so far is durable.
    pub async fn durable(&self) -> Lsn {
        self.cluster.execute("SELECT txid_current(); CHECKPOINT").await;
        let wanted = self.cluster.flush_lsn().await;
        process::eventually("WAL is durable", Duration::from_secs(30), async || {
            let status = self.drctl(["wal", "status", "ledger", "--json"]).run().await.ok().json();
            let regions = status["targets"][0]["branches"]
                .as_array()
                .and_then(|branches| branches.last()?["regions"].as_array().cloned());
            let regions = regions.unwrap_or_default();
            let end = |region: &Value| region["windows"].as_array()?.last()?["end"].as_str()?.parse::<Lsn>().ok();
            regions.len() == 2 && regions.iter().all(|region| end(region).is_some_and(|end| end >= wanted))
        })
        .await;
        wanted
    }

    pub async fn plan(&self, directory: &Path, options: &[&str]) -> Finished {
        let directory = directory.display().to_string();
        let fixed = ["restore", "ledger", "--json", "--target-dir", &directory];
        self.drctl(fixed.iter().chain(options)).run().await
    }

    /// Runs the command that the plan prints, as a person would: pasted into a shell.
    pub async fn execute(&self, directory: &Path, options: &[&str]) -> Finished {
        let plan = self.plan(directory, options).await.ok().json();
        self.here(Drctl::pasted(plan["command"].as_str().unwrap())).run().await
    }

    /// Restores to a point and starts what came of it.
    pub async fn restored(&self, name: &str, options: &[&str]) -> Cluster {
        let directory = self.scratch.join(name);
        self.execute(&directory, options).await.ok();
        Cluster::start_restored(&directory, self.cluster.major()).await
    }
}

async fn numbers(cluster: &Cluster) -> String {
    cluster.query("SELECT string_agg(n::text, ',' ORDER BY n) FROM mark").await
}

#[tokio::test]
async fn a_backup_comes_back_alone_and_passes_pg_verifybackup() {
    let protected = Protected::new().await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT generate_series(1, 1000) n").await;
    protected.backup().await;
    protected.cluster.execute("INSERT INTO mark VALUES (1001)").await;
    for (name, options) in [("end", &[][..]), ("immediate", &["--immediate"][..])] {
        let directory = protected.scratch.join(name);
        let report = protected.execute(&directory, options).await.ok().json();
        assert_eq!(report["incidents"].as_array().unwrap().len(), 0, "{report}");
        assert!(!directory.join("drctl-restore.json").exists() && !directory.join("standby.signal").exists());
        crate::support::dirs::give_to_postgres(&directory);
        let mut verify = crate::support::pg::tool(MAJOR, "pg_verifybackup");
        verify.arg("-n").arg(&directory);
        process::run_async(verify).await;
        let restored = Cluster::start_restored(&directory, MAJOR).await;
        assert_eq!(restored.query("SELECT count(*) FROM mark").await, "1000");
        restored.amcheck().await;
    }
}

#[tokio::test]
async fn every_kind_of_point_lands_exactly() {
    let protected = Protected::new().await;
    let cluster = &protected.cluster;
    cluster.execute("CREATE TABLE mark (n int)").await;
    let stream = protected.stream();
    let backup = protected.backup().await;
    let mut points = Vec::new();
    for n in 1..=4 {
        let client = cluster.client().await;
        let insert = format!("INSERT INTO mark VALUES ({n}) RETURNING pg_current_xact_id()::text");
        let xid: String = client.query_one(&insert, &[]).await.unwrap().get(0);
        let lsn = cluster.insert_lsn().await;
        tokio::time::sleep(Duration::from_millis(60)).await;
        let time: String = client
            .query_one("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')", &[])
            .await
            .unwrap()
            .get(0);
        tokio::time::sleep(Duration::from_millis(60)).await;
        client.batch_execute(&format!("SELECT pg_create_restore_point('after {n}')")).await.unwrap();
        points.push((xid, lsn.to_string(), time));
    }
    protected.durable().await;
    let (xid, lsn, time) = &points[1];
    let both = "1,2";
    for (name, options) in [
        ("xid", vec!["--to-xid", xid]),
        ("lsn", vec!["--to-lsn", lsn]),
        ("time", vec!["--to-time", time]),
        ("name", vec!["--to-name", "after 2"]),
    ] {
        let restored = protected.restored(name, &options).await;
        assert_eq!(numbers(&restored).await, both, "{name}");
    }
    assert_eq!(numbers(&protected.restored("end", &[]).await).await, "1,2,3,4");
    assert_eq!(numbers(&protected.restored("immediate", &["--immediate"]).await).await, "");

    let stop = backup["wal"]["stop_lsn"].as_str().unwrap();
    assert_eq!(numbers(&protected.restored("stop", &["--to-lsn", stop]).await).await, "");
    let nowhere = protected.scratch.join("nowhere");
    for options in [
        ["--to-lsn", "0/1000000"],
        ["--to-lsn", "FF/0"],
        ["--to-time", "2001-01-01 00:00"],
        ["--to-time", "2101-01-01 00:00"],
        ["--to-xid", "999999"],
        ["--to-name", "no such point"],
    ] {
        let refused = protected.plan(&nowhere, &options).await.code(5);
        assert!(
            refused.json()["error"]["hint"].is_string() || refused.json()["error"]["message"].is_string(),
            "{refused}"
        );
    }
    assert!(!nowhere.exists());
    stream.terminate().await.ok();
}

#[tokio::test]
async fn a_running_ledger_is_started_again_with_every_durable_commit() {
    let port = process::free_ports(1);
    let sockets = Scratch::new();
    let directory = sockets.postgres_dir("s");
    let builder = Cluster::builder(MAJOR)
        .setting("port", &port.to_string())
        .setting("listen_addresses", "")
        .setting("dynamic_shared_memory_type", "mmap")
        .setting("unix_socket_directories", &directory.display().to_string());
    let mut protected = Protected::of(builder).await;
    let ledger = Ledger::start(&protected.cluster, 2).await;
    let stream = protected.stream();
    protected.backup().await;
    ledger.wait_for(200).await;
    let durable = protected.durable().await;
    protected.cluster.kill9().await;
    let book = ledger.stop().await;
    stream.kill9();
    let target = protected.scratch.join("restored");
    let report = protected.execute(&target, &["--start", "--run-as", "postgres"]).await.ok().json();
    let pid = u32::try_from(report["started"]["pid"].as_u64().unwrap()).unwrap();
    assert!(process::is_alive(pid), "{}", fs::read_to_string(target.join("drctl-recovery.log")).unwrap());
    let phases: Vec<_> =
        report["phases"].as_array().unwrap().iter().map(|phase| phase["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["fetch", "stage", "replay", "open"]);
    assert!(!target.join("pg_wal/drctl-wal").exists());
    assert!(!fs::read_to_string(target.join("postgresql.auto.conf")).unwrap().contains("restore_command"));
    process::signal(pid, rustix::process::Signal::INT);
    process::eventually("the server ends", Duration::from_secs(30), async || {
        !process::is_alive(pid) || !target.join("postmaster.pid").exists()
    })
    .await;
    let restored = Cluster::start_restored(&target, MAJOR).await;
    let verdict = book.verify(&restored, durable).await.unwrap();
    assert!(verdict.durable >= 200, "{verdict:?}");
}

/// The history of a restored copy, archived as its original does.
async fn push_history(protected: &Protected) -> Finished {
    let socket = protected.home().join("state/ledger.sock").display().to_string();
    let push = protected.drctl(["wal", "push", "--socket", &socket, "pg_wal/00000003.history"]);
    push.current_dir(&protected.scratch.join("new")).run().await
}

#[tokio::test]
async fn recovery_follows_a_promotion_or_stays_on_the_old_timeline() {
    let mut protected = Protected::of(Cluster::builder(MAJOR).setting("restore_command", "/bin/false")).await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT 0 n").await;
    let stream = protected.drctl(["wal", "stream", "ledger"]).expect_log("was refused").spawn();
    protected.backup().await;
    protected.cluster.execute("INSERT INTO mark VALUES (1)").await;
    protected.durable().await;
    protected.cluster.stop().await;
    fs::write(protected.cluster.data_dir().join("recovery.signal"), "").unwrap();
    crate::support::dirs::give_to_postgres(protected.cluster.data_dir());
    protected.cluster.start().await;
    protected.cluster.wait_promoted(Duration::from_secs(60)).await.unwrap();
    assert_eq!(protected.cluster.query("SELECT timeline_id FROM pg_control_checkpoint()").await, "2");
    protected.cluster.execute("INSERT INTO mark VALUES (2)").await;
    protected.durable().await;
    let plan = protected.plan(&protected.scratch.join("x"), &[]).await.ok().json();
    assert_eq!((plan["timeline"].as_u64(), plan["wal"].as_array().unwrap().len()), (Some(2), 2), "{plan}");
    let restored = protected.restored("new", &[]).await;
    assert_eq!(numbers(&restored).await, "0,1,2");
    assert_eq!(restored.query("SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)").await, "00000003");
    assert_eq!(numbers(&protected.restored("old", &["--timeline", "1"]).await).await, "0,1");

    // The copy that was restored to be looked at archives as its original does, and no more of it is stored than its history.
    protected.cluster.execute("INSERT INTO mark VALUES (3)").await;
    protected.durable().await;
    push_history(&protected).await.code(1);
    protected.cluster.stop().await;
    push_history(&protected).await.ok();
    stream.terminate().await;
    let plan = protected.plan(&protected.scratch.join("x"), &[]).await.ok().json();
    let told = plan["not_followed"][0].as_str().unwrap();
    assert!(plan["timeline"] == 2 && told.contains("timeline 3") && told.contains("is not followed"), "{plan:#}");
    assert_eq!(numbers(&protected.restored("latest", &[]).await).await, "0,1,2,3");
    assert_eq!(numbers(&protected.restored("asked", &["--timeline", "3"]).await).await, "0,1,2");
}

#[tokio::test]
async fn a_damaged_object_is_taken_from_the_other_region_and_told() {
    let protected = Protected::new().await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT generate_series(1, 1000) n").await;
    protected.backup().await;
    let packs = files(&protected.home().join("region-a/packs"));
    let frames = files(&protected.home().join("region-a/wal"));
    flip(&packs[0]);
    fs::remove_file(&frames[0]).unwrap();
    let directory = protected.scratch.join("restored");
    let shown = directory.display().to_string();
    let plan = protected.drctl(["restore", "ledger", "--json", "--target-dir", &shown]);
    let plan = plan.expect_log("taken from another region").run().await.ok();
    let digest = plan.json()["digest"].as_str().unwrap().to_owned();
    let run = protected
        .drctl(["restore", "ledger", "--json", "--target-dir", &shown, "--execute", "--plan", &digest])
        .expect_log("taken from another region")
        .run()
        .await
        .ok();
    let incidents = run.json()["incidents"].as_array().unwrap().clone();
    assert!(incidents.iter().any(|incident| incident["key"].as_str().unwrap().starts_with("packs/")), "{run}");
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    assert_eq!(restored.query("SELECT count(*) FROM mark").await, "1000");

    flip(&files(&protected.home().join("region-b/packs"))[0]);
    let half = protected.scratch.join("half");
    let shown = half.display().to_string();
    let plan = protected.drctl(["restore", "ledger", "--json", "--target-dir", &shown]);
    let plan = plan.expect_log("taken from another region").run().await.ok();
    let digest = plan.json()["digest"].as_str().unwrap().to_owned();
    let failed = protected
        .drctl(["restore", "ledger", "--json", "--target-dir", &shown, "--execute", "--plan", &digest])
        .expect_log("taken from another region")
        .run()
        .await
        .code(1);
    assert!(failed.stdout.contains("packs/"), "{failed}");
    assert!(!half.join("global/pg_control").exists());
}

#[tokio::test]
async fn two_regions_with_different_damage_restore_together() {
    let protected = Protected::new().await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT generate_series(1, 1000) n").await;
    protected.backup().await;
    for (region, part) in [("region-a", 1), ("region-b", 3)] {
        let pack = files(&protected.home().join(region).join("packs")).remove(0);
        let mut bytes = fs::read(&pack).unwrap();
        let at = bytes.len() * part / 4;
        bytes[at] ^= 1;
        fs::remove_file(&pack).unwrap();
        fs::write(&pack, bytes).unwrap();
    }
    let directory = protected.scratch.join("restored");
    let shown = directory.display().to_string();
    let line = ["restore", "ledger", "--json", "--target-dir", &shown];
    let quiet = |drctl: Drctl| drctl.expect_log("taken from another region");
    let plan = quiet(protected.drctl(line)).run().await.ok().json();
    let run = quiet(protected.here(Drctl::pasted(plan["command"].as_str().unwrap()))).run().await.ok();
    assert!(!run.json()["incidents"].as_array().unwrap().is_empty(), "{run}");
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    assert_eq!(restored.query("SELECT count(*) FROM mark").await, "1000");
}

/// Whoever is not root may write no file of mode 0400, not even their own.
#[tokio::test]
async fn an_ordinary_account_restores_what_its_owner_may_not_write() {
    use std::os::unix::fs::PermissionsExt;
    let protected = Protected::new().await;
    let key = protected.cluster.data_dir().join("server.key");
    fs::write(&key, "a key").unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
    crate::support::dirs::give_to_postgres(&key);
    protected.backup().await;
    crate::support::dirs::give_to_postgres(&protected.home());
    let program = protected.scratch.join("drctl-copy");
    fs::copy(env!("CARGO_BIN_EXE_drctl"), &program).unwrap();
    let directory = protected.scratch.postgres_dir("home").join("restored");
    let run = async |line: &str| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "sh", "-ec", line]);
        protected.here(Drctl::of(command)).run().await.ok().json()
    };
    let plan = run(&format!("{} restore ledger --json --target-dir {}", program.display(), directory.display())).await;
    run(&format!("{} --json", plan["command"].as_str().unwrap())).await;
    let restored = directory.join("server.key");
    assert_eq!(fs::read_to_string(&restored).unwrap(), "a key");
    assert_eq!(fs::metadata(&restored).unwrap().permissions().mode() & 0o7777, 0o400);
    let server = Cluster::start_restored(&directory, MAJOR).await;
    assert_eq!(server.query("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_killed_restore_cannot_start_and_runs_again() {
    let protected = Protected::new().await;
    protected.cluster.pgbench_init(5).await;
    protected.backup().await;
    let directory = protected.scratch.join("restored");
    let digest = protected.plan(&directory, &[]).await.ok().json()["digest"].as_str().unwrap().to_owned();
    let shown = directory.display().to_string();
    let arguments = ["restore", "ledger", "--target-dir", &shown, "--execute", "--plan", &digest];
    let running = protected.drctl(arguments).spawn();
    process::eventually("the restore begins", Duration::from_secs(30), async || directory.join("base").exists()).await;
    running.kill9();
    if directory.join("drctl-restore.json").exists() {
        assert!(!directory.join("global/pg_control").exists());
        fs::write(directory.join("base/stray"), "left").unwrap();
        protected.drctl(arguments).run().await.ok();
    }
    assert!(!directory.join("base/stray").exists());
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    assert_eq!(restored.query("SELECT count(*) FROM pgbench_accounts").await, "500000");
    drop(restored);
    // What is complete is somebody's data now.
    let refused = protected.plan(&directory, &[]).await.code(5);
    assert!(refused.json()["refused"][0]["what"].as_str().unwrap().contains("not empty"), "{refused}");
}

#[tokio::test]
async fn nothing_is_written_that_was_not_planned() {
    let protected = Protected::new().await;
    let backup = protected.backup().await;
    let directory = protected.scratch.join("restored");
    let shown = directory.display().to_string();
    let run = |options: Vec<&'static str>| {
        let arguments = ["restore", "ledger", "--target-dir", &shown].map(str::to_owned);
        protected.drctl(arguments.into_iter().chain(options.into_iter().map(str::to_owned))).run()
    };
    let text = run(vec![]).await.ok().stdout;
    assert!(
        text.contains(backup["id"].as_str().unwrap()) && text.contains("--plan") && text.contains("--execute"),
        "{text}"
    );
    for options in [vec!["--execute"], vec!["--execute", "--plan", "000000"], vec!["--execute", "--plan", "0"]] {
        let refused = run(options).await.code(5);
        assert!(refused.stderr.contains("--plan"), "{refused}");
    }
    run(vec!["--plan", "000000"]).await.code(2);
    assert!(!directory.exists());
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("precious"), "mine").unwrap();
    let refused = run(vec![]).await.code(5);
    assert!(refused.stdout.contains("not empty") && refused.stdout.contains("precious"), "{refused}");
    assert_eq!(fs::read_to_string(directory.join("precious")).unwrap(), "mine");
    // The printed command is one that runs.
    fs::remove_dir_all(&directory).unwrap();
    let text = run(vec![]).await.ok().stdout;
    let command = text.lines().rfind(|line| line.contains("drctl restore")).unwrap();
    protected.here(Drctl::pasted(command)).run().await.ok();
    assert!(directory.join("global/pg_control").exists());
}

#[tokio::test]
async fn a_machine_without_configuration_restores_with_one_key() {
    let protected = Protected::new().await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT 7 n").await;
    protected.backup().await;
    let home = protected.home();
    let key = home.join("recovery.age").display().to_string();
    let region = home.join("region-b").display().to_string();
    let directory = protected.scratch.join("restored");
    let shown = directory.display().to_string();
    let here = |drctl: Drctl| {
        let bin = format!("DRCTL_PG_BIN_{MAJOR}");
        drctl.current_dir(protected.scratch.path()).env(&bin, protected.cluster.bin_dir()).run()
    };
    let line = ["restore", "latest", "--json", "--target-dir", &shown, "--repo", &region, "--age-identity", &key];
    let plan = here(Drctl::new(line)).await.ok().json();
    here(Drctl::pasted(plan["command"].as_str().unwrap())).await.ok();
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    assert_eq!(numbers(&restored).await, "7");
}

#[tokio::test]
async fn tablespaces_need_a_place_and_get_it() {
    let protected = Protected::new().await;
    let old = protected.cluster.extra_dir("space").display().to_string();
    protected.cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{old}'")).await;
    protected.cluster.execute("CREATE TABLE mark TABLESPACE space AS SELECT 3 n").await;
    protected.backup().await;
    let refused = protected.plan(&protected.scratch.join("a"), &[]).await.code(5);
    assert!(refused.stdout.contains("--tablespace"), "{refused}");
    let new = protected.scratch.join("moved").display().to_string();
    let directory = protected.scratch.join("b");
    protected.execute(&directory, &["--tablespace", &format!("{old}={new}")]).await.ok();
    assert!(!directory.join("tablespace_map").exists());
    let restored = Cluster::try_start_restored(&directory, MAJOR, &[], Until::Promoted).await.unwrap();
    assert_eq!(numbers(&restored).await, "3");
}

/// Every regular file below a directory, the largest first.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().len()));
    found
}

/// Turns one bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}
