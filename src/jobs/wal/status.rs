//! Which WAL is stored where, and what of it can be recovered. Needs no key and no server.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::jobs::context::{Context, Target};
use crate::jobs::lineage::{self, StoredHistory};
use crate::jobs::wal::control;
use crate::jobs::wal::position::{Position, reaches};
use crate::jobs::wal::server;
use crate::model::commit::WalNeed;
use crate::model::{Branch, Error, Lsn, RegionName, Result, SystemId, TargetName, Timeline};
use crate::repository::catalog;
use crate::repository::layout;
use crate::repository::wal::gaps::{self, Gap};
use crate::repository::wal::index::{BranchId, WalIndex, Window, branches, windows};

/// The stored WAL of the targets asked for.
#[derive(Debug, Clone, Serialize)]
pub struct WalStatus {
    /// One entry per target; WAL of a cluster that no known target names stands under `target: null`.
    pub targets: Vec<TargetWal>,
}

/// The stored WAL of one target.
#[derive(Debug, Clone, Serialize)]
pub struct TargetWal {
    /// The target.
    pub target: Option<TargetName>,
    /// What its receiver on this host says; `null` = none answers.
    pub receiver: Option<Position>,
    /// Every branch of every cluster that it ever was, oldest first.
    pub branches: Vec<BranchWal>,
}

/// The stored WAL of one branch.
#[derive(Debug, Clone, Serialize)]
pub struct BranchWal {
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch.
    pub branch: Branch,
    /// What each region holds.
    pub regions: Vec<RegionWal>,
    /// Recorded gaps.
    pub gaps: Vec<RecordedGap>,
    /// What is stored behind the places where later timelines left it.
    pub diverged: Vec<Diverged>,
    /// What could not be read.
    pub errors: Vec<String>,
}

/// WAL behind the place where a later timeline left: the old primary wrote it after the other server was promoted, or that
/// one never got it. It is in no history of the later timeline, and nothing removes it for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diverged {
    /// The timeline that left.
    pub timeline: Timeline,
    /// Its branch.
    pub branch: Branch,
    /// Where it left.
    pub from: Lsn,
    /// Behind the last complete record that is stored.
    pub to: Lsn,
}

impl Diverged {
    fn behind(branch: &BranchId, histories: &[StoredHistory], union: &[Window]) -> Vec<Self> {
        let Some(to) = union.iter().filter_map(|window| window.last_record_end).max() else { return Vec::new() };
        let children = lineage::children(histories, (branch.timeline, &branch.branch));
        let left = children.filter(|(_, from)| *from < to && !reaches(*from, to));
        left.map(|(child, from)| Self { timeline: child.timeline, branch: child.branch.clone(), from, to }).collect()
    }
}

/// The WAL of one branch in one region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionWal {
    /// The region.
    pub name: RegionName,
    /// Ranges without a hole, ascending.
    pub windows: Vec<Window>,
    /// The parts of them into which a backup leads: recovery can go to any record inside one.
    pub recoverable: Vec<Span>,
    /// Frames, END and SEAL among them.
    pub frames: u64,
    /// Frames that another region holds and this one does not.
    pub missing_frames: u64,
    /// Why the region could not be read.
    pub unreadable: Option<String>,
}

/// A range of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Its first position.
    pub from: Lsn,
    /// Behind the last complete record.
    pub to: Lsn,
}

impl Span {
    /// The part of a window that recovery reaches: behind the earliest end of a backup in it. Into the first window of a
    /// later timeline leads what is recoverable of an earlier one and ends where that begins.
    fn within(window: &Window, (branch, needs): (&BranchId, &[WalNeed]), older: &[Self]) -> Option<Self> {
        let own = |need: &&WalNeed| {
            (need.system_id, need.timeline, &need.branch) == (branch.system_id, branch.timeline, &branch.branch)
        };
        let covered = needs.iter().filter(own).filter(|need| window.covers(need.start_lsn, need.stop_lsn));
        let led = || older.iter().any(|span| span.to >= window.start).then_some(window.start);
        let from = led().or_else(|| covered.map(|need| need.stop_lsn).min())?;
        let to = window.last_record_end.unwrap_or(window.end);
        (from <= to).then_some(Self { from, to })
    }
}

/// A gap as it was recorded.
#[derive(Debug, Clone, Serialize)]
pub struct RecordedGap {
    /// The end of the WAL before it.
    pub from: Lsn,
    /// Where WAL begins again.
    pub to: Lsn,
    /// Why.
    pub reason: String,
    /// When it was met.
    pub at: DateTime<Utc>,
    /// Whether WAL that came later, by `archive_command`, covers it: then it is a gap no more.
    pub filled: bool,
    /// Whether nothing is missing and two versions are stored: recovery crosses it as little.
    pub contradiction: bool,
}

impl RecordedGap {
    fn new(gap: Gap, union: &[Window]) -> Self {
        let filled = !gap.is_open(|from, to| union.iter().any(|window| window.covers(from, to)));
        let Gap { from, to, reason, at, contradiction, .. } = gap;
        Self { from, to, reason, at, filled, contradiction }
    }
}

impl WalStatus {
    /// Whether something needs a person: a gap, a hole, a region that lacks frames or cannot be read.
    pub fn is_whole(&self) -> bool {
        self.targets.iter().flat_map(|target| &target.branches).all(BranchWal::is_whole)
    }
}

impl BranchWal {
    fn is_whole(&self) -> bool {
        let whole =
            |region: &RegionWal| region.missing_frames == 0 && region.unreadable.is_none() && region.windows.len() <= 1;
        self.gaps.iter().all(|gap| gap.filled) && self.errors.is_empty() && self.regions.iter().all(whole)
    }
}

/// What is stored of one target, or of everything.
///
/// # Errors
/// No region answers, or the target is no cluster.
pub async fn wal_status(context: &Context, target: Option<&TargetName>) -> Result<WalStatus> {
    if let Some(streamed) = target.and_then(|name| context.streamed(name)) {
        context.target(&streamed.name)?;
    }
    let (mut owners, needs) = owners(context, target).await?;
    if target.is_none() {
        for system_id in stored_systems(context).await? {
            owners.entry(system_id).or_insert(None);
        }
    }
    let mut targets: BTreeMap<Option<TargetName>, Vec<BranchWal>> = BTreeMap::new();
    let configured = context.targets.iter().map(|target| &target.name);
    for name in configured.filter(|name| target.is_none_or(|target| target == *name)) {
        targets.entry(Some(name.clone())).or_default();
    }
    for (system_id, owner) in owners {
        let mut older: BTreeMap<RegionName, Vec<Span>> = BTreeMap::new();
        let histories = lineage::histories_of(&context.repository, system_id, &[]).await;
        for branch in branches(&context.repository.regions, system_id).await? {
            let wal = branch_wal(context, branch, (&needs, &histories), &older).await?;
            for region in &wal.regions {
                older.entry(region.name.clone()).or_default().extend(&region.recoverable);
            }
            targets.entry(owner.clone()).or_default().push(wal);
        }
    }
    let mut status = WalStatus { targets: Vec::new() };
    for (target, branches) in targets {
        let receiver = match target.as_ref().and_then(|name| context.target(name).ok()) {
            Some(target) => ask(target).await,
            None => None,
        };
        status.targets.push(TargetWal { target, receiver, branches });
    }
    Ok(status)
}

async fn ask(target: &Target) -> Option<Position> {
    let asked = control::position(&target.control_socket, &target.name).await;
    asked.inspect_err(|error| tracing::warn!(%error, "the receiver's answer is not readable")).ok().flatten()
}

type Owners = BTreeMap<SystemId, Option<TargetName>>;

/// Whose cluster is whose: the frames say it, and so do backups; a target without either is asked itself.
async fn owners(context: &Context, target: Option<&TargetName>) -> Result<(Owners, Vec<WalNeed>)> {
    let (mut owners, mut needs) = (Owners::new(), Vec::new());
    let (backups, errors) = catalog::backups(&context.repository, target).await?;
    for error in errors {
        tracing::warn!(%error, "a backup is not readable");
    }
    for commit in backups.into_iter().map(|backup| backup.commit) {
        if let Some(wal) = &commit.wal {
            owners.insert(wal.system_id, Some(commit.target.clone()));
            needs.push(wal.clone());
        }
    }
    for system_id in stored_systems(context).await? {
        if !owners.contains_key(&system_id)
            && let Some(owner) = owner_of(context, system_id).await
            && target.is_none_or(|target| *target == owner)
        {
            owners.insert(system_id, Some(owner));
        }
    }
    for known in context.targets.iter().filter(|known| target.is_none_or(|target| *target == known.name)) {
        if !owners.values().flatten().any(|owner| *owner == known.name)
            && let Some(system_id) = live_system(known).await
        {
            owners.insert(system_id, Some(known.name.clone()));
        }
    }
    Ok((owners, needs))
}

async fn stored_systems(context: &Context) -> Result<Vec<SystemId>> {
    let prefixes = context.repository.regions.prefixes_union(layout::WAL).await?;
    let parse = |key: &String| key.strip_prefix(layout::WAL)?.trim_end_matches('/').parse().ok();
    Ok(prefixes.iter().filter_map(parse).collect())
}

/// The target that the newest frame of a cluster names.
async fn owner_of(context: &Context, system_id: SystemId) -> Option<TargetName> {
    let branch = branches(&context.repository.regions, system_id).await.ok()?.pop()?;
    let index = WalIndex::load(&context.repository.regions, branch).await;
    let (epoch, seqs) = index.epochs().last_key_value()?;
    let (seq, _) = seqs.last_key_value()?;
    index.header(&context.repository, epoch, *seq).await.ok().map(|header| header.target)
}

async fn live_system(target: &Target) -> Option<SystemId> {
    let mut client = server::connect(target).await.ok()?;
    client.identify_system().await.ok().map(|id| id.system_id)
}

async fn branch_wal(
    context: &Context,
    branch: BranchId,
    (needs, histories): (&[WalNeed], &Result<Vec<StoredHistory>>),
    older: &BTreeMap<RegionName, Vec<Span>>,
) -> Result<BranchWal> {
    let repository = &context.repository;
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    let total = index.frames().count() as u64;
    let displaced = index.displaced(repository).await;
    let mut errors: Vec<Error> = Vec::new();
    let mut regions = Vec::new();
    for region in repository.regions.all() {
        let unreadable = index.unreadable().iter().find(|(name, _)| *name == region.name).map(|(_, why)| why.clone());
        let lacks = displaced.iter().filter(|displaced| displaced.lacking.contains(&region.name)).count() as u64;
        let frames = index.frames().filter(|(_, held)| held.contains(&region.name)).count() as u64 - lacks;
        let (runs, more) = index.runs(repository, Some(&region.name)).await;
        errors.extend(more);
        let missing_frames = if unreadable.is_some() { 0 } else { total - frames };
        let windows = windows(&runs);
        let older = older.get(&region.name).map(Vec::as_slice).unwrap_or_default();
        let recoverable = windows.iter().filter_map(|window| Span::within(window, (&branch, needs), older));
        regions.push(RegionWal {
            name: region.name.clone(),
            recoverable: recoverable.collect(),
            windows,
            frames,
            missing_frames,
            unreadable,
        });
    }
    let (union, _) = index.runs(repository, None).await;
    let union = windows(&union);
    let (gaps, more) = gaps::read(repository, &branch).await?;
    errors.extend(more);
    let diverged = match histories {
        Ok(histories) => Diverged::behind(&branch, histories, &union),
        Err(error) => {
            errors.push(error.clone());
            Vec::new()
        }
    };
    let mut errors: Vec<_> = errors.iter().map(Error::to_string).collect();
    errors.sort_unstable();
    errors.dedup();
    let BranchId { system_id, timeline, branch } = branch;
    Ok(BranchWal {
        system_id,
        timeline,
        branch,
        regions,
        gaps: gaps.into_iter().map(|gap| RecordedGap::new(gap, &union)).collect(),
        diverged,
        errors,
    })
}
