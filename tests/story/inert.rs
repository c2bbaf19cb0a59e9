//! A copy of production is started next to production. It must not act.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;

use super::bank::Bank;
use crate::support::pg::Cluster;
use crate::support::process;

/// Somebody on the network whom the database knows. He counts who calls.
struct Canary {
    port: u16,
    calls: Arc<AtomicUsize>,
    packets: Arc<AtomicUsize>,
    listening: [JoinHandle<()>; 2],
}

impl Canary {
    async fn new() -> Self {
        let (tcp, udp, port) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = tcp.local_addr().unwrap().port();
            if let Ok(udp) = UdpSocket::bind(("127.0.0.1", port)).await {
                break (tcp, udp, port);
            }
        };
        let (calls, packets) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (called, reached) = (Arc::clone(&calls), Arc::clone(&packets));
        let listening = [
            tokio::spawn(async move {
                while tcp.accept().await.is_ok() {
                    called.fetch_add(1, Ordering::SeqCst);
                }
            }),
            tokio::spawn(async move {
                let mut packet = [0; 64];
                while udp.recv(&mut packet).await.is_ok() {
                    reached.fetch_add(1, Ordering::SeqCst);
                }
            }),
        ];
        Self { port, calls, packets, listening }
    }

    /// Who called and what came since the last look.
    fn heard(&self) -> (usize, usize) {
        (self.calls.swap(0, Ordering::SeqCst), self.packets.swap(0, Ordering::SeqCst))
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        self.listening.iter().for_each(JoinHandle::abort);
    }
}

/// Everybody who works without being asked.
const BUSY: &str = "SELECT coalesce(string_agg(backend_type, ', '), 'nobody') FROM pg_stat_activity WHERE backend_type NOT IN \
                    ('client backend', 'checkpointer', 'background writer', 'walwriter')";

/// A cluster that calls the canary by every way that there is: a subscription, an archiver, functions and foreign tables.
async fn restless(canary: &Canary) -> Bank {
    let builder = Cluster::builder(15).setting("wal_level", "logical").setting("archive_mode", "on");
    // pg_prewarm stands for every library whose workers run on a clock.
    let builder = builder.setting("shared_preload_libraries", "pg_stat_statements,pg_prewarm");
    let bank = Bank::of(builder.start().await).await;
    let (port, archive) = (canary.port, bank.cluster.extra_dir("archive"));
    let command = format!("bash -c \"echo x > /dev/udp/127.0.0.1/{port}; cp %p {}/%f\"", archive.display());
    bank.cluster.execute(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await;
    let there = format!("host '127.0.0.1', port '{port}', dbname 'postgres'");
    let sql = format!(
        "SELECT pg_reload_conf();
         CREATE EXTENSION dblink; CREATE EXTENSION postgres_fdw;
         CREATE SERVER away FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({there});
         CREATE USER MAPPING FOR postgres SERVER away OPTIONS (user 'postgres');
         CREATE FOREIGN TABLE far (n int) SERVER away;
         CREATE FUNCTION reach() RETURNS text LANGUAGE plpgsql AS $$
           BEGIN
             PERFORM dblink_connect('host=127.0.0.1 port={port} connect_timeout=2');
             RETURN 'there';
           EXCEPTION WHEN OTHERS THEN RETURN 'nobody'; END $$"
    );
    bank.cluster.execute(&sql).await;
    bank.cluster.query("SELECT reach()").await;
    assert!(canary.heard().0 > 0, "the function reaches out");
    let subscription = format!(
        "CREATE SUBSCRIPTION away CONNECTION 'host=127.0.0.1 port={port} connect_timeout=2' PUBLICATION all_of_it
           WITH (connect = false)"
    );
    bank.cluster.execute(&subscription).await;
    bank.cluster.execute("ALTER SUBSCRIPTION away ENABLE").await;
    bank
}

#[tokio::test]
async fn a_scratch_cluster_calls_nobody_and_does_nothing_by_itself() {
    let canary = Canary::new().await;
    let mut bank = restless(&canary).await;
    let archive = bank.cluster.extra_dir("archive");
    let archived = || fs::read_dir(&archive).unwrap().count();
    // All of it happens on the source.
    bank.cluster.switch_wal().await;
    process::eventually("the canary hears the source", Duration::from_secs(60), async || {
        canary.calls.load(Ordering::SeqCst) > 0 && canary.packets.load(Ordering::SeqCst) > 0 && archived() > 0
    })
    .await;
    let busy = bank.cluster.query(BUSY).await;
    for name in ["archiver", "logical replication launcher", "autovacuum launcher"] {
        assert!(busy.contains(name), "{name}: {busy}");
    }

    let check = bank.drctl(["check", "--json"]).run().await.json().to_string();
    let isolated = check.contains("network isolated");
    assert_ne!(isolated, check.contains("network shared"), "{check}");
    // Where the network is shared, a function that somebody calls does reach out: so it is called only where it is not.
    let reach = "[targets.ledger.assertions.reach]\nsql = \"SELECT reach()\"\nexpect = \"nobody\"\n";
    let text = fs::read_to_string(bank.config()).unwrap().replace("rpo = \"30s\"", "rpo = \"1h\"");
    // The worker of pg_prewarm is in no view; its library is in this list.
    let preload = "SELECT current_setting('shared_preload_libraries')";
    let quiet = format!(
        "[targets.ledger.assertions.quiet]\nsql = \"\"\"{BUSY}\"\"\"\nexpect = \"nobody\"\n
         [targets.ledger.assertions.preload]\nsql = \"{preload}\"\nexpect = \"pg_stat_statements\"\n"
    );
    fs::write(bank.config(), format!("{text}{quiet}{}", if isolated { reach } else { "" })).unwrap();

    let stream = bank.stream().await;
    bank.backup().await;
    let report = bank.drill(&[]).await.ok().json();
    assert_eq!(report["environment"]["network"], if isolated { "isolated" } else { "shared" }, "{report:#}");
    assert!(report["warnings"].to_string().contains("may act by themselves: pg_prewarm"), "{report:#}");
    stream.terminate().await.ok();

    // The source is silent now. Whatever is heard from here on was the copy.
    bank.cluster.stop().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    canary.heard();
    let before = archived();
    let report = bank.drill(&[]).await.ok().json();
    let passed = report["checks"].as_array().unwrap().iter().filter(|check| check["outcome"] == "pass");
    let passed: Vec<_> = passed.map(|check| check["name"].as_str().unwrap()).collect();
    assert!(passed.contains(&"quiet") && passed.contains(&"reach") == isolated, "{report:#}");
    assert_eq!((canary.heard(), archived()), ((0, 0), before), "{report:#}");

    // What is kept to be looked at stays as quiet when somebody starts it by hand.
    let report = bank.drill(&["--keep=1h"]).await.ok().json();
    let data = std::path::Path::new(report["environment"]["directory"].as_str().unwrap()).join("data");
    let kept = Cluster::start_restored(&data, 15).await;
    assert_eq!(kept.query(BUSY).await, "nobody");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((canary.heard(), archived()), ((0, 0), before));
    assert_eq!(bank.left().len(), 1, "kept");
}
