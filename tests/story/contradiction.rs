//! WAL that is wrong and pushed: it is refused, or it is alarmed for good, and no restore crosses it.

use std::path::PathBuf;

use drctl::jobs::wal::State;

use crate::archive::{SOON, archiving, fill_segment, walk};
use crate::support::pg::{Cluster, Until};
use crate::wal::Rig;

impl Rig {
    fn streams(&self, on: bool) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        let text = text.replace("stream = true", "stream = ANY").replace("stream = false", "stream = ANY");
        std::fs::write(&self.config, text.replace("stream = ANY", &format!("stream = {on}"))).unwrap();
    }

    fn frames(&self, region: &str) -> Vec<PathBuf> {
        walk(&self.scratch.join(region).join("wal"))
    }
}

#[tokio::test]
async fn a_segment_that_was_pushed_with_other_bytes_is_alarmed_until_a_backup_begins_behind_it() {
    let (cluster, rig) = archiving(16, true).await;
    cluster.execute("ALTER SYSTEM SET archive_command = 'false'").await;
    cluster.execute("SELECT pg_reload_conf()").await;
    let serve = rig.serve(State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    fill_segment(&cluster).await;
    cluster.execute("INSERT INTO t (text) VALUES ('in the next segment')").await;
    rig.wait_durable(cluster.flush_lsn().await).await;
    serve.terminate().await.ok();

    // Somebody pushes a segment in which every record is right and one byte that no record covers is not.
    fill_segment(&cluster).await;
    let segment = fill_segment(&cluster).await;
    let mut bytes = std::fs::read(cluster.data_dir().join("pg_wal").join(&segment)).unwrap();
    bytes[8192 + 20] ^= 1;
    let forged = rig.scratch.dir("forged").join(&segment);
    std::fs::write(&forged, bytes).unwrap();
    let before = ["a", "b"].map(|region| rig.frames(region));
    rig.streams(false);
    let serve = rig.serve(State::Archiving).await;
    rig.push(&forged).await.ok();
    serve.terminate().await.ok();
    // Two regions lose it, so that it does not count as durable, and streaming brings what the server wrote.
    for (region, before) in ["a", "b"].into_iter().zip(before) {
        for frame in rig.frames(region).into_iter().filter(|frame| !before.contains(frame)) {
            std::fs::remove_file(frame).unwrap();
        }
    }
    rig.streams(true);
    let serve = rig.stream().expect_log("WAL contradicts itself").spawn();
    let position = rig.wait("the alarm", SOON, |position| position.state == State::Gap).await;
    assert!(position.last_error.unwrap().contains("two versions"));
    rig.wait_durable(cluster.flush_lsn().await).await;

    let told = rig.drctl(&["wal", "status", "ledger"]).run().await.ok().stdout;
    assert!(told.contains("CONTRADICTION"), "{told}");
    let status = rig.drctl(&["status", "--json"]).run().await.code(1).json();
    assert_eq!(status["targets"][0]["gaps"][0]["contradiction"], true, "{status:#}");
    assert!(status["targets"][0]["problems"][0].as_str().unwrap().contains("two versions"), "{status:#}");
    let verified = rig.drctl(&["verify", "ledger", "--level", "l2", "--json"]).expect_log("region").run().await.code(1);
    let contradictions = &verified.json()["wal"][0]["contradictions"];
    assert!(contradictions[0].as_str().unwrap().contains("brought by archive_command"), "{verified}");

    // No restore crosses it. One to a point before it is as good as ever.
    let directory = rig.scratch.join("back").display().to_string();
    let plan = ["restore", "ledger", "--target-dir", &directory, "--json"];
    let refused = rig.drctl(&plan).expect_log("region").run().await.code(5);
    assert!(refused.stdout.contains("stored in two versions"), "{refused}");
    let at = status["targets"][0]["gaps"][0]["from"].as_str().unwrap();
    let before = plan.into_iter().chain(["--to-lsn", at]).collect::<Vec<_>>();
    let before = rig.drctl(&before).expect_log("region").run().await.ok().json();
    assert_eq!(before["refused"], serde_json::json!([]), "{before:#}");

    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    serve.terminate().await.ok();
    let status = rig.drctl(&["status", "--json"]).run().await;
    assert_eq!(status.json()["targets"][0]["gaps"], serde_json::json!([]), "{status}");
    let expected = cluster.query("SELECT count(*) FROM t").await;
    let off = [("archive_mode", "off")];
    let directory = rig.restored("again").await;
    let back = Cluster::try_start_restored(&directory, 16, &off, Until::Promoted).await.unwrap();
    assert_eq!(back.query("SELECT count(*) FROM t").await, expected);
}

/// The storage was cloned, and somebody started the clone: it goes on in the same timeline with records of its own.
#[tokio::test]
async fn what_the_server_has_not_written_is_not_taken() {
    let (mut cluster, rig) = archiving(17, false).await;
    let serve = rig.stream().expect_log("was refused").expect_log("not archived").spawn();
    rig.wait("somebody takes WAL", SOON, |position| position.state == State::Archiving).await;
    let common = fill_segment(&cluster).await;
    crate::archive::until_archived(&cluster, &common).await;
    cluster.execute("ALTER SYSTEM SET archive_command = 'false'").await;
    cluster.stop().await;
    let copy = rig.scratch.join("clone");
    let copied = std::process::Command::new("cp").arg("-a").arg(cluster.data_dir()).arg(&copy).status().unwrap();
    assert!(copied.success());
    cluster.start().await;
    let clone = Cluster::try_start_restored(&copy, 17, &[], Until::Ready).await.unwrap();
    let mut ahead = String::new();
    for _ in 0..3 {
        ahead = fill_segment(&clone).await;
    }
    let told = rig.push(&clone.data_dir().join("pg_wal").join(&ahead)).await.code(1);
    assert!(told.stderr.contains("the server of ledger has written up to"), "{told}");
    let pushes = rig.position().await.unwrap().pushes;
    assert!(pushes.is_refusing() && pushes.refused == 1, "{pushes:?}");

    // The server itself gets there, and its own segment is taken. One that it began is taken while it is away, too.
    let mut own = String::new();
    for _ in 0..3 {
        own = fill_segment(&cluster).await;
    }
    assert_eq!(own, ahead);
    rig.push(&cluster.data_dir().join("pg_wal").join(&own)).await.ok();
    let last = fill_segment(&cluster).await;
    cluster.stop().await;
    rig.push(&cluster.data_dir().join("pg_wal").join(&last)).await.ok();
    let far = fill_segment(&clone).await;
    assert!(far <= last, "the clone is not ahead any more");
    fill_segment(&clone).await;
    let unseen = fill_segment(&clone).await;
    let told = rig.push(&clone.data_dir().join("pg_wal").join(&unseen)).await.code(1);
    assert!(told.stderr.contains("cannot be told now"), "{told}");
    serve.terminate().await.ok();
}
