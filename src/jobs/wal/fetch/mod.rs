//! One WAL file out of the repository, for the `restore_command` of a standby or of a recovery made by hand.
//!
//! PostgreSQL takes every exit code from 1 to 125 for the end of the archive: it stops recovering there and opens the
//! database. So "absent" is said only of what no region can have: everything else is the file, or an error.
//!
//! `library` finds what was asked for, [`desk`] gives it to other processes and reads ahead, [`borrow`] asks such a
//! desk.

use std::path::PathBuf;

use crate::disk::place::Draft;
use crate::jobs::context::Context;
use crate::jobs::wal::fetch::asker::own_histories;
use crate::jobs::wal::fetch::library::{Found, Library};
use crate::model::{Error, Result, TargetName};
use crate::repository::catalog;

mod asker;
pub mod borrow;
pub mod desk;
mod library;

pub use asker::{Asker, Fetched};

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

/// Fetches a file.
///
/// # Errors
/// Any doubt: a region that may have it does not answer, a key does not open, something is damaged, there is a hole before
/// WAL that exists, or two histories claim the timeline.
pub async fn fetch(context: &Context, request: &Request) -> Result<Fetched> {
    let asker = match Asker::of(&request.data_dir)? {
        Some(asker) => asker,
        None => only_cluster(context, request).await?,
    };
    let library = Library::new(context, &asker, Some(&request.data_dir))?;
    let found = library.find(&request.file).await?;
    let mut draft = match found {
        Found::Absent => return Ok(Fetched::Absent),
        _ => Draft::begin(&request.path, 0o600)?,
    };
    match found {
        Found::Absent => {}
        Found::History(content) => draft.write(&content)?,
        Found::Segment(extract) => library.copy(&extract, &mut |bytes| Ok(draft.write(bytes)?)).await?,
    }
    draft.place()?;
    Ok(Fetched::Copied)
}

/// Without a data directory the backups say which cluster it is, if they are of one alone.
async fn only_cluster(context: &Context, request: &Request) -> Result<Asker> {
    let (backups, _) = catalog::backups(&context.repository, Some(&request.target)).await?;
    let mut clusters: Vec<_> = backups.iter().filter_map(|backup| backup.commit.wal.as_ref()).collect();
    clusters.dedup_by_key(|need| need.system_id);
    match clusters.as_slice() {
        [need] => Ok(Asker {
            system_id: need.system_id,
            segment_size: need.wal_segment_size.bytes(),
            own: own_histories(&request.data_dir),
        }),
        _ => {
            let error = Error::usage("which cluster asks is not known");
            Err(error.hint("run it in the data directory, as PostgreSQL does"))
        }
    }
}
