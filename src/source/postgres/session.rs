//! The SQL session that holds backup mode. When it ends, for whatever reason, the server forgets the backup.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::SimpleQueryMessage;

use super::error::SourceError;
use super::started::one_line;
use crate::model::{Lsn, SystemId, Timeline, WalSegmentSize};
use crate::observe::task;
use crate::pg::PgError;
use crate::pg::conninfo::ConnInfo;
use crate::pg::sql::{self, SqlClient};
use crate::source::{Cluster, PAGE_SIZE};

use super::rules::SEGMENT_PAGES;

/// Firewalls forget connections that are silent for minutes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How often the connection is looked at in between; it costs nothing.
const LOOK: Duration = Duration::from_secs(1);

/// What the server says about itself before anything begins.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Fixed properties.
    pub cluster: Cluster,
    /// Names the directory in each tablespace, with the major version.
    pub catalog_version: u32,
    /// The latest checkpoint.
    pub checkpoint: Lsn,
    /// Its timeline.
    pub timeline: Timeline,
}

impl Identity {
    /// `PG_15_202209061`.
    pub fn version_directory(&self) -> String {
        format!("PG_{}_{}", self.cluster.version / 10_000, self.catalog_version)
    }
}

/// What a server is in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Primary,
    /// It replays.
    Standby,
}

/// An entry of a directory on the server.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Whether it is one itself.
    pub is_directory: bool,
}

/// The end of backup mode.
#[derive(Debug)]
pub struct Stopped {
    /// Where the backup becomes consistent.
    pub stop_lsn: Lsn,
    /// The timeline now.
    pub timeline: Timeline,
    /// `backup_label`.
    pub label: String,
    /// `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
    /// The server's clock.
    pub at: DateTime<Utc>,
}

/// A session, kept alive until it is dropped.
#[derive(Debug)]
pub struct Session {
    client: Arc<SqlClient>,
    keepalive: Option<JoinHandle<()>>,
    lost: watch::Receiver<Option<String>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // It holds the client, and with it backup mode.
        if let Some(keepalive) = &self.keepalive {
            keepalive.abort();
        }
    }
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// The server is not reachable.
    pub async fn connect(conninfo: &ConnInfo) -> Result<Self, SourceError> {
        let client = Arc::new(sql::connect(conninfo).await?);
        let (_, lost) = watch::channel(None);
        Ok(Self { client, keepalive: None, lost })
    }

    /// Asks the server who it is, and refuses one that cannot be backed up by page.
    ///
    /// # Errors
    /// Another version, another role, an unusual build.
    pub async fn identify(&self, role: Role) -> Result<Identity, SourceError> {
        let row = self.row(
            "SELECT pg_catalog.current_setting('server_version_num'), pg_catalog.pg_is_in_recovery(),
                    s.system_identifier, s.catalog_version_no, i.database_block_size, i.blocks_per_segment,
                    i.bytes_per_wal_segment, i.data_page_checksum_version, c.checkpoint_lsn, c.timeline_id
             FROM pg_catalog.pg_control_system() s, pg_catalog.pg_control_init() i, pg_catalog.pg_control_checkpoint() c",
        );
        let row = row.await?;
        let version: u32 = row.number(0)?;
        check_version(version)?;
        let wrong = match (role, row.text(1)?) {
            (Role::Primary, "f") | (Role::Standby, "t") => None,
            (Role::Primary, _) => Some("the server is a standby: name its primary"),
            (Role::Standby, _) => Some("the server that is named as standby is none"),
        };
        if let Some(wrong) = wrong {
            return Err(SourceError::Unsupported(wrong.to_owned()));
        }
        let (page, segment): (usize, u32) = (row.number(4)?, row.number(5)?);
        if page != PAGE_SIZE || segment != SEGMENT_PAGES {
            let build =
                format!("the server has pages of {page} bytes and {segment} pages per file, not 8192 and 131072");
            return Err(SourceError::Unsupported(build));
        }
        let cluster = Cluster {
            // SQL has no unsigned numbers.
            system_id: SystemId(row.number::<i64>(2)?.cast_unsigned()),
            version,
            wal_segment_size: wal_segment_size(row.number(6)?)?,
            checksums: row.number::<u32>(7)? != 0,
        };
        Ok(Identity {
            cluster,
            catalog_version: row.number(3)?,
            checkpoint: row.number(8)?,
            timeline: Timeline(row.number(9)?),
        })
    }

    /// Where the server keeps its data, as it sees it.
    ///
    /// # Errors
    /// The role may not know.
    pub async fn data_directory(&self) -> Result<String, SourceError> {
        let row = self.row("SELECT pg_catalog.current_setting('data_directory')").await;
        let row = row.map_err(|error| needs(error, "GRANT pg_read_all_settings TO <role>;"))?;
        Ok(row.text(0)?.to_owned())
    }

    /// Enters backup mode; with a spread checkpoint this takes minutes. Answers where the backup starts.
    ///
    /// # Errors
    /// The server refused, or the role may not.
    pub async fn start_backup(
        &mut self,
        version: u32,
        label: &str,
        fast: bool,
    ) -> Result<(Lsn, Timeline), SourceError> {
        // Limits set for this role or database would end the backup in the middle.
        let idle = if version >= 140_000 { "SET idle_session_timeout = 0;" } else { "" };
        let settings = format!("SET statement_timeout = 0; SET client_min_messages = warning; {idle}");
        self.client.batch_execute(&settings).await.map_err(PgError::from)?;
        let (query, grant) = if version >= 150_000 {
            (
                "SELECT pg_catalog.pg_backup_start($1, $2)::text",
                "GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO <role>;",
            )
        } else {
            (
                "SELECT pg_catalog.pg_start_backup($1, $2, false)::text",
                "GRANT EXECUTE ON FUNCTION pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean) TO <role>;",
            )
        };
        let row = self.client.query_one(query, &[&one_line(label), &fast]).await.map_err(PgError::from);
        let row = row.map_err(|error| needs(error.into(), grant))?;
        let start = row.try_get::<_, &str>(0).map_err(PgError::from)?;
        let start = start.parse().map_err(|_| SourceError::Answer(format!("backup start at `{start}`")))?;
        self.keep_alive();
        let row = self.row(&format!("SELECT pg_catalog.pg_walfile_name('{start}')")).await?;
        Ok((start, timeline(row.text(0)?)?))
    }

    /// Leaves backup mode. It does not wait for the archiver: whether the WAL is safe is decided by those who store it.
    ///
    /// # Errors
    /// The session was lost, and the backup with it.
    pub async fn stop_backup(&self, version: u32) -> Result<Stopped, SourceError> {
        self.alive()?;
        let stop = if version >= 150_000 { "pg_backup_stop(false)" } else { "pg_stop_backup(false, false)" };
        let query = format!(
            "SELECT s.lsn, pg_catalog.pg_walfile_name(s.lsn), s.labelfile, s.spcmapfile,
                    (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint
             FROM pg_catalog.{stop} s"
        );
        let row = self.row(&query).await?;
        let at: i64 = row.number(4)?;
        let wrong_clock = || SourceError::Answer(format!("the server's clock says {at} µs since 1970"));
        Ok(Stopped {
            stop_lsn: row.number(0)?,
            timeline: timeline(row.text(1)?)?,
            label: row.text(2)?.to_owned(),
            tablespace_map: row.optional(3).unwrap_or_default().to_owned(),
            at: DateTime::from_timestamp_micros(at).ok_or_else(wrong_clock)?,
        })
    }

    /// The end of the server's log now.
    ///
    /// # Errors
    /// The session was lost.
    pub async fn insert_lsn(&self) -> Result<Lsn, SourceError> {
        self.alive()?;
        self.row("SELECT pg_catalog.pg_current_wal_insert_lsn()").await?.number(0)
    }

    /// Asks for a checkpoint; on a standby that is a restartpoint, if there is a new checkpoint to restart from.
    ///
    /// # Errors
    /// The role may not.
    pub async fn checkpoint(&self) -> Result<(), SourceError> {
        Ok(self.client.batch_execute("CHECKPOINT").await.map_err(PgError::from)?)
    }

    /// What is in a directory below the data directory (`""` = itself); what vanishes meanwhile is not told.
    ///
    /// # Errors
    /// The role may not.
    pub async fn entries(&self, directory: &str) -> Result<Vec<Entry>, SourceError> {
        let place = if directory.is_empty() { "." } else { directory };
        let query = "SELECT name, (pg_catalog.pg_stat_file($1 || '/' || name, true)).isdir
                     FROM pg_catalog.pg_ls_dir($1, true, false) AS name";
        let rows = self.client.query(query, &[&place]).await.map_err(PgError::from)?;
        let entry = |row: &tokio_postgres::Row| {
            let is_directory: Option<bool> = row.try_get(1).map_err(PgError::from)?;
            let name = row.try_get(0).map_err(PgError::from)?;
            Ok(is_directory.map(|is_directory| Entry { name, is_directory }))
        };
        rows.iter().filter_map(|row| entry(row).transpose()).collect()
    }

    /// Bytes of a file below the data directory, fewer than asked for at its end; `None` = it is gone.
    ///
    /// # Errors
    /// The role may not.
    pub async fn read_file(&self, path: &str, from: u64, length: usize) -> Result<Option<Vec<u8>>, SourceError> {
        let (from, length) = (i64::try_from(from).unwrap_or(i64::MAX), i64::try_from(length).unwrap_or(i64::MAX));
        let query = "SELECT pg_catalog.pg_read_binary_file($1, $2, $3, true)";
        let row = self.client.query_one(query, &[&path, &from, &length]).await.map_err(PgError::from)?;
        Ok(row.try_get(0).map_err(PgError::from)?)
    }

    /// Runs `work`, but no longer than the session lives.
    ///
    /// # Errors
    /// Of the work, or the session was lost.
    pub async fn while_alive<T>(&self, work: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
        let mut lost = self.lost.clone();
        let loss = async {
            let reason = lost.wait_for(Option::is_some).await.map(|reason| reason.clone());
            match reason {
                Ok(reason) => SourceError::SessionLost(reason.unwrap_or_default()),
                // Nobody watches before backup mode begins.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            done = work => done,
            error = loss => Err(error),
        }
    }

    fn alive(&self) -> Result<(), SourceError> {
        let lost = self.lost.borrow().clone();
        match lost {
            Some(reason) => Err(SourceError::SessionLost(reason)),
            None if self.client.is_closed() => Err(SourceError::SessionLost("the connection is closed".to_owned())),
            None => Ok(()),
        }
    }

    fn keep_alive(&mut self) {
        let (sender, lost) = watch::channel(None);
        let client = Arc::clone(&self.client);
        self.lost = lost;
        self.keepalive = Some(task::spawn("backup-session", async move {
            let reason = watch_over(&client).await;
            // Nobody listens once the backup is over.
            let _ = sender.send(Some(reason));
        }));
    }

    /// The first row of an answer.
    pub(super) async fn row(&self, query: &str) -> Result<Row, SourceError> {
        let messages = self.client.simple_query(query).await.map_err(PgError::from)?;
        let row = messages.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect())
            }
            _ => None,
        });
        row.map(Row).ok_or_else(|| SourceError::Answer(format!("no row for `{query}`")))
    }
}

/// Ends with the reason why the session is lost.
async fn watch_over(client: &SqlClient) -> String {
    loop {
        for _ in 0..KEEPALIVE.as_secs() / LOOK.as_secs() {
            tokio::time::sleep(LOOK).await;
            if client.is_closed() {
                return "the connection is closed".to_owned();
            }
        }
        match tokio::time::timeout(KEEPALIVE, client.simple_query("SELECT 1")).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return PgError::from(error).to_string(),
            Err(_) => return format!("no answer within {} s", KEEPALIVE.as_secs()),
        }
    }
}

/// One row as text, which is the same in every version.
pub(super) struct Row(Vec<Option<String>>);

impl Row {
    pub(super) fn optional(&self, column: usize) -> Option<&str> {
        self.0.get(column).and_then(Option::as_deref)
    }

    pub(super) fn text(&self, column: usize) -> Result<&str, SourceError> {
        self.optional(column).ok_or_else(|| SourceError::Answer(format!("column {column} is null")))
    }

    pub(super) fn number<T: std::str::FromStr>(&self, column: usize) -> Result<T, SourceError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| SourceError::Answer(format!("`{text}` in column {column}")))
    }
}

/// Refuses versions that drctl was not made for.
///
/// # Errors
/// Not 13 to 18.
pub fn check_version(version: u32) -> Result<(), SourceError> {
    if (130_000..190_000).contains(&version) {
        return Ok(());
    }
    Err(SourceError::Unsupported(format!("the server has version {}, and 13 to 18 are supported", version / 10_000)))
}

/// The segment size of a server.
///
/// # Errors
/// One that PostgreSQL does not have.
pub fn wal_segment_size(bytes: u64) -> Result<WalSegmentSize, SourceError> {
    WalSegmentSize::try_from(bytes).map_err(|error| SourceError::Answer(error.to_string()))
}

/// The timeline in the name of a WAL segment.
fn timeline(segment: &str) -> Result<Timeline, SourceError> {
    let digits = segment.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    digits.map(Timeline).ok_or_else(|| SourceError::Answer(format!("a WAL segment named `{segment}`")))
}

/// Turns "permission denied" into what must be granted.
fn needs(error: SourceError, grant: &str) -> SourceError {
    match error {
        error if error.is_denied() => SourceError::NotGranted { message: error.to_string(), grant: grant.to_owned() },
        other => other,
    }
}
