//! What expires goes from real servers, whatever happens to the pruner; what stays comes back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use drctl::app::{World, new_recovery_key};
use futures::StreamExt as _;
use serde_json::Value;

use crate::support::dirs::Scratch;
use crate::support::drctl::{Drctl, Finished};
use crate::support::proxy::TcpProxy;
use crate::support::s3::{ACCESS_KEY, Bucket, Endpoint, SECRET_KEY};

/// A bucket that keeps versions, one that does not, and a target of files.
pub struct Protected {
    /// Where everything lies.
    pub scratch: Scratch,
    buckets: [Bucket; 2],
    /// What stands before the buckets, if anything does.
    pub proxies: Vec<TcpProxy>,
}

impl Protected {
    async fn new(retention: &str) -> Self {
        let buckets = [Endpoint::localstack_a().locked_bucket().await, Endpoint::rgw_b().bucket().await];
        Self::over(buckets, Vec::new(), retention).await
    }

    /// With a proxy before each bucket.
    pub async fn behind_proxies(retention: &str) -> Self {
        let mut buckets = [Endpoint::rgw_a().bucket().await, Endpoint::rgw_b().bucket().await];
        let mut proxies = Vec::new();
        for bucket in &mut buckets {
            let (proxy, endpoint) = bucket.endpoint.proxied().await;
            bucket.endpoint = endpoint;
            proxies.push(proxy);
        }
        Self::over(buckets, proxies, retention).await
    }

    async fn over(buckets: [Bucket; 2], proxies: Vec<TcpProxy>, retention: &str) -> Self {
        let protected = Self { scratch: Scratch::new(), buckets, proxies };
        let recipient = new_recovery_key(&protected.scratch.join("recovery.age"), &World::real()).unwrap();
        let role = "{ access_key_id = \"env:ID\", secret_access_key = \"env:SECRET\" }";
        let region = |(name, bucket): (&str, &Bucket)| {
            let Endpoint { url, region, .. } = &bucket.endpoint;
            format!(
                "[regions.{name}]\nurl = \"s3://{}/vault\"\nendpoint = \"{url}\"\naws_region = \"{region}\"\npath_style = true\n\
                 checksum = \"when-required\"\ncredentials = {{ write = {role}, restore = {role}, prune = {role} }}\n",
                bucket.name
            )
        };
        let regions: String = ["alpha", "beta"].into_iter().zip(&protected.buckets).map(region).collect();
        let text = format!(
            "[repository]\nstate_dir = \"{}\"\nmin_wraps = 1\n[prune]\ngrace = \"1s\"\nshort_grace = true\n{regions}\
             [keys.recovery]\nage = \"{recipient}\"\n\
             [targets.kept]\nsource = \"files\"\nroots = [\"{}\"]\n[targets.kept.retention]\n{retention}",
            protected.scratch.join("state").display(),
            protected.root().display()
        );
        fs::create_dir_all(protected.root()).unwrap();
        fs::write(protected.scratch.join("drctl.toml"), text).unwrap();
        protected.drctl(&["init"]).run().await.ok();
        protected
    }

    /// What is backed up.
    pub fn root(&self) -> PathBuf {
        self.scratch.join("srv")
    }

    /// `drctl` with this configuration.
    pub fn drctl(&self, arguments: &[&str]) -> Drctl {
        self.here(Drctl::new(arguments))
    }

    /// The same, of any line.
    pub fn here(&self, drctl: Drctl) -> Drctl {
        let drctl = drctl.config(&self.scratch.join("drctl.toml"));
        drctl.env("ID", ACCESS_KEY).env("SECRET", SECRET_KEY)
    }

    /// What it says as JSON.
    pub async fn json(&self, arguments: &[&str]) -> Value {
        self.drctl(&[arguments, &["--json"]].concat()).run().await.ok().json()
    }

    /// Backs up a file of this text.
    pub async fn backup(&self, text: &str) -> String {
        fs::write(self.root().join("file"), text).unwrap();
        self.json(&["backup", "kept"]).await["backup"]["id"].as_str().unwrap().to_owned()
    }

    /// What may be removed now, by its digest; `None` if nothing is left that nobody needs.
    pub async fn ripe(&self) -> Option<String> {
        loop {
            // A server tells whole seconds, and the grace period is one of them.
            tokio::time::sleep(Duration::from_millis(2200)).await;
            // A pruner that was killed is met by the next one.
            let found = self.drctl(&["prune", "--json"]).expect_log("an earlier sweep died").run().await.ok().json();
            match found["ripe"]["digest"].as_str() {
                Some(digest) => return Some(digest.to_owned()),
                None if found["planned"]["amount"]["objects"] == 0 => return None,
                // What a backup beside the last sweep pushed out was planned just now.
                None => {}
            }
        }
    }

    /// The sweep of exactly that.
    pub fn execute(&self, digest: &str) -> Drctl {
        self.drctl(&["prune", "--plan", digest, "--execute", "--json"])
    }

    /// The backups that exist.
    pub async fn ids(&self) -> Vec<String> {
        let listed = self.json(&["list"]).await;
        listed["backups"].as_array().unwrap().iter().map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
    }

    async fn restores(&self, id: &str, name: &str, text: &str) {
        let (place, identity) = (self.scratch.join(name), self.scratch.join("recovery.age"));
        let opening = ["--age-identity", identity.to_str().unwrap()];
        let plan = ["restore", id, "--target-dir", place.to_str().unwrap(), "--json"];
        let plan = self.drctl(&[&opening[..], &plan].concat()).run().await.ok().json();
        let command = plan["command"].as_str().unwrap().to_owned();
        self.here(Drctl::pasted(&command)).run().await.ok();
        let restored = place.join(self.root().strip_prefix("/").unwrap()).join("file");
        assert_eq!(fs::read_to_string(&restored).unwrap(), text, "{}", restored.display());
    }
}

/// Far more names than a server lists at once, removed by a pruner that is killed at random moments, beside backups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_objects_go_though_the_pruner_is_killed_and_backups_run_beside_it() {
    let protected = Protected::new("keep_last = 2\ncount_undrilled = true\n").await;
    let old = protected.backup("old").await;
    for (bucket, count) in protected.buckets.iter().zip([1100u32, 4200]) {
        let keys = (0..count).map(|number| format!("vault/packs/kept/{old}/{:06}", 100_000 + number));
        let puts = futures::stream::iter(keys).map(|key| async move { bucket.put(&key, "x").await });
        puts.buffer_unordered(24).collect::<Vec<()>>().await;
    }
    protected.backup("middle").await;
    protected.backup("new").await;
    assert_eq!(protected.json(&["prune"]).await["planned"]["by_region"].as_object().unwrap().len(), 2);
    let mut seed = 0x2545_f491u64;
    let mut kills = 0;
    while let Some(digest) = protected.ripe().await {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if kills < 4 {
            let mut pruner = protected.execute(&digest).spawn();
            tokio::time::sleep(Duration::from_millis(1500 + (seed >> 33) % 4000)).await;
            if pruner.is_running() {
                pruner.kill9();
                kills += 1;
            }
        } else {
            // Each backup pushes another one out, so that the last rounds have none beside them.
            let beside = async {
                if kills < 6 {
                    protected.backup(&format!("beside {kills}")).await;
                }
            };
            let (done, ()) = tokio::join!(protected.execute(&digest).run(), beside);
            let done: Finished = done.ok();
            assert!(done.json()["swept"]["objects"].as_u64().unwrap() > 0, "{done}");
            kills += 1;
        }
        protected.drctl(&["verify"]).run().await.ok();
        let repaired = protected.json(&["repair", "--quick"]).await;
        assert!(repaired["regions"].as_array().unwrap().iter().all(|region| region["copied"] == 0), "{repaired}");
        assert!(kills < 12);
    }
    let left = protected.ids().await;
    assert!(left.len() == 2 && !left.contains(&old), "{left:?}");
    for bucket in &protected.buckets {
        assert_eq!(bucket.keys(&format!("vault/packs/kept/{old}/")).await, Vec::<String>::new());
        assert_eq!(bucket.keys("vault/commits/kept/").await.len(), 2);
    }
    // Nothing hides behind a delete marker in the bucket that keeps versions.
    assert_eq!(
        protected.buckets[0].versions("vault/packs/").await,
        protected.buckets[0].keys("vault/packs/").await.len()
    );
    protected.drctl(&["verify", "--scrub"]).run().await.ok();
    let newest = fs::read_to_string(protected.root().join("file")).unwrap();
    protected.restores(&left[0], "back", &newest).await;
}

#[tokio::test]
async fn what_is_pinned_or_held_is_listed_and_stays() {
    let protected = Protected::new("keep_last = 2\ncount_undrilled = true\n").await;
    let mut ids = Vec::new();
    for round in 0..4 {
        ids.push(protected.backup(&round.to_string()).await);
    }
    protected.drctl(&["pin", &ids[0], "--reason", "audit"]).run().await.ok();
    let pins = protected.drctl(&["pin", "--list"]).run().await.ok();
    assert!(pins.stdout.contains(&ids[0]) && pins.stdout.contains("audit"), "{pins}");
    let told = protected.drctl(&["prune", "--dry-run"]).run().await.ok();
    assert!(told.stdout.contains("pinned: audit") && told.stdout.contains("GOES: no rule keeps it"), "{told}");
    protected.drctl(&["prune"]).run().await.ok();
    let digest = protected.ripe().await.unwrap();
    let wrong = protected.execute("00000000").run().await.code(5);
    assert!(wrong.stdout.contains(&digest), "{wrong}");
    protected.execute(&digest).run().await.ok();
    // Those of one second have no order among themselves.
    let (mut left, mut stay) = (protected.ids().await, [&ids[0], &ids[2], &ids[3]].map(String::clone));
    left.sort();
    stay.sort();
    assert_eq!(left, stay);
    let history = protected.drctl(&["prune", "show"]).run().await.ok();
    assert!(history.stdout.contains(&format!("took {}", ids[1])), "{history}");
    protected.drctl(&["hold", "kept", "--reason", "case 4711"]).run().await.ok();
    protected.drctl(&["unpin", &ids[0], "--reason", "over"]).run().await.ok();
    assert_eq!(protected.json(&["prune"]).await["planned"]["amount"]["objects"], 0);
    protected.restores(&ids[0], "pinned", "0").await;
}
