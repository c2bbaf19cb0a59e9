//! The data directory: taken, filled, made startable last.
//!
//! A marker says that a restore is under way. Until `pg_control` has its own name PostgreSQL does not start here; a run
//! that finds the marker of its own plan wipes what is there and starts anew.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::disk::lock::Lock;
use crate::disk::place::Flushed;
use crate::disk::{DiskError, empty, place};
use crate::jobs::restore::marker::{LOCK, Marker, entries, is_free, is_unfinished};
use crate::jobs::restore::plan::Prepared;
use crate::jobs::restore::{MARKER, Request, conf, delta};
use crate::model::commit::{Commit, WalNeed};
use crate::model::{Error, Result, ResultExt};
use crate::pg::backup_manifest::{self, FileEntry, ManifestWriter, WalRange};
use crate::pg::control::ControlFile;
use crate::pg::instance::{Postmaster, postmaster_of};
use crate::repository::restore::{CONTROL_FILE, CONTROL_FILE_PENDING, Leftover, WrittenFile};

/// Recovers to its target and opens.
pub(super) const RECOVERY_SIGNAL: &str = "recovery.signal";
/// The same, and waits for more where its WAL ends.
/// What makes a server a standby.
pub(in crate::jobs) const STANDBY_SIGNAL: &str = "standby.signal";
/// The files that PostgreSQL or `pg_verifybackup` must not find as they were on the source.
const NOT_RESTORED: [&str; 5] =
    [RECOVERY_SIGNAL, STANDBY_SIGNAL, "postmaster.pid", "postmaster.opts", "tablespace_map"];

/// A directory that belongs to this run.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) directory: PathBuf,
    filesystems: Filesystems,
    _lock: Lock,
}

/// The file systems that a restore writes to, the data directory's last.
#[derive(Debug, Clone)]
pub(super) struct Filesystems(Arc<Vec<Flushed>>);

/// Often enough that little is left to flush at the end, and seldom enough that a disk has something to order.
const FLUSH_EVERY: Duration = Duration::from_millis(300);

impl Filesystems {
    fn of(tablespaces: &[PathBuf], directory: &Path) -> Result<Self> {
        let places = tablespaces.iter().map(PathBuf::as_path).chain([directory]);
        Ok(Self(Arc::new(places.map(Flushed::holding).collect::<Result<_, _>>()?)))
    }

    fn sync(&self) -> Result<()> {
        Ok(self.0.iter().try_for_each(Flushed::sync)?)
    }

    /// Flushes now and then, so that the disk works while the rest is fetched. Ends only when that fails.
    pub(super) async fn flush_meanwhile(&self) -> Error {
        loop {
            tokio::time::sleep(FLUSH_EVERY).await;
            let filesystems = self.clone();
            match tokio::task::spawn_blocking(move || filesystems.sync()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error,
                Err(error) => return Error::failed("a restore worker died").because(error),
            }
        }
    }
}

impl Site {
    /// Takes the directory: empty, or left by a run of the same plan, which is wiped, or one that is reused.
    pub(super) fn take(request: &Request, prepared: &Prepared, now: DateTime<Utc>) -> Result<Self> {
        let Prepared { plan, route, .. } = prepared;
        let directory = request.directory.clone();
        create_dir(&directory)?;
        let lock = Lock::acquire(&directory.join(LOCK))?;
        if let Postmaster::Alive { pid } = postmaster_of(&directory)? {
            return Err(Error::refused(format!("a server (pid {pid}) runs on {}", directory.display())));
        }
        let tablespaces: Vec<_> = request.tablespaces.values().cloned().collect();
        let is_free = is_free(&directory)?;
        let reused = request.delta && !is_free;
        if reused {
            let owner = delta::owner_of(&directory);
            if owner != Some(route.need.system_id) {
                return Err(Error::refused(format!("{} is not a directory of this cluster", directory.display())));
            }
        } else if is_unfinished(&directory, &plan.digest) {
            for place in &tablespaces {
                wipe(place)?;
            }
            wipe_all_but(&directory, &[MARKER, LOCK])?;
        } else if !is_free {
            return Err(Error::refused(format!("{} is not empty", directory.display())));
        } else {
            for place in &tablespaces {
                empty::create_empty(place)?;
            }
        }
        let marker = Marker {
            digest: plan.digest.clone(),
            backup: plan.backup.clone(),
            tablespaces: tablespaces.clone(),
            started_at: now,
            system_id: Some(route.need.system_id),
        };
        let marker =
            serde_json::to_vec_pretty(&marker).map_err(|error| Error::failed("encode the marker").because(error))?;
        place::place(&directory.join(MARKER), &marker, 0o600)?;
        if reused {
            clear(&directory, &tablespaces, &prepared.doomed)?;
        }
        let filesystems = Filesystems::of(&tablespaces, &directory)?;
        Ok(Self { directory, filesystems, _lock: lock })
    }

    /// What it is written to.
    pub(super) const fn filesystems(&self) -> &Filesystems {
        &self.filesystems
    }

    /// Everything but `pg_control`: label, the file `signal`, configuration, manifest.
    pub(super) fn complete(
        &self,
        leftover: &Leftover,
        mut manifest: Manifest,
        (commit, need): (&Commit, &WalNeed),
        signal: &str,
    ) -> Result<Vec<String>> {
        let directory = &self.directory;
        let label = leftover.small_files.iter().find(|(path, ..)| path == "backup_label");
        let (_, mode, label) = label.ok_or_else(|| Error::damaged(format!("{} has no backup_label", commit.id)))?;
        // The tablespace_map would make recovery link to the old places: the links are made already.
        place::place(&directory.join("backup_label"), label, mode & 0o777)?;
        manifest.small("backup_label", label)?;
        for name in ["pg_wal", "pg_wal/archive_status"] {
            create_dir(&directory.join(name))?;
        }
        for name in NOT_RESTORED {
            remove_file(&directory.join(name))?;
        }
        let notes = self.configure(leftover, &mut manifest)?;
        manifest.finish(need)?;
        place::place(&directory.join(signal), b"", 0o600)?;
        self.check_control(need)?;
        Ok(notes)
    }

    /// Writes the captured configuration if the data directory came without one.
    fn configure(&self, leftover: &Leftover, manifest: &mut Manifest) -> Result<Vec<String>> {
        if self.directory.join("postgresql.conf").exists() {
            return Ok(Vec::new());
        }
        let document = leftover.documents.iter().find(|(name, _)| name == crate::jobs::backup::CONFIGURATION);
        let files = document.map(|(_, document)| conf::rebuilt(&conf::captured_files(document))).unwrap_or_default();
        if files.is_empty() {
            return Ok(vec!["the backup holds no postgresql.conf: write one before the first start".to_owned()]);
        }
        for (name, content) in files {
            let path = self.directory.join(&name);
            if !path.exists() {
                place::place(&path, &content, 0o600)?;
                manifest.small(&name, &content)?;
            }
        }
        Ok(vec!["postgresql.conf was rebuilt from the captured configuration; originals: drctl-original-*".to_owned()])
    }

    fn check_control(&self, need: &WalNeed) -> Result<()> {
        let path = self.directory.join(CONTROL_FILE_PENDING);
        let bytes = std::fs::read(&path).map_err(|error| DiskError::new("read", &path, error))?;
        let control = ControlFile::parse(&bytes).during(|| "check the restored pg_control")?;
        if control.system_id != need.system_id {
            return Err(Error::damaged(format!(
                "the restored pg_control is of system {}, not {}",
                control.system_id, need.system_id
            )));
        }
        Ok(())
    }

    /// Makes everything durable, then gives `pg_control` its name: from here on PostgreSQL can start.
    pub(super) fn make_startable(&self) -> Result<()> {
        self.filesystems.sync()?;
        Ok(place::rename(&self.directory.join(CONTROL_FILE_PENDING), &self.directory.join(CONTROL_FILE))?)
    }

    /// The restore has ended: the directory is PostgreSQL's alone.
    pub(super) fn release(self) -> Result<()> {
        remove_file(&self.directory.join(MARKER))?;
        remove_file(&self.directory.join(LOCK))?;
        Ok(place::sync_dir(&self.directory)?)
    }
}

/// Makes a directory that is reused unstartable, durably, before anything else in it changes; then removes what goes.
fn clear(directory: &Path, tablespaces: &[PathBuf], doomed: &[PathBuf]) -> Result<()> {
    for name in [CONTROL_FILE, CONTROL_FILE_PENDING] {
        remove_file(&directory.join(name))?;
    }
    let global = directory.join(CONTROL_FILE).parent().map(Path::to_owned);
    global.filter(|global| global.is_dir()).map_or(Ok(()), |global| place::sync_dir(&global))?;
    delta::remove(doomed)?;
    tablespaces.iter().try_for_each(|place| Ok(create_dir(place)?))
}

/// `backup_manifest`, written file by file.
pub(super) struct Manifest {
    writer: ManifestWriter<BufWriter<File>>,
    path: PathBuf,
    modified: DateTime<Utc>,
}

impl Manifest {
    pub(super) fn begin(directory: &Path, need: &WalNeed, modified: DateTime<Utc>) -> Result<Self> {
        let path = directory.join(backup_manifest::FILE_NAME);
        let mut options = File::options();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create(true).truncate(true), 0o600);
        let file = options.open(&path).map_err(|error| DiskError::new("create", &path, error))?;
        let writer = ManifestWriter::new(BufWriter::new(file), need.server_version / 10_000, need.system_id);
        let writer = writer.map_err(|error| DiskError::new("write", &path, error))?;
        Ok(Self { writer, path, modified })
    }

    pub(super) fn add(&mut self, file: &WrittenFile) -> Result<()> {
        let path = file.path.as_str();
        if path == conf::AUTO_CONF || path.starts_with("pg_wal/") || NOT_RESTORED.contains(&path) {
            return Ok(());
        }
        let entry = FileEntry { path: path.as_bytes(), size: file.size, modified: self.modified, crc32c: file.crc32c };
        Ok(self.writer.file(&entry).map_err(|error| DiskError::new("write", &self.path, error))?)
    }

    fn small(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.add(&WrittenFile { path: path.to_owned(), size: content.len() as u64, crc32c: crc32c::crc32c(content) })
    }

    fn finish(self, need: &WalNeed) -> Result<()> {
        let range = WalRange { timeline: need.timeline, start: need.start_lsn, end: need.stop_lsn };
        let io = |error| DiskError::new("write", &self.path, error);
        self.writer.finish(&[range]).and_then(|mut out| out.flush()).map_err(io)?;
        Ok(())
    }
}

fn wipe(directory: &Path) -> Result<()> {
    if directory.exists() { wipe_all_but(directory, &[]) } else { Ok(create_dir(directory)?) }
}

fn wipe_all_but(directory: &Path, kept: &[&str]) -> Result<()> {
    for path in entries(directory)? {
        if kept.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        // Links (tablespaces) are removed, never followed.
        let is_dir = std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        let removed = if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(|error| DiskError::new("remove", &path, error))?;
    }
    Ok(())
}

fn create_dir(path: &Path) -> Result<(), DiskError> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| DiskError::new("create directory", path, error))
}

fn remove_file(path: &Path) -> Result<(), DiskError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(DiskError::new("remove", path, error)),
        _ => Ok(()),
    }
}
