//! Compaction: a backup that needs a little of large packs is copied out of them, and once its copy is drilled prune frees what
//! is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::incremental::Point;
use crate::restore::Protected;
use crate::support::drctl::Finished;
use crate::support::pg::Cluster;

/// Three drilled ones stay; a drill restores into a directory of its own. Nothing but drills writes a heartbeat: a dump is to say
/// the same twice.
fn configure(protected: &Protected) {
    let path = protected.home().join("drctl.toml");
    let drills = protected.scratch.join("drills");
    let text = fs::read_to_string(&path).unwrap()
        + "heartbeat = false\n[prune]\ngrace = \"1s\"\nshort_grace = true\n[targets.ledger.retention]\nkeep_last = 3\n"
        + &format!("[drill]\ndir = \"{}\"\nrun_as = \"postgres\"\n", drills.display());
    fs::write(path, text).unwrap();
}

async fn drill(protected: &Protected, id: &str) {
    protected.drctl(["drill", "ledger", "--backup", id]).run().await.ok();
}

async fn json(protected: &Protected, line: &[&str]) -> Value {
    protected.drctl([line, &["--json"]].concat()).run().await.ok().json()
}

/// Plans, and sweeps when the grace period is over; the backups that went.
async fn prune(protected: &Protected, code: i32) -> BTreeSet<String> {
    let run = async |line: &[&str]| -> Finished { protected.drctl(line).run().await.code(code) };
    run(&["prune"]).await;
    // A file tells whole seconds, and so does the name of a plan.
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let found = run(&["prune", "--json"]).await.json();
    let digest = found["ripe"]["digest"].as_str().unwrap_or_else(|| panic!("nothing is ripe: {found:#}"));
    let swept = run(&["prune", "--plan", digest, "--execute", "--json"]).await.json();
    let gone = swept["swept"]["backups"].as_array().unwrap();
    gone.iter().map(|id| id.as_str().unwrap().to_owned()).collect()
}

fn packs(region: &Path) -> BTreeSet<String> {
    crate::rig3::files_below(region).into_keys().filter(|name| name.starts_with("packs/")).collect()
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn what_is_left_of_old_packs_moves_and_prune_frees_them() {
    // Which pages change is what counts here.
    let builder = Cluster::builder(15).setting("wal_level", "replica").setting("autovacuum", "off");
    let protected = Protected::of(builder).await;
    configure(&protected);
    let stream = protected.stream();
    let cluster = &protected.cluster;
    // Nothing in it repeats: it outweighs the catalogs, which stay alive, in whichever packs these came to lie.
    let body = "md5(i::text) || md5('a' || i) || md5('b' || i) || md5('c' || i) AS body";
    let rows = format!("SELECT i, {body} FROM generate_series(1, 150000) AS i");
    cluster.execute(&format!("CREATE TABLE entries AS {rows}")).await;
    let first = Point::take(&protected).await;
    // Old row versions and new ones: most pages of the first backup are dead for the second, and the rest for the third.
    cluster.execute("UPDATE entries SET body = md5(body) || body WHERE i <= 130000; CHECKPOINT").await;
    let second = Point::take(&protected).await;
    cluster.execute("UPDATE entries SET body = md5(body) || body WHERE i > 130000; CHECKPOINT").await;
    let third = Point::take(&protected).await;
    let fourth = Point::take(&protected).await;
    for point in [&second, &third, &fourth] {
        drill(&protected, point.id()).await;
    }
    // 4: the first was never drilled.
    assert_eq!(prune(&protected, 4).await, BTreeSet::from([first.id().to_owned()]));

    let regions = ["region-a", "region-b"].map(|name| protected.home().join(name));
    let before = packs(&regions[0]);
    let plan = json(&protected, &["compact", "ledger"]).await;
    let left: Vec<_> =
        plan["plan"]["packs"].as_array().unwrap().iter().map(|pack| pack["key"].as_str().unwrap()).collect();
    assert_eq!(plan["plan"]["backups"][0], second.id(), "{plan:#}");
    assert!(left.iter().all(|key| key.contains(first.id())) && !left.is_empty(), "{plan:#}");
    assert_eq!(packs(&regions[0]), before);
    let told = protected.drctl(["compact", "ledger"]).run().await.ok().stdout;
    assert!(told.contains("Nothing was written. Next: drctl compact ledger --execute"), "{told}");

    let announced = names(&regions[0].join("intents"));
    // Killed when it has announced itself, and when it has stored its first pack, it leaves nothing that counts.
    for sign in ["intents", "packs/ledger"] {
        let seen = names(&regions[0].join(sign)).len();
        let killed = protected.drctl(["compact", "ledger", "--execute"]).spawn();
        // Without sleep between two looks: what follows the sign is over within tens of milliseconds.
        let deadline = Instant::now() + Duration::from_secs(60);
        while names(&regions[0].join(sign)).len() == seen {
            assert!(Instant::now() < deadline, "nothing new in {sign}");
            std::thread::yield_now();
        }
        let killed = killed.kill9();
        assert_eq!(killed.code, None, "it ended before it was killed: {}", killed.stdout);
        let listed = json(&protected, &["list"]).await;
        assert_eq!(listed["backups"].as_array().unwrap().len(), 3, "{listed:#}");
        protected.drctl(["verify", "ledger"]).run().await.ok();
    }
    // A killed copy keeps its original for a day. When that is over:
    for name in names(&regions[0].join("intents")).difference(&announced) {
        for region in &regions {
            // The second region may not have had it yet.
            let removed = fs::remove_file(region.join("intents").join(name));
            assert!(removed.is_ok() || !region.join("intents").join(name).exists(), "{removed:?}");
        }
    }
    // A backup beside it has nothing to do with it.
    let compacting = json(&protected, &["compact", "ledger", "--execute"]);
    let (done, newest) = tokio::join!(compacting, Point::take(&protected));
    let copies = done["copies"].as_array().unwrap();
    assert_eq!((copies.len(), &copies[0]["original"]), (1, &second.id().into()), "{done:#}");
    let copy = copies[0]["copy"].as_str().unwrap();
    assert!(before.is_subset(&packs(&regions[0])));
    let shown = protected.drctl(["list", "ledger"]).run().await.ok().stdout;
    let row = shown.lines().find(|line| line.contains(copy)).unwrap_or_else(|| panic!("{shown}"));
    assert!(row.contains("copy"), "{shown}");

    drill(&protected, copy).await;
    assert_eq!(prune(&protected, 0).await, BTreeSet::from([second.id().to_owned()]));
    for region in &regions {
        let after = packs(region);
        assert!(!left.iter().any(|key| after.contains(*key)), "{after:?}");
    }
    protected.drctl(["verify", "--scrub"]).run().await.ok();
    let second = Point { report: serde_json::json!({ "backup": { "id": copy } }), ..second };
    for point in [&second, &third, &newest] {
        point.assert_restores(&protected, &[]).await;
    }
    stream.terminate().await.ok();
}
