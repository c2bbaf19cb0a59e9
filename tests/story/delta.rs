//! Restores over a data directory that stands there: what is right stays, what is wrong is fetched, what does not belong goes.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use drctl::model::pages::PAGE_SIZE;
use serde_json::Value;

use crate::restore::Protected;
use crate::support::dirs::give_to_postgres;
use crate::support::drctl::Drctl;
use crate::support::pg::{self, Cluster};
use crate::support::process;

const MAJOR: u32 = 15;
const DIGEST: &str = "SELECT string_agg(sum, ' ') FROM (\
    SELECT count(*) || ':' || sum(hash_record_extended(t, 0)::numeric) AS sum FROM account t UNION ALL \
    SELECT count(*) || ':' || sum(hash_record_extended(t, 0)::numeric) FROM apart t) sums";

/// A cluster with some 20 MB in two tables, one of them in a tablespace, its backup, and a restored copy that has gone on by
/// itself and was stopped.
struct Diverged {
    protected: Protected,
    directory: PathBuf,
    tablespace: String,
}

impl Diverged {
    async fn new() -> Self {
        let protected = Protected::new().await;
        let old = protected.cluster.extra_dir("space").display().to_string();
        let cluster = &protected.cluster;
        cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{old}'")).await;
        let rows = "SELECT i AS id, md5(i::text) || md5((i + 7)::text) AS body FROM generate_series";
        cluster.execute(&format!("CREATE TABLE account AS {rows}(1, 120000) AS i")).await;
        cluster.execute("ALTER TABLE account ADD PRIMARY KEY (id)").await;
        cluster.execute(&format!("CREATE TABLE apart TABLESPACE space AS {rows}(1, 30000) AS i")).await;
        protected.backup().await;
        let directory = protected.scratch.join("standby");
        let tablespace = format!("{old}={}", protected.scratch.join("standby-space").display());
        protected.execute(&directory, &["--tablespace", &tablespace]).await.ok();
        let mut copy = Cluster::start_restored(&directory, MAJOR).await;
        copy.execute("UPDATE account SET body = 'wrong' WHERE id % 40000 = 0; CREATE TABLE stray AS SELECT 1 AS n")
            .await;
        copy.stop().await;
        drop(copy);
        Self { protected, directory, tablespace }
    }

    fn options<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        ["--tablespace", &self.tablespace].into_iter().chain(more.iter().copied()).collect()
    }

    async fn plan(&self, more: &[&str]) -> crate::support::drctl::Finished {
        let directory = self.directory.display().to_string();
        let fixed = ["restore", "ledger", "--json", "--target-dir", &directory];
        self.protected.drctl(fixed.iter().copied().chain(self.options(more))).run().await
    }

    /// The source and what came back hold the same rows, and PostgreSQL finds nothing wrong with it.
    async fn comes_back(&self) {
        give_to_postgres(&self.directory);
        let mut verify = pg::tool(MAJOR, "pg_verifybackup");
        verify.arg("-n").arg(&self.directory);
        process::run_async(verify).await;
        let expected = self.protected.cluster.query(DIGEST).await;
        let restored = Cluster::start_restored(&self.directory, MAJOR).await;
        assert_eq!(restored.query(DIGEST).await, expected);
        assert_eq!(restored.query("SELECT to_regclass('stray') IS NULL").await, "t");
        restored.amcheck().await;
    }
}

/// The file of a relation in a data directory.
async fn file_of(cluster: &Cluster, relation: &str, directory: &Path) -> PathBuf {
    directory.join(cluster.query(&format!("SELECT pg_relation_filepath('{relation}')")).await)
}

fn fetched(report: &Value) -> u64 {
    report["phases"][0]["fetched_bytes"].as_u64().unwrap()
}

fn reused(report: &Value) -> u64 {
    report["phases"][0]["reused_bytes"].as_u64().unwrap()
}

#[tokio::test]
async fn what_is_right_stays_and_what_is_wrong_is_mended() {
    let diverged = Diverged::new().await;
    let (protected, directory) = (&diverged.protected, &diverged.directory);
    protected.cluster.execute("UPDATE account SET body = 'right' WHERE id < 50").await;
    protected.cluster.execute("VACUUM account").await;
    protected.backup().await;
    let [account, index] = [
        file_of(&protected.cluster, "account", directory).await,
        file_of(&protected.cluster, "account_pkey", directory).await,
    ];
    let apart = file_of(&protected.cluster, "apart", directory).await;
    // A flipped bit, a hole of zeros, a file cut short, a link out of the directory, a file that somebody else has too.
    let damaged = fs::OpenOptions::new().write(true).open(&account).unwrap();
    damaged.write_all_at(b"?", 5 * PAGE_SIZE as u64 + 5000).unwrap();
    damaged.write_all_at(&[0; PAGE_SIZE], 9 * PAGE_SIZE as u64).unwrap();
    fs::OpenOptions::new().write(true).open(&index).unwrap().set_len(3 * PAGE_SIZE as u64 + 100).unwrap();
    let victim = protected.scratch.join("victim");
    fs::write(&victim, b"not ours").unwrap();
    let linked = file_of(&protected.cluster, "pg_class", directory).await;
    fs::remove_file(&linked).unwrap();
    symlink(&victim, &linked).unwrap();
    let twin = protected.scratch.join("twin");
    fs::hard_link(&apart, &twin).unwrap();
    let twin_before = fs::read(&twin).unwrap();
    let stranger = directory.join("base/1/stranger");
    fs::create_dir(&stranger).unwrap();
    fs::write(stranger.join("1"), b"?").unwrap();

    let refused = diverged.plan(&[]).await.code(5);
    assert!(refused.stdout.contains("is not empty"), "{refused}");
    let plan = diverged.plan(&["--delta"]).await.ok().json();
    let reuse = &plan["reuse"];
    assert!(reuse["bytes"].as_u64().unwrap() > 10 << 20, "{plan:#}");
    assert!(reuse["remove_files"].as_u64().unwrap() > 1, "{plan:#}");
    assert!(plan["command"].as_str().unwrap().contains("--delta"), "{plan:#}");
    assert!(stranger.exists(), "a plan touches nothing");

    let report = protected.execute(directory, &diverged.options(&["--delta"])).await.ok().json();
    let whole = report["phases"][0]["bytes"].as_u64().unwrap();
    // What has two names is not written to, and so not reused: the table in the tablespace.
    assert!(reused(&report) > whole / 2 && reused(&report) < whole, "{report:#}");
    assert!(!stranger.exists() && fs::read(&twin).unwrap() == twin_before);
    assert!(fs::read(&victim).unwrap() == b"not ours" && fs::symlink_metadata(&linked).unwrap().is_file());
    diverged.comes_back().await;
}

#[tokio::test]
async fn a_killed_one_does_not_start_and_goes_on_where_it_was() {
    let diverged = Diverged::new().await;
    let (protected, directory) = (&diverged.protected, &diverged.directory);
    // Much to write, so that there is a middle.
    protected.cluster.execute("UPDATE account SET body = body || '!'").await;
    protected.cluster.execute("VACUUM account").await;
    protected.backup().await;
    let plan = diverged.plan(&["--delta", "--memory", "64MiB"]).await.ok().json();
    let line = format!("exec {} --json", plan["command"].as_str().unwrap());
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=pwrite64",
        "-e",
        "inject=pwrite64:signal=SIGKILL:when=4",
    ]);
    strace.args(["sh", "-c", &line]);
    let (home, bin) = (protected.home(), protected.cluster.bin_dir());
    let killed = Drctl::of(strace).config(&home.join("drctl.toml")).env("DRCTL_PG_BIN_15", bin).run().await;
    assert_ne!(killed.code, Some(0), "{killed}");
    assert!(!directory.join("global/pg_control").exists() && directory.join("drctl-restore.json").exists());

    // What says whose directory it is now is the marker of the killed run.
    diverged.plan(&[]).await.code(5);
    let report = protected.execute(directory, &diverged.options(&["--delta"])).await.ok().json();
    assert!(reused(&report) > 0 && fetched(&report) > 0, "{report:#}");
    assert!(!directory.join("drctl-restore.json").exists());
    diverged.comes_back().await;
}

#[tokio::test]
async fn only_a_stopped_directory_of_this_cluster_is_written_over() {
    let protected = Protected::new().await;
    protected.cluster.execute("CREATE TABLE mark AS SELECT 1 n").await;
    protected.backup().await;
    let plan = async |directory: &Path| {
        let directory = directory.display().to_string();
        let words = ["restore", "ledger", "--json", "--delta", "--target-dir", &directory];
        protected.drctl(words).run().await.code(5).stdout
    };
    let running = plan(protected.cluster.data_dir()).await;
    assert!(running.contains("a server (pid"), "{running}");
    let mut other = Cluster::start_new(MAJOR).await;
    other.stop().await;
    let another = plan(other.data_dir()).await;
    assert!(another.contains("is the data directory of another cluster"), "{another}");
    let home = protected.scratch.dir("home");
    fs::write(home.join("thesis"), b"years of work").unwrap();
    let unknown = plan(&home).await;
    assert!(unknown.contains("does not say which cluster it is of"), "{unknown}");
    let directory = protected.scratch.join("restored");
    protected.execute(&directory, &["--delta"]).await.ok();
    fs::rename(directory.join("pg_wal"), protected.scratch.join("wal")).unwrap();
    symlink(protected.scratch.join("wal"), directory.join("pg_wal")).unwrap();
    let linked = plan(&directory).await;
    assert!(linked.contains("pg_wal is a link"), "{linked}");
    assert_eq!(fs::read(home.join("thesis")).unwrap(), b"years of work");
}
