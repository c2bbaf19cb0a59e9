//! Whoever may write to a region signs what he likes, and repair brings it to the others. Without a list of signers it is read; with
//! what it says nobody pushes out a good backup.

use super::*;
use crate::codec::sign::Signer;
use crate::model::SignerId;
use crate::model::commit::{Commit, CopyOf};
use crate::model::retention::Keep;
use crate::repository::catalog::commit_context;
use crate::repository::handle::Repository;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::{inventory, layout};
use crate::store::Digest;

impl Scene {
    fn stranger(&self) -> Writer {
        let signer = Arc::new(Signer::generate(&SystemRng).unwrap());
        Writer { signer, host: "there".to_owned(), ..self.fixture.writer.clone() }
    }

    /// What `how` does, by the hand of another writer.
    async fn by<T>(&mut self, writer: &Writer, how: impl AsyncFnOnce(&mut Self) -> T) -> T {
        let own = std::mem::replace(&mut self.fixture.writer, writer.clone());
        let done = how(self).await;
        self.fixture.writer = own;
        done
    }

    /// A COMMIT that says to be a copy of another backup, with an inventory that says the same as that one's.
    async fn forge_copy(&self, of: &BackupId, writer: &Writer) -> BackupId {
        let repository = self.fixture.reopen().await.unwrap();
        let backups = catalog::backups(&repository, None).await.unwrap().0;
        let original = backups.into_iter().find(|backup| backup.commit.id == *of).unwrap().commit;
        let id = BackupId::new(&original.target, original.started_at, &SystemRng).unwrap();
        let lines = catalog::inventory(&repository, &original).await.unwrap();
        let mut summary = PartsSummary::default();
        let parts = inventory::encode(&lines, &repository.id, &id, &writer.signer).unwrap();
        let mut objects = Vec::new();
        for (part, bytes) in (0..).zip(parts) {
            summary.add(bytes.len() as u64, Digest::of(&bytes));
            objects.push((layout::inventory(&original.target, &id, part), bytes));
        }
        let copy = Some(CopyOf { backup: of.clone(), at: self.fixture.writer.clock.now() });
        let commit = Commit { id: id.clone(), inventory: summary.finish(), copy, ..original };
        let mut body = serde_json::to_vec(&commit).unwrap();
        body.push(b'\n');
        let context = commit_context(&repository.id, &id);
        let bytes = crate::codec::sign::sign_text(&writer.signer, &context, &body).unwrap();
        objects.push((layout::commit(&commit.target, &id), bytes));
        for (key, bytes) in objects {
            repository.regions.put_everywhere(&key, bytes.into()).await.unwrap();
        }
        id
    }

    async fn listing(&self, signers: &[&SignerId]) -> Context {
        let context = self.context().await;
        let listed = signers.iter().map(|id| (*id).clone()).collect();
        let repository = Repository::open(context.repository.regions.clone(), listed).await.unwrap();
        Context { repository, ..context }
    }
}

fn verdict<'r>(report: &'r Report, id: &BackupId) -> &'r Verdict {
    &report.targets[0].backups.iter().find(|backup| backup.id == *id).unwrap().verdict
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drill_that_a_stranger_reports_takes_no_place() {
    let mut scene = Scene::new(2).await;
    let mut ids = scene.drilled(2).await;
    let stranger = scene.stranger();
    for _ in 0..2 {
        let id = scene.backup().await;
        let drilled = id.clone();
        scene.by(&stranger, async move |scene| scene.drill(&drilled).await).await;
        ids.push(id);
    }
    let report = scene.prune_twice().await;
    assert_eq!((report.swept.as_ref(), report.alarms().count()), (None, 0), "{report:#?}");
    assert_eq!(scene.exist().await, ids);
    assert_eq!(*verdict(&report, &ids[2]), Verdict::Keep(vec![Keep::Doubted]));
    assert!(report.notes[0].contains(stranger.signer.id().as_str()), "{:?}", report.notes);

    // Who is on the list is believed, and nobody else.
    let dry = Options { dry_run: true, consent: Consent::None };
    let context = scene.listing(&[scene.fixture.writer.signer.id()]).await;
    let report = run(&context, &dry).await.unwrap();
    assert_eq!(
        (report.planned.amount.objects, verdict(&report, &ids[0])),
        (0, &Verdict::Keep(vec![Keep::Last, Keep::Drilled]))
    );
    let context = scene.listing(&[scene.fixture.writer.signer.id(), stranger.signer.id()]).await;
    let report = run(&context, &dry).await.unwrap();
    assert_eq!((verdict(&report, &ids[0]), report.notes.len()), (&Verdict::Expired, 0), "{report:#?}");
}

/// A drill starts whatever a COMMIT names. That a backup starts is no proof that it is the one that was taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_a_stranger_committed_takes_no_place_however_good_it_is() {
    let mut scene = Scene::new(2).await;
    let mut ids = scene.drilled(2).await;
    let stranger = scene.stranger();
    for _ in 0..2 {
        let id = scene.by(&stranger, async |scene| scene.backup().await).await;
        scene.drill(&id).await;
        ids.push(id);
    }
    let report = scene.prune_twice().await;
    assert_eq!((report.swept.as_ref(), verdict(&report, &ids[2])), (None, &Verdict::Keep(vec![Keep::Doubted])));
    assert_eq!(scene.exist().await, ids);

    // Nor where every backup counts without a drill.
    scene.rules.undrilled = true;
    assert_eq!(scene.prune_twice().await.swept, None);
    assert_eq!(scene.exist().await, ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_copy_takes_the_place_of_no_original() {
    let mut scene = Scene::new(3).await;
    let mut ids = scene.drilled(3).await;
    let stranger = scene.stranger();
    let copy = scene.by(&stranger, async |scene| {
        let out = crate::repository::regions::fan_out::FanOut::new(
            &scene.fixture.repository.regions,
            crate::repository::regions::fan_out::Patience::BACKUP,
        );
        scene.fixture.repository.enroll(&scene.fixture.writer, &out).await.unwrap();
        out.drain().await;
        let copy = scene.forge_copy(&ids[1], &scene.fixture.writer).await;
        scene.drill(&copy).await;
        copy
    });
    let copy = copy.await;
    // An honest drill that was led astray, too.
    scene.drill(&copy).await;
    assert_eq!(scene.prune_twice().await.swept, None);
    ids.push(copy);
    ids.sort();
    let mut left = scene.exist().await;
    left.sort();
    assert_eq!(left, ids);
}
