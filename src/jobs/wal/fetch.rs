//! One WAL file out of the repository, for the `restore_command` of a standby or of a recovery made by hand.
//!
//! PostgreSQL takes every exit code from 1 to 125 for the end of the archive: it stops recovering there and opens the
//! database. So "absent" is said only of what no region can have: everything else is the file, or an error.

use std::path::PathBuf;

use crate::disk::place::Draft;
use crate::jobs::context::Context;
use crate::jobs::wal::position::reaches;
use crate::model::{Branch, Error, Kind, Lsn, RegionName, Result, ResultExt, SegmentName, SystemId, TargetName};
use crate::model::{Timeline, WalSegmentSize};
use crate::pg::control::ControlFile;
use crate::pg::history::{History, Reign};
use crate::repository::catalog;
use crate::repository::layout;
use crate::repository::wal_index::{self, BranchId, Window};
use crate::repository::wal_log::{branch_of, read_history};
use crate::repository::wal_reader::BranchLog;

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whose WAL.
    pub target: TargetName,
    /// PostgreSQL's name of the file.
    pub file: String,
    /// Where it is to be.
    pub path: PathBuf,
    /// The data directory that asks.
    pub data_dir: PathBuf,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// It is there, whole and durable.
    Copied,
    /// No region has it, and all that may have it were asked.
    Absent,
}

/// The cluster that asks.
#[derive(Debug, Clone, Copy)]
struct Cluster {
    system_id: SystemId,
    size: WalSegmentSize,
}

/// Fetches a file.
///
/// # Errors
/// Any doubt: a region that may have it does not answer, a key does not open, something is damaged, there is a hole before
/// WAL that exists, or two histories claim the timeline.
pub async fn fetch(context: &Context, request: &Request) -> Result<Fetched> {
    let cluster = cluster(context, request).await?;
    if let Some(timeline) = history_of(&request.file) {
        return history(context, request, cluster, timeline).await;
    }
    let name = SegmentName::parse(&request.file, cluster.size);
    let name = name.ok_or_else(|| Error::usage(format!("`{}` is no WAL file", request.file)))?;
    segment(context, request, cluster, name).await.during(|| format!("fetch {}", request.file))
}

fn history_of(file: &str) -> Option<Timeline> {
    let number = file.strip_suffix(".history").filter(|number| number.len() == 8)?;
    u32::from_str_radix(number, 16).ok().map(Timeline)
}

/// The data directory says which cluster it is; without one the backups do, if they are of one cluster alone.
async fn cluster(context: &Context, request: &Request) -> Result<Cluster> {
    if let Ok(bytes) = std::fs::read(request.data_dir.join("global/pg_control")) {
        let control = ControlFile::parse(&bytes).map_err(|error| Error::damaged("pg_control").because(error))?;
        return Ok(Cluster { system_id: control.system_id, size: control.wal_segment_size });
    }
    let (backups, _) = catalog::backups(&context.repository, Some(&request.target)).await?;
    let mut clusters: Vec<_> = backups.iter().filter_map(|backup| backup.commit.wal.as_ref()).collect();
    clusters.dedup_by_key(|need| need.system_id);
    match clusters.as_slice() {
        [need] => Ok(Cluster { system_id: need.system_id, size: need.wal_segment_size }),
        _ => {
            let error = Error::usage("which cluster asks is not known");
            Err(error.hint("run it in the data directory, as PostgreSQL does"))
        }
    }
}

/// The branches of a timeline whose history is stored.
async fn branches(context: &Context, cluster: Cluster, timeline: Timeline) -> Result<(Vec<Branch>, Vec<RegionName>)> {
    let (found, silent) = histories(context, cluster).await;
    Ok((found.into_iter().filter(|(known, _)| *known == timeline).map(|(_, branch)| branch).collect(), silent))
}

/// Every stored history, and the regions that do not tell.
async fn histories(context: &Context, cluster: Cluster) -> (Vec<(Timeline, Branch)>, Vec<RegionName>) {
    let prefix = layout::histories(cluster.system_id);
    let (mut found, mut silent) = (Vec::new(), Vec::new());
    for (region, listed) in context.repository.regions.list_each(&prefix).await {
        let Ok(objects) = listed else {
            silent.push(region);
            continue;
        };
        let parsed = objects.iter().filter_map(|object| layout::parse_branch(object.key.strip_prefix(&prefix)?));
        found.extend(parsed);
    }
    found.sort_unstable();
    found.dedup();
    (found, silent)
}

async fn history(context: &Context, request: &Request, cluster: Cluster, timeline: Timeline) -> Result<Fetched> {
    let (found, silent) = branches(context, cluster, timeline).await?;
    match found.as_slice() {
        [] => must_be_unknown(context, cluster, timeline, &silent).await.map(|()| Fetched::Absent),
        [branch] => {
            let content = read_history(&context.repository, cluster.system_id, timeline, branch).await?;
            let mut draft = Draft::begin(&request.path, 0o600)?;
            draft.write(&content)?;
            draft.place()?;
            Ok(Fetched::Copied)
        }
        _ => Err(ambiguous(timeline)),
    }
}

fn ambiguous(timeline: Timeline) -> Error {
    let error = Error::refused(format!("several histories call themselves timeline {timeline}"));
    error.hint(
        "two servers were promoted independently: `drctl restore --timeline` restores to a point before they parted",
    )
}

/// Every acknowledged write is in a quorum of regions, so that all but one less than that must have been asked.
fn must_be_all(context: &Context, silent: &[RegionName]) -> Result<()> {
    if silent.len() < context.repository.regions.lowest_quorum() {
        return Ok(());
    }
    let names = silent.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let error = Error::new(Kind::Unavailable, "whether the repository has it cannot be told");
    Err(error.because(format!("{names}: no answer")).transient(true))
}

/// WAL without the history of its timeline is one that is still to come, and not the end of the archive.
async fn must_be_unknown(context: &Context, cluster: Cluster, timeline: Timeline, silent: &[RegionName]) -> Result<()> {
    must_be_all(context, silent)?;
    let stored = wal_index::branches(&context.repository.regions, cluster.system_id).await?;
    if stored.iter().all(|branch| branch.timeline != timeline) {
        return Ok(());
    }
    let error = Error::refused(format!("WAL of timeline {timeline} is stored, and its history is in no region"));
    Err(error.hint(format!("hand `{}` of the server's pg_wal to `drctl wal push`", timeline.history_file_name())))
}

/// PostgreSQL takes the end of a timeline for the end of recovery. It is not, if a newer one left it behind `end`: the
/// WAL in between is missing, and all that the newer one holds would be dropped.
async fn must_be_last(context: &Context, cluster: Cluster, history: &History, end: Lsn) -> Result<()> {
    let (known, silent) = histories(context, cluster).await;
    must_be_all(context, &silent)?;
    for stored in wal_index::branches(&context.repository.regions, cluster.system_id).await? {
        let BranchId { system_id, timeline, branch } = stored;
        if timeline <= history.timeline() || !known.contains(&(timeline, branch.clone())) {
            continue;
        }
        let content = read_history(&context.repository, system_id, timeline, &branch).await?;
        let newer = parse(timeline, &content)?;
        let left = newer.reign_of(history.timeline()).and_then(|reign| reign.end);
        let descends = newer.entries().starts_with(history.entries());
        if descends && left.is_some_and(|left| !reaches(end, left)) {
            let text = format!("the WAL of timeline {} has a hole at {end}", history.timeline());
            let error =
                Error::refused(text).because(format!("timeline {timeline}, which is stored, goes on behind it"));
            return Err(error.hint("recovery must not end here: drctl wal status shows what is missing"));
        }
    }
    Ok(())
}

fn parse(timeline: Timeline, content: &[u8]) -> Result<History> {
    let text = std::str::from_utf8(content);
    let text = text.map_err(|error| Error::damaged(format!("the history of timeline {timeline}")).because(error))?;
    Ok(History::parse(timeline, text)?)
}

/// The history of a timeline: the asking cluster's own file decides between two of one number.
async fn lineage(
    context: &Context,
    request: &Request,
    cluster: Cluster,
    timeline: Timeline,
) -> Result<Option<(Branch, History)>> {
    if timeline == Timeline::FIRST {
        return Ok(Some((Branch::root(), History::without_ancestors(timeline))));
    }
    let own = request.data_dir.join("pg_wal").join(timeline.history_file_name());
    let content = match std::fs::read(own) {
        Ok(content) => content,
        Err(_) => {
            let (found, silent) = branches(context, cluster, timeline).await?;
            match found.as_slice() {
                [] => return must_be_unknown(context, cluster, timeline, &silent).await.map(|()| None),
                [branch] => read_history(&context.repository, cluster.system_id, timeline, branch).await?.to_vec(),
                _ => return Err(ambiguous(timeline)),
            }
        }
    };
    Ok(Some((branch_of(&content), parse(timeline, &content)?)))
}

/// WAL of one timeline that goes into the file.
struct Part {
    log: BranchLog,
    from: Lsn,
    to: Lsn,
}

async fn segment(context: &Context, request: &Request, cluster: Cluster, name: SegmentName) -> Result<Fetched> {
    let Some((_, history)) = lineage(context, request, cluster, name.timeline).await? else {
        return Ok(Fetched::Absent);
    };
    let (start, end) = (name.start(cluster.size), Lsn(name.start(cluster.size).0 + cluster.size.bytes()));
    let mut parts = Vec::new();
    for Reign { timeline, begin, end: switch } in history.ancestry() {
        let (from, to) = (begin.max(start), switch.map_or(end, |switch| switch.min(end)));
        if from >= to {
            continue;
        }
        let Some((branch, _)) = lineage(context, request, cluster, timeline).await? else {
            return Err(Error::refused(format!("the history of timeline {timeline} is in no region")));
        };
        let branch = BranchId { system_id: cluster.system_id, timeline, branch };
        let log = BranchLog::load(&context.repository, branch).await;
        parts.push(Part { log, from, to });
    }
    // The timeline begins behind this segment: there never was such a file.
    if parts.last().is_none_or(|part| part.log.index.branch().timeline != name.timeline) {
        return Ok(Fetched::Absent);
    }
    // Streaming that began on this timeline stored its first segment whole, the part of the older timeline with it.
    if parts.last().is_some_and(|part| part.log.window(start).is_some()) {
        parts.drain(..parts.len().saturating_sub(1));
        parts.iter_mut().for_each(|part| part.from = start);
    }
    let Some(last) = parts.last_mut() else { return Ok(Fetched::Absent) };
    match extent(context, last, (cluster, &history)).await? {
        None => Ok(Fetched::Absent),
        Some(to) => {
            last.to = to;
            copy(context, request, cluster.size, &parts).await.map(|()| Fetched::Copied)
        }
    }
}

/// Up to where a part can be given; `None` = nothing of it exists.
async fn extent(context: &Context, part: &Part, (cluster, history): (Cluster, &History)) -> Result<Option<Lsn>> {
    let window = part.log.window(part.from);
    if window.is_some_and(|window| window.end >= part.to) {
        return Ok(Some(part.to));
    }
    let end = window.map_or(part.from, |window| window.end);
    if part.log.runs.iter().any(|run| run.end() > end) {
        let error =
            Error::refused(format!("the WAL of timeline {} has a hole at {end}", part.log.index.branch().timeline));
        return Err(error.hint("recovery must not end here: drctl wal status shows what is missing"));
    }
    if let Some(damage) = part.log.damaged.first() {
        return Err(damage.clone().during("find the end of stored WAL"));
    }
    let silent: Vec<_> = part.log.index.unreadable().iter().map(|(region, _)| region.clone()).collect();
    must_be_all(context, &silent)?;
    must_be_last(context, cluster, history, end).await?;
    // The end of all WAL: up to the last complete record it is right, and zeros behind it say so to PostgreSQL.
    let complete = window.and_then(|Window { last_record_end, .. }| last_record_end);
    Ok(complete.filter(|complete| *complete > part.from))
}

/// Writes the file beside its place, and puts it there when it is whole and durable.
async fn copy(context: &Context, request: &Request, size: WalSegmentSize, parts: &[Part]) -> Result<()> {
    let mut draft = Draft::begin(&request.path, 0o600)?;
    let mut written = 0;
    for part in parts {
        let mut sink = |_, wal: &[u8]| {
            draft.write(wal)?;
            Ok(std::ops::ControlFlow::Continue(()))
        };
        written += part.log.read(&context.repository, &context.ring, (part.from, part.to), &mut sink).await?;
    }
    let zeros = vec![0; 64 * 1024];
    while written < size.bytes() {
        let length = usize::try_from(size.bytes() - written).unwrap_or(usize::MAX).min(zeros.len());
        draft.write(zeros.get(..length).unwrap_or_default())?;
        written += length as u64;
    }
    Ok(draft.place()?)
}
