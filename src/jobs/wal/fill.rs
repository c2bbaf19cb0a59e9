//! The last attempt before a gap is recorded: segments that the server does not stream any more may still lie in its
//! `pg_wal`. A segment that waits for `archive_command` stays there when newer ones are removed, and people put saved ones
//! back; the walsender refuses both. They are read over SQL and go through the desk that judges what is pushed.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::push::{Handed, PushDesk};
use crate::jobs::wal::server::{Server, Start};
use crate::model::{Error, Lsn, Result, ResultExt, SegmentName};
use crate::pg::sql::{self, SqlClient};

/// As much of a file as is asked for at once.
const PIECE: u64 = 1024 * 1024;
/// What is held in memory of a segment; the rest of a large one waits in the state directory.
const IN_MEMORY: usize = 16 << 20;

/// The desk that takes what is found; a receiver without one fills nothing.
pub(super) type Filler = Arc<OnceLock<Arc<PushDesk>>>;

/// Stores what the server still has from `cursor` on, up to the first segment that it lacks. Says how many.
///
/// # Errors
/// The server does not let its files be read, or a segment is not what it should be.
pub(super) async fn fill(
    (context, target): (&Context, &Target),
    filler: &Filler,
    server: &Server,
    (cursor, to): (&Start, Lsn),
) -> Result<u64> {
    let Some(desk) = filler.get() else { return Ok(0) };
    let client = sql::connect(&target.conninfo).await.map_err(Error::from).during(|| "connect for its WAL files")?;
    let size = server.segment_size;
    let (mut at, mut filled) = (size.segment_start(cursor.lsn), 0);
    while at < to {
        let Some((name, file)) = segment(context, &client, server, at).await? else { break };
        let handed = Handed { name, file, length: size.bytes(), system_id: Some(server.system_id) };
        desk.found(handed).await?;
        (at, filled) = (Lsn(at.0 + size.bytes()), filled + 1);
    }
    Ok(filled)
}

/// The segment that begins at `at`, under the name of the newest timeline that has it whole.
async fn segment(
    context: &Context,
    client: &SqlClient,
    server: &Server,
    at: Lsn,
) -> Result<Option<(String, tempfile::SpooledTempFile)>> {
    let size = server.segment_size;
    let end = Lsn(at.0 + size.bytes());
    let reigns = server.lineage.iter().map(|descent| descent.reign);
    for reign in reigns.filter(|reign| reign.begin < end && reign.end.is_none_or(|switch| switch > at)) {
        let name = SegmentName::containing(reign.timeline, at, size).file_name(size);
        let mut file = tempfile::spooled_tempfile_in(IN_MEMORY, &context.state_dir);
        if read(client, &name, size.bytes(), &mut file).await.during(|| format!("read pg_wal/{name}"))? {
            return Ok(Some((name, file)));
        }
    }
    Ok(None)
}

/// Whether the file is there, whole. One that is recycled meanwhile fails the check of its records.
async fn read(client: &SqlClient, name: &str, size: u64, file: &mut impl Write) -> Result<bool> {
    let path = format!("pg_wal/{name}");
    let mut at = 0;
    while at < size {
        let piece = i64::try_from(PIECE.min(size - at)).unwrap_or(i64::MAX);
        let from = i64::try_from(at).unwrap_or(i64::MAX);
        let sql = "SELECT pg_catalog.pg_read_binary_file($1, $2, $3, true)";
        let row = client.query_one(sql, &[&path, &from, &piece]).await;
        let row = row.map_err(|error| Error::from(crate::pg::PgError::from(error)))?;
        let bytes: Option<Vec<u8>> = row.try_get(0).map_err(|error| Error::from(crate::pg::PgError::from(error)))?;
        let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else { return Ok(false) };
        file.write_all(&bytes).map_err(|error| Error::failed("the state directory").because(error))?;
        at += bytes.len() as u64;
    }
    Ok(true)
}
