//! A base backup on the server's own host: the server is put into backup mode, and its files are read beside it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use futures::future;
use tokio::sync::mpsc;

use super::error::SourceError;
use super::listing::{self, CONTROL_FILE, Listing};
use super::options::Lender;
use super::options::Options;
use super::pace::Pace;
use super::pages::PageCheck;
use super::reader::Reading;
use super::session::{Identity, Role, Session};
use super::standby::{self, Standby};
use super::started::Started;
use crate::model::{Result, SystemId};
use crate::pg::control::{ControlFile, State};
use crate::source::{Batch, Begun, FileId, Finished, Item, PAGE_SIZE, PhysicalSource, Piece, SmallFile, Unread};

/// The server rewrites its control file in place, and a reader may see half of it. Two seconds are more than any write.
const CONTROL_TRIES: u32 = 100;
const CONTROL_PAUSE: Duration = Duration::from_millis(20);

/// A backup that reads the data directory.
#[derive(Debug)]
pub struct LocalBackup {
    options: Options,
    session: Session,
    data_directory: PathBuf,
    identity: Identity,
    unread: Option<(Arc<dyn Unread>, bool)>,
    standby: Option<(Standby, Duration)>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Open,
    Begun { started: Started, listing: Listing },
    Copied(Started),
    Over,
}

impl LocalBackup {
    /// Connects, finds the data directory and makes sure that it is the one of this server. Nothing changes on the
    /// server yet.
    ///
    /// # Errors
    /// The server cannot be backed up, or its data directory is not here.
    pub async fn open(options: Options) -> Result<Self, SourceError> {
        let session = Session::connect(&options.conninfo).await?;
        let data_directory = match &options.data_directory {
            Some(directory) => directory.clone(),
            None => PathBuf::from(session.data_directory().await?),
        };
        let identity =
            recognise(&data_directory, State::InProduction, async || session.identify(Role::Primary).await).await?;
        Ok(Self { options, session, data_directory, identity, standby: None, unread: None, stage: Stage::Open })
    }

    /// The same with the files of a standby on this host.
    ///
    /// # Errors
    /// As [`open`](Self::open), of either server.
    pub async fn open_standby(options: Options, lender: &Lender) -> Result<Self, SourceError> {
        let session = Session::connect(&options.conninfo).await?;
        let identity = session.identify(Role::Primary).await?;
        let standby = Standby::open(&lender.conninfo, options.data_directory.clone(), &identity).await?;
        let data_directory = standby.data_directory.clone();
        recognise(&data_directory, State::InArchiveRecovery, async || standby.identity().await).await?;
        // Found out now, and not after hours of reading.
        read_control_over(&session).await?;
        let standby = Some((standby, lender.patience));
        Ok(Self { options, session, data_directory, identity, standby, unread: None, stage: Stage::Open })
    }

    async fn start(&mut self) -> Result<Begun, SourceError> {
        if !matches!(self.stage, Stage::Open) {
            return Err(SourceError::OutOfOrder);
        }
        self.stage = Stage::Over;
        let version = self.identity.cluster.version;
        let (lsn, timeline) = self.session.start_backup(version, &self.options.label, self.options.fast).await?;
        let started = Started { lsn, timeline };
        if let Some((standby, patience)) = &self.standby {
            self.session.while_alive(standby.reach(started, *patience)).await?;
        }
        let (directory, name) = (self.data_directory.clone(), self.identity.version_directory());
        let mut listing = blocking(move || listing::list(&directory, &name)).await?;
        if self.standby.is_some() {
            listing.files.retain(|file| standby::is_replicated(&file.path));
        }
        for note in &listing.notes {
            tracing::warn!(directory = %self.data_directory.display(), "{note}");
        }
        let listed: u64 = listing.files.iter().map(|file| file.size).sum();
        self.stage = Stage::Begun { started, listing };
        Ok(Begun {
            start_lsn: lsn,
            timeline,
            cluster: self.identity.cluster.clone(),
            estimated_bytes: listed + PAGE_SIZE as u64,
        })
    }

    async fn read(&mut self, items: mpsc::Sender<Item>) -> Result<(), SourceError> {
        let (started, listing) = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Begun { started, listing } => (started, listing),
            other => {
                self.stage = other;
                return Err(SourceError::OutOfOrder);
            }
        };
        self.session.while_alive(self.send_all(listing, started, &items)).await?;
        self.stage = Stage::Copied(started);
        Ok(())
    }

    async fn send_all(
        &self,
        listing: Listing,
        started: Started,
        items: &mpsc::Sender<Item>,
    ) -> Result<(), SourceError> {
        for tablespace in listing.tablespaces {
            send(items, Item::Tablespace { oid: tablespace.oid, location: tablespace.location }).await?;
        }
        for directory in listing.directories {
            send(items, Item::Directory { path: directory.path, mode: directory.mode }).await?;
        }
        let control_id = u32::try_from(listing.files.len()).map(FileId);
        let control_id = control_id.map_err(|_| SourceError::Unsupported("more than 2^32 files".to_owned()))?;
        let check = PageCheck { checksums: self.identity.cluster.checksums, start: started.lsn };
        let pace = Pace::new(self.options.max_read_rate, Arc::clone(&self.options.clock));
        let reading = Reading::new(self.data_directory.clone(), listing.files, check, pace);
        let reading = Arc::new(reading.leaving_out(self.unread.clone()));
        let _stop = StopOnDrop(Arc::clone(&reading));
        let answers = reading.start(self.options.threads(), items)?.into_iter().map(|answer| async {
            answer.await.unwrap_or_else(|_| Err(SourceError::ReaderDied("it panicked".to_owned())))
        });
        future::try_join_all(answers).await?;
        // Every page that was read had reached the log by now.
        let end = self.session.insert_lsn().await?;
        for held in reading.take_held() {
            send(items, held.settle(end)).await?;
        }
        let control = match &self.standby {
            None => {
                let directory = self.data_directory.clone();
                (control_id, blocking(move || read_control(&directory)).await?)
            }
            Some((standby, _)) => {
                standby.still_replays(started).await?;
                let next = standby::send_rest(&self.session, items, control_id).await?;
                (next, read_control_over(&self.session).await?)
            }
        };
        self.control_file(items, control).await
    }

    /// Last: its checkpoint may be newer than the backup's start, never older than a file that was read before it.
    async fn control_file(
        &self,
        items: &mpsc::Sender<Item>,
        (id, control): (FileId, Control),
    ) -> Result<(), SourceError> {
        if control.parsed.system_id != self.identity.cluster.system_id {
            return Err(SourceError::ControlFile(other_cluster(control.parsed.system_id, &self.identity)));
        }
        let size = control.bytes.len() as u64;
        let pieces = vec![Piece { file: id, first_page: 0, pages: 1 }];
        send(items, Item::File { id, path: CONTROL_FILE.to_owned(), mode: control.mode }).await?;
        send(items, Item::Batch(Batch { pieces, data: control.bytes, ..Batch::default() })).await?;
        send(items, Item::FileDone { id, size, damaged_blocks: Vec::new() }).await
    }

    async fn stop(&mut self) -> Result<Finished, SourceError> {
        let Stage::Copied(started) = self.stage else { return Err(SourceError::OutOfOrder) };
        self.stage = Stage::Over;
        let stopped = self.session.stop_backup(self.identity.cluster.version).await?;
        started.same_timeline(stopped.timeline)?;
        let mut files = vec![SmallFile { path: "backup_label".to_owned(), bytes: stopped.label.into_bytes() }];
        if !stopped.tablespace_map.is_empty() {
            let bytes = stopped.tablespace_map.into_bytes();
            files.push(SmallFile { path: "tablespace_map".to_owned(), bytes });
        }
        started.check_label(&files, &self.identity.cluster)?;
        Ok(Finished { stop_lsn: stopped.stop_lsn, timeline: stopped.timeline, files, finished_at: stopped.at })
    }
}

#[async_trait]
impl PhysicalSource for LocalBackup {
    async fn begin(&mut self) -> Result<Begun> {
        Ok(self.start().await?)
    }

    async fn copy(&mut self, items: mpsc::Sender<Item>) -> Result<()> {
        Ok(self.read(items).await?)
    }

    fn leave_out(&mut self, unread: Arc<dyn Unread>, proof: bool) -> bool {
        self.unread = Some((unread, proof));
        true
    }

    fn method(&self) -> &'static str {
        if self.standby.is_some() { "standby" } else { "local" }
    }

    async fn finish(&mut self) -> Result<Finished> {
        Ok(self.stop().await?)
    }
}

/// Threads cannot be cancelled: they must be told.
struct StopOnDrop(Arc<Reading>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Compares the control file on this disk with what the server reads from its own. The system identifier alone would
/// accept a standby or a clone on this host; their latest checkpoints differ, or they are not in production.
async fn recognise(
    data_directory: &Path,
    state: State,
    identify: impl AsyncFn() -> Result<Identity, SourceError>,
) -> Result<Identity, SourceError> {
    let mut tries = 0;
    loop {
        let identity = identify().await?;
        let directory = data_directory.to_owned();
        let control = blocking(move || read_control(&directory)).await?.parsed;
        let wrong = |reason| SourceError::NotThisServer { path: data_directory.to_owned(), reason };
        if control.system_id != identity.cluster.system_id {
            return Err(wrong(other_cluster(control.system_id, &identity)));
        }
        if control.state != state {
            return Err(wrong(format!("its control file says {:?}", control.state)));
        }
        if (control.checkpoint, control.timeline) == (identity.checkpoint, identity.timeline) {
            return Ok(identity);
        }
        // A checkpoint may have ended between the two looks; three in a row do not.
        tries += 1;
        if tries == 3 {
            let (here, there) = (control.checkpoint, identity.checkpoint);
            return Err(wrong(format!("its latest checkpoint is at {here}, the server's at {there}")));
        }
    }
}

fn other_cluster(here: SystemId, identity: &Identity) -> String {
    format!("its system identifier is {here}, the server's {}", identity.cluster.system_id)
}

struct Control {
    bytes: Vec<u8>,
    mode: u32,
    parsed: ControlFile,
}

fn read_control(data_directory: &Path) -> Result<Control, SourceError> {
    let path = data_directory.join(CONTROL_FILE);
    let unreadable = |source| SourceError::Read { path: CONTROL_FILE.to_owned(), source };
    if !data_directory.is_dir() {
        return Err(SourceError::NoDataDirectory(data_directory.to_owned()));
    }
    let mut tries = 0;
    loop {
        let mode = fs::metadata(&path).map_err(unreadable)?.permissions().mode() & 0o7777;
        let bytes = fs::read(&path).map_err(unreadable)?;
        tries += 1;
        match ControlFile::parse(&bytes) {
            Ok(parsed) => return Ok(Control { bytes, mode, parsed }),
            Err(error) if error.is_transient() && tries < CONTROL_TRIES => thread::sleep(CONTROL_PAUSE),
            Err(error) => return Err(SourceError::ControlFile(error.to_string())),
        }
    }
}

/// The primary's, over SQL.
async fn read_control_over(session: &Session) -> Result<Control, SourceError> {
    let mut tries = 0;
    loop {
        let bytes = session.read_file(CONTROL_FILE, 0, PAGE_SIZE).await.map_err(standby::needs)?;
        let bytes = bytes.ok_or_else(|| SourceError::ControlFile("the primary has none".to_owned()))?;
        tries += 1;
        match ControlFile::parse(&bytes) {
            Ok(parsed) => return Ok(Control { bytes, mode: 0o600, parsed }),
            Err(error) if error.is_transient() && tries < CONTROL_TRIES => tokio::time::sleep(CONTROL_PAUSE).await,
            Err(error) => return Err(SourceError::ControlFile(error.to_string())),
        }
    }
}

async fn send(items: &mpsc::Sender<Item>, item: Item) -> Result<(), SourceError> {
    items.send(item).await.map_err(|_| SourceError::ReceiverGone)
}

async fn blocking<T, F>(work: F) -> Result<T, SourceError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, SourceError> + Send + 'static,
{
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|error| Err(SourceError::ReaderDied(error.to_string())))
}
