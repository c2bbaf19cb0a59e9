//! Which point a drill recovers to. One that always takes the newest never learns that old backups rot.

use chrono::{DateTime, TimeDelta, Utc};

use crate::jobs::context::Context;
use crate::jobs::drill::report::Asked;
use crate::jobs::restore::{self, Point, Request};
use crate::model::schedule::Pick;
use crate::model::{Error, Result, ResultExt, TargetName};
use crate::repository::catalog;

/// What is restored and to when; a time that was drawn is noted.
pub(super) async fn point(context: &Context, target: &TargetName, asked: &mut Asked) -> Result<(String, Point)> {
    let what = asked.backup.clone().unwrap_or_else(|| target.to_string());
    match (asked.select, asked.to_time) {
        (_, Some(time)) => Ok((what, Point::Time(time))),
        (Pick::Latest, None) => Ok((what, Point::End)),
        (Pick::Oldest, None) => Ok((oldest(context, target).await?.0, Point::Immediate)),
        (Pick::Random, None) => {
            let (id, began) = oldest(context, target).await?;
            let newest = newest(context, &what).await.during(|| "find the newest point")?;
            let Some(span) = newest.map(|newest| newest - began).filter(|span| *span > TimeDelta::zero()) else {
                return Ok((id, Point::Immediate));
            };
            let time = began + drawn(context, span)?;
            asked.to_time = Some(time);
            Ok((what, Point::Time(time)))
        }
    }
}

/// The oldest backup and when it ended.
async fn oldest(context: &Context, target: &TargetName) -> Result<(String, DateTime<Utc>)> {
    let (backups, _) = catalog::backups(&context.repository, Some(target)).await?;
    let commits = backups.iter().map(|backup| &backup.commit).filter(|commit| commit.wal.is_some());
    let oldest = commits.min_by_key(|commit| commit.finished_at);
    let oldest = oldest.ok_or_else(|| Error::not_found(format!("there is no backup of {target}")))?;
    Ok((oldest.id.to_string(), oldest.finished_at))
}

async fn newest(context: &Context, what: &str) -> Result<Option<DateTime<Utc>>> {
    let request = Request {
        what: what.to_owned(),
        directory: context.scratch.directory.join("drill"),
        tablespaces: std::collections::BTreeMap::new(),
        region: None,
        point: Point::End,
        timeline: None,
        start: false,
        run_as: None,
        delta: false,
        feed: Some(restore::Feed::Staged),
        standby: false,
        memory: restore::Memory::default(),
        invocation: Vec::new(),
        known: None,
    };
    Ok(restore::plan(context, &request).await?.newest_commit)
}

fn drawn(context: &Context, span: TimeDelta) -> Result<TimeDelta> {
    let mut chance = [0; 8];
    context.rng.fill(&mut chance)?;
    let milliseconds = u64::try_from(span.num_milliseconds()).unwrap_or(0);
    let drawn = u64::from_le_bytes(chance) % milliseconds.max(1);
    Ok(TimeDelta::milliseconds(i64::try_from(drawn).unwrap_or(0)))
}
