//! The end of the stored WAL is damaged everywhere: what is before it comes back, and what is lost is told to the byte.

use std::fs;

use drctl::jobs::wal::State;
use drctl::model::Lsn;
use drctl::repository::wal::frame::{FrameHeader, FrameKind};
use serde_json::Value;

use crate::archive::SOON;
use crate::rig3::files_below;
use crate::support::pg::Cluster;
use crate::wal::{DIRECTORIES, Rig};

const MAJOR: u32 = 16;
const REGIONS: [&str; 3] = ["a", "b", "c"];

/// The data frames of the log, ascending, by name and head.
fn frames(rig: &Rig) -> Vec<(String, FrameHeader)> {
    let files = files_below(&rig.scratch.join("a")).into_iter().filter(|(name, _)| name.starts_with("wal/"));
    let mut frames: Vec<(String, FrameHeader)> = files
        .map(|(name, bytes)| {
            // Eight bytes that name the format, four that say how long the head is.
            let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
            (name, serde_json::from_slice(&bytes[12..12 + length]).unwrap())
        })
        .collect();
    frames.retain(|(_, header)| header.kind == FrameKind::Data);
    frames.sort_by_key(|(_, header)| header.span.start);
    frames
}

async fn plan(rig: &Rig) -> Value {
    let never = rig.scratch.join("never").display().to_string();
    rig.drctl(&["restore", "ledger", "--json", "--target-dir", &never]).run().await.ok().json()
}

#[tokio::test]
async fn a_last_frame_that_is_cut_costs_what_is_in_it_and_not_a_byte_more() {
    let builder = Cluster::builder(MAJOR).setting("autovacuum", "off").setting("wal_keep_size", "1GB");
    let cluster = builder.start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "heartbeat = false\n").await;
    let stream = rig.stream().spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    for n in 0..4 {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        rig.wait_durable(cluster.flush_lsn().await).await;
    }
    let flushed = cluster.flush_lsn().await;
    // It closes nothing: the frame of the last row is the last object of the log.
    stream.kill9();
    rig.drctl(&["repair"]).run().await.ok();

    let stored = frames(&rig);
    let (before, (last, header)) = (&stored[stored.len() - 2].1, &stored[stored.len() - 1]);
    let lost = header.span.end.bytes_since(header.span.start);
    let whole = fs::read(rig.scratch.join("a").join(last)).unwrap();
    let cut = |length: usize| {
        let length = length | 1;
        REGIONS.iter().for_each(|region| fs::write(rig.scratch.join(region).join(last), &whole[..length]).unwrap());
    };
    assert_eq!(plan(&rig).await["end_lsn"], header.span.last_record_end.unwrap().to_string());
    // Behind the head, in the middle of the body, a byte before its end.
    for length in [whole.len() - usize::try_from(header.body_bytes).unwrap(), whole.len() - 40, whole.len() - 3] {
        cut(length);
        let plan = plan(&rig).await;
        assert_eq!(plan["end_lsn"], before.span.last_record_end.unwrap().to_string(), "{length}: {plan:#}");
        let told = format!("{lost} bytes of WAL, from {} to {}, are lost", header.span.start, header.span.end);
        assert!(plan["unreachable"].as_str().unwrap().contains(&told), "{told}: {plan:#}");
    }
    // So much that nobody can tell how much it was.
    cut(99);
    let torso = plan(&rig).await;
    assert_eq!(torso["end_lsn"], before.span.last_record_end.unwrap().to_string(), "{torso:#}");
    assert!(torso["unreachable"].as_str().unwrap().contains(last.as_str()), "{torso:#}");
    cut(whole.len() - 40);
    let back = Cluster::start_restored(&rig.restored("back").await, MAJOR).await;
    assert_eq!(back.query("SELECT string_agg(n::text, ' ' ORDER BY n) FROM t").await, "0 1 2");
    assert!(back.log().contains("redo done at"), "{}", back.log());
    drop(back);

    // One good copy is enough, and none is asked for as long as the server has it: the receiver goes on before the cut.
    let stream = rig.stream().expect_log("not readable").expect_log("damaged").spawn();
    let position = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    assert!(position.start_lsn.unwrap() <= header.span.start, "{position:?}");
    cluster.execute("INSERT INTO t VALUES (4)").await;
    rig.wait_durable(cluster.flush_lsn().await.max(flushed)).await;
    stream.terminate().await.ok();
    assert_ne!(plan(&rig).await["end_lsn"].as_str().unwrap().parse::<Lsn>().unwrap(), flushed);
    let back = Cluster::start_restored(&rig.restored("again").await, MAJOR).await;
    assert_eq!(back.query("SELECT string_agg(n::text, ' ' ORDER BY n) FROM t").await, "0 1 2 3 4");
}
