//! Where the record of what was done to a directory is kept: beside the backups if this machine can sign, else beside the
//! directory.

use std::path::{Path, PathBuf};

use crate::disk::place;
use crate::jobs::context::Context;
use crate::jobs::reports::outbox;
use crate::model::{Error, Kind, ReportId, Result};
use crate::repository::handle::Writer;
use crate::repository::records::reports::{ReportBody, ReportHead};

/// Where a record is.
#[derive(Debug)]
pub enum Place {
    /// In the regions, or on its way there.
    Regions(ReportId),
    /// Beside the directory, and why not in the regions, if that was tried.
    File(PathBuf, Option<Error>),
}

impl Place {
    /// Its name in the regions.
    pub const fn stored_as(&self) -> Option<&ReportId> {
        match self {
            Self::Regions(id) => Some(id),
            Self::File(..) => None,
        }
    }
}

/// Keeps a record where it can be found again.
///
/// # Errors
/// Nowhere.
pub async fn keep(context: &Context, directory: &Path, (head, body): (&ReportHead, &ReportBody)) -> Result<Place> {
    // What nobody would believe is no record in a region.
    let signs = |writer: &&Writer| !context.repository.trust.refuses(writer.signer.id());
    let mut why = None;
    if let Some(writer) = context.writer.as_ref().filter(signs) {
        match outbox::keep(context, writer, head, body).await {
            Ok(kept) if kept.is_stored() => return Ok(Place::Regions(head.id.clone())),
            // It waits in the state directory of a machine that may be thrown away tomorrow.
            Ok(_) => why = Some(Error::new(Kind::Unavailable, "no region took the record")),
            Err(error) => why = Some(error),
        }
    }
    let path = beside(directory);
    let text = serde_json::to_vec_pretty(&body.report)
        .map_err(|error| Error::failed("a report is not JSON").because(error))?;
    place::place(&path, &text, 0o600)?;
    Ok(Place::File(path, why))
}

fn beside(directory: &Path) -> PathBuf {
    let mut name = directory.as_os_str().to_owned();
    name.push(".drctl-report.json");
    PathBuf::from(name)
}
