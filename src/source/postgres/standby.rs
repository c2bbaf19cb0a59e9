//! A standby that lends its files: the primary is put into backup mode and left alone, the reading happens here.
//!
//! A standby's file is good for a backup that began at `start` once the standby has completed a restartpoint at or after
//! it: everything before `start` is on its disk then, and replay from `start` repairs whatever is older or newer. What no WAL
//! carries (`pg_control`, prepared transactions, configuration in the data directory) comes from the primary, over SQL.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::SourceError;
use super::rules::{self, Verdict};
use super::session::{Identity, Role, Session};
use super::started::Started;
use crate::model::{Lsn, Timeline};
use crate::pg::conninfo::ConnInfo;
use crate::source::{BATCH_PAGES, Batch, FileId, Item, PAGE_SIZE, Piece};

/// How often the standby is asked how far it is.
const POLL: Duration = Duration::from_millis(200);
/// How often a restartpoint is asked for while it has none that is new enough.
const CHECKPOINT_AGAIN: Duration = Duration::from_secs(5);
/// What WAL keeps equal on both servers.
const REPLICATED: [&str; 5] = ["base/", "global/", "pg_tblspc/", "pg_xact/", "pg_multixact/"];
/// What a role needs on the primary.
const GRANT: &str = "GRANT pg_read_server_files TO <role>; GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean), \
                     pg_stat_file(text, boolean), pg_read_binary_file(text, bigint, bigint, boolean) TO <role>;";

/// Whether a file of the data directory may be read from a standby.
pub fn is_replicated(path: &str) -> bool {
    REPLICATED.iter().any(|directory| path.starts_with(directory))
}

/// A standby of the server that is backed up.
#[derive(Debug)]
pub struct Standby {
    session: Session,
    /// Its data directory, on this host.
    pub data_directory: PathBuf,
}

impl Standby {
    /// Connects, and makes sure that it is a standby of that cluster.
    ///
    /// # Errors
    /// It is none, or of another cluster.
    pub async fn open(
        conninfo: &ConnInfo,
        data_directory: Option<PathBuf>,
        primary: &Identity,
    ) -> Result<Self, SourceError> {
        let session = Session::connect(conninfo).await?;
        let own = session.identify(Role::Standby).await?;
        if own.cluster != primary.cluster {
            let text = format!(
                "the standby is of system {}, the primary of {}",
                own.cluster.system_id, primary.cluster.system_id
            );
            return Err(SourceError::Unsupported(text));
        }
        let data_directory = match data_directory {
            Some(directory) => directory,
            None => PathBuf::from(session.data_directory().await?),
        };
        Ok(Self { session, data_directory })
    }

    /// Who it says it is now.
    pub(super) async fn identity(&self) -> Result<Identity, SourceError> {
        self.session.identify(Role::Standby).await
    }

    /// Waits until everything before the start of the backup is on its disk.
    ///
    /// # Errors
    /// It is promoted, or not there within `patience`.
    pub async fn reach(&self, started: Started, patience: Duration) -> Result<(), SourceError> {
        let since = Instant::now();
        let mut asked: Option<Instant> = None;
        let mut refused = None;
        loop {
            let now = self.position().await?;
            if now.redo >= started.lsn && now.timeline == started.timeline {
                return Ok(());
            }
            if since.elapsed() >= patience {
                return Err(SourceError::StandbyBehind {
                    start: started.lsn,
                    redo: now.redo,
                    replayed: now.replayed,
                    waited: patience,
                    hint: refused,
                });
            }
            if now.replayed > started.lsn && asked.is_none_or(|asked| asked.elapsed() >= CHECKPOINT_AGAIN) {
                // Without the right to ask for one, the next by time will do.
                asked = Some(Instant::now());
                refused = self.session.checkpoint().await.err().map(|error| error.to_string());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Makes sure that it was a standby all the while: its session lives, and it still replays.
    ///
    /// # Errors
    /// It was promoted or restarted.
    pub async fn still_replays(&self, started: Started) -> Result<(), SourceError> {
        let now = self.position().await.map_err(|error| match error {
            SourceError::Pg(error) => SourceError::SessionLost(format!("with the standby: {error}")),
            other => other,
        })?;
        started.same_timeline(now.timeline)
    }

    async fn position(&self) -> Result<Position, SourceError> {
        let row = self.session.row(
            "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_wal_replay_lsn(), c.redo_lsn, c.timeline_id,
                    r.min_recovery_end_timeline
             FROM pg_catalog.pg_control_checkpoint() c, pg_catalog.pg_control_recovery() r",
        );
        let row = row.await?;
        if row.text(0)? != "t" {
            return Err(SourceError::Promoted);
        }
        let replayed = row.optional(1).map_or(Ok(Lsn(0)), |_| row.number(1))?;
        let (restartpoint, written) = (Timeline(row.number(3)?), Timeline(row.number(4)?));
        Ok(Position { replayed, redo: row.number(2)?, timeline: restartpoint.max(written) })
    }
}

struct Position {
    replayed: Lsn,
    /// Where its newest restartpoint would start replay.
    redo: Lsn,
    /// Of its newest restartpoint, or of a page that it has written since: the control file says so before the page is.
    timeline: Timeline,
}

/// Sends the files of the primary that a standby does not have, or has of its own.
///
/// # Errors
/// The role may not read them.
pub async fn send_rest(primary: &Session, items: &mpsc::Sender<Item>, first: FileId) -> Result<FileId, SourceError> {
    let mut next = first;
    let mut directories = vec![String::new()];
    while let Some(directory) = directories.pop() {
        for entry in primary.entries(&directory).await.map_err(needs)? {
            let path = if directory.is_empty() { entry.name } else { format!("{directory}/{}", entry.name) };
            let own = !is_replicated(&path) && !is_replicated(&format!("{path}/"));
            match rules::verdict(&path) {
                Verdict::Take if own && entry.is_directory => directories.push(path),
                Verdict::Take if own && send_file(primary, items, next, &path).await? => next = FileId(next.0 + 1),
                _ => {}
            }
        }
    }
    Ok(next)
}

/// Sends one file over SQL; `false` = it is gone.
async fn send_file(primary: &Session, items: &mpsc::Sender<Item>, id: FileId, path: &str) -> Result<bool, SourceError> {
    const BATCH: usize = BATCH_PAGES * PAGE_SIZE;
    let send = async |item| items.send(item).await.map_err(|_| SourceError::ReceiverGone);
    let (mut size, mut announced) = (0, false);
    loop {
        let Some(mut data) = primary.read_file(path, size, BATCH).await.map_err(needs)? else {
            if announced {
                send(Item::FileVanished { id }).await?;
            }
            return Ok(announced);
        };
        if !announced {
            send(Item::File { id, path: path.to_owned(), mode: 0o600 }).await?;
            announced = true;
        }
        let read = data.len();
        if read > 0 {
            let first_page = u32::try_from(size / PAGE_SIZE as u64)
                .map_err(|_| SourceError::Unsupported(format!("{path} has more than 2^32 pages")))?;
            data.resize(read.next_multiple_of(PAGE_SIZE), 0);
            let pages = u32::try_from(data.len() / PAGE_SIZE).unwrap_or(u32::MAX);
            send(Item::Batch(Batch { pieces: vec![Piece { file: id, first_page, pages }], data, ..Batch::default() }))
                .await?;
        }
        size += read as u64;
        if read < BATCH {
            send(Item::FileDone { id, size, damaged_blocks: Vec::new() }).await?;
            return Ok(true);
        }
    }
}

/// Turns "permission denied" into what must be granted.
pub(super) fn needs(error: SourceError) -> SourceError {
    match error {
        error if error.is_denied() => SourceError::NotGranted { message: error.to_string(), grant: GRANT.to_owned() },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wal_carries_may_come_from_a_standby() {
        for path in ["base/5/1", "global/1262", "pg_tblspc/16385/PG_15_202209061/5/1", "pg_xact/0000"] {
            assert!(is_replicated(path), "{path}");
        }
        for path in ["PG_VERSION", "postgresql.auto.conf", "pg_twophase/000002E4", "pg_commit_ts/0000", "pg_logical/x"]
        {
            assert!(!is_replicated(path), "{path}");
        }
    }
}
