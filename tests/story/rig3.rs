//! The rig of three regions: two S3 servers, each with a key of its own KMS, and a directory; one age recipient; a write
//! quorum of two. A proxy stands before every server, so that each can refuse, hang or slow down by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use drctl::app::{World, new_recovery_key};
use drctl::jobs::wal::{Position, control};
use drctl::model::TargetName;
use serde_json::Value;

use crate::support::dirs::Scratch;
use crate::support::drctl::{Background, Drctl, Finished};
use crate::support::pg::Cluster;
use crate::support::proxy::{Mode, TcpProxy};
use crate::support::s3::{ACCESS_KEY, Bucket, Endpoint, SECRET_KEY};
use crate::support::{kms, process, unique};

/// The version of PostgreSQL that is protected: what breaks here are regions.
pub const MAJOR: u32 = 15;
const PREFIX: &str = "vault/";

/// What is logged when a region or a key holder is in trouble.
const TROUBLE: [&str; 7] = [
    "region is left behind",
    "waiting for regions",
    "taken from another region",
    "not wrapped by this holder",
    "an epoch cannot be opened",
    "key wrap is not readable",
    "is not readable",
];

/// A bucket, and the key that is lost together with it.
#[derive(Debug)]
pub struct Site {
    /// Its name in the configuration.
    pub name: &'static str,
    /// The bucket, seen past the proxy.
    pub bucket: Bucket,
    /// Before the S3 server.
    pub objects: TcpProxy,
    /// Before the KMS.
    pub keys: TcpProxy,
    /// Where drctl is told that the KMS is.
    pub kms_url: String,
    /// Where drctl is told that the S3 server is.
    pub s3_url: String,
    kms: Endpoint,
    key_name: String,
    /// The ARN of its key.
    pub key: String,
}

impl Site {
    /// A new bucket at `s3` and a new key at `kms`.
    pub async fn new(name: &'static str, s3: &Endpoint, kms: &Endpoint) -> Self {
        let ((objects, s3_through), (keys, kms_through)) = (s3.proxied().await, kms.proxied().await);
        let key_name = format!("{name} {}", unique());
        let key = kms::create_key(kms, &key_name).await;
        let (s3_url, kms_url) = (s3_through.url, kms_through.url);
        Self { name, bucket: s3.bucket().await, objects, keys, kms_url, s3_url, kms: kms.clone(), key_name, key }
    }

    /// The first shared LocalStack.
    pub async fn alpha() -> Self {
        let server = Endpoint::localstack_a();
        Self::new("alpha", &server, &server).await
    }

    /// The second.
    pub async fn beta() -> Self {
        let server = Endpoint::localstack_b();
        Self::new("beta", &server, &server).await
    }

    /// Makes bucket and key again in servers that forgot everything.
    pub async fn make_again(&mut self) {
        self.bucket = self.bucket.endpoint.make_bucket(&self.bucket.name, false).await;
        assert_eq!(kms::create_key(&self.kms, &self.key_name).await, self.key);
    }

    /// The name of the variables that hold its credentials.
    fn variable(&self, what: &str) -> String {
        format!("RIG_{}_{what}", self.name.to_uppercase())
    }

    fn table(&self) -> String {
        let Self { name, key, kms_url, s3_url, .. } = self;
        let (bucket, aws_region) = (&self.bucket.name, self.bucket.endpoint.region);
        let (id, secret) = (self.variable("ID"), self.variable("SECRET"));
        let role = format!("{{ access_key_id = \"env:{id}\", secret_access_key = \"env:{secret}\" }}");
        format!(
            "[regions.{name}]\n\
             url = \"s3://{bucket}/{PREFIX}\"\n\
             endpoint = \"{s3_url}\"\n\
             aws_region = \"{aws_region}\"\n\
             path_style = true\n\
             timeout = \"3s\"\n\
             kms = {{ key = \"{key}\", endpoint = \"{kms_url}\" }}\n\
             credentials = {{ write = {role}, restore = {role} }}\n\n"
        )
    }
}

/// The rig, with a repository made.
#[derive(Debug)]
pub struct Rig3 {
    /// What is protected, as target `ledger`.
    pub cluster: Cluster,
    /// The region that restores prefer.
    pub alpha: Site,
    /// The second region.
    pub beta: Site,
    scratch: Scratch,
}

impl Rig3 {
    /// On the shared servers.
    pub async fn new() -> Self {
        Self::of(Site::alpha().await, Site::beta().await).await
    }

    /// On servers of choice.
    pub async fn of(alpha: Site, beta: Site) -> Self {
        let cluster = Cluster::builder(MAJOR).setting("wal_level", "replica").start().await;
        let rig = Self { cluster, alpha, beta, scratch: Scratch::new() };
        let recipient = new_recovery_key(&rig.identity(), &World::real()).unwrap();
        let text = format!(
            "[repository]\nstate_dir = \"{}\"\ndetach_after = \"4s\"\n\n{}{}\
             [regions.cellar]\nurl = \"dir://{}\"\n\n\
             [keys.recovery]\nage = \"{recipient}\"\n\n\
             [targets.ledger]\nsource = \"postgres\"\nconninfo = \"{}\"\non_pressure = \"keep\"\n\
             max_read_rate = \"16MiB\"\nship_interval = \"100ms\"\n",
            rig.scratch.join("state").display(),
            rig.alpha.table(),
            rig.beta.table(),
            rig.cellar().display(),
            rig.cluster.conninfo()
        );
        fs::write(rig.config(), text).unwrap();
        rig.drctl(["init"]).run().await.ok();
        rig
    }

    fn config(&self) -> PathBuf {
        self.scratch.join("drctl.toml")
    }

    /// The directory region.
    pub fn cellar(&self) -> PathBuf {
        self.scratch.join("cellar")
    }

    /// The age identity, which the configuration does not name.
    pub fn identity(&self) -> PathBuf {
        self.scratch.join("recovery.age")
    }

    /// A path for a restore.
    pub fn target_dir(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// `drctl` with this configuration and the right credentials.
    pub fn drctl<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Drctl {
        self.furnish(Drctl::new(arguments))
    }

    /// The same, with a clock that is wrong by `offset`, as faketime writes it.
    pub fn drctl_at(&self, offset: &str, arguments: &[&str]) -> Drctl {
        let mut command = Command::new("faketime");
        command.args(["-f", offset, env!("CARGO_BIN_EXE_drctl")]).args(arguments);
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        self.furnish(Drctl::of(command))
    }

    fn furnish(&self, mut drctl: Drctl) -> Drctl {
        for site in [&self.alpha, &self.beta] {
            drctl = drctl.env(&site.variable("ID"), ACCESS_KEY).env(&site.variable("SECRET"), SECRET_KEY);
        }
        let bin = self.cluster.bin_dir();
        drctl.config(&self.config()).env(&format!("DRCTL_PG_BIN_{MAJOR}"), bin)
    }

    /// The same, where regions and key holders are expected to be in trouble.
    pub fn troubled<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Drctl {
        TROUBLE.into_iter().fold(self.drctl(arguments), Drctl::expect_log)
    }

    /// `drctl backup`, in trouble.
    pub fn backup(&self) -> Drctl {
        self.troubled(["backup", "ledger", "--fast", "--json"])
    }

    /// Rows that do not compress, so that a backup has packs of some size: about `megabytes` of them.
    pub async fn fill(&self, megabytes: u32) {
        let rows = megabytes * 625;
        let bytes = "decode(string_agg(md5(n || '.' || i), ''), 'hex')";
        let sql = format!(
            "CREATE TABLE noise AS SELECT n, (SELECT {bytes} FROM generate_series(1, 100) i) AS bytes
               FROM generate_series(1, {rows}) n"
        );
        self.cluster.execute(&sql).await;
        // Otherwise the backup carries the rows twice: its WAL begins with the segment that is being written.
        self.cluster.switch_wal().await;
    }

    /// Asserts that the rows of [`fill`](Self::fill) are what they were.
    pub async fn assert_filled(&self, restored: &Cluster) {
        let digest = "SELECT count(*), md5(string_agg(md5(bytes), '' ORDER BY n)) FROM noise";
        assert_eq!(restored.query(digest).await, self.cluster.query(digest).await);
    }

    /// Where the WAL receiver says that it stands.
    pub async fn position(&self) -> Option<Position> {
        let target: TargetName = "ledger".parse().unwrap();
        control::position(&self.scratch.join("state/ledger.sock"), &target).await.ok().flatten()
    }

    /// `drctl wal stream`, once it streams.
    pub async fn stream(&self) -> Background {
        let stream = self.troubled(["wal", "stream", "ledger"]).spawn();
        process::eventually("the receiver streams", Duration::from_secs(20), async || {
            self.position().await.is_some_and(|position| position.start_lsn.is_some())
        })
        .await;
        stream
    }

    /// The plan of a restore to the end.
    pub async fn plan(&self, directory: &Path, options: &[&str]) -> Finished {
        self.troubled(restore(directory, options)).run().await
    }

    /// Plan and run; `before` the run something may break.
    pub async fn restore(&self, directory: &Path, options: &[&str]) -> Finished {
        let digest = self.plan(directory, options).await.ok().json()["digest"].as_str().unwrap().to_owned();
        self.execute(directory, options, &digest).run().await
    }

    /// The run of a plan.
    pub fn execute(&self, directory: &Path, options: &[&str], digest: &str) -> Drctl {
        let options: Vec<_> = options.iter().copied().chain(["--execute", "--plan", digest]).collect();
        self.troubled(restore(directory, &options))
    }

    /// Restores, starts, and asserts that everything is there.
    pub async fn assert_restores(&self, name: &str, options: &[&str]) -> Value {
        let directory = self.target_dir(name);
        let report = self.restore(&directory, options).await.ok().json();
        let restored = Cluster::start_restored(&directory, MAJOR).await;
        self.assert_filled(&restored).await;
        report
    }

    /// Every object of every region with its bytes, but for probes, which each region has for itself, and intents,
    /// which end with their backup and are not repaired.
    pub async fn objects(&self) -> BTreeMap<&'static str, BTreeMap<String, Vec<u8>>> {
        let mut regions = BTreeMap::from([("cellar", files_below(&self.cellar()))]);
        for site in [&self.alpha, &self.beta] {
            let mut objects = BTreeMap::new();
            for key in site.bucket.keys(PREFIX).await {
                let body = site.bucket.get(&key).await.unwrap().to_vec();
                objects.insert(key.strip_prefix(PREFIX).unwrap().to_owned(), body);
            }
            regions.insert(site.name, objects);
        }
        for objects in regions.values_mut() {
            objects.retain(|key, _| !key.starts_with('.') && !key.starts_with("intents/"));
        }
        regions
    }

    /// The names in which regions differ.
    pub async fn differences(&self) -> BTreeSet<String> {
        let regions = self.objects().await;
        let names: BTreeSet<_> = regions.values().flat_map(BTreeMap::keys).cloned().collect();
        let differs = |name: &String| {
            let bodies: BTreeSet<_> = regions.values().map(|objects| objects.get(name)).collect();
            bodies.len() > 1
        };
        names.into_iter().filter(differs).collect()
    }

    /// Asserts that a repair brings all regions to the same bytes, and that a second one finds nothing to do.
    pub async fn assert_repairs(&self) {
        self.troubled(["repair"]).run().await.ok();
        assert_eq!(self.differences().await, BTreeSet::new());
        let before = self.objects().await;
        let again = self.drctl(["repair", "--json"]).run().await.ok().json();
        assert!(before == self.objects().await, "a second repair wrote something: {again}");
    }

    /// The COMMITs that a region holds.
    pub async fn commits(&self, region: &str) -> usize {
        let regions = self.objects().await;
        regions[region].keys().filter(|key| key.starts_with("commits/")).count()
    }
}

fn restore(directory: &Path, options: &[&str]) -> Vec<String> {
    let directory = directory.display().to_string();
    let fixed = ["restore", "ledger", "--json", "--target-dir", &directory];
    fixed.iter().chain(options).map(|&word| word.to_owned()).collect()
}

/// Breaks what is behind `proxy` once another `bytes` went through it.
pub async fn break_after(proxy: &TcpProxy, bytes: u64, mode: Mode) {
    let before = proxy.passed();
    process::eventually("the proxy carries bytes", Duration::from_secs(60), async || proxy.passed() >= before + bytes)
        .await;
    proxy.set(mode).await;
}

/// What each region owes according to the report of a backup.
pub fn debts(report: &Value) -> BTreeMap<String, u64> {
    let regions = report["regions"].as_array().unwrap().iter();
    let debts =
        regions.map(|lane| (lane["region"].as_str().unwrap().to_owned(), lane["missing_objects"].as_u64().unwrap()));
    debts.filter(|(_, missing)| *missing > 0).collect()
}

/// Every regular file below a directory, by its path from there.
pub fn files_below(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut files, mut open) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    files
}
