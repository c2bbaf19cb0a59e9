//! Prune over a small repository in memory: backups are taken, drilled, expire, and regions and pruners fail meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::SystemRng;
use crate::jobs::pin::{self, Reason};
use crate::jobs::prune::{Consent, Options, Report, run, show};
use crate::jobs::show::run as show_backup;
use crate::jobs::verify::{self, Level};
use crate::jobs::{Context, Levels, ScratchPlace, list, repair};
use crate::model::retention::{Rules, Verdict};
use crate::model::{BackupId, Kind, Result};
use crate::notify::Courier;
use crate::observe::progress::Progress;
use crate::repository::catalog;
use crate::repository::compact::{Hands, alike};
use crate::repository::handle::Writer;
use crate::repository::mend::Scope;
use crate::repository::prune::Limits;
use crate::repository::records::reports::{ReportBody, ReportHead, seal_report, spread};
use crate::repository::survey::scrub;
use crate::repository::testing::{Fault, Fixture, Made, options};

mod bundles;
mod copies;
mod forged;
mod late;
mod newer;
mod spared;
mod under_way;
mod wal;

const DAY: i64 = 24 * 3600;

struct Scene {
    fixture: Fixture,
    rules: Rules,
    limits: Limits,
    taken: u64,
}

fn rules(last: u32) -> Rules {
    let timezone = chrono_tz::Tz::UTC;
    Rules { last, daily: 0, weekly: 0, monthly: 0, yearly: 0, within: None, wal: None, timezone, undrilled: false }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 0xff) as u8
    };
    (0..length).map(|_| next()).collect()
}

impl Scene {
    async fn new(last: u32) -> Self {
        Self::of(Fixture::memory(2, 2).await, last).await
    }

    async fn of(fixture: Fixture, last: u32) -> Self {
        fixture.epoch(1000, &[40, 50], true).await;
        let limits = Limits { percent: 100, ..Limits::default() };
        Self { fixture, rules: rules(last), limits, taken: 0 }
    }

    async fn context(&self) -> Context {
        let fixture = &self.fixture;
        let repository = fixture.reopen().await.unwrap();
        let clock = Arc::clone(&fixture.writer.clock);
        Context {
            ring: Arc::new(fixture.ring.within(repository.regions.clone())),
            repository,
            writer: Some(fixture.writer.clone()),
            streamed: Vec::new(),
            targets: Vec::new(),
            retention: BTreeMap::from([(options().target, self.rules.clone())]),
            prune: self.limits,
            levels: Levels { pages: 1, dumps: 1, wal: 1 },
            pack_size: crate::repository::pages::pack::OBJECT_LIMIT,
            state_dir: fixture.files.path().to_owned(),
            guests: Vec::new(),
            scratch: ScratchPlace { directory: fixture.files.path().to_owned(), run_as: None, preload: Vec::new() },
            progress: Progress::new(Arc::clone(&clock)),
            meters: Arc::default(),
            courier: Courier::default(),
            clock,
            rng: Arc::new(SystemRng),
        }
    }

    /// Pages that stay, and some that are other ones each time.
    fn files(&mut self) -> Vec<Made> {
        self.taken += 1;
        let changing = noise(100 + self.taken, 40 * 8192);
        vec![Made::new("base/stays", noise(1, 64 * 8192)), Made::new("base/changes", changing)]
    }

    /// A backup of a new day that shares pages with the last one.
    async fn backup(&mut self) -> BackupId {
        self.fixture.clock.advance(DAY);
        let files = self.files();
        self.fixture.next_backup(&files).await.commit.id
    }

    async fn drill(&self, id: &BackupId) {
        let at = self.fixture.writer.clock.now();
        let head = ReportHead {
            format: 1,
            id: crate::model::ReportId::new(&options().target, at, &SystemRng).unwrap(),
            job: "drill".into(),
            target: options().target,
            backup: Some(id.clone()),
            region: None,
            outcome: "pass".into(),
            level: Some("L5".into()),
            started_at: at,
            finished_at: at,
            rpo: (None, None),
            rto: (None, None),
            phases: Vec::new(),
            checks: Vec::new(),
            same_as: self.same_as(id).await,
            host: "here".into(),
            drctl: "0.1.0".into(),
        };
        let body = ReportBody { report: serde_json::json!({}), markdown: String::new() };
        let sealed = seal_report(&self.fixture.repository, &self.fixture.writer, &head, &body).await.unwrap();
        spread(&self.fixture.repository, &sealed).await;
    }

    /// What a drill of a copy finds it to be the same as.
    async fn same_as(&self, id: &BackupId) -> Vec<BackupId> {
        let context = self.context().await;
        let Context { repository, ring, pack_size, progress, .. } = &context;
        let hands = Hands { repository, writer: &self.fixture.writer, ring, pack_size: *pack_size, progress };
        let compared = alike(hands, &options().target, id).await.unwrap();
        compared.into_iter().filter(|(_, same)| same.is_ok()).map(|(other, _)| other).collect()
    }

    /// So many backups, one a day, each drilled.
    async fn drilled(&mut self, count: usize) -> Vec<BackupId> {
        let mut ids = Vec::new();
        for _ in 0..count {
            let id = self.backup().await;
            self.drill(&id).await;
            ids.push(id);
        }
        ids
    }

    async fn try_prune(&self, consent: Consent) -> Result<Report> {
        run(&self.context().await, &Options { dry_run: false, consent }).await
    }

    async fn prune(&self, consent: Consent) -> Report {
        self.try_prune(consent).await.unwrap()
    }

    /// Plans, waits, sweeps.
    async fn prune_twice(&self) -> Report {
        let planned = self.prune(Consent::None).await;
        assert_eq!(planned.refusals, Vec::<String>::new());
        self.fixture.clock.advance(DAY + 1);
        self.prune(Consent::Scheduled).await
    }

    /// Plans, waits, and sweeps; each time after so many deletes in each region the pruner is killed. Whatever is left then
    /// is never damage, and never brought back.
    async fn prune_with_kills(&self, deletes: i64) -> usize {
        self.prune(Consent::None).await;
        self.fixture.clock.advance(DAY + 1);
        let mut kills = 0;
        loop {
            self.fixture.stores.iter().for_each(|store| store.break_after_deletes(deletes));
            let done = self.try_prune(Consent::Scheduled).await;
            self.fixture.stores.iter().for_each(|store| store.break_after_deletes(i64::MAX));
            self.is_whole().await;
            let mended = repair::run(&self.context().await, &Scope::default()).await.unwrap();
            let copied: Vec<_> = mended.regions.iter().map(|region| (region.copied, region.replaced.len())).collect();
            assert_eq!(copied, [(0, 0), (0, 0)], "{mended:#?}");
            assert!(!mended.has_debts());
            match done {
                Ok(report) if report.planned.amount.objects == 0 => return kills,
                Ok(report) => assert!(report.refusals.is_empty(), "{report:#?}"),
                Err(error) => {
                    assert!(error.to_string().contains("killed"), "{error}");
                    kills += 1;
                }
            }
            assert!(kills < 50);
        }
    }

    async fn exist(&self) -> Vec<BackupId> {
        let repository = self.fixture.reopen().await.unwrap();
        let (backups, unreadable) = catalog::backups(&repository, None).await.unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        backups.into_iter().map(|backup| backup.commit.id).collect()
    }

    /// Every backup that exists opens to the last page, in every region alone.
    async fn is_whole(&self) {
        let context = self.context().await;
        let options = verify::Options { what: None, level: Level::L1, region: None, scrub: true };
        let report = verify::run(&context, &options).await.unwrap();
        assert!(report.is_clean(), "{report:#?}");
        // Made-up WAL holds no records, so pages alone are opened.
        let phase = Arc::new(context.progress.begin("open", None));
        for backup in catalog::backups(&context.repository, None).await.unwrap().0 {
            for region in context.repository.regions.all() {
                let hands = (region, context.ring.as_ref());
                scrub::open_everything(&context.repository, hands, &backup.commit, &phase).await.unwrap();
            }
        }
        let listed = list::run(&self.context().await, None).await.unwrap();
        assert!(listed.backups.iter().all(|backup| backup.recoverable_until.is_some()), "{listed:?}");
    }

    async fn names(&self, region: usize) -> Vec<String> {
        self.fixture.stores[region].contents().await.into_iter().map(|(key, _)| key).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runs_and_a_grace_period_take_what_no_rule_keeps_and_nothing_else() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(5).await;
    let dry = run(&scene.context().await, &Options { dry_run: true, consent: Consent::None }).await.unwrap();
    assert!(dry.planned.amount.objects > 0 && dry.planned.id.is_none());
    let before = scene.names(0).await;
    let planned = scene.prune(Consent::None).await;
    assert!(planned.ripe.is_none() && planned.swept.is_none() && planned.planned.id.is_some(), "{planned:#?}");
    assert_eq!(planned.planned.amount, dry.planned.amount);
    assert!(scene.names(0).await.iter().filter(|key| !key.starts_with("prunes/")).eq(&before));

    // A schedule that comes too early removes nothing; neither does a person without the right digest.
    assert!(scene.prune(Consent::Scheduled).await.swept.is_none());
    scene.fixture.clock.advance(DAY + 1);
    let ripe = scene.prune(Consent::None).await.ripe.unwrap();
    assert_eq!(ripe.backups, ids[..3]);
    let wrong = scene.prune(Consent::Digest("00000000".into())).await;
    assert!(wrong.swept.is_none() && wrong.refusals[0].contains(&ripe.digest), "{wrong:#?}");
    assert_eq!(scene.exist().await, ids);
    let done = scene.prune(Consent::Digest(ripe.digest)).await;
    let swept = done.swept.unwrap();
    assert_eq!((swept.backups.as_slice(), swept.objects), (&ids[..3], ripe.amount.objects));

    assert_eq!(scene.exist().await, ids[3..]);
    scene.is_whole().await;
    for region in 0..2 {
        let names = scene.names(region).await;
        let records = ["commits/", "inventories/", "manifests/"];
        let is_record = |key: &&String| records.iter().any(|class| key.starts_with(class));
        let left = |id: &BackupId| names.iter().filter(is_record).any(|key| key.contains(id.as_str()));
        assert!(!ids[..3].iter().any(left), "{names:#?}");
        // Pages that never changed are still those of the first backup, and so is its keyset.
        assert!(names.iter().any(|key| key.starts_with(&format!("packs/ledger/{}/", ids[0]))));
        assert!(!names.iter().any(|key| key.starts_with(&format!("packs/ledger/{}/", ids[1]))));
    }
    let again = scene.prune(Consent::None).await;
    assert_eq!(again.planned.amount.objects, 0, "{again:#?}");
    let history = show::run(&scene.context().await, None).await.unwrap();
    assert_eq!((history.sweeps.len(), history.sweeps[0].begun.backups.as_slice()), (1, &ids[..3]));
    assert_eq!(history.sweeps[0].ended.as_ref().unwrap().objects, swept.objects);
}

/// Killed after every second delete in each region: what is left is never called a backup, never damage, and never brought back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_that_is_killed_again_and_again_ends_where_one_would() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    let kills = scene.prune_with_kills(2).await;
    assert!(kills > 2, "{kills}");
    assert_eq!(scene.exist().await, ids[2..]);
    assert_eq!(scene.names(0).await, scene.names(1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_in_doubt_refuses_the_whole_run() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(4).await;
    scene.prune(Consent::None).await;
    scene.fixture.clock.advance(DAY + 1);
    let refused = async |what: &str| {
        let told = match scene.try_prune(Consent::Scheduled).await {
            Ok(report) => report.refusals.join("\n"),
            Err(error) => error.to_string(),
        };
        assert!(told.contains(what), "{what}: {told}");
        assert_eq!(scene.exist().await, ids);
    };
    scene.fixture.stores[1].set(Fault::Fail);
    refused("switched off").await;
    scene.fixture.stores[1].set(Fault::None);
    // What one region alone does not tell may be why something stays.
    for class in [
        "pins/",
        "intents/",
        "reports/",
        "commits/",
        "inventories/",
        "pruned/",
        "sweeps/",
        "prunes/",
        "wal/",
        "keysets/",
    ] {
        scene.fixture.stores[1].close(Some(class));
        refused("switched off").await;
        scene.fixture.stores[1].close(None);
    }

    // Among the packs of the first backup are pages that the newest one shares.
    let of_first = format!("packs/ledger/{}/", ids[0]);
    let contents = scene.fixture.stores[1].contents().await.into_iter();
    let packs: Vec<_> = contents.filter(|(key, _)| key.starts_with(&of_first)).collect();
    for (pack, _) in &packs {
        scene.fixture.stores[1].lose(pack).await;
    }
    refused("is not whole: region b lacks").await;
    for (pack, good) in &packs {
        scene.fixture.stores[1].damage(pack, good[1..].to_vec()).await;
    }
    refused("with a wrong size").await;
    for (pack, good) in &packs {
        scene.fixture.stores[1].damage(pack, good.to_vec()).await;
    }

    let commit = format!("commits/ledger/{}", ids[1]);
    let good = scene.fixture.stores[0].contents().await.into_iter().find(|(key, _)| *key == commit).unwrap().1;
    for store in &scene.fixture.stores {
        store.damage(&commit, b"rotten".to_vec()).await;
    }
    let told = scene.prune(Consent::Scheduled).await.refusals.join("\n");
    assert!(told.contains("is not readable"), "{told}");
    for store in &scene.fixture.stores {
        store.damage(&commit, good.to_vec()).await;
    }

    scene.fixture.clock.advance(-3 * DAY);
    refused("the clocks disagree").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_drills_nothing_goes_and_an_unproven_one_that_goes_alarms() {
    let mut scene = Scene::new(1).await;
    let first = scene.backup().await;
    for _ in 0..3 {
        scene.backup().await;
    }
    let report = scene.prune(Consent::None).await;
    assert_eq!((report.planned.amount.objects, report.alarms().count()), (0, 0), "{report:#?}");
    let drilled = scene.drilled(1).await;
    let report = scene.prune(Consent::None).await;
    let verdict = |id: &BackupId| {
        let judged = report.targets[0].backups.iter().find(|backup| backup.id == *id).unwrap();
        judged.verdict.clone()
    };
    assert_eq!(verdict(&first), Verdict::NeverProven);
    assert!(matches!(verdict(&drilled[0]), Verdict::Keep(_)));
    assert_eq!(report.alarms().count(), 4);
    assert!(scene.prune_twice().await.swept.unwrap().backups.contains(&first));
    assert_eq!(scene.exist().await, drilled);
    scene.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pins_and_holds_keep_until_they_end() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(5).await;
    let reason = || Reason { text: "audit".into(), until: None };
    // The plan is older than the pin.
    scene.prune(Consent::None).await;
    pin::pin(&scene.context().await, ids[0].as_str(), reason()).await.unwrap();
    scene.fixture.clock.advance(DAY + 1);
    assert_eq!(scene.prune(Consent::Scheduled).await.swept.unwrap().backups, ids[1..3]);
    assert_eq!(scene.exist().await, [&ids[..1], &ids[3..]].concat());
    scene.is_whole().await;

    pin::hold(&scene.context().await, &options().target, reason()).await.unwrap();
    pin::unpin(&scene.context().await, ids[0].as_str(), "over").await.unwrap();
    assert!(scene.prune_twice().await.swept.is_none());
    pin::release(&scene.context().await, &options().target, "over").await.unwrap();
    assert!(pin::active(&scene.context().await, None).await.unwrap().is_empty());
    // Plans of one second have no order among themselves.
    scene.fixture.clock.advance(2);
    let after = scene.prune(Consent::Scheduled).await;
    assert!(after.swept.is_none(), "what a hold kept has its whole grace period when the hold ends: {after:#?}");
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[..1]);
    let late = pin::pin(&scene.context().await, ids[0].as_str(), reason()).await.unwrap_err();
    assert_eq!(late.kind(), Kind::NotFound, "{late}");
    scene.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schedule_takes_no_more_than_its_share_and_no_forged_plan() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(6).await;
    scene.limits.percent = 34;
    let report = scene.prune_twice().await;
    assert!(report.swept.is_none() && report.refusals[0].contains("4 of the 6 backups"), "{report:#?}");
    let digest = report.ripe.unwrap().digest;

    // A plan of somebody else, old by its own words: with no list of signers only this host is known.
    let stranger = crate::codec::sign::Signer::generate(&SystemRng).unwrap();
    let mut context = scene.context().await;
    context.writer = Some(Writer { signer: Arc::new(stranger), ..scene.fixture.writer.clone() });
    let foreign = run(&context, &Options { dry_run: true, consent: Consent::None }).await.unwrap();
    assert!(foreign.refusals.iter().any(|why| why.contains("cannot be relied on")), "{foreign:#?}");

    // A small run takes whole backups, the oldest first, and the next one goes on.
    scene.limits.objects = 1;
    let dry = run(&scene.context().await, &Options { dry_run: true, consent: Consent::None }).await.unwrap();
    let dry = dry.ripe.unwrap();
    assert_eq!((dry.backups.as_slice(), dry.more), (&ids[..1], true));
    assert_ne!(dry.digest, digest);
    let swept = scene.prune(Consent::Scheduled).await.swept.unwrap();
    assert_eq!(swept.backups, ids[..1]);
    scene.is_whole().await;
}

/// What `list` says that a backup frees is what its end frees, to the byte, and `show` says whose pages it reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_frees_what_was_said() {
    let mut scene = Scene::new(2).await;
    let ids = scene.drilled(3).await;
    let bytes = async || {
        let contents = scene.fixture.stores[0].contents().await.into_iter();
        let of_backups =
            contents.filter(|(key, _)| !["sweeps/", "prunes/", "pruned/"].iter().any(|of| key.starts_with(of)));
        of_backups.map(|(_, bytes)| bytes.len() as u64).sum::<u64>()
    };
    let commit = async || {
        let key = format!("commits/ledger/{}", ids[0]);
        let contents = scene.fixture.stores[0].contents().await;
        contents.into_iter().find(|(name, _)| *name == key).map_or(0, |(_, bytes)| bytes.len() as u64)
    };
    let listed = list::run(&scene.context().await, None).await.unwrap();
    let oldest = listed.backups.iter().find(|backup| backup.id == ids[0]).unwrap();
    let (frees, before) = (oldest.frees_bytes.unwrap() + commit().await, bytes().await);
    // How much depends on which worker packed what: a pack with pages of survivors stays as a whole.
    assert!(frees > 0 && frees < oldest.stored_bytes, "{frees} of {}", oldest.stored_bytes);
    assert_eq!(scene.prune_twice().await.swept.unwrap().backups, ids[..1]);
    assert_eq!(before - bytes().await, frees);

    let shown = show_backup(&scene.context().await, ids[2].as_str()).await.unwrap();
    let generations: Vec<_> = shown.listed.generations.iter().map(|generation| &generation.backup).collect();
    assert_eq!(generations, [&ids[0], &ids[2]]);
}
