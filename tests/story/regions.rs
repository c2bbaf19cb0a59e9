//! Regions that refuse, hang, crawl, die, are wiped or turn us away: jobs end well while the quorum holds, wait while it
//! does not, and lose nothing either way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drctl::jobs::wal::State;
use drctl::model::Lsn;

use crate::rig3::{MAJOR, Rig3, Site, break_after, debts};
use crate::support::ledger::Ledger;
use crate::support::pg::Cluster;
use crate::support::process;
use crate::support::proxy::Mode;
use crate::support::s3::{Endpoint, LocalStack, Rgw};

const MIB: u64 = 1024 * 1024;

#[tokio::test]
async fn a_backup_leaves_three_equal_regions() {
    let rig = Rig3::new().await;
    let report = rig.drctl(["backup", "ledger", "--fast", "--json"]).run().await.ok().json();
    assert_eq!(debts(&report), BTreeMap::new());
    assert_eq!(rig.differences().await, BTreeSet::new());
    let list = rig.drctl(["list", "--json"]).run().await.ok().json();
    let text = list.to_string();
    assert_eq!(text.matches("\"complete\"").count(), 3, "{list}");
}

/// A backup during which `alpha` breaks; afterwards `alpha` owes, and the quorum has a whole backup.
async fn backup_without_alpha(rig: &Rig3, broken: Mode) {
    rig.fill(16).await;
    let backup = rig.backup().spawn();
    break_after(&rig.alpha.objects, MIB, broken).await;
    let report = backup.wait().await.code(4).json();
    assert_eq!(debts(&report).into_keys().collect::<Vec<_>>(), ["alpha"], "{report}");
    assert_eq!((rig.commits("beta").await, rig.commits("cellar").await), (1, 1));
}

#[tokio::test]
async fn a_region_that_refuses_during_a_backup_owes_and_repair_pays() {
    let rig = Rig3::new().await;
    backup_without_alpha(&rig, Mode::Refuse).await;
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
}

#[tokio::test]
async fn a_region_that_hangs_during_a_backup_owes_and_repair_pays() {
    let rig = Rig3::new().await;
    backup_without_alpha(&rig, Mode::Hang).await;
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
}

#[tokio::test]
async fn a_region_that_crawls_during_a_backup_owes_and_repair_pays() {
    let rig = Rig3::new().await;
    backup_without_alpha(&rig, Mode::Delay(Duration::from_millis(300))).await;
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
}

#[tokio::test]
async fn a_region_that_is_killed_during_a_backup_owes_and_during_a_restore_is_replaced() {
    let server = Rgw::start().await;
    let rig = Rig3::of(Site::new("alpha", &server.endpoint, &Endpoint::localstack_a()).await, Site::beta().await).await;
    rig.fill(16).await;
    let backup = rig.backup().spawn();
    let before = rig.alpha.objects.passed();
    process::eventually("the backup flows", Duration::from_secs(60), async || {
        rig.alpha.objects.passed() > before + MIB
    })
    .await;
    server.kill9(false).await;
    let report = backup.wait().await.code(4).json();
    assert_eq!(debts(&report).into_keys().collect::<Vec<_>>(), ["alpha"], "{report}");
    server.restart().await;
    rig.assert_repairs().await;
    rig.drctl(["verify", "--scrub"]).run().await.ok();

    // The same again while a restore reads from it, this time with the storage behind the gateway.
    let directory = rig.target_dir("restored");
    let plan = rig.plan(&directory, &[]).await.ok().json();
    rig.alpha.objects.set(Mode::Delay(Duration::from_millis(2))).await;
    let before = rig.alpha.objects.passed();
    let mut restore = rig.execute(&directory, &[], plan["digest"].as_str().unwrap()).spawn();
    process::eventually("the restore flows", Duration::from_secs(60), async || {
        rig.alpha.objects.passed() > before + MIB
    })
    .await;
    server.kill9(true).await;
    assert!(restore.is_running(), "{}", restore.wait().await);
    let report = restore.wait().await.ok().json();
    let incidents = report["incidents"].as_array().unwrap();
    assert!(!incidents.is_empty() && incidents.iter().all(|incident| incident["region"] == "alpha"), "{report}");
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    rig.assert_filled(&restored).await;
    server.restart().await;
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
    rig.drctl(["verify", "--scrub"]).run().await.ok();
}

#[tokio::test]
async fn a_backup_waits_while_two_regions_are_gone() {
    let rig = Rig3::new().await;
    rig.fill(16).await;
    let mut backup = rig.backup().spawn();
    break_after(&rig.alpha.objects, MIB, Mode::Hang).await;
    rig.beta.objects.set(Mode::Refuse).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(backup.is_running(), "{}", backup.wait().await);
    assert_eq!(rig.commits("cellar").await, 0, "COMMIT must not be written before everything else is durable");
    rig.beta.objects.set(Mode::Pass).await;
    let report = backup.wait().await.code(4).json();
    assert!(debts(&report).contains_key("alpha"), "{report}");
    assert_eq!((rig.commits("beta").await, rig.commits("cellar").await), (1, 1));
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
}

/// Waits until the receiver reports `lsn` durable.
async fn wait_durable(rig: &Rig3, lsn: Lsn) {
    process::eventually("WAL is durable", Duration::from_secs(30), async || {
        rig.position().await.is_some_and(|position| position.reaches(lsn))
    })
    .await;
}

#[tokio::test]
async fn wal_holds_while_two_regions_are_gone_and_loses_nothing() {
    let server = Rgw::start().await;
    let rig = Rig3::of(Site::new("alpha", &server.endpoint, &Endpoint::localstack_a()).await, Site::beta().await).await;
    rig.fill(1).await;
    let mut stream = rig.stream().await;
    rig.backup().run().await.ok();
    let ledger = Ledger::start(&rig.cluster, 2).await;

    // One region less: nothing changes for anybody.
    server.kill9(false).await;
    ledger.wait_for(50).await;
    wait_durable(&rig, rig.cluster.flush_lsn().await).await;

    // Two: PostgreSQL goes on and keeps its WAL, and nothing more is called durable.
    rig.beta.objects.set(Mode::Refuse).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let held = rig.position().await.unwrap().durable_lsn;
    ledger.wait_for(50).await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    let position = rig.position().await.unwrap();
    assert_eq!(position.durable_lsn, held);
    assert_eq!(position.state, State::WaitingForRegions, "{position:?}");
    assert!(rig.cluster.flush_lsn().await > held && stream.is_running());
    let kept: Lsn = rig
        .cluster
        .query("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'drctl_ledger'")
        .await
        .parse()
        .unwrap();
    assert!(kept <= held, "the server may recycle WAL from {held} on, its slot stands at {kept}");

    // One returns: work resumes by itself.
    rig.beta.objects.set(Mode::Pass).await;
    wait_durable(&rig, rig.cluster.flush_lsn().await).await;
    server.restart().await;
    ledger.wait_for(20).await;
    let durable = rig.position().await.unwrap().durable_lsn;
    let book = ledger.stop().await;
    stream.terminate().await.code(4);

    let directory = rig.target_dir("restored");
    rig.restore(&directory, &[]).await.ok();
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    let verdict = book.verify(&restored, durable).await.unwrap();
    assert!(verdict.durable > 100, "{verdict:?}");
    rig.assert_repairs().await;
}

#[tokio::test]
async fn wal_is_acknowledged_beside_a_region_that_crawls_or_hangs() {
    let rig = Rig3::new().await;
    rig.fill(1).await;
    let stream = rig.stream().await;
    rig.backup().run().await.ok();
    let ledger = Ledger::start(&rig.cluster, 2).await;
    for trouble in [Mode::Delay(Duration::from_secs(3)), Mode::Hang] {
        rig.alpha.objects.set(trouble).await;
        ledger.wait_for(50).await;
        wait_durable(&rig, rig.cluster.flush_lsn().await).await;
    }
    let durable = rig.position().await.unwrap().durable_lsn;
    let book = ledger.stop().await;
    rig.alpha.objects.set(Mode::Refuse).await;
    stream.terminate().await.code(4);

    // What was acknowledged meanwhile comes back without that region; then repair brings it back to equal.
    let directory = rig.target_dir("restored");
    rig.restore(&directory, &["--region", "beta"]).await.ok();
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    let verdict = book.verify(&restored, durable).await.unwrap();
    assert!(verdict.durable >= 100, "{verdict:?}");
    rig.alpha.objects.set(Mode::Pass).await;
    rig.assert_repairs().await;
}

/// A restore that prefers `alpha`, which breaks on the way.
async fn restore_while_alpha_breaks(rig: &Rig3, broken: Mode) {
    rig.fill(16).await;
    rig.backup().run().await.ok();
    let directory = rig.target_dir("restored");
    let plan = rig.plan(&directory, &[]).await.ok().json();
    // Slowly, so that there is a middle to break in.
    rig.alpha.objects.set(Mode::Delay(Duration::from_millis(2))).await;
    let restore = rig.execute(&directory, &[], plan["digest"].as_str().unwrap()).spawn();
    // Early, so that enough is left: small requests get through a crawl.
    break_after(&rig.alpha.objects, MIB / 4, broken).await;
    let report = restore.wait().await.ok().json();
    let incidents = report["incidents"].as_array().unwrap();
    assert!(!incidents.is_empty() && incidents.iter().all(|incident| incident["region"] == "alpha"), "{report}");
    let restored = Cluster::start_restored(&directory, MAJOR).await;
    rig.assert_filled(&restored).await;
}

#[tokio::test]
async fn a_restore_survives_a_region_that_refuses() {
    restore_while_alpha_breaks(&Rig3::new().await, Mode::Refuse).await;
}

#[tokio::test]
async fn a_restore_survives_a_region_that_hangs() {
    restore_while_alpha_breaks(&Rig3::new().await, Mode::Hang).await;
}

#[tokio::test]
async fn a_restore_survives_a_region_that_crawls() {
    restore_while_alpha_breaks(&Rig3::new().await, Mode::Delay(Duration::from_secs(3))).await;
}

#[tokio::test]
async fn a_wiped_region_is_rebuilt_and_restores_alone() {
    let server = LocalStack::start().await;
    let mut rig = Rig3::of(Site::new("alpha", &server.endpoint, &server.endpoint).await, Site::beta().await).await;
    rig.fill(2).await;
    rig.backup().run().await.ok();
    server.restart_empty().await;
    rig.alpha.make_again().await;
    assert!(!rig.differences().await.is_empty());
    rig.assert_repairs().await;

    // Everything but the rebuilt region and its key is gone.
    rig.beta.objects.set(Mode::Refuse).await;
    rig.beta.keys.set(Mode::Refuse).await;
    std::fs::rename(rig.cellar(), rig.target_dir("elsewhere")).unwrap();
    rig.assert_restores("restored", &["--region", "alpha"]).await;
}

#[tokio::test]
async fn a_region_that_turns_us_away_is_told_and_owes() {
    let (s3, kms) = (Endpoint::rgw_a(), Endpoint::localstack_a());
    let rig = Rig3::of(Site::new("alpha", &s3, &kms).await, Site::beta().await).await;
    let wrong = ("RIG_ALPHA_SECRET", "not the secret");
    let check = rig.troubled(["check", "--json"]).env(wrong.0, wrong.1).run().await.code(1).json();
    let failed = |check: &serde_json::Value| {
        let checks = check["checks"].as_array().unwrap().clone();
        let failed = checks.into_iter().filter(|line| line["level"] == "fail");
        failed.map(|line| line["object"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    assert!(failed(&check).contains("alpha"), "{check}");
    let report = rig.backup().env(wrong.0, wrong.1).run().await.code(4).json();
    assert_eq!(debts(&report).into_keys().collect::<Vec<_>>(), ["alpha"], "{report}");

    // RGW refuses signatures of another time.
    let skewed = rig.drctl_at("+2h", &["check", "--json"]).expect_log("").run().await.json();
    let told = skewed["checks"].as_array().unwrap().iter().any(|line| {
        line["object"] == "alpha" && line["level"] != "ok" && line["what"].as_str().unwrap().contains("clock")
    });
    assert!(told, "{skewed}");
    // A client that is told so signs by the server's clock from then on.
    let skewed = rig.drctl_at("+2h", &["backup", "ledger", "--fast", "--full", "--json"]).expect_log("");
    assert_eq!(debts(&skewed.run().await.ok().json()), BTreeMap::new());
    rig.assert_repairs().await;
}
