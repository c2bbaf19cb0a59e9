//! `wal fetch` through a daemon: whoever asks needs no key, and what is not certain is never "absent".

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::jobs::wal::State;

use crate::archive::{SOON, archiving, fill_segment, until_archived, walk};
use crate::support::drctl::{Drctl, Finished};
use crate::support::pg::Cluster;
use crate::support::process::eventually;
use crate::wal::Rig;

/// A data directory that asks: it knows which cluster it is, and nothing else.
fn asking(rig: &Rig, cluster: &Cluster) -> PathBuf {
    let data = rig.scratch.dir("data");
    std::fs::create_dir(data.join("global")).unwrap();
    std::fs::create_dir(data.join("pg_wal")).unwrap();
    std::fs::copy(cluster.data_dir().join("global/pg_control"), data.join("global/pg_control")).unwrap();
    data
}

struct Asking<'a> {
    rig: &'a Rig,
    data: PathBuf,
}

impl Asking<'_> {
    fn fetched(&self, told: &Finished) -> Vec<u8> {
        let path = self.data.join("pg_wal/RECOVERYXLOG");
        let found = std::fs::read(&path).ok();
        assert_eq!(found.is_some(), told.code == Some(0), "{told}");
        let _gone = std::fs::remove_file(path);
        assert_eq!(std::fs::read_dir(self.data.join("pg_wal")).unwrap().count(), 0, "nothing is left");
        found.unwrap_or_default()
    }

    /// With the configuration, as the account that has the keys.
    async fn alone(&self, file: &str, code: i32) -> Vec<u8> {
        let fetch = self.rig.drctl(&["wal", "fetch", file, "pg_wal/RECOVERYXLOG"]);
        let told = fetch.expect_log("region").current_dir(&self.data).run().await.code(code);
        self.fetched(&told)
    }

    /// Without one.
    async fn borrow(&self, file: &str, code: i32) -> (Vec<u8>, Finished) {
        let socket = self.rig.scratch.join("state/daemon.sock").display().to_string();
        let words = ["wal", "fetch", "--socket", &socket, file, "pg_wal/RECOVERYXLOG"];
        let told = Drctl::new(words).current_dir(&self.data).run().await.code(code);
        (self.fetched(&told), told)
    }
}

fn histories(rig: &Rig, region: &str) -> Vec<PathBuf> {
    let directory = rig.scratch.join(region).join("history");
    if directory.exists() { walk(&directory) } else { Vec::new() }
}

#[tokio::test]
async fn a_daemon_that_may_restore_gives_wal_and_reads_ahead() {
    let (mut cluster, rig) = archiving(16, false).await;
    let serve = rig.serve(State::Archiving).await;
    // The server forgets them soon.
    let (mut segments, mut saved) = (Vec::new(), BTreeMap::new());
    for _ in 0..6 {
        let segment = fill_segment(&cluster).await;
        saved.insert(segment.clone(), std::fs::read(cluster.data_dir().join("pg_wal").join(&segment)).unwrap());
        segments.push(segment);
    }
    until_archived(&cluster, segments.last().unwrap()).await;

    // A promotion: its history is archived before anything of the new timeline is.
    cluster.stop().await;
    std::fs::write(cluster.data_dir().join("standby.signal"), "").unwrap();
    cluster.start().await;
    cluster.execute("SELECT pg_promote()").await;
    eventually("the history is in every region", SOON, async || {
        ["a", "b", "c"].iter().all(|region| histories(&rig, region).len() == 1)
    })
    .await;
    let newer = fill_segment(&cluster).await;
    for file in [newer.as_str(), "00000002.history"] {
        saved.insert(file.to_owned(), std::fs::read(cluster.data_dir().join("pg_wal").join(file)).unwrap());
    }
    until_archived(&cluster, &newer).await;
    serve.terminate().await.ok();
    let own = |file: &str| saved[file].clone();
    let asking = Asking { data: asking(&rig, &cluster), rig: &rig };
    assert!(asking.alone("00000002.history", 0).await == own("00000002.history"));
    assert!(asking.alone(&newer, 0).await == own(&newer));

    // WAL whose history is gone is WAL all the same: PostgreSQL must not take it for the end.
    let kept: Vec<_> = ["a", "b", "c"].iter().flat_map(|region| histories(&rig, region)).collect();
    let aside = |number: usize| rig.scratch.join(&format!("history-{number}"));
    kept.iter().enumerate().for_each(|(number, file)| std::fs::rename(file, aside(number)).unwrap());
    asking.alone(&newer, 255).await;
    asking.alone("00000002.history", 255).await;
    asking.alone("00000003.history", 1).await;
    kept.iter().enumerate().for_each(|(number, file)| std::fs::rename(aside(number), file).unwrap());

    // A daemon that only writes gives nothing.
    std::fs::create_dir_all(rig.scratch.join("schedules")).unwrap();
    let start = async |only: &str| {
        let daemon = rig.drctl(&["daemon", "--only", only]).expect_log("region").expect_log("not invited");
        let daemon = daemon.expect_log("answer").spawn();
        let socket = rig.scratch.join("state/daemon.sock");
        eventually("the daemon answers", SOON, async || Path::new(&socket).exists()).await;
        daemon
    };
    let daemon = start("backup").await;
    let told = asking.borrow(&segments[0], 255).await.1;
    assert!(told.stderr.contains("nobody gives WAL"), "{told}");
    assert!(asking.alone(&segments[0], 0).await == own(&segments[0]), "it is fetched all the same");
    daemon.terminate().await.ok();

    let daemon = start("verify").await;
    assert!(asking.borrow("00000002.history", 0).await.0 == own("00000002.history"));
    assert!(asking.borrow(&newer, 0).await.0 == own(&newer));
    asking.borrow("00000003.history", 1).await;
    asking.borrow("pg_control", 255).await;
    if crate::support::dirs::postgres_user().is_some() {
        use std::os::unix::process::CommandExt as _;
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_drctl"));
        let socket = rig.scratch.join("state/daemon.sock");
        command.args(["wal", "fetch", "--socket"]).arg(socket).args([segments[0].as_str(), "/tmp/never"]).uid(65_534);
        Drctl::of(command).current_dir(&asking.data).run().await.code(255);
    }
    // What was read ahead is there without any region.
    assert!(asking.borrow(&segments[0], 0).await.0 == own(&segments[0]));
    tokio::time::sleep(Duration::from_secs(3)).await;
    rig.take_away(&["a", "b", "c"]);
    for segment in &segments[1..4] {
        assert!(asking.borrow(segment, 0).await.0 == own(segment));
    }
    // Regions that have lost all WAL of a cluster do not know where it ends.
    asking.borrow(&segments[0], 255).await;
    rig.give_back(&["a", "b", "c"]);
    assert!(asking.borrow(&segments[5], 0).await.0 == own(&segments[5]));
    daemon.terminate().await.ok();
    // Without a daemon the regions are asked.
    assert!(asking.alone(&segments[2], 0).await == own(&segments[2]));
}
