//! Reports on their way: in the state directory until every region holds them, so that an outage of all regions can be
//! reported while it lasts. They are sealed there as they will be in the regions.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::model::{Error, ReportId, Result};
use crate::repository::handle::Writer;
use crate::repository::records::reports::{self, ReportBody, ReportHead, Sealed};
use crate::repository::regions::fan_out::LaneOutcome;

const OUTBOX: &str = "reports";

/// What became of a report.
#[derive(Debug)]
pub struct Kept {
    /// The report.
    pub id: ReportId,
    /// What each region made of it.
    pub regions: Vec<LaneOutcome>,
    /// Why it could not be put aside for regions that lack it; repair brings it to them.
    pub not_waiting: Option<Error>,
}

impl Kept {
    /// Whether a region holds it.
    pub fn is_stored(&self) -> bool {
        self.regions.iter().any(|lane| lane.missing_objects == 0)
    }
}

/// How long whoever brings a report of his own spends on older ones.
const BROUGHT_ALONG: Duration = Duration::from_secs(30);

/// Seals a report, brings it to every region that answers, and keeps it for the others. Older reports go along.
///
/// # Errors
/// It could not be sealed; or no region took it and the state directory did not either.
pub async fn keep(context: &Context, writer: &Writer, head: &ReportHead, body: &ReportBody) -> Result<Kept> {
    let sealed = reports::seal_report(&context.repository, writer, head, body).await?;
    let path = outbox(&context.state_dir).join(sealed.id.as_str());
    let waiting = put_aside(&path, &sealed);
    let regions = reports::spread(&context.repository, &sealed).await;
    let kept = Kept { id: sealed.id, regions, not_waiting: waiting.err() };
    if kept.is_stored() {
        bring_along(context, &kept.id).await;
    }
    if kept.regions.iter().all(|lane| lane.missing_objects == 0) {
        if let Err(error) = remove(&path) {
            tracing::info!(%error, "a report that every region holds still waits here");
        }
        return Ok(Kept { not_waiting: None, ..kept });
    }
    match kept.not_waiting {
        Some(error) if !kept.is_stored() => Err(error.during("put the report aside, since no region took it")),
        not_waiting => Ok(Kept { not_waiting, ..kept }),
    }
}

/// What keeps an older report here has no say in what becomes of the new one.
async fn bring_along(context: &Context, own: &ReportId) {
    let older = owed(&context.state_dir).into_iter().filter(|path| !path.ends_with(own.as_str())).collect();
    match tokio::time::timeout(BROUGHT_ALONG, bring(context, older)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::info!(%error, "older reports stay in the state directory"),
        Err(_) => tracing::info!("older reports stay in the state directory: a region does not answer in time"),
    }
}

/// Whether a report waits here.
pub fn has_owed(state_dir: &Path) -> bool {
    !owed(state_dir).is_empty()
}

/// Brings reports to the regions that lack them and forgets those that all hold. Answers how many are still owed. What
/// cannot be read stays, and is told.
///
/// # Errors
/// The state directory cannot be written.
pub async fn spread(context: &Context) -> Result<usize> {
    bring(context, owed(&context.state_dir)).await
}

async fn bring(context: &Context, paths: Vec<PathBuf>) -> Result<usize> {
    let mut left = 0;
    for path in paths {
        let sealed: Sealed = match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(sealed)) => sealed,
            // Another process brought it meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Ok(Err(_)) | Err(_) => {
                tracing::error!(path = %path.display(), "a report that waits here is not readable");
                left += 1;
                continue;
            }
        };
        let regions = reports::spread(&context.repository, &sealed).await;
        let missing: Vec<_> = regions.iter().filter(|lane| lane.missing_objects > 0).collect();
        for lane in &missing {
            let (region, why) = (&lane.region, lane.last_error.as_deref().unwrap_or_default());
            tracing::info!(%region, report = %sealed.id, why, "a report is owed");
        }
        match missing.is_empty() {
            true => remove(&path)?,
            false => left += 1,
        }
    }
    Ok(left)
}

fn outbox(state_dir: &Path) -> PathBuf {
    state_dir.join(OUTBOX)
}

/// The files of reports, oldest first. Half a file that a killed process left begins with a dot.
fn owed(state_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(outbox(state_dir)).into_iter().flatten().flatten();
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."));
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).filter(named).collect();
    paths.sort();
    paths
}

fn put_aside(path: &Path, sealed: &Sealed) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let bytes = serde_json::to_vec(sealed).map_err(|error| Error::failed("a report is not JSON").because(error))?;
    if let Some(directory) = path.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| DiskError::new("create directory", directory, error))?;
    }
    Ok(place::place(path, &bytes, 0o600)?)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(DiskError::new("remove", path, error).into()),
        _ => Ok(()),
    }
}
