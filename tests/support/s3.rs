//! Real S3 servers: the shared ones, servers of one test that may be killed, and buckets in them.

use std::path::{Path, PathBuf};
use std::process::Command;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, RequestChecksumCalculation};
use aws_sdk_s3::types::{
    BucketLocationConstraint, CreateBucketConfiguration, ObjectLockRetention, ObjectLockRetentionMode,
};
use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process_group};

use super::dirs::Scratch;
use super::process;
use super::proxy::TcpProxy;

/// The one user of every server of the rig.
pub const ACCESS_KEY: &str = "AKTEST";
/// Its secret.
pub const SECRET_KEY: &str = "SKTESTSECRET";

/// An S3 server, and with LocalStack also a KMS.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    /// Its AWS region.
    pub region: &'static str,
}

impl Endpoint {
    /// The first shared LocalStack.
    pub fn localstack_a() -> Self {
        Self { url: super::from_environment("DRCTL_TEST_S3_A"), region: "us-east-1" }
    }

    /// The second, in another region.
    pub fn localstack_b() -> Self {
        Self { url: super::from_environment("DRCTL_TEST_S3_B"), region: "eu-central-1" }
    }

    /// The first shared RGW.
    pub fn rgw_a() -> Self {
        Self { url: super::from_environment("DRCTL_TEST_RGW_A"), region: "us-east-1" }
    }

    /// The second; every RGW of the rig says that it is us-east-1.
    pub fn rgw_b() -> Self {
        Self { url: super::from_environment("DRCTL_TEST_RGW_B"), region: "us-east-1" }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.url.rsplit(':').next().unwrap().parse().unwrap()
    }

    /// A proxy before this server, and the endpoint that leads through it.
    pub async fn proxied(&self) -> (TcpProxy, Self) {
        let proxy = TcpProxy::before(self.port()).await;
        let url = format!("http://127.0.0.1:{}", proxy.port());
        (proxy, Self { url, region: self.region })
    }

    /// A client of the rig's own.
    pub fn client(&self) -> Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&self.url)
            .region(Region::from_static(self.region))
            .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "rig"))
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .force_path_style(true)
            .build();
        Client::from_conf(config)
    }

    /// A new bucket.
    pub async fn bucket(&self) -> Bucket {
        self.make_bucket(&super::unique(), false).await
    }

    /// A new bucket with object lock, and so with versions.
    pub async fn locked_bucket(&self) -> Bucket {
        self.make_bucket(&super::unique(), true).await
    }

    /// A bucket of a given name, for a region that was wiped.
    pub async fn make_bucket(&self, name: &str, lock: bool) -> Bucket {
        let client = self.client();
        let mut create = client.create_bucket().bucket(name);
        if self.region != "us-east-1" {
            let place = BucketLocationConstraint::from(self.region);
            create = create
                .create_bucket_configuration(CreateBucketConfiguration::builder().location_constraint(place).build());
        }
        if lock {
            create = create.object_lock_enabled_for_bucket(true);
        }
        create.send().await.unwrap_or_else(|error| panic!("bucket {name} in {}: {error:?}", self.url));
        Bucket { name: name.to_owned(), endpoint: self.clone(), client }
    }
}

/// A bucket, and the ways to look into it and to damage it that drctl does not have.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// Its server.
    pub endpoint: Endpoint,
    client: Client,
}

impl Bucket {
    /// Every name that begins with `prefix`, in ascending order.
    pub async fn keys(&self, prefix: &str) -> Vec<String> {
        let mut pages = self.client.list_objects_v2().bucket(&self.name).prefix(prefix).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            keys.extend(page.unwrap().contents().iter().map(|object| object.key().unwrap().to_owned()));
        }
        keys
    }

    /// How many versions and delete markers stand below `prefix`.
    pub async fn versions(&self, prefix: &str) -> usize {
        let (mut count, mut key, mut version) = (0, None, None);
        loop {
            let request = self.client.list_object_versions().bucket(&self.name).prefix(prefix);
            let page = request.set_key_marker(key).set_version_id_marker(version).send().await.unwrap();
            count += page.versions().len() + page.delete_markers().len();
            if page.is_truncated() != Some(true) {
                return count;
            }
            key = page.next_key_marker().map(str::to_owned);
            version = page.next_version_id_marker().map(str::to_owned);
        }
    }

    /// Everything that stands below `prefix`: name, version, whether it is a delete marker; of each name the newest first.
    pub async fn all_versions(&self, prefix: &str) -> Vec<(String, String, bool)> {
        let (mut all, mut key, mut version) = (Vec::new(), None, None);
        loop {
            let request = self.client.list_object_versions().bucket(&self.name).prefix(prefix);
            let page = request.set_key_marker(key).set_version_id_marker(version).send().await.unwrap();
            let versions = page.versions().iter().map(|it| (it.key(), it.version_id(), it.last_modified(), false));
            let markers = page.delete_markers().iter().map(|it| (it.key(), it.version_id(), it.last_modified(), true));
            all.extend(versions.chain(markers).map(|(key, id, at, marker)| {
                (key.unwrap().to_owned(), std::cmp::Reverse(at.unwrap().secs()), id.unwrap().to_owned(), marker)
            }));
            if page.is_truncated() != Some(true) {
                break;
            }
            key = page.next_key_marker().map(str::to_owned);
            version = page.next_version_id_marker().map(str::to_owned);
        }
        all.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        all.into_iter().map(|(key, _, id, marker)| (key, id, marker)).collect()
    }

    /// Removes one version for good; what the server says if it refuses.
    pub async fn delete_version(&self, key: &str, version: &str) -> Result<(), String> {
        let request = self.client.delete_object().bucket(&self.name).key(key).version_id(version);
        let refused = |error| format!("{:?}", aws_sdk_s3::error::DisplayErrorContext(error));
        request.send().await.map(drop).map_err(refused)
    }

    /// Until when an object is locked.
    pub async fn locked_until(&self, key: &str) -> Option<i64> {
        let reply = self.client.get_object_retention().bucket(&self.name).key(key).send().await.ok()?;
        Some(reply.retention()?.retain_until_date()?.secs())
    }

    /// Locks an object until then, in governance mode with the right to bypass it: also for less than it was.
    pub async fn lock(&self, key: &str, mode: ObjectLockRetentionMode, until: i64) -> Result<(), String> {
        let date = aws_sdk_s3::primitives::DateTime::from_secs(until);
        let lock = ObjectLockRetention::builder().mode(mode).retain_until_date(date).build();
        let request = self.client.put_object_retention().bucket(&self.name).key(key).retention(lock);
        let refused = |error| format!("{:?}", aws_sdk_s3::error::DisplayErrorContext(error));
        request.bypass_governance_retention(true).send().await.map(drop).map_err(refused)
    }

    /// An object, `None` if it is not there.
    pub async fn get(&self, key: &str) -> Option<Bytes> {
        match self.client.get_object().bucket(&self.name).key(key).send().await {
            Ok(object) => Some(object.body.collect().await.unwrap().into_bytes()),
            Err(error) if error.as_service_error().is_some_and(|error| error.is_no_such_key()) => None,
            Err(error) => panic!("get {key}: {error:?}"),
        }
    }

    /// Writes an object, over any other.
    pub async fn put(&self, key: &str, body: impl Into<Bytes>) {
        let body = aws_sdk_s3::primitives::ByteStream::from(body.into());
        self.client.put_object().bucket(&self.name).key(key).body(body).send().await.unwrap();
    }

    /// Removes an object.
    pub async fn delete(&self, key: &str) {
        self.client.delete_object().bucket(&self.name).key(key).send().await.unwrap();
    }

    /// Flips one bit of an object.
    pub async fn flip_bit(&self, key: &str, bit: usize) {
        let mut body = self.get(key).await.expect("nothing to damage").to_vec();
        body[bit / 8] ^= 1 << (bit % 8);
        self.put(key, body).await;
    }

    /// Removes every object.
    pub async fn wipe(&self) {
        for key in self.keys("").await {
            self.delete(&key).await;
        }
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// Starts a server of one test: its script's `up` with a free port, again if somebody else took the port.
async fn up(name: &'static str, dir: PathBuf) -> Endpoint {
    let url = tokio::task::spawn_blocking(move || {
        for _ in 0..3 {
            let port = process::free_ports(3);
            let started = process::output(Command::new(script(name)).arg("up").arg(&dir).arg(port.to_string()));
            if started.status.success() {
                return String::from_utf8(started.stdout).unwrap().trim().to_owned();
            }
        }
        panic!("scripts/{name} up does not work")
    });
    Endpoint { url: url.await.unwrap(), region: "us-east-1" }
}

fn signal_group(pid_file: &Path, signal: Signal) {
    let Ok(pid) = std::fs::read_to_string(pid_file) else { return };
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw).expect("a process id");
    let _gone = kill_process_group(pid, signal);
}

/// A LocalStack of one test. It forgets everything when it is killed.
#[derive(Debug)]
pub struct LocalStack {
    scratch: Scratch,
    /// Its address.
    pub endpoint: Endpoint,
}

impl LocalStack {
    /// A new one, in about two seconds.
    pub async fn start() -> Self {
        let scratch = Scratch::new();
        let endpoint = up("localstack", scratch.join("server")).await;
        Self { scratch, endpoint }
    }

    /// Stops answering, with every connection open.
    pub fn freeze(&self) {
        signal_group(&self.scratch.join("server/pid"), Signal::STOP);
    }

    /// Goes on.
    pub fn thaw(&self) {
        signal_group(&self.scratch.join("server/pid"), Signal::CONT);
    }

    /// SIGKILL.
    pub fn kill9(&self) {
        signal_group(&self.scratch.join("server/pid"), Signal::KILL);
    }

    /// The same address, empty: a region that was wiped.
    pub async fn restart_empty(&self) {
        self.kill9();
        let mut command = Command::new(script("localstack"));
        command.arg("up").arg(self.scratch.join("server")).arg(self.endpoint.port().to_string());
        process::run_async(command).await;
    }
}

impl Drop for LocalStack {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// A Ceph gateway of one test. What it acknowledged survives [`kill9`](Self::kill9).
#[derive(Debug)]
pub struct Rgw {
    scratch: Scratch,
    /// Its address.
    pub endpoint: Endpoint,
}

impl Rgw {
    /// A new one, in about ten seconds.
    pub async fn start() -> Self {
        let scratch = Scratch::new();
        let endpoint = up("rgw", scratch.join("server")).await;
        Self { scratch, endpoint }
    }

    fn script(&self, action: &str, daemons: &[&str]) -> Command {
        let mut command = Command::new(script("rgw"));
        command.arg(action).arg(self.scratch.join("server")).args(daemons);
        command
    }

    /// SIGKILL for the gateway; with `everything` also for the storage behind it.
    pub async fn kill9(&self, everything: bool) {
        process::run_async(self.script("kill", if everything { &[] } else { &["rgw"] })).await;
    }

    /// Starts what was killed, at the same address and with the same objects.
    pub async fn restart(&self) {
        process::run_async(self.script("restart", &[])).await;
    }

    /// Stops answering, with every connection open.
    pub fn freeze(&self) {
        signal_group(&self.scratch.join("server/pid/rgw"), Signal::STOP);
    }

    /// Goes on.
    pub fn thaw(&self) {
        signal_group(&self.scratch.join("server/pid/rgw"), Signal::CONT);
    }
}

impl Drop for Rgw {
    fn drop(&mut self) {
        let _down = self.script("down", &[]).status();
    }
}
