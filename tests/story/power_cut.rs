//! Power fails right after PostgreSQL was told that a segment is archived: what was on its way to the disks is lost, and
//! the segment is not.

use std::path::{Path, PathBuf};

use drctl::jobs::wal::State;
use drctl::model::Lsn;
use rustix::process::Signal;

use crate::archive::{archiving, fill_segment, until_archived};
use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::power_cut::{Disk, Recording};
use crate::support::process;
use crate::wal::Rig;

const SEGMENTS: usize = 4;

/// Frames of WAL among what is left, and whether any of them is whole.
fn frames(recording: &Recording, at: usize, disk: Disk) -> (usize, bool) {
    let left = recording.left(at, disk);
    let frames: Vec<_> =
        left.iter().filter(|(path, _)| ["a/wal", "b/wal", "c/wal"].iter().any(|wal| path.starts_with(wal))).collect();
    (frames.len(), frames.iter().any(|(_, length)| **length > 0))
}

/// The machine after it came up again, with a disk that holds what is left.
fn after_the_cut(recording: &Recording, at: usize, rig: &Rig) -> Rig {
    let scratch = Scratch::new();
    recording.leave(at, scratch.path());
    for file in ["drctl.toml", "recovery.age"] {
        // fs::copy keeps the mode.
        std::fs::copy(rig.scratch.join(file), scratch.join(file)).unwrap();
    }
    for region in ["a", "b", "c", "state"] {
        scratch.dir(region);
    }
    let (config, socket) = (scratch.join("drctl.toml"), scratch.join("ledger.sock"));
    Rig { scratch, config, socket }
}

fn wal_file(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.data_dir().join("pg_wal").join(name)
}

/// The stored WAL of the segments is what the server wrote.
async fn assert_holds(rig: &Rig, cluster: &Cluster, segments: &[(Lsn, PathBuf)]) {
    let (first, last) = (segments[0].0, segments[segments.len() - 1].0);
    let stored = rig.stored_wal(cluster, (first, Lsn(last.0 + (1 << 20)))).await;
    let written: Vec<u8> = segments.iter().flat_map(|(_, path)| std::fs::read(path).unwrap()).collect();
    assert!(stored == written, "{} bytes of {} differ", stored.len(), written.len());
}

#[tokio::test]
async fn an_archived_segment_outlives_a_power_cut() {
    let (cluster, rig) = archiving(17, false).await;
    let journal = Scratch::new();
    let words = ["wal", "stream", "ledger"];
    let root = rig.scratch.path();
    let (recording, strace) = Recording::of((journal.join("journal"), root), env!("CARGO_BIN_EXE_drctl"), words);
    let strace = Drctl::of(strace).config(&rig.config).expect_log("config file overridden").spawn();
    rig.wait("somebody takes WAL", crate::archive::SOON, |position| position.state == State::Archiving).await;

    let saved = Scratch::new();
    let mut segments = Vec::new();
    for _ in 0..SEGMENTS {
        let name = fill_segment(&cluster).await;
        until_archived(&cluster, &name).await;
        let start = u64::from_str_radix(&name[16..], 16).unwrap() << 20;
        std::fs::copy(wal_file(&cluster, &name), saved.join(&name)).unwrap();
        segments.push((Lsn(start), saved.join(&name)));
    }
    let newest = segments[SEGMENTS - 1].1.file_name().unwrap().to_str().unwrap().to_owned();
    // strace ends with what it traces, and not the other way round.
    for program in process::children(strace.pid()) {
        process::signal(program, Signal::KILL);
    }
    strace.wait().await;

    let told = recording.told("\"receipt\":");
    let last = told[told.len() - 1];
    // Whoever left out a flush would have lost it.
    assert!(frames(&recording, last, Disk::Honest).1);
    assert_eq!(frames(&recording, last, Disk::ForgetsNames), (0, false));
    let (names, any_bytes) = frames(&recording, last, Disk::ForgetsBytes);
    assert!(names > 0 && !any_bytes);

    // The first segments that were told of may have been in front of those that are known here.
    for (at, count) in told[told.len() - SEGMENTS..].iter().zip(1..) {
        let up = after_the_cut(&recording, *at, &rig);
        assert_holds(&up, &cluster, &segments[..count]).await;
    }
    assert_goes_on(after_the_cut(&recording, last, &rig), &saved.join(&newest)).await;
}

/// What was said to be safe is known, or taken once more.
async fn assert_goes_on(up: Rig, newest: &Path) {
    let serve = up.serve(State::Archiving).await;
    up.push(newest).await.ok();
    let pushes = up.position().await.unwrap().pushes;
    assert_eq!((pushes.known + pushes.stored, pushes.refused), (1, 0), "{pushes:?}");
    serve.terminate().await.ok();
    let status = up.status().await;
    assert!(status.targets[0].branches[0].regions.iter().all(|region| region.windows.len() == 1), "{status:?}");
}
