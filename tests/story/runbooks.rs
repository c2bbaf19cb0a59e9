//! Runbooks, as somebody follows them at night: the disaster is made, and then every block of the document is run, word for
//! word, in its order.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::bank::{Bank, largest};
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::process;

const MAJOR: u32 = 15;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A document in its parts.
struct Runbook {
    inputs: Vec<String>,
    /// Kind (`run`, `verify`, `rollback`) and commands.
    blocks: Vec<(String, String)>,
}

impl Runbook {
    /// Reads it, and refuses what a person or a program could not follow.
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let mut parts = text.splitn(3, "+++\n");
        assert_eq!(parts.next(), Some(""), "{path:?} begins with its inputs");
        let front: toml::Table = parts.next().unwrap().parse().unwrap();
        let body = parts.next().unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert_eq!(front["id"].as_str(), Some(stem));
        for key in ["title", "scenario"] {
            assert!(!front[key].as_str().unwrap().is_empty());
        }
        let inputs: Vec<_> = front["inputs"].as_table().unwrap().keys().cloned().collect();
        for input in &inputs {
            let words = &front["inputs"][input.as_str()];
            assert!(words["about"].as_str().is_some() && words["example"].as_str().is_some(), "{path:?} {input}");
            assert!(body.contains(&format!("${input}")), "{path:?} never uses {input}");
        }
        let runbook = Self { inputs, blocks: blocks(body) };
        assert!(runbook.blocks.iter().any(|(kind, _)| kind == "verify"), "{path:?}");
        runbook
    }

    fn named(name: &str) -> Self {
        Self::read(&root().join("runbooks").join(name).with_extension("md"))
    }
}

/// The fenced blocks that are for a shell; every one stands under a step.
fn blocks(body: &str) -> Vec<(String, String)> {
    let (mut blocks, mut open, mut steps) = (Vec::new(), None::<(String, String)>, 0);
    for line in body.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(kind)) => {
                assert!(["run", "verify", "rollback", "sh"].contains(&kind) && steps > 0, "{line}");
                open = Some((kind.to_owned(), String::new()));
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some((_, text)), None) => *text += &format!("{line}\n"),
            (None, None) => steps += usize::from(line.starts_with("## ")),
        }
    }
    assert!(open.is_none());
    blocks
}

/// A shell in a directory of its own, with the inputs set.
struct Shell<'b> {
    bank: &'b Bank,
    inputs: BTreeMap<&'static str, String>,
    directory: PathBuf,
    configured: bool,
}

impl<'b> Shell<'b> {
    fn new(bank: &'b Bank, inputs: &[(&'static str, &str)]) -> Self {
        let inputs = inputs.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self { bank, inputs, directory: bank.scratch.dir("shell"), configured: true }
    }

    /// A machine that has never seen drctl.
    fn bare(mut self) -> Self {
        self.configured = false;
        self
    }

    async fn run(&self, block: &str) {
        let mut command = Command::new("sh");
        let binary = Path::new(env!("CARGO_BIN_EXE_drctl")).parent().unwrap();
        let path = std::env::var("PATH").unwrap();
        let path = format!("{}:{}:{path}", binary.display(), self.bank.cluster.bin_dir().display());
        command.args(["-euc", block]).current_dir(&self.directory);
        let mut shell =
            Drctl::of(command).env("PATH", path).env(&format!("DRCTL_PG_BIN_{MAJOR}"), self.bank.cluster.bin_dir());
        if self.configured {
            shell = shell.config(&self.bank.config());
        }
        for (name, value) in &self.inputs {
            shell = shell.env(name, value);
        }
        for words in ["is not readable", "taken from another region", "no list of trusted"] {
            shell = shell.expect_log(words);
        }
        shell.run().await.ok();
    }

    /// Everything but what takes it back.
    async fn follow(&self, runbook: &Runbook) {
        let names: Vec<_> = self.inputs.keys().map(|name| (*name).to_owned()).collect();
        let mut declared = runbook.inputs.clone();
        declared.sort();
        assert_eq!(names, declared, "the inputs that the runbook declares");
        for (_, block) in runbook.blocks.iter().filter(|(kind, _)| kind == "run" || kind == "verify") {
            self.run(block).await;
        }
    }

    /// What takes it back, the last step first.
    async fn take_back(&self, runbook: &Runbook) {
        for (_, block) in runbook.blocks.iter().rev().filter(|(kind, _)| kind == "rollback") {
            self.run(block).await;
        }
    }
}

fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn every_runbook_can_be_followed() {
    let files = fs::read_dir(root().join("runbooks")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|path| path.file_name().unwrap() != "README.md").collect();
    assert!(files.len() >= 6);
    let index = fs::read_to_string(root().join("runbooks/README.md")).unwrap();
    for path in files {
        Runbook::read(&path);
        assert!(index.contains(path.file_name().unwrap().to_str().unwrap()), "{path:?} is not in the list");
    }
}

#[tokio::test]
async fn cold_restore_after_the_loss_of_a_region() {
    // By its own configuration the restored server listens where a rig's server does not.
    let socket = crate::support::dirs::Scratch::new();
    let listens = socket.postgres_dir("s");
    let builder = Cluster::builder(MAJOR).setting("wal_level", "replica").setting("listen_addresses", "");
    let builder = builder.setting("unix_socket_directories", shown(&listens)).setting("port", "6543");
    let mut bank = Bank::of(builder.start().await).await;
    let stream = bank.stream().await;
    bank.backup().await;
    bank.cluster.execute("INSERT INTO account VALUES (1001, 70), (1002, -70)").await;
    bank.shipped().await;
    stream.terminate().await.ok();

    bank.cluster.kill9().await;
    fs::remove_dir_all(bank.home().join("region-a")).unwrap();
    let safe = bank.scratch.join("safe.age");
    fs::rename(bank.home().join("recovery.age"), &safe).unwrap();
    fs::remove_file(bank.config()).unwrap();
    fs::remove_dir_all(bank.home().join("state")).unwrap();

    let (region, directory) = (bank.home().join("region-b"), bank.scratch.join("back"));
    let inputs = [
        ("REPO", shown(&region)),
        ("KEY", shown(&safe)),
        ("TARGET", "ledger"),
        ("DIR", shown(&directory)),
        ("RUN_AS", "postgres"),
        ("HOST", shown(&listens)),
        ("PORT", "6543"),
    ];
    let (runbook, shell) = (Runbook::named("cold-restore-region-loss"), Shell::new(&bank, &inputs).bare());
    shell.follow(&runbook).await;
    let mut psql = bank.cluster.tool("psql");
    psql.args(["-h", shown(&listens), "-p", "6543", "-XAtc", "SELECT count(*), sum(amount) FROM account"]);
    assert_eq!(process::run_async(psql).await.trim(), "1002|0");
    shell.take_back(&runbook).await;
    assert!(!directory.join("postmaster.pid").exists());
}

#[tokio::test]
async fn going_back_to_before_a_bad_deploy() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    bank.cluster.execute("INSERT INTO account VALUES (1001, 70), (1002, -70)").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let time = bank.cluster.query("SELECT clock_timestamp() AT TIME ZONE 'UTC'").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    bank.cluster.execute("DELETE FROM account").await;
    // Only a later commit proves that nothing else happened up to that time.
    bank.shipped().await;
    stream.terminate().await.ok();

    let directory = bank.scratch.join("before");
    let inputs = [("TARGET", "ledger"), ("TIME", &*time), ("DIR", shown(&directory)), ("RUN_AS", "postgres")];
    let (runbook, shell) = (Runbook::named("pitr-bad-deploy"), Shell::new(&bank, &inputs));
    shell.follow(&runbook).await;
    let mut psql = bank.cluster.tool("psql");
    let beside = bank.scratch.join("before.socket");
    psql.args(["-h", shown(&beside), "-p", "5432", "-XAtc", "SELECT count(*), sum(amount) FROM account"]);
    assert_eq!(process::run_async(psql).await.trim(), "1002|0");
    assert_eq!(bank.cluster.query("SELECT count(*) FROM account").await, "0", "the damaged server is left as it was");
    shell.take_back(&runbook).await;
    assert!(!directory.exists());
}

#[tokio::test]
async fn a_damaged_region_is_whole_again_and_a_drill_says_so() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    let region = bank.home().join("region-b");
    let whole = super::rig3::files_below(&region);
    let damage = async || {
        let list = bank.drctl(["list", "ledger", "--json"]).run().await.json();
        let newest = list["backups"].as_array().unwrap().iter().max_by_key(|backup| backup["started_at"].to_string());
        let pack = largest(&region.join("packs/ledger").join(newest.unwrap()["id"].as_str().unwrap()));
        let mut bad = fs::read(&pack).unwrap();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(&pack, bad).unwrap();
    };

    damage().await;
    let lost = bank.frames().remove(0);
    fs::remove_file(&lost).unwrap();
    let shell = Shell::new(&bank, &[("TARGET", "ledger")]);
    shell.follow(&Runbook::named("damaged-repository")).await;
    for (name, bytes) in whole.iter().filter(|(name, _)| !name.starts_with("intents/") && !name.starts_with('.')) {
        assert!(fs::read(region.join(name)).is_ok_and(|found| found == *bytes), "{name}");
    }

    // The same damage, found by a drill.
    damage().await;
    bank.drill(&[]).await.code(1);
    let shell = Shell::new(&bank, &[("TARGET", "ledger"), ("REGION", "region-b")]);
    shell.follow(&Runbook::named("drill-failed")).await;
    let reports = bank.drctl(["report", "list", "ledger", "--json"]).run().await.ok().json();
    assert_eq!(reports["reports"][0]["outcome"], "pass", "{reports:#}");
    stream.terminate().await.ok();
}

#[tokio::test]
async fn a_lost_key_is_replaced_while_another_is_left() {
    let bank = Bank::new().await;
    let spare = bank.scratch.join("spare.age");
    process::run(Command::new("age-keygen").args(["-o", shown(&spare)]));
    let recipient = process::run(Command::new("age-keygen").args(["-y", shown(&spare)]));
    let text = fs::read_to_string(bank.config()).unwrap();
    fs::write(bank.config(), format!("{text}\n[keys.spare]\nage = \"{}\"\n", recipient.trim())).unwrap();
    bank.backup().await;
    fs::remove_file(bank.home().join("recovery.age")).unwrap();

    let (new, nothing) = (bank.scratch.join("new.age"), bank.scratch.join("nothing"));
    let config = bank.config();
    let inputs = [
        ("CONFIG", shown(&config)),
        ("LEFT", shown(&spare)),
        ("NEW", shown(&new)),
        ("NAME", "recovery-2"),
        ("TARGET", "ledger"),
        ("DIR", shown(&nothing)),
    ];
    let (runbook, shell) = (Runbook::named("lost-key-holder"), Shell::new(&bank, &inputs));
    shell.follow(&runbook).await;
    // With the new key alone, from any region alone.
    for region in ["region-a", "region-b"] {
        let (region, back) = (bank.home().join(region), bank.scratch.join(region));
        let with = ["--repo", shown(&region), "--age-identity", shown(&new), "--json"];
        let line = ["restore", "ledger", "--target-dir", shown(&back)];
        let plan = Drctl::new(with.iter().chain(&line)).run().await.ok().json();
        let execute = ["--execute", "--plan", plan["digest"].as_str().unwrap()];
        Drctl::new(with.iter().chain(&line).chain(&execute)).run().await.ok();
        assert!(back.join("global/pg_control").exists());
    }
    assert!(!nothing.exists());
    shell.take_back(&runbook).await;
    assert!(!new.exists());
}

#[tokio::test]
async fn a_slot_that_fills_the_disk_is_given_up_and_protection_goes_on() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    stream.kill9();
    let retained = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) > 60000000 FROM pg_replication_slots";
    bank.cluster
        .execute("CREATE TABLE noise AS SELECT repeat(md5(n::text), 10) FROM generate_series(1, 20000) n")
        .await;
    for _ in 0..5 {
        bank.cluster.switch_wal().await;
        bank.cluster.execute("INSERT INTO account VALUES (0, 0)").await;
    }
    assert_eq!(bank.cluster.query(retained).await, "t");

    let (conninfo, log) = (bank.cluster.conninfo(), bank.scratch.join("stream.log"));
    let inputs = [("TARGET", "ledger"), ("CONNINFO", &*conninfo), ("SLOT", "drctl_ledger"), ("LOG", shown(&log))];
    let (runbook, shell) = (Runbook::named("slot-filling-the-disk"), Shell::new(&bank, &inputs));
    shell.follow(&runbook).await;
    assert_eq!(bank.cluster.query("SELECT count(*) FROM pg_replication_slots WHERE active").await, "1");
    assert_ne!(bank.cluster.query(retained).await, "t", "the disk is free again");
    // What comes after the gap comes back.
    bank.cluster.execute("INSERT INTO account VALUES (2000, 0)").await;
    bank.drill(&[]).await.ok();
    shell.take_back(&runbook).await;
    let pid: u32 = fs::read_to_string(shell.directory.join("stream.pid")).unwrap().trim().parse().unwrap();
    process::signal(pid, rustix::process::Signal::TERM);
    process::eventually("the receiver ends", Duration::from_secs(30), async || !process::is_alive(pid)).await;
}
