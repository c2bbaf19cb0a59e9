//! Sabotage: whatever is broken, a drill must say so, at the level where it shows, by its name. And say nothing when
//! nothing is broken.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drctl::pg::page::{PAGE_SIZE, checksum};
use serde_json::Value;

use super::bank::{Bank, largest};
use crate::support::drctl::{Drctl, Finished};
use crate::support::process;
use crate::support::tmpfs::Tmpfs;

/// The outcome of the check of this name.
#[track_caller]
fn outcome<'r>(report: &'r Value, name: &str) -> (&'r str, &'r str, &'r str) {
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report:#}"));
    let text = |key: &str| check[key].as_str().unwrap();
    (text("outcome"), text("level"), text("detail"))
}

/// That the drill failed at this check, on this level, with these words, and that nothing else went wrong.
#[track_caller]
fn assert_caught(drill: Finished, (name, level): (&str, &str), words: &str) -> Value {
    let report = drill.code(1).json();
    let (outcome, at, detail) = outcome(&report, name);
    assert_eq!((outcome, at), ("fail", level), "{report:#}");
    assert!(detail.contains(words), "{words}: {report:#}");
    let wrong = report["checks"].as_array().unwrap().iter().filter(|check| check["outcome"] != "pass");
    assert_eq!(wrong.count(), 1, "{report:#}");
    report
}

#[tokio::test]
async fn what_is_stored_wrongly_is_caught_before_or_while_it_is_restored() {
    let bank = Bank::new().await;
    let stream = bank.stream().await;
    bank.backup().await;
    let clean = bank.drill(&[]).await.ok().json();
    assert_eq!((&clean["outcome"], &clean["level"]), (&"pass".into(), &"L6".into()), "{clean:#}");
    let region = bank.home().join("region-b");

    // A damaged frame.
    let pack = largest(&region.join("packs"));
    let mend = damage(&pack);
    let report = assert_caught(bank.drill(&[]).await, ("every frame opens", "L2"), "packs/");
    assert!(report["level"].is_null(), "{report:#}");
    mend();

    // A key that is not the one.
    let identity = bank.home().join("recovery.age");
    let right = fs::read(&identity).unwrap();
    fs::remove_file(&identity).unwrap();
    let other = bank.scratch.join("other");
    Drctl::new(["init".as_ref(), other.as_os_str()]).run().await.ok();
    fs::copy(other.join("recovery.age"), &identity).unwrap();
    let opens = ("a key opens it, and this machine can take it", "L2");
    let report = assert_caught(bank.drill(&[]).await, opens, "no key opens the backup");
    assert!(report["reasons"].to_string().contains("age-"), "the holder is named: {report:#}");
    fs::write(&identity, right).unwrap();

    // WAL in the middle is gone. The other region holds it, and is not asked.
    let before = bank.frames();
    bank.cluster.execute("INSERT INTO account VALUES (1001, 5)").await;
    bank.cluster.execute("INSERT INTO account VALUES (1002, -5)").await;
    process::eventually("the rows are durable", Duration::from_secs(20), async || bank.frames().len() > before.len())
        .await;
    let new: Vec<_> = bank.frames().into_iter().filter(|frame| !before.contains(frame)).collect();
    let (lost, aside) = (new[0].clone(), bank.scratch.join("frame"));
    fs::rename(&lost, &aside).unwrap();
    bank.cluster.execute("INSERT INTO account VALUES (1003, 0)").await;
    let report = bank.drill(&[]).await.code(1).json();
    assert_eq!(outcome(&report, "WAL without a gap").1, "L1", "{report:#}");
    assert_eq!(outcome(&report, "WAL without a gap").0, "fail", "{report:#}");
    assert!(report["level"].is_null(), "what has a gap is not verified: {report:#}");
    fs::rename(&aside, &lost).unwrap();

    // And with everything in its place again, all is well.
    let again = bank.drill(&[]).await.ok().json();
    assert_eq!(again["outcome"], "pass", "{again:#}");
    stream.terminate().await.ok();
}

#[tokio::test]
async fn what_is_wrong_in_the_data_is_caught_by_the_check_that_is_about_it() {
    let mut bank = Bank::new().await;
    bank.cluster
        .execute("CREATE TABLE indexed (id int PRIMARY KEY); INSERT INTO indexed SELECT generate_series(1, 300)")
        .await;
    let mut stream = bank.stream().await;

    // Two entries of an index change places, and the page gets the checksum that fits: every page is in order, and every
    // seal, and only a comparison of the index with its table sees it.
    let file = bank.cluster.query("SELECT pg_relation_filepath('indexed_pkey')").await;
    stream.terminate().await.ok();
    bank.cluster.stop().await;
    let path = bank.cluster.data_dir().join(file);
    let good = fs::read(&path).unwrap();
    fs::write(&path, with_swapped_entries(&good)).unwrap();
    bank.cluster.start().await;
    stream = bank.stream().await;
    bank.backup().await;
    let report = assert_caught(bank.drill(&[]).await, ("amcheck with heapallindexed", "L5"), "indexed_pkey");
    assert_eq!(report["level"], "L4", "{report:#}");
    assert_eq!(outcome(&report, "page checksums").0, "pass", "{report:#}");
    bank.cluster.execute("REINDEX TABLE indexed").await;

    // A table that somebody emptied. What it was is still in an older backup, which a drill of today does not look at.
    bank.cluster.execute("CREATE TABLE saved AS SELECT * FROM account; TRUNCATE account").await;
    let report = bank.drill(&[]).await.code(1).json();
    assert_eq!(outcome(&report, "enough"), ("fail", "L6", "expected t, got f"), "{report:#}");
    assert_eq!(report["level"], "L5", "{report:#}");

    // An assertion whose table is not there any more.
    bank.cluster
        .execute("INSERT INTO account SELECT * FROM saved; ALTER TABLE account RENAME COLUMN amount TO sum")
        .await;
    assert_caught(bank.drill(&[]).await, ("balances", "L6"), "column \"amount\" does not exist");
    bank.cluster.execute("ALTER TABLE account RENAME COLUMN sum TO amount").await;

    // An assertion that cannot fail: its owner says what would break it, and it does not notice.
    let idle = "[targets.ledger.assertions.idle]\nsql = \"SELECT count(*) >= 0 FROM account\"\ncontrol = \"TRUNCATE account\"\n\
                [targets.ledger.assertions.alert]\nsql = \"SELECT count(*) > 0 FROM account\"\ncontrol = \"TRUNCATE account\"\n";
    let text = fs::read_to_string(bank.config()).unwrap();
    fs::write(bank.config(), format!("{text}{idle}")).unwrap();
    let report = bank.drill(&[]).await.code(1).json();
    assert!(report["reasons"][0].as_str().unwrap().contains("idle cannot fail"), "{report:#}");
    assert_eq!(report["reasons"].as_array().unwrap().len(), 1, "{report:#}");
    let caught: Vec<_> = report["controls"].as_array().unwrap().iter().map(|control| &control["caught"]).collect();
    assert_eq!(caught, [false, true], "{report:#}");
    // What a control breaks is whole again for whoever looks next.
    assert_eq!(outcome(&report, "balances").0, "pass", "{report:#}");
    fs::write(bank.config(), text).unwrap();

    // Too little room, before and in the middle: nothing was found out about the backup.
    let small = Tmpfs::mount(bank.scratch.join("small"), 8);
    let place = small.path().join("d").display().to_string();
    let report = bank.drill(&["--dir", &place]).await.code(3).json();
    assert!(report["reasons"][0].as_str().unwrap().contains("too little space"), "{report:#}");
    small.resize(256);
    let drill = bank.drctl(["drill", "ledger", "--json", "--dir", &place]).spawn();
    process::eventually("the restore begins", Duration::from_secs(60), async || {
        below(Path::new(&place)).iter().any(|root| root.join("data/base").exists())
    })
    .await;
    small.fill();
    let report = drill.wait().await.code(3).json();
    assert!(report["reasons"][0].as_str().unwrap().contains("disk of the scratch cluster is full"), "{report:#}");
    assert_eq!(below(Path::new(&place)), Vec::<PathBuf>::new());

    let clean = bank.drill(&[]).await.ok().json();
    assert_eq!((&clean["outcome"], &clean["level"]), (&"pass".into(), &"L6".into()), "{clean:#}");
    stream.terminate().await.ok();
}

/// Flips a bit in the middle of a file; what comes back mends it.
fn damage(path: &Path) -> impl FnOnce() {
    let (path, good) = (path.to_owned(), fs::read(path).unwrap());
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&path, bad).unwrap();
    move || fs::write(path, good).unwrap()
}

/// An index of one leaf, block 1, whose second and third entry point at each other's rows.
fn with_swapped_entries(index: &[u8]) -> Vec<u8> {
    const ITEMS: usize = 24;
    let mut index = index.to_vec();
    let page: &mut [u8; PAGE_SIZE] = (&mut index[PAGE_SIZE..2 * PAGE_SIZE]).try_into().unwrap();
    let entry = |page: &[u8], number: usize| {
        let at = ITEMS + 4 * number;
        usize::from(u16::from_le_bytes([page[at], page[at + 1]]) & 0x7FFF)
    };
    let (a, b) = (entry(page, 1), entry(page, 2));
    // The row's place is the first six bytes of an entry.
    for byte in 0..6 {
        page.swap(a + byte, b + byte);
    }
    let sum = checksum(page, 1).to_le_bytes();
    page[8..10].copy_from_slice(&sum);
    index
}

fn below(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).map(|list| list.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
}
