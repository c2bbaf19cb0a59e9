//! A standby lends its files: the primary is put into backup mode and otherwise left alone.

use std::time::Duration;

use serde_json::Value;

use crate::restore::Protected;
use crate::support::dirs::Scratch;
use crate::support::ledger::Ledger;
use crate::support::pg::{Cluster, Until};
use crate::support::process;

const SOON: Duration = Duration::from_secs(30);

/// A primary, its standby on the same host, and a role with the rights that the documentation names.
struct Pair {
    protected: Protected,
    standby: Cluster,
    _place: Scratch,
}

impl Pair {
    async fn new(major: u32, more: &str) -> Self {
        let builder = Cluster::builder(major).setting("max_prepared_transactions", "5");
        let protected = Protected::of(builder).await;
        let primary = &protected.cluster;
        primary
            .execute(
                "CREATE ROLE lender LOGIN REPLICATION; GRANT pg_monitor, pg_read_server_files TO lender;
                 GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO lender;
                 GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean), pg_stat_file(text, boolean),
                     pg_read_binary_file(text, bigint, bigint, boolean) TO lender;
                 GRANT pg_checkpoint TO lender; GRANT CREATE ON DATABASE postgres TO lender",
            )
            .await;
        let place = Scratch::new();
        let data = place.postgres_dir("standby");
        let mut basebackup = primary.tool("pg_basebackup");
        basebackup.arg("-D").arg(&data).args(["-R", "-c", "fast"]);
        process::run_async(basebackup).await;
        let standby = Cluster::try_start_restored(&data, major, &[], Until::Ready).await.unwrap();
        let path = protected.home().join("drctl.toml");
        let text = std::fs::read_to_string(&path).unwrap().replace("user=postgres", "user=lender");
        assert!(text.contains("user=lender"), "{text}");
        let lender = standby.conninfo().replace("user=postgres", "user=lender");
        std::fs::write(&path, format!("{text}standby = \"{lender}\"\n{more}")).unwrap();
        Self { protected, standby, _place: place }
    }

    async fn backups(&self) -> usize {
        let list: Value = self.protected.drctl(["list", "ledger", "--json"]).run().await.ok().json();
        list["backups"].as_array().unwrap_or_else(|| panic!("{list:#}")).len()
    }
}

#[tokio::test]
async fn what_it_lends_comes_back_under_load() {
    for major in [15, 18] {
        let pair = Pair::new(major, "").await;
        let (protected, primary) = (&pair.protected, &pair.protected.cluster);
        primary.execute("CREATE TABLE promised (n int)").await;
        // A prepared transaction is in a file that no standby has to have.
        primary.execute("BEGIN; INSERT INTO promised VALUES (1); PREPARE TRANSACTION 'kept'").await;
        primary.execute("ALTER SYSTEM SET work_mem = '5MB'").await;
        let stream = protected.stream();
        let ledger = Ledger::start(primary, 2).await;
        ledger.wait_for(200).await;
        let first = protected.backup().await;
        assert_eq!(first["provenance"]["method"], "standby", "{first:#}");
        ledger.wait_for(200).await;
        let second = protected.backup().await;
        assert_eq!(second["kind"], "incremental", "{second:#}");
        ledger.wait_for(100).await;
        let book = ledger.stop().await;
        let durable = protected.durable().await;

        let back = protected.restored("back", &[]).await;
        book.verify(&back, durable).await.unwrap();
        back.amcheck().await;
        assert_eq!(back.query("SHOW work_mem").await, "5MB", "the configuration is the primary's");
        assert_eq!(
            back.query("SELECT count(*) FROM pg_settings WHERE name = 'primary_conninfo' AND setting <> ''").await,
            "0"
        );
        back.execute("COMMIT PREPARED 'kept'").await;
        assert_eq!(back.query("SELECT count(*) FROM promised").await, "1");
        stream.terminate().await.ok();
    }
}

#[tokio::test]
async fn a_standby_that_lags_or_is_promoted_fails_the_backup() {
    let pair = Pair::new(16, "standby_patience = \"2s\"\nmax_read_rate = \"4MiB\"\n").await;
    let (protected, primary) = (&pair.protected, &pair.protected.cluster);
    primary.execute("CREATE TABLE filler AS SELECT repeat(md5(g::text), 30) FROM generate_series(1, 30000) g").await;

    pair.standby.execute("SELECT pg_wal_replay_pause()").await;
    let told = protected.drctl(["backup", "ledger", "--fast"]).run().await.code(1);
    assert!(told.stderr.contains("the standby is behind"), "{told}");
    pair.standby.execute("SELECT pg_wal_replay_resume()").await;
    assert_eq!(pair.backups().await, 0);

    let backup = protected.drctl(["backup", "ledger", "--fast"]).spawn();
    process::eventually("the backup reads", SOON, async || {
        primary.query("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'drctl backup' AND query LIKE 'SELECT%walfile%'").await != "0"
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    pair.standby.execute("SELECT pg_promote()").await;
    let told = backup.wait().await.code(1);
    assert!(told.stderr.contains("the standby was promoted"), "{told}");
    assert_eq!(pair.backups().await, 0);

    // It is none any more: the primary is read.
    let told = protected.drctl(["backup", "ledger", "--fast", "--json"]).expect_log("no standby can be read here");
    let backup = told.run().await.ok().json();
    assert_eq!(backup["backup"]["provenance"]["method"], "local", "{backup:#}");
}
