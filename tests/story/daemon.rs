//! The daemon: it works to schedules, dies, and tells what became of every slot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Timelike, Utc};
use rustix::process::Signal;
use serde_json::Value;

use drctl::model::Lsn;

use crate::check::first_configuration;
use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::http;
use crate::support::pg::Cluster;
use crate::support::process::{eventually, free_ports, signal};

const SOON: Duration = Duration::from_secs(40);

struct Rig {
    config: PathBuf,
    dr: PathBuf,
    /// A time of day that was hours ago, so that nothing comes due by itself.
    slot: DateTime<Utc>,
}

impl Rig {
    async fn new(scratch: &Scratch, cluster: &Cluster, more: &str) -> Self {
        let config = first_configuration(scratch, cluster, more).await;
        let dr = config.parent().unwrap().to_owned();
        let slot = (Utc::now() - TimeDelta::hours(6)).with_second(0).unwrap().with_nanosecond(0).unwrap();
        Drctl::new(["init"]).config(&config).run().await.ok();
        Self { config, dr, slot }
    }

    /// A schedule that comes once a day at the time of `slot`, and was last accounted for this many days ago.
    fn schedule(&self, name: &str, what: &str, days_ago: i64) {
        let text = format!("cron = \"{} {} * * *\"\n{what}", self.slot.minute(), self.slot.hour());
        std::fs::write(self.dr.join(format!("schedules/{name}.toml")), text).unwrap();
        let cursors = self.dr.join("state/runs/cursors");
        std::fs::create_dir_all(&cursors).unwrap();
        let cursor = self.slot - TimeDelta::days(days_ago);
        std::fs::write(cursors.join(name), cursor.format("%Y%m%dt%H%M%Sz").to_string()).unwrap();
    }

    fn daemon(&self, more: &[&str]) -> Drctl {
        let arguments = ["daemon", "--grace", "5s"].iter().chain(more);
        Drctl::new(arguments).config(&self.config).expect_log("outcome=")
    }

    /// The records of a schedule in a region, by slot.
    fn runs(&self, region: &str, name: &str) -> Vec<Value> {
        let dir = self.dr.join(region).join("runs").join(name);
        let mut files: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().map(|file| file.unwrap().path()).collect();
        files
            .retain(|file| file.extension().is_none() && !file.file_name().unwrap().to_string_lossy().starts_with('.'));
        files.sort();
        let first_line = |file: &PathBuf| {
            let text = std::fs::read_to_string(file).unwrap();
            serde_json::from_str(text.lines().next().unwrap()).unwrap()
        };
        files.iter().map(first_line).collect()
    }

    /// `outcome`, with how many slots and whether late, in every region alike.
    fn told(&self, name: &str) -> Vec<String> {
        let told = |run: &Value| {
            let late = if run["caught_up"] == true { " late" } else { "" };
            format!("{} {}{late}", run["outcome"].as_str().unwrap(), run["slots"])
        };
        let runs = self.runs("region-a", name);
        assert_eq!(runs, self.runs("region-b", name));
        runs.iter().map(told).collect()
    }

    /// How many keys sign.
    fn signers(&self) -> usize {
        std::fs::read_dir(self.dr.join("region-a/signers")).unwrap().count()
    }

    async fn until_told(&self, name: &str, count: usize) {
        let both = || self.runs("region-a", name).len().min(self.runs("region-b", name).len());
        eventually(&format!("{count} records of {name}"), SOON, async || both() >= count).await;
    }
}

fn open(dr: &Path, words: &str) -> bool {
    let files = std::fs::read_dir(dr.join("state/runs/open")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_to_string(file.path()).ok()).any(|text| text.contains(words))
}

#[tokio::test]
async fn a_killed_daemon_leaves_no_slot_without_an_outcome() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let rig = Rig::new(&scratch, &cluster, "max_read_rate = \"1MB\"\n").await;
    rig.schedule("ledger-base", "job = \"backup\"\ntarget = \"ledger\"\nparams = { fast = true }\n", 3);
    rig.schedule("all-repair", "job = \"repair\"\nafter = \"ledger-base\"\ncatch_up = \"one\"\n", 1);
    rig.schedule("never-late", "job = \"repair\"\ncatch_up = \"none\"\n", 2);

    // The backup is caught up and is slow; the repair waits for it.
    let daemon = rig.daemon(&[]).spawn();
    let intents = rig.dr.join("region-a/intents");
    eventually("the backup runs", SOON, async || open(&rig.dr, "\"attempts\":1") && intents.exists()).await;
    eventually("WAL is streamed", SOON, async || rig.dr.join("region-a/wal").exists()).await;
    let second = rig.daemon(&[]).run().await.code(5);
    assert!(second.stderr.contains("another drctl daemon runs with this state directory"), "{second}");
    rig.until_told("never-late", 1).await;
    let jobs = Drctl::new(["jobs"]).config(&rig.config).run().await.ok();
    let of = |name: &str| jobs.stdout.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert!(of("ledger-base").contains("runs for") && of("all-repair").contains("waits"), "{jobs}");
    let busy = Drctl::new(["run", "ledger-base"]).config(&rig.config).run().await.code(5);
    assert!(busy.stderr.contains("ledger-base runs or waits already"), "{busy}");
    daemon.kill9();
    let nobody = Drctl::new(["jobs"]).config(&rig.config).run().await.code(1);
    assert!(nobody.stderr.contains("no daemon answers"), "{nobody}");
    assert_eq!(rig.told("never-late"), ["missed 2"]);
    assert_eq!(rig.told("all-repair"), Vec::<String>::new());

    // The next one tells what the dead one did, and goes on.
    let text = std::fs::read_to_string(&rig.config).unwrap().replace("max_read_rate = \"1MB\"\n", "");
    std::fs::write(&rig.config, text).unwrap();
    rig.schedule("ledger-again", "job = \"backup\"\ntarget = \"ledger\"\nparams = { fast = true }\n", 1);
    let daemon = rig.daemon(&[]).expect_log("the old ones stay").spawn();
    rig.until_told("all-repair", 1).await;
    rig.until_told("ledger-again", 1).await;
    assert_eq!(rig.told("ledger-base"), ["missed 2", "interrupted 1 late"]);
    assert_eq!(rig.told("all-repair"), ["success 1 late"]);
    assert_eq!(rig.told("ledger-again"), ["success 1 late"]);
    let again = rig.runs("region-a", "ledger-again").remove(0);
    let id = again["detail"].as_str().unwrap().split(',').next().unwrap();
    let shown = Drctl::new(["show", id]).config(&rig.config).run().await.ok();
    assert!(shown.stdout.contains(id), "{shown}");

    let runs = Drctl::new(["runs", "ledger-base"]).config(&rig.config).run().await.ok();
    let lines: Vec<_> = runs.stdout.lines().collect();
    assert!(lines[1].contains("interrupted late") && lines[2].contains("missed 2 since"), "{runs}");

    // What is asked for is a slot like any other; a pause is told.
    Drctl::new(["run", "never-late"]).config(&rig.config).run().await.ok();
    rig.until_told("never-late", 2).await;
    assert_eq!(rig.told("never-late")[1], "success 1");
    Drctl::new(["pause", "never-late", "--for", "1h", "--reason", "the server moves"])
        .config(&rig.config)
        .run()
        .await
        .ok();
    let jobs = Drctl::new(["jobs", "--json"]).config(&rig.config).run().await.ok().json();
    let paused = jobs.as_array().unwrap().iter().find(|view| view["schedule"] == "never-late").unwrap();
    assert_eq!(paused["paused"]["reason"], "the server moves");
    let unknown = Drctl::new(["resume", "nobody"]).config(&rig.config).run().await.code(2);
    assert!(unknown.stderr.contains("there is no schedule `nobody`"), "{unknown}");
    for verb in ["run", "runs", "list"] {
        Drctl::new([verb, "nobody"]).config(&rig.config).run().await.code(2);
    }
    let resumed = Drctl::new(["resume", "never-late", "--json"]).config(&rig.config).run().await.ok().json();
    assert_eq!(resumed, serde_json::json!({ "schedule": "never-late", "paused": false }));

    // A broken folder changes nothing; a good one counts.
    let broken = rig.dr.join("schedules/broken.toml");
    std::fs::write(&broken, "job = \"backup\"\n").unwrap();
    signal(daemon.pid(), Signal::HUP);
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::fs::write(&broken, "job = \"repair\"\ncron = \"* * * * *\"\n").unwrap();
    let ended = daemon.terminate().await.ok();
    assert!(ended.stderr.contains("broken.toml:1:1: `cron` is missing"), "{ended}");
    let status = Drctl::new(["wal", "status", "--json"]).config(&rig.config).run().await.ok().json();
    for region in status["targets"][0]["branches"][0]["regions"].as_array().unwrap() {
        assert_eq!((region["windows"].as_array().unwrap().len(), &region["missing_frames"]), (1, &Value::from(0)));
    }
    let left = std::fs::read_dir(rig.dr.join("state/runs/done")).unwrap().count();
    assert_eq!((left, open(&rig.dr, "")), (0, false));
}

#[tokio::test]
async fn an_outage_of_every_region_is_recorded_while_it_lasts() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let port = free_ports(1);
    let rig = Rig::new(&scratch, &cluster, &format!("[daemon]\nlisten = \"127.0.0.1:{port}\"\n")).await;
    rig.schedule("all-verify", "job = \"verify\"\nretry = { max = 1, pause = \"100ms\" }\n", 1);
    for region in ["region-a", "region-b"] {
        std::fs::rename(rig.dr.join(region), rig.dr.join(format!("{region}.away"))).unwrap();
    }
    let daemon = rig.daemon(&["--only", "verify,repair"]);
    let daemon =
        daemon.expect_log("no region tells what was run").expect_log("cannot be brought to any region").spawn();
    let done = rig.dr.join("state/runs/done");
    let count = || std::fs::read_dir(&done).into_iter().flatten().count();
    eventually("the failure is recorded", SOON, async || count() == 1).await;
    // The process is worth keeping, and cannot do its work.
    let probe = async |path: &str| http::get(port, path).await.unwrap();
    assert_eq!(probe("/healthz").await, (200, "ok\n".to_owned()));
    let (status, reasons) = probe("/readyz").await;
    assert_eq!(status, 503);
    assert!(reasons.starts_with("0 regions answer, 1 are needed\nregion-a: "), "{reasons}");
    for region in ["region-a", "region-b"] {
        std::fs::rename(rig.dr.join(format!("{region}.away")), rig.dr.join(region)).unwrap();
    }
    eventually("the daemon is ready", SOON, async || probe("/readyz").await.0 == 200).await;
    daemon.terminate().await.ok();
    assert_eq!((rig.told("all-verify"), count()), (vec!["failed 1 late".to_owned()], 0));
    let run = rig.runs("region-a", "all-verify").remove(0);
    assert_eq!(run["attempts"], 2);
    assert!(run["detail"].as_str().unwrap().contains("region"), "{run}");
}

#[tokio::test]
async fn a_scheduled_drill_proves_what_the_daemon_keeps() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let drill = format!("[drill]\ndir = \"{}\"\nrun_as = \"postgres\"\n", scratch.join("drills").display());
    let rig = Rig::new(&scratch, &cluster, &drill).await;
    rig.schedule("ledger-base", "job = \"backup\"\ntarget = \"ledger\"\nparams = { fast = true }\n", 0);
    rig.schedule("ledger-drill", "job = \"drill\"\ntarget = \"ledger\"\nparams = { region = \"region-a\" }\n", 0);
    let daemon = rig.daemon(&[]).spawn();
    let ask = async |name: &str| {
        eventually("the daemon takes the wish", SOON, async || {
            Drctl::new(["run", name]).config(&rig.config).run().await.code == Some(0)
        })
        .await;
        rig.until_told(name, 1).await;
    };
    ask("ledger-base").await;
    ask("ledger-drill").await;
    daemon.terminate().await.ok();
    assert_eq!(rig.told("ledger-drill"), ["success 1"], "{:?}", rig.runs("region-a", "ledger-drill"));
    let listed = Drctl::new(["report", "list", "ledger", "--json"]).config(&rig.config).run().await.ok().json();
    let report = &listed["reports"][0];
    assert_eq!((&report["outcome"], &report["region"]), (&"pass".into(), &"region-a".into()), "{listed:#}");
    let detail = rig.runs("region-b", "ledger-drill")[0]["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(report["id"].as_str().unwrap()), "the run names its report: {detail}");
}

#[tokio::test]
async fn a_new_host_goes_on_and_says_what_the_loss_of_the_old_one_costs() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(15).await);
    let rig = Rig::new(&scratch, &cluster, "").await;
    rig.schedule("ledger-base", "job = \"backup\"\ntarget = \"ledger\"\nparams = { fast = true }\n", 1);
    let old = rig.daemon(&[]).spawn();
    rig.until_told("ledger-base", 1).await;
    cluster.execute("CREATE TABLE t AS SELECT 1 AS n").await;
    let drctl = |words: &[&str]| Drctl::new(words).config(&rig.config);
    let shipped = async || {
        let status = drctl(&["status", "--json"]).run().await.json();
        status["targets"][0]["regions"][0]["exposure_seconds"] == 0
    };
    eventually("the row is durable", SOON, shipped).await;
    old.kill9();

    // The host is gone, with its state directory: caches, the signing key, what ran when.
    std::fs::remove_dir_all(rig.dr.join("state")).unwrap();
    let before = rig.told("ledger-base");
    let new = rig.daemon(&[]).spawn();
    cluster.execute("INSERT INTO t SELECT 2").await;
    let flushed = cluster.flush_lsn().await;
    eventually("the new host streams", SOON, shipped).await;
    assert_eq!(rig.told("ledger-base"), before, "the slot that the regions know is not run again");
    drctl(&["run", "ledger-base"]).run().await.ok();
    rig.until_told("ledger-base", 2).await;
    new.terminate().await.ok();

    // What it cost: one full backup, one more signer, and nothing of the data.
    let listed = drctl(&["list", "--json"]).run().await.ok().json();
    let kinds: Vec<_> = listed["backups"].as_array().unwrap().iter().map(|backup| backup["kind"].clone()).collect();
    assert_eq!(kinds, ["full", "full"], "{listed:#}");
    let detail = rig.runs("region-a", "ledger-base")[1]["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("full, because") && detail.contains("page map"), "it says why: {detail}");
    assert_eq!(rig.signers(), 2);
    let first = listed["backups"][0]["id"].as_str().unwrap();
    let directory = scratch.join("restored");
    let plan =
        drctl(&["restore", first, "--target-dir", directory.to_str().unwrap(), "--json"]).run().await.ok().json();
    let end: Lsn = plan["end_lsn"].as_str().unwrap().parse().unwrap();
    assert!(
        end.0 + 8192 >= flushed.0 && plan["refused"] == serde_json::json!([]),
        "no gap between the hosts: {plan:#}"
    );
    drctl(&["verify", "--level", "l1"]).run().await.ok();
}

/// A question over plain HTTP, and the whole answer.
async fn http(port: u16, path: &str, headers: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let question = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(question.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_daemon_answers_over_tcp_whoever_has_the_token_and_nobody_else() {
    let (scratch, cluster) = (Scratch::new(), Cluster::start_new(16).await);
    let port = free_ports(1);
    let more = format!("[daemon]\nlisten = \"127.0.0.1:{port}\"\ntoken = \"env:TOKEN_OF_THE_TEST\"\n");
    let rig = Rig::new(&scratch, &cluster, &more).await;
    rig.schedule("ledger-base", "job = \"backup\"\ntarget = \"ledger\"\nmax_age = \"25h\"\n", 0);
    let daemon = rig.daemon(&[]).env("TOKEN_OF_THE_TEST", "open sesame").expect_log("without the token").spawn();
    let asked = |verb: &[&str], token: &str| {
        let url = format!("http://127.0.0.1:{port}");
        let words = verb.iter().copied().chain(["--daemon", &url, "--token", "env:HERE"]).map(str::to_owned);
        // No configuration: whoever asks may be anywhere.
        Drctl::new(words.collect::<Vec<_>>()).env("HERE", token)
    };
    eventually("the daemon answers", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok())
        .await;
    let wrong = asked(&["jobs"], "open barley").run().await.code(5);
    assert!(wrong.stderr.contains("the token is missing or wrong"), "{wrong}");
    for path in ["/v1/jobs", "/v1/status", "/v1/wal", "/v1/schedules/ledger-base/run"] {
        let answer = http(port, path, "").await;
        assert!(answer.starts_with("HTTP/1.1 401 ") && !answer.contains("ledger-base\""), "{answer}");
    }
    assert!(http(port, "/healthz", "").await.starts_with("HTTP/1.1 200 "), "probes need no token");

    asked(&["pause", "ledger-base", "--for", "1h", "--reason", "from afar"], "open sesame").run().await.ok();
    let jobs = asked(&["jobs", "--json"], "open sesame").run().await.ok().json();
    assert_eq!(jobs[0]["paused"]["reason"], "from afar", "{jobs:#}");
    let here = Drctl::new(["jobs", "--json"]).config(&rig.config).run().await.ok().json();
    assert_eq!(here[0]["paused"]["reason"], "from afar", "the socket tells the same");
    let token = "Authorization: Bearer open sesame\r\n";
    eventually("WAL is streamed", SOON, async || {
        http(port, "/v1/wal", token).await.contains("\"state\":\"streaming\"")
    })
    .await;

    // Never backed up, and a schedule says that it should have been by now.
    let told = http(port, "/v1/status", token).await;
    assert!(told.starts_with("HTTP/1.1 200 ") && told.contains("\"overdue\":[{\"schedule\":\"ledger-base\""), "{told}");
    let status = Drctl::new(["status", "--json"]).config(&rig.config).run().await.code(1).json();
    assert_eq!((&status["overdue"][0]["max_age_seconds"], &status["next_told_by"]), (&90_000.into(), &"daemon".into()));
    assert_eq!(status["targets"][0]["slot"]["active"], true, "{status:#}");
    let text = Drctl::new(["status"]).config(&rig.config).run().await.code(1).stdout;
    assert!(text.contains("OVERDUE  ledger-base never succeeded") && text.contains("NEXT  ledger-base"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let ended = daemon.terminate().await.ok();
    assert!(!ended.stderr.contains("sesame") && !ended.stderr.contains("barley"), "{ended}");
}
