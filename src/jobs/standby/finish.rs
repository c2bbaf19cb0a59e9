//! A promotion whose process died: the server follows the order alone, and whoever comes next looks what became of it, tells
//! it, and takes away what made the directory a standby.

use chrono::{DateTime, Utc};

use crate::disk::DiskError;
use crate::disk::lock::Lock;
use crate::jobs::context::Context;
use crate::jobs::feed;
use crate::jobs::restore;
use crate::jobs::standby::control;
use crate::jobs::standby::promote::{OPENING, next, switched, warnings};
use crate::jobs::standby::record::{LOCK, LOG, Record};
use crate::jobs::standby::report::Report;
use crate::jobs::standby::server::Server;
use crate::jobs::standby::words::{Promoted, Wish};
use crate::jobs::wal::reaches;
use crate::model::{Branch, Error, Lsn, Result, ResultExt, Timeline};
use crate::pg::instance::User;
use crate::repository::wal::index::{BranchId, Window, windows};
use crate::repository::wal::log::branch_of;
use crate::repository::wal::reader::BranchLog;

/// Finishes a promotion that was ordered at `at` and followed: what would have come after it comes now. The caller holds the
/// standby's lock.
///
/// # Errors
/// PostgreSQL does not open, or its timeline is not to be found out.
pub(super) async fn finish(context: &Context, record: &Record, at: DateTime<Utc>) -> Result<Promoted> {
    let mut server = Server::of(record).await?;
    let runs = server.is_running()?;
    if runs {
        server.opened(OPENING).await.during(|| "wait until the promoted server is open")?;
    }
    // How it was to be promoted went with whoever ordered it.
    let report = Report::begin(context, record, Wish::default()).since(at);
    let mut told = look(context, record, &server, at).await;
    if let Ok(promoted) = &mut told {
        control::remove(record);
        feed::remove(&record.socket_dir);
        let parted = part(context, record, server.owner()).and_then(|()| if runs { server.reload() } else { Ok(()) });
        promoted.warnings.extend(parted.err().map(|error| format!("not tidied up: {error}")));
    }
    report.end(context, &mut told).await;
    told
}

/// The same for whoever does not hold the lock.
///
/// # Errors
/// As [`finish`]; or somebody feeds it.
pub(super) async fn finish_alone(context: &Context, record: &Record, at: DateTime<Utc>) -> Result<Promoted> {
    let _lock = Lock::acquire(&record.directory.join(LOCK)).during(|| "another drctl feeds this standby")?;
    finish(context, record, at).await
}

/// What the server's files and the regions tell.
async fn look(context: &Context, record: &Record, server: &Server, at: DateTime<Utc>) -> Result<Promoted> {
    let (timeline, (old, switch)) = switched(record, server).await?;
    let mut warnings = warnings(server).await;
    warnings.push("whoever ordered it died before it was over: times are those of files".to_owned());
    let stored = stored(context, record, old, switch).await;
    if stored.is_none() {
        warnings.push(format!("what is stored of timeline {old} is not known: whether all of it is here, too"));
    }
    let end = stored.and_then(|window| window.last_record_end).unwrap_or(switch);
    let lost_to = (switch < end && !reaches(switch, end)).then_some(end);
    let here = stored.filter(|_| lost_to.is_none());
    let seconds = opened(record, timeline).map_or(0.0, |opened| (opened - at).as_seconds_f64().max(0.0));
    Ok(Promoted {
        target: record.target.clone(),
        directory: record.directory.clone(),
        recovered_to: switch,
        switch,
        lost_to,
        old_timeline: old,
        timeline,
        last_commit: here.and_then(|window| window.last_commit),
        stored_at: here.map(|window| window.written_at),
        silent: Vec::new(),
        phases: vec![("promote".to_owned(), seconds)],
        seconds,
        warnings,
        next: next(record, lost_to),
        stored_as: None,
        record: None,
    })
}

/// The stored WAL of the old timeline around the place where it was left, if a region holds it.
async fn stored(context: &Context, record: &Record, timeline: Timeline, switch: Lsn) -> Option<Window> {
    let branch = match timeline {
        Timeline::FIRST => Branch::root(),
        later => branch_of(&std::fs::read(record.directory.join("pg_wal").join(later.history_file_name())).ok()?),
    };
    let branch = BranchId { system_id: record.origin.system_id, timeline, branch };
    let log = BranchLog::load(&context.repository, branch).await;
    windows(&log.runs).into_iter().find(|window| window.start <= switch && switch <= window.end)
}

/// When the server chose its timeline.
fn opened(record: &Record, timeline: Timeline) -> Option<DateTime<Utc>> {
    let path = record.directory.join("pg_wal").join(timeline.history_file_name());
    Some(std::fs::metadata(path).ok()?.modified().ok()?.into())
}

/// Takes away what made a directory a standby of drctl.
pub(super) fn part(context: &Context, record: &Record, owner: Option<User>) -> Result<()> {
    restore::unconfigure(&record.directory, owner)?;
    restore::give(&record.directory.join(LOG), owner)?;
    record.forget(context);
    let lock = record.directory.join(LOCK);
    Ok(std::fs::remove_file(&lock).map_err(|error| DiskError::new("remove", &lock, error))?)
}

/// What whoever wanted to feed a server that is no standby any more is told. A promotion that was ordered here is finished
/// first; whatever else made a primary of a standby is left to whoever did.
pub(super) async fn forsake(context: &Context, record: &Record, promoted: Error) -> Error {
    let Some(at) = record.promotion else { return promoted };
    match finish(context, record, at).await {
        Ok(Promoted { directory, timeline, warnings, .. }) => {
            let (directory, at) = (directory.display(), at.format("%Y-%m-%d %H:%M:%S"));
            let error = Error::refused(format!("{directory} was promoted on {at} UTC, and is on timeline {timeline}"));
            let error = warnings.into_iter().fold(error, Error::because);
            error.hint(
                "it is a cluster of its own now: start and stop it with pg_ctl, let conninfo name it, and back it up",
            )
        }
        Err(error) => promoted.because(format!("not tidied up: {error}")),
    }
}
