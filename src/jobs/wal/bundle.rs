//! Bundles: the many small frames of old WAL become few objects. The frames go with a later prune.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::TimeDelta;
use serde::Serialize;

use crate::jobs::Context;
use crate::model::{Branch, EpochId, Error, Result, SystemId, TargetName, Timeline};
use crate::repository::layout;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::wal::bundling::{Bundling, find, make};
use crate::repository::wal::index::branches;

/// WAL that is younger stays in frames, unless somebody says otherwise.
pub const OLDER_THAN: Duration = Duration::from_hours(48);

/// What is bundled.
#[derive(Debug, Clone)]
pub struct Options {
    /// WAL of this target alone.
    pub target: Option<TargetName>,
    /// Epochs that ended so long ago.
    pub older_than: Duration,
    /// Whether it is done, or only said.
    pub execute: bool,
}

/// What was bundled, or would be.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Whether it was done.
    pub executed: bool,
    /// Epoch by epoch.
    pub epochs: Vec<Epoch>,
    /// Frames in all new bundles.
    pub frames: u64,
    /// New bundles.
    pub bundles: u64,
    /// Their bytes in each region.
    pub bytes: u64,
    /// Bundles that some region did not take in time; repair brings them there.
    pub owed: u64,
    /// What was left alone, and why.
    pub notes: Vec<String>,
}

/// One epoch.
#[derive(Debug, Clone, Serialize)]
pub struct Epoch {
    /// Whose WAL.
    pub target: TargetName,
    /// The cluster.
    pub system_id: SystemId,
    /// Its timeline.
    pub timeline: Timeline,
    /// The branch of it.
    pub branch: Branch,
    /// Which.
    pub epoch: EpochId,
    /// Frames that go into bundles.
    pub frames: u64,
    /// How many bundles.
    pub bundles: u64,
    /// Bytes of the frames.
    pub bytes: u64,
}

/// Bundles what is old.
///
/// # Errors
/// A region does not answer, a frame is nowhere intact, or the write quorum was not reached; what was done by then stays,
/// and the next run goes on behind it.
pub async fn run(context: &Context, options: &Options) -> Result<Report> {
    let repository = &context.repository;
    let age = TimeDelta::from_std(options.older_than).map_err(|error| Error::usage("older-than").because(error))?;
    let before = context.clock.now() - age;
    let looking = context.progress.begin("look for old WAL", None);
    let (mut report, mut todo) = (Report { executed: options.execute, ..Report::default() }, Vec::new());
    for system in systems(context).await? {
        for branch in branches(&repository.regions, system).await? {
            let (found, notes) = find(repository, &branch, before).await?;
            report.notes.extend(notes);
            todo.extend(found.into_iter().filter(|of| options.target.as_ref().is_none_or(|only| *only == of.target)));
        }
    }
    drop(looking);
    report.epochs = todo.iter().map(told).collect();
    report.frames = report.epochs.iter().map(|epoch| epoch.frames).sum();
    report.bundles = report.epochs.iter().map(|epoch| epoch.bundles).sum();
    report.bytes = report.epochs.iter().map(|epoch| epoch.bytes).sum();
    if options.execute {
        report.owed = execute(context, &todo, report.bytes).await?;
    }
    Ok(report)
}

async fn systems(context: &Context) -> Result<BTreeSet<SystemId>> {
    let parts = context.repository.regions.prefixes_union(layout::WAL).await?;
    let system = |part: &String| part.strip_prefix(layout::WAL)?.trim_end_matches('/').parse().ok();
    Ok(parts.iter().filter_map(system).collect())
}

async fn execute(context: &Context, todo: &[Bundling], bytes: u64) -> Result<u64> {
    let out = FanOut::new(&context.repository.regions, Patience::PUSH);
    let phase = context.progress.begin("bundle", Some(bytes));
    for bundling in todo {
        for (numbers, bytes) in &bundling.bundles {
            make(&context.repository, &out, bundling, *numbers).await?;
            phase.advance(*bytes);
        }
    }
    Ok(out.drain().await.iter().map(|outcome| outcome.missing_objects).sum())
}

fn told(bundling: &Bundling) -> Epoch {
    let branch = bundling.branch.clone();
    Epoch {
        target: bundling.target.clone(),
        system_id: branch.system_id,
        timeline: branch.timeline,
        branch: branch.branch,
        epoch: bundling.epoch.clone(),
        frames: bundling.bundles.iter().map(|((first, last), _)| last - first + 1).sum(),
        bundles: bundling.bundles.len() as u64,
        bytes: bundling.bundles.iter().map(|(_, bytes)| *bytes).sum(),
    }
}
