//! Old WAL in few objects: the frames go, and everything that reads WAL reads on.

use std::time::Duration;

use drctl::jobs::wal::State;
use serde_json::Value;

use crate::archive::SOON;
use crate::escape::{follow_the_last_lines, open, succeeded};
use crate::support::pg::Cluster;
use crate::wal::{DIRECTORIES, Rig};

const MAJOR: u32 = 15;

impl Rig {
    async fn said(&self, arguments: &[&str]) -> Value {
        self.drctl(&[arguments, &["--json"]].concat()).run().await.ok().json()
    }

    /// Objects below `wal/`.
    fn wal_objects(&self, region: &str) -> usize {
        self.objects(&format!("{region}/wal"))
    }

    async fn count(&self, name: &str, region: &str) -> String {
        let directory = self.scratch.join(name);
        let shown = directory.display().to_string();
        let words = ["restore", "ledger", "--json", "--target-dir", &shown, "--region", region];
        let plan = self.drctl(&words).run().await.ok().json();
        let run = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
        self.drctl(&[&words[..], &run].concat()).run().await.ok();
        Cluster::start_restored(&directory, MAJOR).await.query("SELECT count(*) FROM t").await
    }
}

#[tokio::test]
async fn what_is_restored_from_bundles_alone_is_what_was_written() {
    const COMMITS: usize = 40;
    let cluster = Cluster::builder(MAJOR).setting("autovacuum", "off").start().await;
    let more = "heartbeat = false\nship_interval = \"20ms\"\n[targets.ledger.retention]\nkeep_last = 5\n\
                [prune]\ngrace = \"1s\"\nshort_grace = true\n";
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, more).await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    cluster.execute("CREATE TABLE t (n int)").await;
    for n in 0..COMMITS {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        rig.wait_durable(cluster.flush_lsn().await).await;
    }
    stream.terminate().await.ok();
    let before = rig.wal_objects("a");
    assert!(before > COMMITS, "{before}");

    tokio::time::sleep(Duration::from_millis(1100)).await;
    let words = ["wal", "bundle", "ledger", "--older-than", "1s"];
    let planned = rig.said(&words).await;
    assert_eq!(rig.wal_objects("a"), before, "a plan stores nothing");
    let executed = rig.said(&[&words[..], &["--execute"]].concat()).await;
    assert_eq!((&planned["frames"], &planned["bundles"]), (&executed["frames"], &executed["bundles"]));
    let (frames, bundles) = (executed["frames"].as_u64().unwrap(), executed["bundles"].as_u64().unwrap());
    assert!(frames > COMMITS as u64 / 2 && bundles == 1, "{executed}");
    assert_eq!(rig.said(&words).await["bundles"], 0);
    assert_eq!(rig.wal_objects("a"), before + 1);

    // Two looks and a grace period between them; a restore reads beside the sweep.
    let mut digest = None;
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(2200)).await;
        let found = rig.said(&["prune"]).await;
        digest = found["ripe"]["digest"].as_str().map(str::to_owned);
        if digest.is_some() {
            break;
        }
    }
    let digest = digest.expect("the frames are found twice");
    let sweep = ["prune", "--plan", &digest, "--execute", "--json"];
    let (swept, beside) = tokio::join!(rig.drctl(&sweep).run(), rig.count("beside", "a"));
    assert_eq!(swept.ok().json()["swept"]["objects"], frames * 3);
    assert_eq!(beside, COMMITS.to_string());
    for region in ["a", "b", "c"] {
        assert_eq!(rig.wal_objects(region), before + 1 - usize::try_from(frames).unwrap());
    }

    let verified = rig.said(&["verify", "--level", "l2", "--scrub"]).await;
    assert_eq!(verified["backups"][0]["regions"][2]["level"], "L2", "{verified:#}");
    assert_eq!(rig.said(&["repair"]).await["regions"][0]["copied"], 0, "frames that went came back");
    assert!(rig.status().await.is_whole());
    assert_eq!(rig.count("back", "c").await, COMMITS.to_string());

    let (restored, key) = (rig.scratch.join("hatch"), rig.scratch.join("recovery.age"));
    let options = ["ledger", restored.to_str().unwrap(), "--age-identity", key.to_str().unwrap()];
    let told = succeeded(&open(&rig.scratch.join("b"), &options));
    follow_the_last_lines(&restored, &told);
    let hatch = Cluster::start_restored(&restored, MAJOR).await;
    assert_eq!(hatch.query("SELECT count(*) FROM t").await, COMMITS.to_string());
}
