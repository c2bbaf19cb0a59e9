//! Records that a later drctl wrote: nobody here knows what they say, so nobody touches them.

use super::*;
use crate::codec::sign::sign_text;
use crate::repository::catalog::commit_context;
use crate::repository::layout;

impl Scene {
    /// A COMMIT as a later drctl would write it, in the regions of choice.
    async fn newer(&self, like: &BackupId, regions: &[usize]) -> BackupId {
        let repository = self.fixture.reopen().await.unwrap();
        let commit = catalog::named(&repository, like.as_str()).await.unwrap().0.remove(0).commit;
        let id = BackupId::new(&commit.target, commit.started_at, &SystemRng).unwrap();
        let mut said = serde_json::to_value(&commit).unwrap();
        said["format"] = 2.into();
        said["id"] = id.as_str().into();
        said["needs"] = serde_json::json!(["something"]);
        let body = format!("{said}\n");
        let context = commit_context(&repository.id, &id);
        let bytes = sign_text(&self.fixture.writer.signer, &context, body.as_bytes()).unwrap();
        for region in regions {
            self.fixture.stores[*region].damage(&layout::commit(&commit.target, &id), bytes.clone()).await;
        }
        id
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_newer_drctl_wrote_is_no_damage_and_stays_as_it_is() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    scene.prune(Consent::None).await;
    let id = scene.newer(&ids[0], &[0]).await;
    scene.fixture.clock.advance(DAY + 1);
    let before = scene.names(0).await;
    let report = scene.prune(Consent::Scheduled).await;
    let told = report.refusals.join("\n");
    assert!(report.swept.is_none() && told.contains(&format!("{id} was written by a newer drctl")), "{told}");
    assert!(!told.contains("damaged"), "{told}");

    let context = scene.context().await;
    let (backups, unreadable) = catalog::backups(&context.repository, None).await.unwrap();
    assert_eq!((backups.len(), unreadable.len(), unreadable[0].kind()), (4, 1, Kind::Newer), "{unreadable:?}");
    assert!(unreadable[0].hint_text().is_some());
    // Whoever names it is told why he does not get it: for a restore, to look at it, to keep it.
    let named = [
        catalog::named(&context.repository, id.as_str()).await.unwrap_err(),
        show_backup(&context, id.as_str()).await.unwrap_err(),
        pin::pin(&context, id.as_str(), Reason { text: "audit".into(), until: None }).await.unwrap_err(),
    ];
    assert!(named.iter().all(|error| error.kind() == Kind::Newer), "{named:?}");
    let options = verify::Options { what: None, level: Level::L1, region: None, scrub: true };
    let verified = verify::run(&context, &options).await.unwrap();
    assert!(verified.unreadable.len() == 1 && verified.unreadable[0].contains("newer drctl"), "{verified:#?}");
    assert!(verified.backups.iter().all(|backup| backup.restorable), "{verified:#?}");

    // Nor is it brought elsewhere, or taken for a copy that is wrong.
    let mended = repair::run(&context, &Scope::default()).await.unwrap();
    assert!(mended.regions.iter().all(|region| region.copied == 0 && region.replaced.is_empty()), "{mended:#?}");
    let still: Vec<_> = mended.regions.iter().flat_map(|region| &region.still_missing).collect();
    assert!(still.iter().any(|one| one.why.contains("newer drctl")), "{still:?}");
    assert_eq!(scene.names(0).await, before);
}

/// A backup whose drill a newer drctl reported would look as if nobody had ever tried it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_goes_while_a_report_or_a_pin_is_of_a_newer_drctl() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    scene.prune(Consent::None).await;
    scene.fixture.clock.advance(DAY + 1);
    let repository = scene.fixture.reopen().await.unwrap();
    let report = "reports/ledger/ledger-241004-000000-q4x";
    let pin = "pins/ledger/20241004t000000z-abcd";
    let records = [
        (report, format!("report {} ledger-241004-000000-q4x", repository.id), r#"{"head":{"format":2,"score":7}}"#),
        (pin, format!("pin {} {pin}", repository.id), r#"{"format":2,"backups":[]}"#),
    ];
    for (key, context, body) in records {
        let bytes = sign_text(&scene.fixture.writer.signer, &context, format!("{body}\n").as_bytes()).unwrap();
        scene.fixture.stores[0].damage(key, bytes).await;
        let told = match scene.try_prune(Consent::Scheduled).await {
            Ok(report) => report.refusals.join("\n"),
            Err(error) => error.to_string(),
        };
        assert!(told.contains(&format!("{key} was written by a newer drctl")), "{told}");
        assert_eq!(scene.exist().await, ids);
        scene.fixture.stores[0].lose(key).await;
    }
    assert_eq!(scene.prune(Consent::Scheduled).await.swept.unwrap().backups, ids[..2]);
}
