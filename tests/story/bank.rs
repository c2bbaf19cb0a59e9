//! The rig of the drills: one cluster, two directory regions, a key at hand.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::rig3::files_below;
use crate::support::dirs::Scratch;
use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::pg::Cluster;
use crate::support::process;

const MAJOR: u32 = 15;

/// A bank whose accounts always sum up to nothing, protected into two directory regions.
pub struct Bank {
    /// What is protected, as target `ledger`.
    pub cluster: Cluster,
    /// Where everything lies.
    pub scratch: Scratch,
}

impl Bank {
    /// With PostgreSQL's version of the stories about regions.
    pub async fn new() -> Self {
        let builder = Cluster::builder(MAJOR).setting("wal_level", "replica");
        Self::of(builder.setting("shared_preload_libraries", "pg_stat_statements").start().await).await
    }

    /// In a cluster of choice.
    pub async fn of(cluster: Cluster) -> Self {
        let bank = Self { cluster, scratch: Scratch::new() };
        Drctl::new(["init".as_ref(), bank.home().as_os_str()]).run().await.ok();
        let text = fs::read_to_string(bank.config()).unwrap();
        let target = format!(
            "\n[targets.ledger]\nsource = \"postgres\"\nconninfo = \"{}\"\nship_interval = \"100ms\"\n\
             rpo = \"30s\"\nrto_restore = \"10m\"\n\
             [targets.ledger.assertions.balances]\nsql = \"SELECT sum(amount) FROM account\"\nexpect = \"0\"\n\
             [targets.ledger.assertions.enough]\nsql = \"SELECT count(*) >= 1000 FROM account\"\n\
             [drill]\ndir = \"{}\"\nrun_as = \"postgres\"\n",
            bank.cluster.conninfo(),
            bank.drills().display()
        );
        fs::write(bank.config(), text + &target).unwrap();
        let sql = "CREATE TABLE account AS SELECT n, CASE WHEN n % 2 = 0 THEN 7 ELSE -7 END AS amount
                     FROM generate_series(1, 1000) n; CREATE INDEX ON account (n)";
        bank.cluster.execute(sql).await;
        bank
    }

    /// drctl's directory: regions, key, state.
    pub fn home(&self) -> PathBuf {
        self.scratch.join("drctl")
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.home().join("drctl.toml")
    }

    /// Where scratch clusters stand.
    pub fn drills(&self) -> PathBuf {
        self.scratch.join("drills")
    }

    /// `drctl` with this configuration.
    pub fn drctl<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Drctl {
        let bin = self.cluster.bin_dir();
        Drctl::new(arguments).config(&self.config()).env(&format!("DRCTL_PG_BIN_{MAJOR}"), bin)
    }

    /// `drctl wal stream`, once it streams.
    pub async fn stream(&self) -> Background {
        let stream = self.drctl(["wal", "stream", "ledger"]).spawn();
        process::eventually("streaming", Duration::from_secs(20), async || {
            let status = self.drctl(["wal", "status", "--json"]).run().await.ok().json();
            status["targets"][0]["receiver"]["state"] == "streaming"
        })
        .await;
        stream
    }

    /// Waits until everything that is committed now is durable.
    pub async fn shipped(&self) {
        let flushed = self.cluster.flush_lsn().await;
        process::eventually("it is durable", Duration::from_secs(20), async || {
            let status = self.drctl(["wal", "status", "--json"]).run().await.ok().json();
            let durable = status["targets"][0]["receiver"]["durable_lsn"].as_str().unwrap_or("0/0").to_owned();
            durable.parse::<drctl::model::Lsn>().is_ok_and(|durable| durable >= flushed)
        })
        .await;
    }

    /// A base backup.
    pub async fn backup(&self) {
        self.drctl(["backup", "ledger", "--fast"]).run().await.ok();
    }

    /// A drill, as JSON.
    pub async fn drill(&self, options: &[&str]) -> Finished {
        let line = ["drill", "ledger", "--json"].iter().chain(options);
        let drill =
            self.drctl(line).expect_log("drill left").expect_log("is not readable").expect_log("region is left behind");
        drill.run().await
    }

    /// What drills left.
    pub fn left(&self) -> Vec<PathBuf> {
        fs::read_dir(self.drills()).map(|list| list.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
    }

    /// The frames of WAL in the region that is drilled, in their order.
    pub fn frames(&self) -> Vec<PathBuf> {
        let names = files_below(&self.home().join("region-b")).into_keys();
        names.filter(|name| name.starts_with("wal/")).map(|name| self.home().join("region-b").join(name)).collect()
    }
}

/// The largest file below a directory.
pub fn largest(directory: &std::path::Path) -> PathBuf {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found.into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
}
