//! A base backup made by the server itself and streamed here: works from anywhere, with one process on the server.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;

use super::archive::{self, Chunk, Unpacked};
use super::error::SourceError;
use super::options::Options;
use super::pages::PageCheck;
use super::session::{check_version, wal_segment_size};
use super::started::{Started, one_line};
use crate::model::{Lsn, Result, Timeline};
use crate::pg::PgError;
use crate::pg::label::{self, Tablespace};
use crate::pg::replication::{BaseBackupEvent, BaseBackupOptions, BaseBackupStream, ReplicationClient, TablespaceRow};
use crate::source::{Begun, Cluster, Finished, Item, PhysicalSource, SmallFile};

/// Messages between the connection and the thread that unpacks; the server fills them with 32 KiB.
const QUEUE: usize = 256;

/// What the server answers after the end when it has met wrong checksums: all bytes have arrived all the same.
const DATA_CORRUPTED: &str = "XX001";

/// A backup that the server sends.
///
/// The server judges each page as `pages` does, with a second look, and sends the bytes of that second look;
/// judging what arrives here therefore finds the same damage, with its blocks. A server that reports damage where none
/// arrived fails the backup.
#[derive(Debug)]
pub struct StreamBackup {
    options: Options,
    cluster: Cluster,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Open(ReplicationClient),
    Begun { stream: BaseBackupStream, started: Started, tablespaces: Vec<TablespaceRow> },
    Copied { started: Started, end: End, files: Vec<SmallFile>, at: DateTime<Utc> },
    Over,
}

#[derive(Debug, Clone, Copy)]
struct End {
    lsn: Lsn,
    timeline: Timeline,
}

impl StreamBackup {
    /// Connects and asks the server who it is.
    ///
    /// # Errors
    /// The server is not reachable or cannot be backed up this way.
    pub async fn open(options: Options) -> Result<Self, SourceError> {
        let mut client = ReplicationClient::connect(&options.conninfo).await?;
        let cluster = identify(&mut client).await?;
        Ok(Self { options, cluster, stage: Stage::Open(client) })
    }

    async fn start(&mut self) -> Result<Begun, SourceError> {
        let client = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Open(client) => client,
            other => {
                self.stage = other;
                return Err(SourceError::OutOfOrder);
            }
        };
        let wanted = BaseBackupOptions {
            label: one_line(&self.options.label),
            fast: self.options.fast,
            max_rate: self.options.max_read_rate.map(max_rate),
            manifest: false,
            verify_checksums: true,
        };
        let mut stream = client.base_backup(wanted).await?;
        loop {
            match stream.next().await? {
                Some(BaseBackupEvent::Start { lsn, timeline, tablespaces }) => {
                    let sizes = tablespaces.iter().filter_map(|tablespace| tablespace.size_kib);
                    let estimated_bytes = sizes.fold(0u64, u64::saturating_add).saturating_mul(1024);
                    let started = Started { lsn, timeline };
                    self.stage = Stage::Begun { stream, started, tablespaces };
                    let cluster = self.cluster.clone();
                    return Ok(Begun { start_lsn: lsn, timeline, cluster, estimated_bytes });
                }
                Some(BaseBackupEvent::Notice(notice)) => tracing::warn!("the server says: {notice}"),
                other => return Err(SourceError::Answer(format!("no start of a base backup but {other:?}"))),
            }
        }
    }

    async fn read(&mut self, items: mpsc::Sender<Item>) -> Result<(), SourceError> {
        let (mut stream, started, tablespaces) = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Begun { stream, started, tablespaces } => (stream, started, tablespaces),
            other => {
                self.stage = other;
                return Err(SourceError::OutOfOrder);
            }
        };
        let linked = linked(tablespaces);
        for Tablespace { oid, location } in linked.clone() {
            items.send(Item::Tablespace { oid, location }).await.map_err(|_| SourceError::ReceiverGone)?;
        }
        let check = PageCheck { checksums: self.cluster.checksums, start: started.lsn };
        let (chunks, receiver) = mpsc::channel(QUEUE);
        let sender = items.clone();
        let unpacker = tokio::task::spawn_blocking(move || archive::unpack(receiver, sender, check));
        // The other end of the queue goes away only with a reason of its own, which is the better one.
        let forwarded = forward(&mut stream, chunks).await;
        let arrived = match forwarded {
            Err(Interrupted::ByServer(error)) => return Err(error),
            Err(Interrupted::ByReader) => None,
            Ok(arrived) => Some(arrived),
        };
        let unpacked = unpacker.await.unwrap_or_else(|error| Err(SourceError::ReaderDied(error.to_string())))?;
        let Some(Arrived { end, complaint }) = arrived else { return Err(SourceError::ReceiverGone) };
        let at = Arc::clone(&self.options.clock).now();
        let mut files = settle(unpacked, end.lsn, complaint, &items).await?;
        if !linked.is_empty() {
            let bytes = label::print_tablespace_map(&linked).into_bytes();
            files.push(SmallFile { path: "tablespace_map".to_owned(), bytes });
        }
        self.stage = Stage::Copied { started, end, files, at };
        Ok(())
    }

    fn stop(&mut self) -> Result<Finished, SourceError> {
        let (started, end, files, at) = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Copied { started, end, files, at } => (started, end, files, at),
            other => {
                self.stage = other;
                return Err(SourceError::OutOfOrder);
            }
        };
        started.same_timeline(end.timeline)?;
        started.check_label(&files, &self.cluster)?;
        // A walsender for physical replication does not tell the time: this is the reader's clock.
        Ok(Finished { stop_lsn: end.lsn, timeline: end.timeline, files, finished_at: at })
    }
}

#[async_trait]
impl PhysicalSource for StreamBackup {
    async fn begin(&mut self) -> Result<Begun> {
        Ok(self.start().await?)
    }

    async fn copy(&mut self, items: mpsc::Sender<Item>) -> Result<()> {
        Ok(self.read(items).await?)
    }

    fn method(&self) -> &'static str {
        "stream"
    }

    async fn finish(&mut self) -> Result<Finished> {
        Ok(self.stop()?)
    }
}

async fn identify(client: &mut ReplicationClient) -> Result<Cluster, SourceError> {
    let version = client.server_version();
    check_version(version)?;
    // 13 does not tell itself; there it is a standby whose transactions cannot write, or somebody made them so by default.
    let setting = if version >= 140_000 { "in_hot_standby" } else { "transaction_read_only" };
    if client.show(setting).await? != "off" {
        return Err(SourceError::Unsupported("the server is a standby: name its primary".to_owned()));
    }
    let (page, segment) = (client.show("block_size").await?, client.show("segment_size").await?);
    if page != "8192" || segment != "1GB" {
        let build = format!("the server has pages of {page} bytes and files of {segment}, not 8192 and 1GB");
        return Err(SourceError::Unsupported(build));
    }
    let wal = client.show("wal_segment_size").await?;
    let checksums = client.show("data_checksums").await? == "on";
    let system_id = client.identify_system().await?.system_id;
    Ok(Cluster { system_id, version, wal_segment_size: wal_segment_size(bytes(&wal)?)?, checksums })
}

/// `16MB`, `1GB`: the sizes that a WAL segment can have, as the server prints them.
fn bytes(text: &str) -> Result<u64, SourceError> {
    let size = |suffix: &str, shift: u32| text.strip_suffix(suffix)?.parse::<u64>().ok()?.checked_mul(1 << shift);
    size("MB", 20)
        .or_else(|| size("GB", 30))
        .ok_or_else(|| SourceError::Answer(format!("a WAL segment size of `{text}`")))
}

/// The server's bound, in kB/s and within its limits.
fn max_rate(bytes: u64) -> u32 {
    u32::try_from((bytes / 1024).clamp(32, 1_048_576)).unwrap_or(1_048_576)
}

/// Those that are links in `pg_tblspc`. The location of an in-place tablespace is relative: it is a directory there.
fn linked(rows: Vec<TablespaceRow>) -> Vec<Tablespace> {
    let row = |row: TablespaceRow| Some(Tablespace { oid: row.oid?, location: row.location? });
    rows.into_iter().filter_map(row).filter(|tablespace| tablespace.location.starts_with('/')).collect()
}

struct Arrived {
    end: End,
    /// The server's last word, if it was about checksums.
    complaint: Option<PgError>,
}

enum Interrupted {
    ByServer(SourceError),
    ByReader,
}

impl From<PgError> for Interrupted {
    fn from(error: PgError) -> Self {
        Self::ByServer(error.into())
    }
}

/// Moves the archives from the connection to the thread that unpacks them.
async fn forward(stream: &mut BaseBackupStream, chunks: mpsc::Sender<Chunk>) -> Result<Arrived, Interrupted> {
    let mut end = None;
    loop {
        let event = match (stream.next().await, end) {
            (Err(error), Some(end)) if error.sqlstate() == Some(DATA_CORRUPTED) => {
                return Ok(Arrived { end, complaint: Some(error) });
            }
            (event, _) => event?,
        };
        let chunk = match (event, end) {
            (None, Some(end)) => return Ok(Arrived { end, complaint: None }),
            (Some(BaseBackupEvent::Archive { name, .. }), None) => Chunk::Archive(archive_of(&name)?),
            (Some(BaseBackupEvent::Data(data)), None) => Chunk::Data(data),
            (Some(BaseBackupEvent::End { lsn, timeline }), None) => {
                end = Some(End { lsn, timeline });
                continue;
            }
            (Some(BaseBackupEvent::Progress(_)), _) => continue,
            (Some(BaseBackupEvent::Notice(notice)), _) => {
                tracing::warn!("the server says: {notice}");
                continue;
            }
            (other, _) => {
                return Err(Interrupted::ByServer(SourceError::Answer(format!("{other:?} in a base backup"))));
            }
        };
        chunks.send(chunk).await.map_err(|_| Interrupted::ByReader)?;
    }
}

/// `base.tar` is the data directory, `16384.tar` a tablespace.
fn archive_of(name: &str) -> Result<Option<u32>, Interrupted> {
    let stem = name.strip_suffix(".tar");
    match stem {
        Some("base") => Ok(None),
        Some(oid) if super::rules::parse_oid(oid).is_some() => Ok(super::rules::parse_oid(oid)),
        _ => Err(Interrupted::ByServer(SourceError::Answer(format!("an archive named `{name}`")))),
    }
}

/// Ends the files whose damage depended on the end of the backup, and compares notes with the server.
async fn settle(
    unpacked: Unpacked,
    end: Lsn,
    complaint: Option<PgError>,
    items: &mpsc::Sender<Item>,
) -> Result<Vec<SmallFile>, SourceError> {
    let mut damaged = unpacked.damaged;
    for held in unpacked.held {
        let done = held.settle(end);
        damaged |= matches!(&done, Item::FileDone { damaged_blocks, .. } if !damaged_blocks.is_empty());
        items.send(done).await.map_err(|_| SourceError::ReceiverGone)?;
    }
    match complaint {
        Some(error) if !damaged => Err(SourceError::UnlocatedDamage(error.to_string())),
        _ => Ok(unpacked.files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_are_understood() {
        assert_eq!(bytes("16MB").unwrap(), 16 << 20);
        assert_eq!(bytes("1GB").unwrap(), 1 << 30);
        assert!(bytes("16kB").is_err() && bytes("MB").is_err());
        assert_eq!((max_rate(1), max_rate(1 << 20), max_rate(u64::MAX)), (32, 1024, 1_048_576));
    }

    #[test]
    fn archives_are_known_by_name() {
        assert!(matches!(archive_of("base.tar"), Ok(None)));
        assert!(matches!(archive_of("16384.tar"), Ok(Some(16384))));
        for name in ["base.tar.gz", "x.tar", "16384", ".tar", "../1.tar"] {
            assert!(archive_of(name).is_err(), "{name}");
        }
    }
}
