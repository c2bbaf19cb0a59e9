//! Whoever may write to a region signs what he likes, and repair brings it to the others. Without a list of signers it is read; with
//! what it says nobody pushes out a good backup.

use super::*;
use crate::codec::sign::Signer;
use crate::model::commit::{Commit, CopyOf};
use crate::model::retention::Keep;
use crate::model::{PruneId, SignerId};
use crate::repository::catalog::commit_context;
use crate::repository::handle::Repository;
use crate::repository::pages::manifest::PartsSummary;
use crate::repository::records;
use crate::repository::records::tombs::{self, Tomb};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::{inventory, layout};
use crate::store::Digest;

impl Scene {
    pub(super) fn stranger(&self) -> Writer {
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
    pub(super) async fn forge_copy(&self, of: &BackupId, writer: &Writer) -> BackupId {
        let copy = CopyOf { backup: of.clone(), at: self.fixture.writer.clock.now() };
        self.forge_copy_like(of, copy, writer).await
    }

    /// The same with the pages of `like`, which exists.
    pub(super) async fn forge_copy_like(&self, like: &BackupId, copy: CopyOf, writer: &Writer) -> BackupId {
        let repository = self.fixture.reopen().await.unwrap();
        let backups = catalog::backups(&repository, None).await.unwrap().0;
        let original = backups.into_iter().find(|backup| backup.commit.id == *like).unwrap().commit;
        let id = BackupId::new(&original.target, original.started_at, &SystemRng).unwrap();
        let lines = catalog::inventory(&repository, &original).await.unwrap();
        let mut summary = PartsSummary::default();
        let parts = inventory::encode(&lines, &repository.id, &id, &writer.signer).unwrap();
        let mut objects = Vec::new();
        for (part, bytes) in (0..).zip(parts) {
            summary.add(bytes.len() as u64, Digest::of(&bytes));
            objects.push((layout::inventory(&original.target, &id, part), bytes));
        }
        let commit = Commit { id: id.clone(), inventory: summary.finish(), copy: Some(copy), ..original };
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

    pub(super) async fn enroll(&self, writer: &Writer) {
        let out = FanOut::new(&self.fixture.repository.regions, Patience::BACKUP);
        self.fixture.repository.enroll(writer, &out).await.unwrap();
        out.drain().await;
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

/// Whoever can take a COMMIT out of one region, and write tombs into all, hides a backup from readers without a list. Prune does not
/// take the rest of it for garbage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_forged_tomb_hides_is_no_garbage() {
    let mut scene = Scene::new(10).await;
    let ids = scene.drilled(3).await;
    let stranger = scene.stranger();
    let at = scene.fixture.writer.clock.now();
    let tomb = Tomb {
        format: 1,
        backup: ids[0].clone(),
        target: options().target,
        prune: PruneId::new(at, &SystemRng).unwrap(),
        at,
        why: String::new(),
        keysets: Vec::new(),
        wal: None,
        host: "there".to_owned(),
    };
    scene.enroll(&stranger).await;
    let repository = scene.fixture.reopen().await.unwrap();
    records::put_everywhere(&repository, &stranger, (tombs::TOMB, &tomb.key()), &tomb).await.unwrap();
    let commit = layout::commit(&tomb.target, &ids[0]);
    scene.fixture.stores[1].lose(&commit).await;
    let before = scene.names(0).await;
    for days in [0, 1, 30] {
        scene.fixture.clock.advance(days * DAY + 1);
        let report = scene.prune(Consent::Scheduled).await;
        let told = report.refusals.join("\n");
        assert!(report.swept.is_none() && told.contains(stranger.signer.id().as_str()), "{report:#?}");
    }
    assert_eq!(scene.names(0).await, before);
    // Who lists his signers is not led astray in the first place.
    let context = scene.listing(&[scene.fixture.writer.signer.id()]).await;
    assert_eq!(catalog::backups(&context.repository, None).await.unwrap().0.len(), 3);
}

/// A pin that a stranger ended keeps what it kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_ends_a_pin_on_whom_prune_does_not_rely() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(3).await;
    let reason = Reason { text: "audit".into(), until: None };
    pin::pin(&scene.context().await, ids[0].as_str(), reason).await.unwrap();
    let stranger = scene.stranger();
    let context = Context { writer: Some(stranger), ..scene.context().await };
    pin::unpin(&context, ids[0].as_str(), "over").await.unwrap();
    assert_eq!(scene.prune_twice().await.swept, None);
    assert_eq!(scene.exist().await, ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_copy_takes_the_place_of_no_original() {
    let mut scene = Scene::new(3).await;
    let mut ids = scene.drilled(3).await;
    let stranger = scene.stranger();
    let copy = scene.by(&stranger, async |scene| {
        scene.enroll(&scene.fixture.writer).await;
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

/// One id stands for one backup: below the name of another target it is of nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_below_the_name_of_another_target_is_no_backup() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(3).await;
    let stranger = scene.stranger();
    scene.enroll(&stranger).await;
    let repository = scene.fixture.reopen().await.unwrap();
    let commit = catalog::named(&repository, ids[1].as_str()).await.unwrap().0.remove(0).commit;
    let commit = Commit { target: "zzz".parse().unwrap(), ..commit };
    let mut body = serde_json::to_vec(&commit).unwrap();
    body.push(b'\n');
    let context = commit_context(&repository.id, &commit.id);
    let bytes = crate::codec::sign::sign_text(&stranger.signer, &context, &body).unwrap();
    repository.regions.put_everywhere(&layout::commit(&commit.target, &commit.id), bytes.into()).await.unwrap();
    let (backups, unreadable) = catalog::backups(&repository, None).await.unwrap();
    assert_eq!((backups.len(), unreadable.len()), (3, 1), "{unreadable:?}");
    assert!(unreadable[0].to_string().contains("belongs elsewhere"), "{unreadable:?}");
    let report = scene.prune(Consent::None).await;
    assert!(report.refusals.iter().any(|why| why.contains("zzz")), "{report:#?}");
}
