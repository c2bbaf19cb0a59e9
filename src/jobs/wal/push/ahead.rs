//! Looking ahead: PostgreSQL archives one segment after the other, and starts a process for each. While it is busy with
//! that, the segments that wait behind the one that it hands over are read from its directory and stored, so that the next
//! hand-over is a comparison of digests.
//!
//! What is told to PostgreSQL stays the same: a file is taken when its own bytes are durable at the write quorum.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::SpooledTempFile;

use crate::jobs::context::Target;
use crate::jobs::wal::segments::{Digester, SegmentDigest};
use crate::model::{Error, Result, ResultExt, SystemId};
use crate::pg::control::ControlFile;
use crate::pg::sql;

/// Segments that are stored ahead of one hand-over; the next one looks on.
const MOST: usize = 8;
/// What is held in memory of a segment; the rest of a large one waits in the state directory.
const IN_MEMORY: usize = 16 << 20;

/// Where a server keeps its WAL on this host.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    pg_wal: PathBuf,
}

impl Shelf {
    /// The directory of a target's server, as far as it is here and can be read.
    ///
    /// # Errors
    /// It is not.
    pub(super) async fn of(target: &Target, system_id: SystemId) -> Result<Self> {
        let directory = match &target.data_dir {
            Some(directory) => directory.clone(),
            None => asked(target).await?,
        };
        let control = directory.join("global/pg_control");
        let bytes =
            std::fs::read(&control).map_err(|error| Error::failed(control.display().to_string()).because(error))?;
        let control = ControlFile::parse(&bytes).map_err(|error| Error::failed("pg_control").because(error))?;
        match control.system_id == system_id {
            true => Ok(Self { pg_wal: directory.join("pg_wal") }),
            false => Err(Error::refused(format!("{} is another cluster's", directory.display()))),
        }
    }

    /// Whether the segment of this name is the one that was handed over. A copy of the cluster on this host has the same
    /// identifier and goes its own way.
    pub(super) fn holds(&self, name: &str, digest: &SegmentDigest, digester: &Digester) -> bool {
        let own = self.open(name).and_then(|file| digester.of(file));
        own.is_ok_and(|own| own == *digest)
    }

    /// The segments behind `name` that wait for `archive_command`, oldest first.
    pub(super) fn waiting(&self, name: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.pg_wal.join("archive_status")) else { return Vec::new() };
        let segment = |entry: io::Result<std::fs::DirEntry>| {
            let file = entry.ok()?.file_name();
            let segment = file.to_str()?.strip_suffix(".ready")?.to_owned();
            // Of this timeline: what archives first when a timeline changes, PostgreSQL decides.
            let same = segment.len() == 24 && segment.get(..8) == name.get(..8);
            (same && segment.as_str() > name).then_some(segment)
        };
        let mut waiting: Vec<_> = entries.filter_map(segment).collect();
        waiting.sort_unstable();
        waiting.truncate(MOST);
        waiting
    }

    /// A copy of a segment: PostgreSQL may use the file again as soon as the segment is archived.
    pub(super) fn copy(&self, name: &str, spool: &Path) -> io::Result<(SpooledTempFile, u64)> {
        let mut copy = tempfile::spooled_tempfile_in(IN_MEMORY, spool);
        let length = io::copy(&mut self.open(name)?, &mut copy)?;
        Ok((copy, length))
    }

    fn open(&self, name: &str) -> io::Result<File> {
        // The directory belongs to another account, and this process may be root: a link leads nowhere.
        let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default();
        let file = File::options().read(true).custom_flags(no_follow).open(self.pg_wal.join(name))?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("no file")) }
    }
}

async fn asked(target: &Target) -> Result<PathBuf> {
    let client = sql::connect(&target.conninfo).await.map_err(Error::from).during(|| "ask for the data directory")?;
    let row = client.query_one("SELECT pg_catalog.current_setting('data_directory')", &[]).await;
    let row = row.map_err(|error| Error::from(crate::pg::PgError::from(error)))?;
    Ok(PathBuf::from(row.get::<_, String>(0)))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::codec::SystemRng;
    use crate::jobs::wal::segments::SegmentBook;

    #[test]
    fn what_waits_is_taken_in_order_and_never_what_is_something_else() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf { pg_wal: dir.path().to_owned() };
        std::fs::create_dir(dir.path().join("archive_status")).unwrap();
        let name = |number: u64| format!("0000000200000000000000{number:02X}");
        let mut ready: Vec<_> = (1..=12).rev().map(name).collect();
        ready.extend(["0000000300000000000000FF".to_owned(), "00000003.history".to_owned(), name(9) + ".partial"]);
        for file in &ready {
            File::create(dir.path().join(format!("archive_status/{file}.ready"))).unwrap();
        }
        File::create(dir.path().join(format!("archive_status/{}.done", name(14)))).unwrap();
        assert_eq!(shelf.waiting(&name(2)), (3..=10).map(name).collect::<Vec<_>>());
        assert_eq!(shelf.waiting(&name(11)), [name(12)]);
        assert_eq!(shelf.waiting(&name(12)), Vec::<String>::new());

        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(name(3))).unwrap();
        assert!(shelf.copy(&name(3), dir.path()).is_err() && shelf.copy("archive_status", dir.path()).is_err());
        File::create(dir.path().join(name(4))).unwrap().write_all(b"wal").unwrap();
        assert_eq!(shelf.copy(&name(4), dir.path()).unwrap().1, 3);
        let repository = hex::encode([1; 16]).parse().unwrap();
        let book = SegmentBook::open(dir.path(), "ledger", &repository, &SystemRng).unwrap();
        let holds = |wal: &[u8]| shelf.holds(&name(4), &book.digester().of(wal).unwrap(), &book.digester());
        assert!(holds(b"wal") && !holds(b"war"));
    }
}
