//! The recovery point that a drill reports, against what clients remember: it may be worse than the truth, never better.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::bank::Bank;
use crate::support::ledger::{Book, Ledger};
use crate::support::pg::Cluster;

#[tokio::test]
async fn the_recovery_point_is_never_reported_better_than_it_was() {
    let bank = Bank::new().await;
    bank.cluster.execute("DROP TABLE account").await;
    let text = fs::read_to_string(bank.config()).unwrap();
    let (before, rest) = text.split_once("[targets.ledger.assertions.balances]").unwrap();
    let (_, drill) = rest.split_once("[drill]").unwrap();
    fs::write(bank.config(), format!("{before}[drill]{drill}")).unwrap();
    let stream = bank.stream().await;
    let ledger = Ledger::start(&bank.cluster, 2).await;
    ledger.wait_for(50).await;
    bank.backup().await;
    for number in 0..3 {
        ledger.wait_for(20).await;
        let report = bank.drill(&["--keep=1h"]).await.ok().json();
        let reported = report["rpo"]["measured_seconds"].as_f64().unwrap();
        let truth = truth(&report, &ledger.book()).await;
        assert!(reported >= truth, "drill {number}: {reported} s were reported, {truth} s were lost\n{report:#}");
        assert!(reported < 60.0, "{report:#}");
        fs::remove_dir_all(report["environment"]["directory"].as_str().unwrap()).unwrap();
    }
    ledger.stop().await;
    stream.terminate().await.ok();
}

/// How long before the fault the oldest commit was acknowledged that did not come back.
async fn truth(report: &Value, book: &Book) -> f64 {
    let fault: DateTime<Utc> = report["fault_at"].as_str().unwrap().parse().unwrap();
    let fault = SystemTime::from(fault);
    let data = Path::new(report["environment"]["directory"].as_str().unwrap()).join("data");
    let restored = Cluster::start_restored(&data, 15).await;
    let numbers = restored.query("SELECT number FROM transfer").await;
    let numbers: BTreeSet<u64> = numbers.lines().map(|number| number.parse().unwrap()).collect();
    assert!(numbers.len() >= 50, "{}", numbers.len());
    let lost = book.entries.iter().filter(|entry| entry.acknowledged_at < fault && !numbers.contains(&entry.number));
    let oldest = lost.map(|entry| entry.acknowledged_at).min();
    oldest.map_or(Duration::ZERO, |oldest| fault.duration_since(oldest).unwrap()).as_secs_f64()
}
