//! Verify: is every backup whole in every region, and is it what was written?

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::Context;
use crate::jobs::verdict::Verdict;
use crate::model::commit::Commit;
use crate::model::{BackupId, Error, Lsn, RegionName, Result, TargetName};
use crate::observe::progress::Phase;
use crate::repository::catalog::{self, Backup, Held, held_everywhere};
use crate::repository::inventory::InventoryLine;
use crate::repository::regions::Region;
use crate::repository::survey::beside::{self, Beside};
use crate::repository::survey::scrub::{self, Problem, Trouble};
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::repository::wal::reader::BranchLog;

mod walk;

/// How deep a backup was looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Level {
    /// Catalog and signatures.
    L0,
    /// Every object is there with its size, and the WAL without a hole.
    L1,
    /// Every frame was fetched, opened and compared with its map; every WAL record of the backup walked.
    L2,
}

/// What is to be verified.
#[derive(Debug, Clone)]
pub struct Options {
    /// A backup, a target, or everything.
    pub what: Option<String>,
    /// How deep.
    pub level: Level,
    /// This region alone.
    pub region: Option<RegionName>,
    /// Compare every stored byte with its digest as well, which needs no key.
    pub scrub: bool,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The level that was asked for.
    pub level: Level,
    /// Whether every byte was compared with its digest.
    pub scrub: bool,
    /// The backups, newest first.
    pub backups: Vec<BackupReport>,
    /// The WAL of their clusters.
    pub wal: Vec<WalReport>,
    /// Objects of runs that never committed.
    #[serde(flatten)]
    pub beside: Beside,
    /// COMMITs that no region holds intact.
    pub unreadable: Vec<String>,
}

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupReport {
    /// Its id.
    pub id: BackupId,
    /// Its target.
    pub target: TargetName,
    /// Whether the regions looked at hold all of it together, as far as this level tells.
    pub restorable: bool,
    /// Region by region.
    pub regions: Vec<RegionReport>,
}

/// One backup in one region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionReport {
    /// The region.
    pub name: RegionName,
    /// The highest level that it reached.
    pub level: Option<Level>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// One branch of WAL.
#[derive(Debug, Clone, Serialize)]
pub struct WalReport {
    /// The cluster.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// The branch.
    pub branch: String,
    /// Frames whose bytes were compared, over all regions.
    pub scrubbed_frames: u64,
    /// Where two epochs hold different bytes: no region is to blame, and repair mends nothing.
    pub contradictions: Vec<String>,
    /// Overlapping epochs that could not be compared.
    pub not_compared: Vec<String>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

impl Report {
    fn problems(&self) -> impl Iterator<Item = &Problem> {
        let backups = self.backups.iter().flat_map(|backup| &backup.regions).flat_map(|region| &region.problems);
        backups.chain(self.wal.iter().flat_map(|wal| &wal.problems))
    }

    /// Whether there was nothing to look at, which proves nothing.
    pub const fn is_of_nothing(&self) -> bool {
        self.backups.is_empty() && self.unreadable.is_empty()
    }

    /// Whether nothing is wrong anywhere.
    pub fn is_clean(&self) -> bool {
        self.unreadable.is_empty() && self.problems().next().is_none() && self.is_consistent()
    }

    /// Whether WAL contradicts itself somewhere.
    pub fn has_contradictions(&self) -> bool {
        self.wal.iter().any(|wal| !wal.contradictions.is_empty())
    }

    /// Whether all that is wrong is that some regions lack what others have.
    pub fn has_only_debts(&self) -> bool {
        let missing = self.problems().all(|problem| problem.trouble == Trouble::Missing);
        let whole = missing && self.backups.iter().all(|backup| backup.restorable);
        self.unreadable.is_empty() && whole && self.is_consistent()
    }

    /// Whether all epochs were compared where they overlap, and agree.
    fn is_consistent(&self) -> bool {
        self.wal.iter().all(|wal| wal.contradictions.is_empty() && wal.not_compared.is_empty())
    }
}

/// Verifies.
///
/// # Errors
/// No region answers, or nothing is named as asked. What is wrong with a backup is no error but the result.
pub async fn run(context: &Context, options: &Options) -> Result<Report> {
    let began = context.clock.now();
    let ended = look(context, options).await;
    if let Ok(report) = &ended {
        tell(context, options, report, began);
    }
    ended
}

fn tell(context: &Context, options: &Options, report: &Report, began: DateTime<Utc>) {
    let target = options.what.as_ref().and_then(|what| what.parse::<TargetName>().ok());
    let verdict = Verdict {
        job: "verify",
        target: target.as_ref().filter(|target| report.backups.iter().any(|backup| backup.target == **target)),
        region: options.region.as_ref(),
        outcome: match () {
            () if report.is_of_nothing() => "inconclusive",
            () if report.is_clean() || report.has_only_debts() => "pass",
            () => "fail",
        },
        level: Some(format!("{:?}", report.level)),
        rpo_seconds: None,
        rto_seconds: None,
        report: None,
        phases: Vec::new(),
        began,
        ended: context.clock.now(),
    };
    verdict.tell(context);
}

async fn look(context: &Context, options: &Options) -> Result<Report> {
    let repository = &context.repository;
    let (all, unreadable) = catalog::backups(repository, None).await?;
    let chosen = choose(context, (&all, &unreadable), options.what.as_deref())?;
    // An incremental backup is read whole as well.
    let bytes = |commit: &Commit| if options.level >= Level::L2 { commit.size_bytes } else { commit.stored_bytes };
    let total = chosen.iter().map(|backup| bytes(&backup.commit)).sum::<u64>();
    let regions = regions(context, options)?;
    let phase = Arc::new(context.progress.begin("verify", Some(total * regions.len() as u64)));
    let mut indexes = BTreeMap::new();
    for branch in scrub::branches_of(repository, &chosen).await? {
        indexes.insert(branch.clone(), WalIndex::load(&repository.regions, branch).await);
    }
    let mut look = Look { context, options, regions, indexes, scrubbed: BTreeMap::new(), phase };
    let mut backups = Vec::new();
    let mut beside = Beside::default();
    for target in targets(context, &chosen, options.what.is_none()).await? {
        let held: BTreeMap<_, _> = held_everywhere(repository, &target).await.into_iter().collect();
        for Backup { commit, .. } in chosen.iter().rev().filter(|backup| backup.commit.target == target) {
            backups.push(look.backup(commit, &held).await);
        }
        let of_target: Vec<_> = all.iter().filter(|backup| backup.commit.target == target).cloned().collect();
        let left = beside::beside(repository, &target, &held, (&of_target, context.clock.now())).await?;
        beside.orphans.extend(left.orphans);
        beside.in_progress.extend(left.in_progress);
    }
    let wal = look.wal().await;
    let unreadable = unreadable.iter().map(ToString::to_string).collect();
    Ok(Report { level: options.level, scrub: options.scrub, backups, wal, beside, unreadable })
}

fn choose(context: &Context, (all, unreadable): (&[Backup], &[Error]), what: Option<&str>) -> Result<Vec<Backup>> {
    let Some(what) = what else { return Ok(all.to_vec()) };
    let of_target: Vec<_> = all.iter().filter(|backup| backup.commit.target.as_str() == what).cloned().collect();
    let known = context.promises().any(|(name, _)| name.as_str() == what);
    if known && of_target.is_empty() {
        return Err(Error::not_found(format!("{what} has no backup yet")).hint(format!("drctl backup {what}")));
    }
    if of_target.is_empty() { Ok(vec![catalog::find((all, unreadable), what)?.clone()]) } else { Ok(of_target) }
}

fn regions(context: &Context, options: &Options) -> Result<Vec<Region>> {
    let regions = &context.repository.regions;
    Ok(match &options.region {
        Some(name) => vec![regions.named(name)?.clone()],
        None => regions.all().to_vec(),
    })
}

/// The targets of the backups, and when everything is looked at those that have packs but no backup.
async fn targets(context: &Context, chosen: &[Backup], all: bool) -> Result<BTreeSet<TargetName>> {
    let mut targets: BTreeSet<_> = chosen.iter().map(|backup| backup.commit.target.clone()).collect();
    if all {
        let named = context.repository.regions.prefixes_union("packs/").await?;
        targets.extend(named.iter().filter_map(|prefix| prefix.split('/').nth(1)?.parse().ok()));
    }
    Ok(targets)
}

struct Look<'a> {
    context: &'a Context,
    options: &'a Options,
    regions: Vec<Region>,
    indexes: BTreeMap<BranchId, WalIndex>,
    scrubbed: BTreeMap<RegionName, BTreeMap<String, Option<Problem>>>,
    phase: Arc<Phase>,
}

impl Look<'_> {
    async fn backup(&mut self, commit: &Commit, held: &BTreeMap<RegionName, Held>) -> BackupReport {
        let lines = catalog::inventory(&self.context.repository, commit).await;
        let mut reports = Vec::new();
        for region in self.regions.clone() {
            self.phase.note(format!("{} in {}", commit.id, region.name));
            let mut report = RegionReport { name: region.name.clone(), level: None, problems: Vec::new() };
            match (&lines, held.get(&region.name)) {
                (Ok(lines), Some(held)) => self.region(&region, (commit, lines, held), &mut report).await,
                (Err(error), _) => report.problems.push(Problem::of(&region, commit.id.as_str(), error)),
                (_, None) => {}
            }
            report.problems.sort();
            report.problems.dedup_by(|a, b| a.key == b.key && a.trouble == b.trouble);
            reports.push(report);
        }
        let restorable = restorable(&lines, &reports);
        BackupReport { id: commit.id.clone(), target: commit.target.clone(), restorable, regions: reports }
    }

    async fn region(
        &mut self,
        region: &Region,
        (commit, lines, held): (&Commit, &[InventoryLine], &Held),
        report: &mut RegionReport,
    ) {
        let repository = &self.context.repository;
        report.problems.extend(scrub::check_records(repository, region, commit).await);
        if let Ok(alone) = scrub::alone(repository, &region.name) {
            let ring = self.context.ring.within(alone.regions);
            for keyset in catalog::keysets(commit, lines) {
                report.problems.extend(scrub::check_wraps(&ring, region, (&commit.target, &keyset)).await);
            }
        }
        report.reached(Level::L0);
        if self.options.level >= Level::L1 {
            report.problems.extend(scrub::check_presence(region, held, commit, lines));
            report.problems.extend(self.wal_of(region, commit).await);
            report.reached(Level::L1);
        }
        if self.options.scrub {
            self.scrub(region, lines, report).await;
        }
        if self.options.level >= Level::L2 {
            self.open(region, (commit, lines), report).await;
            report.reached(Level::L2);
        }
    }

    async fn wal_of(&self, region: &Region, commit: &Commit) -> Vec<Problem> {
        let Some((need, index)) = self.need(commit) else { return Vec::new() };
        scrub::check_wal(&self.context.repository, index, region, need).await
    }

    fn need<'a>(&'a self, commit: &'a Commit) -> Option<(&'a crate::model::commit::WalNeed, &'a WalIndex)> {
        let need = commit.wal.as_ref()?;
        let branch = BranchId { system_id: need.system_id, timeline: need.timeline, branch: need.branch.clone() };
        Some((need, self.indexes.get(&branch)?))
    }

    async fn scrub(&mut self, region: &Region, lines: &[InventoryLine], report: &mut RegionReport) {
        let seen = self.scrubbed.entry(region.name.clone()).or_default();
        report.problems.extend(scrub::scrub_objects(region, lines, seen, &self.phase).await);
    }

    async fn open(&mut self, region: &Region, (commit, lines): (&Commit, &[InventoryLine]), report: &mut RegionReport) {
        let repository = &self.context.repository;
        let ring = &self.context.ring;
        if let Err(error) = scrub::open_everything(repository, (region, ring), commit, &self.phase).await {
            let before = report.problems.len();
            if !self.options.scrub {
                // The first bad frame ends the reading; the digests name every other object that is bad.
                self.scrub(region, lines, report).await;
            }
            if before == report.problems.len() {
                report.problems.push(Problem::of(region, commit.id.as_str(), &error));
            }
        }
        let Some((need, index)) = self.need(commit) else { return };
        if let Err(error) = walk::walk(self.context, region, index, need).await {
            let key = format!("wal/{}", need.system_id);
            report.problems.push(Problem::of(region, key, &error));
        }
    }

    /// Everything that several epochs hold, as the regions hold it together: what one region alone holds is read by every
    /// restore that finds it there.
    async fn compare(&self, branch: &BranchId, report: &mut WalReport) {
        let repository = &self.context.repository;
        self.phase.note(format!("overlapping WAL of timeline {}", branch.timeline));
        let log = BranchLog::load(repository, branch.clone()).await;
        let (found, unread) = log.compare(repository, &self.context.ring, (Lsn::INVALID, Lsn(u64::MAX))).await;
        report.contradictions = found.iter().map(|found| Error::from(found).to_string()).collect();
        report.not_compared = unread.iter().map(Error::to_string).collect();
    }

    async fn wal(&self) -> Vec<WalReport> {
        let mut reports = Vec::new();
        for (branch, index) in &self.indexes {
            let mut report = WalReport {
                system_id: branch.system_id.to_string(),
                timeline: branch.timeline.0,
                branch: branch.branch.to_string(),
                scrubbed_frames: 0,
                contradictions: Vec::new(),
                not_compared: Vec::new(),
                problems: Vec::new(),
            };
            if self.options.level >= Level::L2 {
                self.compare(branch, &mut report).await;
            }
            for region in &self.regions {
                let now = self.context.clock.now();
                let repository = &self.context.repository;
                report.problems.extend(scrub::missing_frames(repository, index, region, now).await);
                report.problems.extend(scrub::displaced_frames(repository, index, region).await);
                if let (Level::L2, Ok(alone)) = (self.options.level, scrub::alone(repository, &region.name)) {
                    let ring = self.context.ring.within(alone.regions);
                    report.problems.extend(scrub::check_wal_wraps(repository, &ring, index, region).await);
                }
                if self.options.scrub {
                    let (frames, problems) = scrub::scrub_wal(repository, index, region).await;
                    report.scrubbed_frames += frames;
                    report.problems.extend(problems);
                }
            }
            reports.push(report);
        }
        reports
    }
}

impl RegionReport {
    fn reached(&mut self, level: Level) {
        if self.problems.is_empty() {
            self.level = Some(level);
        }
    }
}

/// Each object is good in one of the regions at least.
fn restorable<T>(lines: &Result<T>, reports: &[RegionReport]) -> bool {
    let Some(first) = reports.first() else { return false };
    let bad_everywhere = |problem: &Problem| {
        let has = |report: &RegionReport| report.problems.iter().any(|other| other.key == problem.key);
        reports.iter().all(has)
    };
    lines.is_ok() && !first.problems.iter().any(bad_everywhere)
}
