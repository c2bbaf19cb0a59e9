//! Object Lock: whoever holds every credential removes nothing before its time, and prune takes it when that has come.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_sdk_s3::types::ObjectLockRetentionMode as Mode;
use drctl::app::{World, new_recovery_key};
use futures::StreamExt as _;
use serde_json::Value;

use crate::support::dirs::Scratch;
use crate::support::drctl::Drctl;
use crate::support::pg::Cluster;
use crate::support::s3::{ACCESS_KEY, Bucket, Endpoint, SECRET_KEY};

const MAJOR: u32 = 15;

/// Two buckets with Object Lock on two makes of server, and one target.
struct Locked {
    scratch: Scratch,
    buckets: [Bucket; 2],
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

impl Locked {
    async fn new(keep: &str, target: impl FnOnce(&Scratch) -> String) -> Self {
        let buckets = [Endpoint::localstack_a().locked_bucket().await, Endpoint::rgw_b().locked_bucket().await];
        let locked = Self { scratch: Scratch::new(), buckets };
        let recipient = new_recovery_key(&locked.scratch.join("recovery.age"), &World::real()).unwrap();
        let role = "{ access_key_id = \"env:ID\", secret_access_key = \"env:SECRET\" }";
        let region = |((name, bucket), more): ((&str, &Bucket), &str)| {
            let Endpoint { url, region, .. } = &bucket.endpoint;
            format!(
                "[regions.{name}]\nurl = \"s3://{}/vault\"\nendpoint = \"{url}\"\naws_region = \"{region}\"\npath_style = true\n\
                 credentials = {{ write = {role}, restore = {role}, prune = {role} }}\n{more}, for = \"{keep}\" }}\n",
                bucket.name
            )
        };
        // RGW 16 ignores If-None-Match in a bucket with versions, and a lock needs versions.
        let more = [
            "lock = { mode = \"governance\"",
            "single_writer = true\nchecksum = \"when-required\"\nlock = { mode = \"compliance\"",
        ];
        let regions: String = ["alpha", "beta"].into_iter().zip(&locked.buckets).zip(more).map(region).collect();
        let text = format!(
            "[repository]\nstate_dir = \"{}\"\nmin_wraps = 1\n[prune]\ngrace = \"1s\"\nshort_grace = true\n{regions}\
             [keys.recovery]\nage = \"{recipient}\"\n{}",
            locked.scratch.join("state").display(),
            target(&locked.scratch)
        );
        fs::write(locked.scratch.join("drctl.toml"), text).unwrap();
        locked.drctl(&["init"]).run().await.ok();
        locked
    }

    fn drctl(&self, arguments: &[&str]) -> Drctl {
        self.here(Drctl::new(arguments))
    }

    fn here(&self, drctl: Drctl) -> Drctl {
        let drctl = drctl.config(&self.scratch.join("drctl.toml")).env("ID", ACCESS_KEY).env("SECRET", SECRET_KEY);
        drctl.env(&format!("DRCTL_PG_BIN_{MAJOR}"), crate::support::pg::bin_dir(MAJOR))
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        self.drctl(&[arguments, &["--json"]].concat()).run().await.ok().json()
    }

    /// What `check` says of locks, whatever else it finds.
    async fn check(&self) -> (Vec<Value>, Vec<String>) {
        let report = self.drctl(&["check", "--json"]).run().await.json();
        let of_locks = report["checks"].as_array().unwrap().iter().filter(|check| check["area"] == "locks");
        let bad = of_locks.filter(|check| check["level"] != "ok").map(|check| check["what"].to_string()).collect();
        (report["locks"].as_array().unwrap().clone(), bad)
    }

    /// Somebody with every right that credentials give: tries to remove each version, then hides and overwrites all.
    async fn ransom(&self) {
        for bucket in &self.buckets {
            let all = bucket.all_versions("vault/").await;
            let tries =
                all.iter().map(|(key, version, _)| async move { (key, bucket.delete_version(key, version).await) });
            let tries: Vec<_> = futures::stream::iter(tries).buffer_unordered(8).collect().await;
            let evidence =
                |key: &str| !["vault/intents/", "vault/.probe/", "vault/prunes/"].iter().any(|of| key.starts_with(of));
            let removed: Vec<_> = tries.iter().filter(|(key, done)| evidence(key) && done.is_ok()).collect();
            assert!(removed.is_empty() && tries.len() > 20, "{removed:?} of {}", tries.len());
            let refused = tries.iter().filter_map(|(_, done)| done.as_ref().err());
            assert!(refused.into_iter().all(|why| why.contains("AccessDenied")), "{tries:?}");
            for key in bucket.keys("vault/").await {
                bucket.put(&key, "pay").await;
                bucket.delete(&key).await;
            }
            assert_eq!(bucket.keys("vault/").await, Vec::<String>::new());
        }
    }

    /// As docs/operations.md says: of every name all but the oldest version goes.
    async fn uncover(&self) {
        for bucket in &self.buckets {
            let all = bucket.all_versions("vault/").await;
            for (at, (key, version, _)) in all.iter().enumerate() {
                let is_oldest = all.get(at + 1).is_none_or(|(next, ..)| next != key);
                if !is_oldest {
                    bucket.delete_version(key, version).await.unwrap();
                }
            }
        }
    }

    async fn execute(&self, plan: &Value) {
        self.here(Drctl::pasted(plan["command"].as_str().unwrap())).run().await.ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thief_with_every_credential_removes_nothing_and_the_backup_restores() {
    let cluster = Cluster::builder(MAJOR).setting("wal_level", "replica").start().await;
    cluster.execute("CREATE TABLE account AS SELECT n, md5(n::text) AS text FROM generate_series(1, 20000) n").await;
    let conninfo = cluster.conninfo();
    let target = |_: &Scratch| format!("[targets.ledger]\nsource = \"postgres\"\nconninfo = \"{conninfo}\"\n");
    let locked = Locked::new("1h", target).await;
    let full = locked.json(&["backup", "ledger", "--fast"]).await;
    cluster.execute("UPDATE account SET text = 'changed' WHERE n <= 50").await;
    let next = locked.json(&["backup", "ledger", "--fast"]).await;
    assert_eq!(next["backup"]["kind"], "incremental");
    for region in next["locks"].as_array().unwrap() {
        assert!(region["owed"] == 0 && region["objects"].as_u64().unwrap() > 5, "{next}");
    }
    let (locks, bad) = locked.check().await;
    assert_eq!(locks.len(), 4, "{locks:?}");
    assert!(
        locks.iter().all(|one| one["state"] == "locked" && one["weak"] == 0) && bad.is_empty(),
        "{locks:?} {bad:?}"
    );

    let shown = locked.json(&["show", "ledger"]).await;
    assert!(["alpha", "beta"].iter().all(|region| shown["held"][region]["locked_until"].is_string()), "{shown}");

    // What the second one shares is locked as long as its own COMMIT, and a weaker lock is found and mended.
    let id = |report: &Value| report["backup"]["id"].as_str().unwrap().to_owned();
    let commit = format!("vault/commits/ledger/{}", id(&next));
    let shared = format!("vault/packs/ledger/{}/000000", id(&full));
    let [alpha, beta] = &locked.buckets;
    for bucket in [alpha, beta] {
        assert!(bucket.locked_until(&commit).await > Some(now() + 3000));
        assert!(bucket.locked_until(&shared).await >= bucket.locked_until(&commit).await);
        // A frame is locked for longer: it may be older than the backup that needs it.
        let frame = bucket.keys("vault/wal/").await.remove(0);
        assert!(bucket.locked_until(&frame).await > Some(now() + 2 * 3600 - 600));
    }
    assert!(beta.lock(&shared, Mode::Compliance, now() + 600).await.is_err(), "nobody shortens a compliance lock");
    alpha.lock(&shared, Mode::Governance, now() + 600).await.unwrap();
    let (locks, bad) = locked.check().await;
    let weak: Vec<_> = locks.iter().filter(|one| one["state"] == "weak").collect();
    assert!(weak.iter().all(|one| one["region"] == "alpha" && one["weakest"] == shared["vault/".len()..]), "{locks:?}");
    assert!(weak.iter().any(|one| one["backup"] == next["backup"]["id"]) && bad.len() == weak.len(), "{bad:?}");
    let repaired = locked.json(&["repair", "ledger", "--quick"]).await;
    assert_eq!((&repaired["locks"][0]["objects"], &repaired["locks"][0]["owed"]), (&1.into(), &0.into()), "{repaired}");
    assert!(locked.check().await.0.iter().all(|one| one["state"] == "locked"));

    locked.ransom().await;
    locked.uncover().await;
    let directory = locked.scratch.join("restored");
    let identity = locked.scratch.join("recovery.age");
    let opening = ["--age-identity", identity.to_str().unwrap()];
    let wanted = ["restore", "ledger", "--target-dir", directory.to_str().unwrap(), "--immediate"];
    let plan = locked.json(&[&opening[..], &wanted].concat()).await;
    locked.execute(&plan).await;
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    let sum = "SELECT count(*), md5(string_agg(n || text, ',' ORDER BY n)) FROM account";
    assert_eq!(restored.query(sum).await, cluster.query(sum).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_is_retained_and_goes_when_the_lock_is_over() {
    let target = |scratch: &Scratch| {
        fs::create_dir_all(scratch.join("srv")).unwrap();
        format!(
            "[targets.kept]\nsource = \"files\"\nroots = [\"{}\"]\n\
             [targets.kept.retention]\nkeep_last = 1\ncount_undrilled = true\n",
            scratch.join("srv").display()
        )
    };
    let locked = Locked::new("6s", target).await;
    let mut ids = Vec::new();
    for text in ["one", "two", "three"] {
        fs::write(locked.scratch.join("srv/file"), text).unwrap();
        ids.push(locked.json(&["backup", "kept"]).await["backup"]["id"].as_str().unwrap().to_owned());
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    // Somebody locks one COMMIT for longer, in one region alone: of everything else the locks end before.
    let [alpha, beta] = &locked.buckets;
    let (commit, until) = (format!("vault/commits/kept/{}", ids[0]), now() + 25);
    beta.lock(&commit, Mode::Compliance, until).await.unwrap();
    let verdict = async || {
        let report = locked.json(&["prune"]).await;
        let backups = report["targets"][0]["backups"].as_array().unwrap().clone();
        let verdict = backups.iter().find(|backup| backup["id"] == *ids[0]).map(|backup| backup["verdict"].clone());
        (verdict.unwrap_or_default(), report)
    };
    let (first, report) = verdict().await;
    assert_eq!(first["retained"]["region"], "beta", "{report}");
    while alpha.locked_until(&commit).await.unwrap() >= now() {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let (second, report) = verdict().await;
    assert!(second["retained"]["region"] == "beta" && report["ripe"].is_null(), "{report}");
    let place = locked.scratch.join("first");
    let identity = locked.scratch.join("recovery.age");
    let opening = ["--age-identity", identity.to_str().unwrap()];
    let plan =
        locked.json(&[&opening[..], &["restore", &ids[0], "--target-dir", place.to_str().unwrap()]].concat()).await;
    locked.execute(&plan).await;
    let file = locked.scratch.join("srv/file");
    assert_eq!(fs::read_to_string(place.join(file.strip_prefix("/").unwrap())).unwrap(), "one");

    while now() <= until {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let digest = loop {
        // A server tells whole seconds, and the grace period is one of them.
        tokio::time::sleep(Duration::from_millis(2200)).await;
        if let Some(digest) = locked.json(&["prune"]).await["ripe"]["digest"].as_str() {
            break digest.to_owned();
        }
    };
    let done = locked.json(&["prune", "--plan", &digest, "--execute"]).await;
    assert_eq!(
        (&done["swept"]["backups"][0], &done["swept"]["retained"]),
        (&ids[0].as_str().into(), &0.into()),
        "{done}"
    );
    for bucket in [alpha, beta] {
        assert_eq!(bucket.versions(&format!("vault/packs/kept/{}", ids[0])).await, 0);
        assert_eq!(bucket.versions(&commit).await, 0);
    }
    let listed = locked.json(&["list"]).await;
    let left: Vec<_> = listed["backups"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert!(left.len() == 2 && !left.contains(&ids[0].as_str()), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_cannot_lock_is_refused_before_anything_is_in_it() {
    let scratch = Scratch::new();
    let recipient = new_recovery_key(&scratch.join("recovery.age"), &World::real()).unwrap();
    let bucket = Endpoint::localstack_a().bucket().await;
    let place = [format!("s3://{}/vault", bucket.name), scratch.join("region").display().to_string()];
    let s3 = format!(
        "endpoint = \"{}\"\naws_region = \"us-east-1\"\npath_style = true\n\
         credentials = {{ write = {{ access_key_id = \"env:ID\", secret_access_key = \"env:SECRET\" }} }}\n",
        bucket.endpoint.url
    );
    for (place, more, code, words) in
        [(&place[0], s3.as_str(), 1, "the bucket has no object lock"), (&place[1], "", 2, "a directory locks nothing")]
    {
        let text = format!(
            "[repository]\nstate_dir = \"{}\"\nmin_wraps = 1\n[regions.a]\nurl = \"{place}\"\n{more}\
             lock = {{ mode = \"compliance\", for = \"35d\" }}\n[keys.recovery]\nage = \"{recipient}\"\n",
            scratch.join("state").display(),
        );
        fs::write(scratch.join("drctl.toml"), text).unwrap();
        let drctl = |verb: &str| {
            let drctl = Drctl::new([verb]).config(&scratch.join("drctl.toml"));
            drctl.env("ID", ACCESS_KEY).env("SECRET", SECRET_KEY)
        };
        let refused = drctl("init").run().await.code(code);
        assert!(refused.to_string().contains(words), "{refused}");
        let told = drctl("check").run().await.code(code);
        assert!(told.to_string().contains(if code == 1 { "no Object Lock" } else { words }), "{told}");
    }
    assert!(bucket.keys("vault/").await.iter().all(|key| key.starts_with("vault/.probe/")));
}
