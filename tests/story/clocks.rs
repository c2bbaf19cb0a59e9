//! Clocks that jump, on the server and beside it: what is stored goes by positions; times are the server's, and where they
//! cannot be ours that is told.

use std::time::Duration;

use drctl::jobs::wal::State;
use drctl::model::Lsn;
use serde_json::Value;

use crate::archive::SOON;
use crate::support::clock::FakeClock;
use crate::support::dirs::Scratch;
use crate::support::drctl::Background;
use crate::support::pg::{Cluster, Until};
use crate::wal::{DIRECTORIES, Rig};

const MAJOR: u32 = 15;

/// What stands in the table after a row was written, where that row ends, and a moment of the server's clock right then.
struct Written {
    rows: String,
    lsn: Lsn,
    then: String,
}

/// A server whose clock can be set, and a receiver with another one.
struct Jumping {
    cluster: Cluster,
    theirs: FakeClock,
    ours: FakeClock,
    rig: Rig,
    written: Vec<Written>,
    _place: Scratch,
}

impl Jumping {
    async fn new() -> Self {
        let place = Scratch::new();
        let (theirs, ours) = (FakeClock::new(place.join("theirs")), FakeClock::new(place.join("ours")));
        let builder = Cluster::builder(MAJOR).setting("autovacuum", "off").setting("wal_keep_size", "1GB");
        let cluster = builder.clock(&theirs).start().await;
        cluster.execute("CREATE TABLE t (n serial, text text)").await;
        let rig = Rig::with_more(&cluster.conninfo(), DIRECTORIES, "ship_interval = \"100ms\"\n").await;
        Self { cluster, theirs, ours, rig, written: Vec::new(), _place: place }
    }

    /// The receiver, and where it begins.
    async fn stream(&self) -> (Background, Lsn) {
        let clock = self.ours.environment();
        let stream = clock.into_iter().fold(self.rig.stream(), |drctl, (name, value)| drctl.env(name, value)).spawn();
        self.ours.used_by(stream.pid());
        let position = self.rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
        (stream, position.start_lsn.unwrap())
    }

    async fn write(&mut self, row: &str) {
        let (rows, before) = self
            .written
            .last()
            .map_or((row.to_owned(), Lsn::INVALID), |last| (format!("{} {row}", last.rows), last.lsn));
        self.cluster.execute(&format!("INSERT INTO t (text) VALUES ('{row}')")).await;
        let lsn = self.cluster.flush_lsn().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        let then = self.cluster.query(now).await;
        // A server that was put forward takes the silence of its clock for ours, and is met again.
        let durable =
            |position: &drctl::jobs::wal::Position| position.reaches(lsn) && position.exposure_seconds.is_some();
        let position = self.rig.wait(row, SOON, durable).await;
        assert!(position.durable_lsn > before && position.exposure_seconds.unwrap() < 30.0, "{position:?}");
        self.written.push(Written { rows, lsn, then });
    }

    /// What `check` says of the server's clock.
    async fn checked(&self) -> String {
        let report = self.rig.drctl(&["check", "ledger", "--json"]).run().await.json();
        let mut said = report["checks"].as_array().unwrap().iter().map(|check| check["what"].as_str().unwrap());
        said.find(|what| what.starts_with("the server's clock")).unwrap().to_owned()
    }

    /// The plan of a restore, and what comes of it.
    async fn restored(&self, name: &str, options: &[&str]) -> (Value, String) {
        let directory = self.rig.scratch.join(name);
        let shown = directory.display().to_string();
        let words = [&["restore", "ledger", "--json", "--target-dir", &shown], options].concat();
        let plan = self.rig.drctl(&words).run().await.ok().json();
        let run = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
        self.rig.drctl(&[&words[..], &run].concat()).run().await.ok();
        let back = Cluster::try_start_restored(&directory, MAJOR, &[], Until::Promoted).await.unwrap();
        (plan, back.query("SELECT string_agg(text, ' ' ORDER BY n) FROM t").await)
    }
}

#[tokio::test]
async fn clocks_that_jump_by_a_day_change_no_order_and_are_told() {
    let mut jumping = Jumping::new().await;
    let (stream, begun) = jumping.stream().await;
    jumping.rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    assert_eq!(jumping.checked().await, "the server's clock agrees with ours");
    jumping.write("one").await;
    jumping.ours.set("-1d");
    jumping.write("two").await;
    jumping.write("three").await;
    jumping.theirs.set("+1d");
    jumping.write("four").await;
    jumping.write("five").await;
    let told = jumping.checked().await;
    let ahead: u64 = told.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!((86_300..=86_400).contains(&ahead) && told.ends_with("s ahead of ours"), "{told}");
    jumping.ours.set("+1d");
    jumping.write("six").await;
    jumping.theirs.set("-1d");
    jumping.write("seven").await;
    stream.terminate().await.ok();

    // Nothing is missing, nothing is twice, and positions lead where they should.
    let Written { rows, lsn, .. } = &jumping.written[6];
    jumping.rig.assert_one_window(*lsn).await;
    let stored = jumping.rig.stored_wal(&jumping.cluster, (begun, *lsn)).await;
    assert!(stored == jumping.rig.server_wal(&jumping.cluster, (begun, *lsn)));
    let (plan, found) = jumping.restored("end", &[]).await;
    assert_eq!((&found, plan["warnings"].to_string().contains("clock")), (rows, false), "{plan:#}");
    let Written { rows, lsn, .. } = &jumping.written[5];
    assert_eq!(&jumping.restored("position", &["--to-lsn", &lsn.to_string()]).await.1, rows);

    // Up to the fifth row the server's clock went forward, and each moment lies between two of its commits.
    for at in [1, 3] {
        let Written { rows, then, .. } = &jumping.written[at];
        let (plan, found) = jumping.restored(&format!("time-{at}"), &["--to-time", then]).await;
        assert_eq!(&found, rows, "{then}: {plan:#}");
        assert!(plan["warnings"].to_string().contains("s ahead of that of whoever stored its WAL"), "{plan:#}");
    }
}
