//! Gives WAL files to other processes of this host, and reads the next ones ahead: recovery asks for one segment after the
//! other, and each would wait for its regions.
//!
//! Only whole segments are kept. What is not whole yet, or absent, is looked for each time it is asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::jobs::context::Context;
use crate::jobs::wal::fetch::asker::Asker;
use crate::jobs::wal::fetch::library::{Found, Library};
use crate::model::{Error, Result, SegmentName};
use crate::observe::task;

/// What is read ahead for one cluster, on disk.
const AHEAD_BYTES: u64 = 64 << 20;
/// The fewest and the most segments of it.
const AHEAD: std::ops::RangeInclusive<u64> = 1..=16;
/// Clusters that are read ahead for at once; the one that has not asked for the longest time gives way.
const CLUSTERS: usize = 4;

/// A file, rewound.
#[derive(Debug)]
pub struct Given {
    /// Its bytes.
    pub file: File,
    /// How many.
    pub length: u64,
}

/// Files that are on their way for one cluster.
#[derive(Debug)]
struct Shelf {
    asker: Asker,
    coming: BTreeMap<String, oneshot::Receiver<File>>,
    _reading: AbortOnDropHandle<()>,
}

/// Gives files; its context holds the restore role.
#[derive(Debug)]
pub struct FetchDesk {
    context: Context,
    /// The one that asked last is last.
    shelves: Mutex<Vec<Shelf>>,
}

impl FetchDesk {
    /// A desk that reads with `context`.
    pub fn new(context: Context) -> Arc<Self> {
        Arc::new(Self { context, shelves: Mutex::default() })
    }

    /// A file by PostgreSQL's name for it; `None` = it exists nowhere.
    ///
    /// # Errors
    /// Any doubt, as of [`fetch`](super::fetch).
    pub async fn give(self: &Arc<Self>, asker: &Asker, file: &str) -> Result<Option<Given>> {
        let coming = self.coming(asker, file);
        if let Some(coming) = coming
            && let Ok(ready) = coming.await
        {
            self.read_on(asker, file);
            return given(ready).map(Some);
        }
        // Signers may have been enrolled since this process began.
        self.context.repository.trust.refresh(&self.context.repository.regions).await?;
        let library = Library::new(&self.context, asker, None)?;
        let mut copy = self.file()?;
        match library.find(file).await? {
            Found::Absent => return Ok(None),
            Found::History(content) => write(&mut copy, &content)?,
            Found::Segment(extract) => {
                if extract.is_whole {
                    self.read_ahead(asker, file);
                }
                library.copy(&extract, &mut |bytes| write(&mut copy, bytes)).await?;
            }
        }
        given(copy).map(Some)
    }

    fn coming(&self, asker: &Asker, file: &str) -> Option<oneshot::Receiver<File>> {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        let at = shelves.iter().position(|shelf| shelf.asker == *asker)?;
        let mut shelf = shelves.remove(at);
        let coming = shelf.coming.remove(file);
        // Whoever asks for something else has left the path that was read ahead.
        if coming.is_some() {
            shelves.push(shelf);
        }
        coming
    }

    /// Goes on reading ahead when most of what was read has been taken.
    fn read_on(self: &Arc<Self>, asker: &Asker, file: &str) {
        let shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        let shelf = shelves.iter().find(|shelf| shelf.asker == *asker);
        let is_low = shelf.is_none_or(|shelf| shelf.coming.is_empty());
        drop(shelves);
        if is_low {
            self.read_ahead(asker, file);
        }
    }

    /// Begins to read what follows `file`.
    fn read_ahead(self: &Arc<Self>, asker: &Asker, file: &str) {
        let Some(names) = following(asker, file) else { return };
        let (mut coming, mut going) = (BTreeMap::new(), Vec::new());
        for (name, file) in names {
            let (sender, receiver) = oneshot::channel();
            coming.insert(file, receiver);
            going.push((name, sender));
        }
        let (desk, whose) = (Arc::clone(self), asker.clone());
        let reading = task::spawn("wal-read-ahead", async move {
            if let Err(error) = desk.fill(&whose, going).await {
                tracing::debug!(%error, "WAL is not read ahead");
            }
        });
        let shelf = Shelf { asker: asker.clone(), coming, _reading: AbortOnDropHandle::new(reading) };
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.retain(|shelf| shelf.asker != *asker);
        shelves.push(shelf);
        let surplus = shelves.len().saturating_sub(CLUSTERS);
        shelves.drain(..surplus);
    }

    /// Reads segments one after the other, up to the first that is not whole. The branch is listed once for all of them.
    async fn fill(&self, asker: &Asker, going: Vec<(SegmentName, oneshot::Sender<File>)>) -> Result<()> {
        let library = Library::new(&self.context, asker, None)?;
        for (name, sender) in going {
            let Some(extract) = library.segment(name).await?.filter(|extract| extract.is_whole) else { break };
            let mut copy = self.file()?;
            library.copy(&extract, &mut |bytes| write(&mut copy, bytes)).await?;
            // Nobody waits for it any more: it goes with the file.
            let _ = sender.send(copy);
        }
        Ok(())
    }

    fn file(&self) -> Result<File> {
        tempfile::tempfile_in(&self.context.state_dir).map_err(|error| cannot(&error))
    }
}

/// The segments behind `file` that are worth reading ahead.
fn following(asker: &Asker, file: &str) -> Option<Vec<(SegmentName, String)>> {
    let size = asker.size().ok()?;
    let name = SegmentName::parse(file, size)?;
    let count = (AHEAD_BYTES / size.bytes()).clamp(*AHEAD.start(), *AHEAD.end());
    let next = |ahead: u64| SegmentName { number: name.number + ahead, ..name };
    Some((1..=count).map(next).map(|name| (name, name.file_name(size))).collect())
}

fn write(file: &mut File, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(|error| cannot(&error))
}

fn given(mut file: File) -> Result<Given> {
    let length = file.seek(SeekFrom::End(0)).map_err(|error| cannot(&error))?;
    file.seek(SeekFrom::Start(0)).map_err(|error| cannot(&error))?;
    Ok(Given { file, length })
}

fn cannot(error: &std::io::Error) -> Error {
    Error::failed("WAL cannot be kept in the state directory").because(error).hint("it may be full")
}
