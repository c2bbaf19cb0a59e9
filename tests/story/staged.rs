//! Staged WAL is given to recovery under a second name of the same file. It stays what it is for as long as it may be asked
//! for, whatever PostgreSQL does with the file under its own names.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::restore::Protected;
use crate::rig3::files_below;
use crate::support::pg::{Cluster, MAJORS, Until};

const COUNT: &str = "SELECT count(*), sum(hashtext(body)) FROM entries";

/// Small segments, and few that stay: what was replayed is reused at once.
async fn busy(major: u32) -> Protected {
    let builder =
        Cluster::builder(major).wal_segsize(1).setting("min_wal_size", "24MB").setting("max_wal_size", "32MB");
    Protected::of(builder).await
}

fn segments(staging: &Path) -> BTreeMap<String, Vec<u8>> {
    files_below(staging).into_iter().filter(|(name, _)| name.len() == 24).collect()
}

async fn stays_what_it_is(major: u32) {
    let protected = busy(major).await;
    let stream = protected.stream();
    protected.cluster.execute("CREATE TABLE entries (body text)").await;
    protected.backup().await;
    for _ in 0..6 {
        let rows = "SELECT md5(random()::text) || md5(random()::text) FROM generate_series(1, 25000)";
        protected.cluster.execute(&format!("INSERT INTO entries {rows}")).await;
        protected.cluster.execute("CHECKPOINT").await;
    }
    protected.durable().await;
    let target = protected.scratch.join("restored");
    protected.execute(&target, &[]).await.ok();
    let staging = target.join("pg_wal/drctl-wal");
    let staged = segments(&staging);
    assert!(staged.len() > 12, "{:?}", staged.keys());

    // At the end of WAL, just before it would be promoted, a restartpoint lets go of all segments behind it.
    let held = [("recovery_target_action", "pause"), ("log_checkpoints", "on")];
    let mut recovering = Cluster::try_start_restored(&target, major, &held, Until::Ready).await.unwrap();
    crate::support::process::eventually("all is replayed", std::time::Duration::from_secs(60), async || {
        recovering.query("SELECT pg_get_wal_replay_pause_state() = 'paused'").await == "t"
    })
    .await;
    recovering.execute("CHECKPOINT").await;
    let log = recovering.log();
    assert!(log.contains("restartpoint complete"), "{log}");
    let shared = staged.keys().filter(|name| fs::metadata(staging.join(name)).unwrap().nlink() > 1).count();
    assert!(shared > 0, "every segment was copied");
    let begun = staged.keys().filter(|name| target.join("pg_wal").join(name).exists()).count();
    assert!(begun < staged.len(), "no segment was let go of");
    recovering.kill9().await;
    assert!(segments(&staging) == staged, "PostgreSQL wrote into a staged segment during recovery");
    drop(recovering);

    let back = Cluster::start_restored(&target, major).await;
    assert_eq!(back.query(COUNT).await, protected.cluster.query(COUNT).await);
    back.amcheck().await;
    stream.terminate().await.ok();
}

#[tokio::test]
async fn recovery_writes_into_no_staged_segment_and_a_crash_finds_all_of_them() {
    stays_what_it_is(*MAJORS.first().unwrap()).await;
    stays_what_it_is(*MAJORS.last().unwrap()).await;
}
