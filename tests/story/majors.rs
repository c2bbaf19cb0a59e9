//! Every major version of PostgreSQL comes back: a tablespace, an unlogged table, and rows written after the backup, from
//! a backup read on the same host and from one that was streamed.

use std::time::Duration;

use rustix::process::Signal;

use crate::restore::Protected;
use crate::support::dirs::Scratch;
use crate::support::pg::{Cluster, MAJORS, OLDEST};
use crate::support::process;

/// Every row of every table that is logged.
const ROWS: &str = "SELECT 'near', id, text FROM near UNION ALL SELECT 'far', id, text FROM far ORDER BY 1, 2";

/// A server that drctl started and left running; it ends with the test.
struct Left(u32);

impl Left {
    async fn stop(self) {
        process::signal(self.0, Signal::INT);
        process::eventually("the server ends", Duration::from_secs(30), async || !process::is_alive(self.0)).await;
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        if process::is_alive(self.0) {
            process::signal(self.0, Signal::QUIT);
        }
    }
}

async fn comes_back(major: u32, methods: &[&str]) {
    assert!(MAJORS.contains(&major) || major == OLDEST);
    let sockets = Scratch::new();
    // The restored server is started by drctl with the settings that were backed up.
    let builder = Cluster::builder(major)
        .setting("port", &process::free_ports(1).to_string())
        .setting("listen_addresses", "")
        .setting("dynamic_shared_memory_type", "mmap")
        .setting("unix_socket_directories", &sockets.postgres_dir("s").display().to_string());
    let protected = Protected::of(builder).await;
    let old = furnish(&protected.cluster).await;
    let stream = protected.stream();
    let mut first = None;
    for (turn, method) in methods.iter().enumerate() {
        protected.set_method(method);
        let backup = protected.backup().await;
        assert_eq!(backup["provenance"]["method"], *method, "{backup:#}");
        let stored = backup["stored_bytes"].as_u64().unwrap();
        match first {
            None => first = Some(stored),
            // Whatever way the bytes came, only changed pages are stored.
            Some(full) => {
                assert_eq!((backup["kind"].as_str(), stored * 2 < full), (Some("incremental"), true), "{backup:#}");
            }
        }
        let more = format!("SELECT g, '{method} ' || md5(g::text) FROM generate_series(1, 300) g");
        for table in ["near", "far"] {
            protected.cluster.execute(&format!("INSERT INTO {table} (n, text) {more}")).await;
        }
        protected.cluster.execute("DELETE FROM near WHERE id % 7 = 3").await;
        protected.durable().await;
        let (data, moved) =
            (protected.scratch.join(&format!("{turn}")), protected.scratch.join(&format!("{turn}-space")));
        let tablespace = format!("{old}={}", moved.display());
        let options = ["--tablespace", &tablespace, "--start", "--run-as", "postgres"];
        let report = protected.execute(&data, &options).await.ok().json();
        Left(u32::try_from(report["started"]["pid"].as_u64().unwrap()).unwrap()).stop().await;
        let restored = Cluster::start_restored(&data, major).await;
        assert_eq!(restored.query(ROWS).await, protected.cluster.query(ROWS).await);
        assert_eq!(restored.query("SELECT count(*) FROM fleeting").await, "0", "unlogged tables begin anew");
        restored.execute("INSERT INTO fleeting SELECT 1; INSERT INTO far (n, text) VALUES (0, 'goes on')").await;
        let place = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'space'";
        assert_eq!(restored.query(place).await, moved.display().to_string());
        restored.amcheck().await;
    }
    stream.terminate().await.ok();
}

/// Tables of every kind; where the tablespace is.
async fn furnish(cluster: &Cluster) -> String {
    let space = cluster.extra_dir("space").display().to_string();
    cluster.execute(&format!("CREATE TABLESPACE space LOCATION '{space}'")).await;
    for (table, place) in [("near", "pg_default"), ("far", "space")] {
        let columns = "id bigserial, n int, text text";
        cluster.execute(&format!("CREATE TABLE {table} ({columns}) TABLESPACE {place}")).await;
        let rows = "SELECT g, md5(g::text) FROM generate_series(1, 3000) g";
        cluster.execute(&format!("INSERT INTO {table} (n, text) {rows}")).await;
        cluster.execute(&format!("CREATE UNIQUE INDEX ON {table} (id) TABLESPACE {place}")).await;
        cluster.execute(&format!("VACUUM {table}")).await;
    }
    cluster.execute("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 500) n").await;
    space
}

#[tokio::test]
async fn postgresql_13_comes_back() {
    comes_back(OLDEST, &["stream", "local"]).await;
}

#[tokio::test]
async fn postgresql_14_comes_back() {
    comes_back(14, &["local", "stream"]).await;
}

#[tokio::test]
async fn postgresql_15_comes_back() {
    comes_back(15, &["stream", "stream"]).await;
}

#[tokio::test]
async fn postgresql_16_comes_back() {
    comes_back(16, &["local", "stream"]).await;
}

#[tokio::test]
async fn postgresql_17_comes_back() {
    comes_back(17, &["local", "stream"]).await;
}

#[tokio::test]
async fn postgresql_18_comes_back() {
    comes_back(18, &["local", "stream"]).await;
}
