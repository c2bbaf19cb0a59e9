//! Incremental backups: each restores on its own, whatever the schema did in between, and what the writer remembers is
//! never worth more than what the regions hold.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::restore::Protected;
use crate::support::dirs::size_of;
use crate::support::pg::Cluster;
use crate::support::process;

/// A backup and the whole cluster's text at that moment; nobody writes while it is taken.
pub struct Point {
    /// The backup's report.
    pub report: Value,
    /// What `pg_dump` said.
    pub text: String,
}

impl Point {
    /// Takes it.
    pub async fn take(protected: &Protected) -> Self {
        let text = dump(&protected.cluster).await;
        let report = protected.drctl(["backup", "ledger", "--fast", "--json"]).run().await.ok().json();
        Self { report, text }
    }

    /// The backup.
    pub fn id(&self) -> &str {
        self.report["backup"]["id"].as_str().unwrap()
    }

    fn stored(&self) -> u64 {
        self.report["backup"]["stored_bytes"].as_u64().unwrap()
    }

    /// It comes back as it was.
    pub async fn assert_restores(&self, protected: &Protected, options: &[&str]) {
        let directory = protected.scratch.join(&format!("restored-{}", self.id()));
        let shown = directory.display().to_string();
        let fixed = ["restore", self.id(), "--target-dir", &shown, "--immediate", "--json"];
        let fixed = [&fixed[..], options].concat();
        // A region that is gone is told, and only then.
        let gone = if options.is_empty() { "-" } else { "taken from another region" };
        let plan = protected.drctl(&fixed).expect_log(gone).run().await.ok().json();
        let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
        protected.drctl([&fixed[..], &execute].concat()).expect_log(gone).run().await.ok();
        let restored = Cluster::start_restored(&directory, protected.cluster.major()).await;
        restored.amcheck().await;
        // Only now: pg_amcheck has installed its extension.
        restored.execute("DROP EXTENSION amcheck").await;
        let text = dump(&restored).await;
        let other = text.lines().zip(self.text.lines()).find(|(restored, dumped)| restored != dumped);
        assert!(text == self.text, "{} restores something else: {other:?}", self.id());
        drop(restored);
        fs::remove_dir_all(&directory).unwrap();
    }
}

async fn dump(cluster: &Cluster) -> String {
    let mut command = cluster.tool("pg_dump");
    command.arg("--no-sync");
    let text = process::run_async(command).await;
    // A random word that keeps psql from obeying the dumped server.
    text.lines().filter(|line| !line.contains("restrict ")).map(|line| format!("{line}\n")).collect()
}

async fn pgbench(cluster: &Cluster, transactions: u32) {
    let mut command = cluster.tool("pgbench");
    command.args(["--no-vacuum", "--client=2", &format!("--transactions={transactions}")]);
    process::run_async(command).await;
}

#[tokio::test]
async fn a_chain_across_ddl_restores_link_by_link() {
    let protected = Protected::new().await;
    let cluster = &protected.cluster;
    cluster.pgbench_init(2).await;
    cluster
        .execute(
            "CREATE TABLE doomed AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g;
             CREATE TABLE emptied AS TABLE doomed;
             CREATE TABLE growing AS SELECT 1 AS g, 'one' AS t;
             CREATE TABLE shrinking AS TABLE doomed; CREATE INDEX ON shrinking (g)",
        )
        .await;
    let full = Point::take(&protected).await;
    assert_eq!(full.report["backup"]["kind"], "full");
    assert_eq!(full.report["full_because"], "there is no earlier backup of ledger");
    assert_eq!(full.report["not_remembered"], Value::Null);

    pgbench(cluster, 100).await;
    let second = Point::take(&protected).await;
    let backup = &second.report["backup"];
    assert_eq!((backup["kind"].as_str(), backup["parent"].as_str()), (Some("incremental"), Some(full.id())));
    let pages = |what: &str| second.report["pages"][what].as_u64().unwrap();
    assert!(pages("changed") * 5 < pages("read"), "{}", second.report);
    assert!(second.stored() * 5 < full.stored(), "{} of {}", second.stored(), full.stored());

    cluster
        .execute(
            "DROP TABLE doomed; TRUNCATE emptied; CREATE TABLE born AS SELECT g FROM generate_series(1, 30000) g;
             INSERT INTO growing SELECT g, repeat('x', 500) FROM generate_series(2, 15000) g;
             DELETE FROM shrinking WHERE g > 40; REINDEX TABLE shrinking",
        )
        .await;
    // Outside of a transaction, and it gives the tail of the table back.
    cluster.execute("VACUUM shrinking").await;
    pgbench(cluster, 100).await;
    let third = Point::take(&protected).await;
    assert_eq!(third.report["backup"]["parent"].as_str(), Some(second.id()));
    assert!(third.stored() * 2 < full.stored(), "{} of {}", third.stored(), full.stored());

    let verified = protected.drctl(["verify", "ledger", "--level", "l2", "--json"]).run().await.ok().json();
    for region in verified["backups"].as_array().unwrap().iter().flat_map(|b| b["regions"].as_array().unwrap()) {
        assert_eq!(region["level"], "L2", "{verified}");
    }
    for point in [&third, &full, &second] {
        point.assert_restores(&protected, &[]).await;
    }
}

#[tokio::test]
async fn what_is_not_remembered_costs_a_full_backup_and_is_said() {
    let protected = Protected::new().await;
    let state = protected.home().join("state/ledger.pages");
    let backup = async |options: &[&str]| {
        let told = protected.drctl([&["backup", "ledger", "--fast"][..], options].concat()).run().await.ok();
        assert!(state.exists() && !state.with_extension("pages.next").exists(), "{told}");
        told.stdout
    };
    backup(&[]).await;
    let told = backup(&[]).await;
    assert!(told.contains("incremental of ledger") && told.contains("pages changed since ledger-"), "{told}");
    let told = backup(&["--full"]).await;
    assert!(told.contains("full of ledger") && told.contains("pages: it was asked for"), "{told}");

    fs::remove_file(&state).unwrap();
    let told = backup(&[]).await;
    assert!(told.contains("full of ledger") && told.contains("is not in"), "{told}");
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).unwrap();
    let told = backup(&[]).await;
    assert!(told.contains("full of ledger") && told.contains("is not the page map"), "{told}");

    let stranger = Protected::new().await;
    stranger.backup().await;
    fs::copy(stranger.home().join("state/ledger.pages"), &state).unwrap();
    let told = backup(&[]).await;
    assert!(told.contains("full of ledger") && told.contains("is not the page map"), "{told}");
    assert!(backup(&[]).await.contains("incremental of ledger"));
}

#[tokio::test]
async fn a_wiped_region_gets_the_whole_closure_back() {
    let protected = Protected::new().await;
    let cluster = &protected.cluster;
    cluster.pgbench_init(1).await;
    let full = Point::take(&protected).await;
    pgbench(cluster, 50).await;
    let child = Point::take(&protected).await;
    assert_eq!(child.report["backup"]["parent"].as_str(), Some(full.id()));
    let (a, b) = (protected.home().join("region-a"), protected.home().join("region-b"));
    // The parent is a backup no more; what the child shares with it stays.
    for region in [&a, &b] {
        fs::remove_file(region.join("commits/ledger").join(full.id())).unwrap();
    }
    let found = protected.drctl(["verify", "--json"]).run().await.ok().json();
    let strays = found["orphans"].as_array().unwrap().iter().filter(|orphan| orphan["id"] == full.id());
    let strays: u64 = strays.map(|orphan| orphan["objects"].as_u64().unwrap()).sum();
    assert!(strays <= 2, "only the manifest and the inventory of the parent are needed by nobody: {found}");

    let whole = size_of(&b.join("packs"));
    fs::remove_dir_all(&b).unwrap();
    protected.drctl(["repair", "ledger"]).run().await.ok();
    assert_eq!(size_of(&b.join("packs")), whole);
    move_away(&a);
    // The region that is left has everything, and says of the other that it is gone.
    let options = ["--region", "region-b"];
    child.assert_restores(&protected, &options).await;
}

fn move_away(region: &Path) {
    fs::rename(region, region.with_extension("gone")).unwrap();
}
