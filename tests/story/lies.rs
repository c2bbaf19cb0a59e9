//! A region that is wrong about what it did: it did what it does not tell, it tells what it did not do, it refuses in the
//! middle of a recovery.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;

use drctl::jobs::wal::State;

use crate::archive::{SOON, fill_segment};
use crate::support::dirs::{Scratch, give_to_postgres};
use crate::support::drctl::Drctl;
use crate::support::http_proxy::{Deed, HttpProxy};
use crate::support::pg::{Cluster, Until};
use crate::support::process::eventually;
use crate::support::s3::{ACCESS_KEY, Bucket, Endpoint, SECRET_KEY};
use crate::wal::Rig;

/// The objects of the log; names in a listing are escaped.
const WAL: &str = "/wal/";

/// A region in a real S3 server that can be made to lie.
pub struct Doubtful {
    pub proxy: HttpProxy,
    pub bucket: Bucket,
    /// Its part of the configuration.
    pub table: String,
    /// What opens it, in files: this process asks it, too.
    keys: Scratch,
}

impl Doubtful {
    pub async fn new(name: &str, server: &Endpoint, timeout: &str) -> Self {
        let bucket = server.bucket().await;
        let (proxy, through) = HttpProxy::before(server).await;
        let keys = Scratch::new();
        let secret = |name: &str, text: &str| {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(keys.join(name)).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            format!("\"file:{}\"", keys.join(name).display())
        };
        let (id, secret) = (secret("id", ACCESS_KEY), secret("secret", SECRET_KEY));
        let role = format!("{{ access_key_id = {id}, secret_access_key = {secret} }}");
        let table = format!(
            "[regions.{name}]\nurl = \"s3://{}\"\nendpoint = \"{}\"\naws_region = \"{}\"\npath_style = true\n\
             timeout = \"{timeout}\"\ncredentials = {{ write = {role}, restore = {role} }}\n",
            bucket.name, through.url, through.region
        );
        Self { proxy, bucket, table, keys }
    }
}

#[tokio::test]
async fn what_a_region_did_counts_and_what_it_only_says_is_found_out() {
    let cluster = Cluster::builder(17).setting("autovacuum", "off").setting("wal_keep_size", "1GB").start().await;
    cluster.execute("CREATE TABLE t (n int)").await;
    let doubtful = Doubtful::new("b", &Endpoint::localstack_a(), "2s").await;
    let regions = format!("[regions.a]\nurl = \"a\"\n{}[regions.c]\nurl = \"c\"\n", doubtful.table);
    let rig = Rig::with_more(&cluster.conninfo(), &regions, "heartbeat = false\n").await;
    let proxy = &doubtful.proxy;
    let stream = rig.stream().expect_log("region").spawn();
    let begun = rig.wait("streaming", SOON, |position| position.state == State::Streaming).await.start_lsn.unwrap();
    rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
    let write = async |n: u32| {
        cluster.execute(&format!("INSERT INTO t VALUES ({n})")).await;
        cluster.flush_lsn().await
    };
    rig.wait_durable(write(0).await).await;
    // From here on nothing is acknowledged without its word; what was on its way to the third one is there.
    rig.take_away(&["c"]);
    rig.wait_durable(write(10).await).await;

    // It has the frame, and the answer never comes: the next attempt is told that the name is taken, by these very bytes.
    proxy.set("PUT", WAL, Deed::Swallow);
    let lsn = write(1).await;
    eventually("a frame is put", SOON, async || proxy.hits("PUT", WAL) > 0).await;
    proxy.heal();
    rig.wait_durable(lsn).await;
    let puts = proxy.seen("PUT", WAL);
    let (landed, _) = puts.iter().find(|(_, hit)| *hit).unwrap();
    let attempts: Vec<_> = puts.iter().filter(|(path, _)| path == landed).map(|(_, hit)| *hit).collect();
    assert!(attempts.len() > 1 && attempts.ends_with(&[false]), "{puts:?}");
    let position = rig.position().await.unwrap();
    let lane = position.regions.iter().find(|region| region.name.as_str() == "b").unwrap();
    assert_eq!((lane.missing_objects, position.state), (0, State::Streaming), "{position:?}");

    // It says that it has the frame, and does not.
    proxy.set("PUT", WAL, Deed::Lie);
    let told = write(2).await;
    rig.wait_durable(told).await;
    proxy.heal();
    let (lied, _) = proxy.seen("PUT", WAL).into_iter().rfind(|(_, hit)| *hit).unwrap();
    let lied = lied[lied.find(WAL).unwrap() + 1..].split(['?', ' ']).next().unwrap();
    assert!(doubtful.bucket.get(lied).await.is_none());
    rig.give_back(&["c"]);
    let flushed = write(3).await;
    rig.wait_durable(flushed).await;
    let ended = stream.terminate().await;
    assert!(matches!(ended.code, Some(0 | 4)), "{ended}");

    // One look tells, and what another region holds makes it good.
    let found = rig.drctl(&["verify", "--level", "l1", "--json"]).run().await.code(4).json();
    let problems = found["wal"][0]["problems"].to_string();
    assert!(problems.contains(lied) && problems.contains("\"b\""), "{found:#}");
    rig.drctl(&["repair"]).run().await.ok();
    assert_eq!(doubtful.bucket.get(lied).await.unwrap(), std::fs::read(rig.scratch.join("a").join(lied)).unwrap());
    rig.drctl(&["verify", "--scrub"]).run().await.ok();
    rig.assert_one_window(flushed).await;
    assert!(rig.stored_wal(&cluster, (begun, flushed)).await == rig.server_wal(&cluster, (begun, flushed)));

    // Had nobody told the truth, no region could pay: that is no debt.
    doubtful.bucket.delete(lied).await;
    ["a", "c"].iter().for_each(|region| std::fs::remove_file(rig.scratch.join(region).join(lied)).unwrap());
    let lost = rig.drctl(&["verify", "--level", "l1", "--json"]).run().await.code(1).json();
    let problems = lost["wal"][0]["problems"].to_string();
    assert!(problems.contains(lied) && problems.contains("1 WAL frames are in no region"), "{lost:#}");
    assert!(!rig.status().await.is_whole());

    // The server still has it: handed over once more it is stored anew, and nothing is missing.
    let segment = cluster.query(&format!("SELECT pg_walfile_name('{told}')")).await;
    cluster.switch_wal().await;
    let stream = rig.stream().expect_log("region").spawn();
    rig.wait("streaming", SOON, |position| position.state == State::Streaming).await;
    rig.push(&cluster.data_dir().join("pg_wal").join(&segment)).await.ok();
    rig.wait_durable(cluster.flush_lsn().await).await;
    stream.terminate().await.ok();
    assert!(rig.status().await.is_whole());
    assert!(rig.stored_wal(&cluster, (begun, flushed)).await == rig.server_wal(&cluster, (begun, flushed)));
}

/// A cluster of several segments whose only region is doubtful, and what is in it.
struct Sole {
    cluster: Cluster,
    doubtful: Doubtful,
    rig: Rig,
    rows: String,
}

const ROWS: &str = "SELECT count(*), md5(string_agg(n || text, ',' ORDER BY n)) FROM t";
const MAJOR: u32 = 16;

impl Sole {
    async fn new() -> Self {
        let cluster = Cluster::builder(MAJOR).wal_segsize(1).setting("autovacuum", "off").start().await;
        let doubtful = Doubtful::new("s", &Endpoint::localstack_b(), "5s").await;
        let rig = Rig::with_more(&cluster.conninfo(), &doubtful.table, "heartbeat = false\n").await;
        let stream = rig.serve(State::Streaming).await;
        rig.drctl(&["backup", "ledger", "--fast"]).run().await.ok();
        for _ in 0..6 {
            fill_segment(&cluster).await;
            rig.wait_durable(cluster.flush_lsn().await).await;
        }
        stream.terminate().await.ok();
        let rows = cluster.query(ROWS).await;
        Self { cluster, doubtful, rig, rows }
    }

    fn here(&self, drctl: Drctl) -> Drctl {
        let bin = self.cluster.bin_dir();
        drctl
            .config(&self.rig.config)
            .env(&format!("DRCTL_PG_BIN_{MAJOR}"), bin)
            .expect_log("region")
            .expect_log("readable")
    }

    /// The command that restores to `name`, and how often its plan reads WAL.
    async fn plan(&self, name: &str, options: &[&str]) -> (String, usize) {
        let directory = self.rig.scratch.join(name).display().to_string();
        let fixed = ["restore", "ledger", "--json", "--target-dir", &directory];
        let before = self.reads();
        let plan = self.here(Drctl::new(fixed.iter().chain(options))).run().await.ok().json();
        (plan["command"].as_str().unwrap().to_owned(), self.reads() - before)
    }

    fn reads(&self) -> usize {
        self.doubtful.proxy.seen("GET", WAL).len()
    }

    /// From the read of WAL after `spared` more on the server cannot serve.
    fn fail_after(&self, spared: usize) {
        self.doubtful.proxy.after(u64::try_from(spared).unwrap(), ("GET", WAL), Deed::Refuse(500));
    }

    /// That what failed was tried again.
    fn assert_tried_again(&self) {
        let seen = self.doubtful.proxy.seen("GET", WAL);
        let hits = |path: &str| seen.iter().filter(|(seen, hit)| *hit && seen == path).count();
        assert!(seen.iter().any(|(path, _)| hits(path) > 2), "{seen:?}");
    }
}

/// PostgreSQL says this when it takes what it has for the whole.
fn assert_never_opened(log: &str) {
    for words in ["ready to accept connections", "archive recovery complete", "selected new timeline"] {
        assert!(!log.contains(words), "{words}: {log}");
    }
}

#[tokio::test]
async fn recovery_whose_wal_stops_coming_never_opens_the_database() {
    let sole = Sole::new().await;
    let start = ["--start", "--run-as", "postgres"];
    let (command, planned) = sole.plan("back", &start).await;
    let directory = sole.rig.scratch.join("back");
    sole.fail_after(planned + 2);
    let failed = sole.here(Drctl::pasted(&command)).run().await.code(1);
    assert!(failed.stderr.contains("stage WAL") || failed.stdout.contains("stage WAL"), "{failed}");
    sole.assert_tried_again();
    let log = std::fs::read_to_string(directory.join("drctl-recovery.log")).unwrap_or_default();
    assert_never_opened(&log);
    assert!(!directory.join("postmaster.pid").exists());

    // Whoever starts it by hand gets as far: nobody stages, and nobody says that this was all.
    sole.doubtful.proxy.heal();
    let by_hand = Cluster::try_start_restored(&directory, MAJOR, &[("hot_standby", "off")], Until::Promoted).await;
    assert_never_opened(&by_hand.map(|_| ()).expect_err("a torso of a restore was opened"));

    std::fs::remove_dir_all(&directory).unwrap();
    let report = sole.here(Drctl::pasted(&command)).run().await.ok().json();
    let pid = u32::try_from(report["started"]["pid"].as_u64().unwrap()).unwrap();
    crate::support::process::signal(pid, rustix::process::Signal::INT);
    eventually("the server ends", SOON, async || !directory.join("postmaster.pid").exists()).await;
    assert_eq!(Cluster::start_restored(&directory, MAJOR).await.query(ROWS).await, sole.rows);
}

#[tokio::test]
async fn a_restore_command_that_cannot_read_ends_recovery_and_not_the_archive() {
    let sole = Sole::new().await;
    let (command, _) = sole.plan("back", &[]).await;
    sole.here(Drctl::pasted(&command)).run().await.ok();
    // Instead of what was staged, the repository itself is asked, by PostgreSQL's account.
    let directory = sole.rig.scratch.join("back");
    std::fs::remove_dir_all(directory.join("pg_wal/drctl-wal")).unwrap();
    give_to_postgres(sole.rig.scratch.path());
    give_to_postgres(sole.doubtful.keys.path());
    let settings = directory.join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&settings).unwrap();
    let (config, drctl) = (sole.rig.config.display(), env!("CARGO_BIN_EXE_drctl"));
    let fetch = format!("env DRCTL_CONFIG={config} {drctl} wal fetch %f %p");
    std::fs::write(&settings, format!("{text}\nrestore_command = '{fetch}'\n")).unwrap();
    let copy = |name: &str| {
        let to = sole.rig.scratch.join(name);
        crate::support::process::run(std::process::Command::new("cp").arg("-a").arg(&directory).arg(&to));
        to
    };
    let (failing, whole) = (copy("failing"), copy("whole"));

    let quiet = [("hot_standby", "off")];
    let before = sole.reads();
    let back = Cluster::try_start_restored(&whole, MAJOR, &quiet, Until::Promoted).await.unwrap();
    assert_eq!(back.query(ROWS).await, sole.rows);
    drop(back);

    // The same again, and in the middle of it the server cannot serve.
    sole.fail_after((sole.reads() - before) / 2);
    let log = Cluster::try_start_restored(&failing, MAJOR, &quiet, Until::Promoted).await.map(|_| ());
    let log = log.expect_err("the database was opened in the middle of its WAL");
    assert_never_opened(&log);
    assert!(log.contains("FATAL") && log.contains("exit code 255"), "{log}");
    assert!(log.contains("restored log file"), "it had begun: {log}");
    sole.assert_tried_again();
}
