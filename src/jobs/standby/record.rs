//! What a standby is, written beside its data, so that whoever starts it again goes on with it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::disk::{DiskError, place};
use crate::jobs::context::Context;
use crate::jobs::feed;
use crate::jobs::restore;
use crate::model::commit::WalNeed;
use crate::model::{BackupId, Error, RegionName, Result, TargetName};
use crate::pg::instance::User;

/// The record's name in the data directory.
pub const RECORD: &str = "drctl-standby.json";
/// Held by the process that feeds the standby.
pub(super) const LOCK: &str = "drctl-standby.lock";
/// What its server prints.
pub(super) const LOG: &str = "drctl-standby.log";
/// More than any record has.
const LIMIT: u64 = 64 * 1024;
/// Where a host keeps which standbys it has, below the state directory.
const KNOWN: &str = "standbys";

/// A standby of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of this record.
    pub format: u32,
    /// Whose standby.
    pub target: TargetName,
    /// The backup that it was made from.
    pub backup: BackupId,
    /// Where its WAL began.
    pub origin: WalNeed,
    /// Its data directory.
    pub directory: PathBuf,
    /// Where the feed's socket goes.
    pub socket_dir: PathBuf,
    /// The account that PostgreSQL runs as, when drctl is root.
    pub run_as: Option<String>,
    /// Read from this region first, instead of from the nearest.
    pub region: Option<RegionName>,
    /// The port of its server.
    pub port: u16,
    /// The addresses that it listens on; none but a socket in the data directory without them.
    pub listen: Option<String>,
    /// When its server was told to end recovery; written before it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<DateTime<Utc>>,
}

/// Where a standby is, as the state directory knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Known {
    target: TargetName,
    directory: PathBuf,
}

impl Record {
    /// The one in a data directory; `None` if that is no standby of drctl.
    ///
    /// # Errors
    /// It is not readable.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(RECORD);
        let mut bytes = Vec::new();
        let mut options = OpenOptions::new();
        // A pipe in its place would let us wait for ever.
        options.read(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
        match options.open(&path).and_then(|file| file.take(LIMIT).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DiskError::new("read", &path, error).into()),
        }
        let record = serde_json::from_slice::<Self>(&bytes);
        let record =
            record.map_err(|error| Error::damaged(format!("{} is not readable", path.display())).because(error))?;
        record.must_be_of(directory).map(|()| Some(record))
    }

    /// The record lies among files of the account that PostgreSQL runs as, which may write into it what it likes. So nothing
    /// in it leads root elsewhere: to no other directory, and to no other account.
    fn must_be_of(&self, directory: &Path) -> Result<()> {
        let wrong = |why: String| {
            let error = Error::refused(format!("{} is not followed", directory.join(RECORD).display()));
            Err(error.because(why))
        };
        let whole = |path: &Path| path.canonicalize().map_err(|error| DiskError::new("find", path, error));
        let here = whole(directory)?;
        if self.directory != directory && self.directory.canonicalize().ok() != Some(here) {
            return wrong(format!("it is of {}", self.directory.display()));
        }
        if !feed::is_place_in(&self.directory, &self.socket_dir) {
            return wrong(format!("it names {} as the place of a socket", self.socket_dir.display()));
        }
        if let Some(name) = self.run_as.as_ref().filter(|_| rustix::process::geteuid().is_root()) {
            let owner = std::fs::metadata(directory).map_err(|error| DiskError::new("look at", directory, error))?;
            if User::named(name)?.uid != owner.uid() {
                return wrong(format!("the directory does not belong to {name}, whom it names"));
            }
        }
        Ok(())
    }

    pub(super) fn document(&self) -> Result<Vec<u8>> {
        json(self)
    }

    /// Notes that the server is about to be told to end recovery, or (`None`) that it was not after all: whoever finds the
    /// directory later must not take a primary for a standby.
    pub(super) fn note_promotion(&self, at: Option<DateTime<Utc>>, owner: Option<User>) -> Result<()> {
        let path = self.directory.join(RECORD);
        place::place(&path, &json(&Self { promotion: at, ..self.clone() })?, 0o600)?;
        restore::give(&path, owner)
    }

    /// Lets `status` and the other verbs find it without its directory.
    pub(super) fn remember(&self, context: &Context) -> Result<()> {
        let places = context.state_dir.join(KNOWN);
        std::fs::create_dir_all(&places).map_err(|error| DiskError::new("create", &places, error))?;
        let known = Known { target: self.target.clone(), directory: self.directory.clone() };
        Ok(place::place(&self.note(context), &json(&known)?, 0o600)?)
    }

    pub(super) fn forget(&self, context: &Context) {
        for path in [self.note(context), self.directory.join(RECORD)] {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!(%error, path = %path.display(), "the record of a standby is not removed");
            }
        }
    }

    fn note(&self, context: &Context) -> PathBuf {
        let digest = Sha256::digest(self.directory.display().to_string().as_bytes());
        let digest: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        context.state_dir.join(KNOWN).join(format!("{}-{digest}.json", self.target))
    }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|error| Error::failed("encode the record of a standby").because(error))
}

/// Every standby of this host, or those of one target.
///
/// # Errors
/// The state directory cannot be read.
pub fn known(context: &Context, target: Option<&TargetName>) -> Result<Vec<Record>> {
    known_in(&context.state_dir, target)
}

/// The same for whoever has no context.
///
/// # Errors
/// As [`known`].
pub fn known_in(state_dir: &Path, target: Option<&TargetName>) -> Result<Vec<Record>> {
    let places = state_dir.join(KNOWN);
    let entries = match std::fs::read_dir(&places) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(DiskError::new("read directory", &places, error).into()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| DiskError::new("read directory", &places, error))?.path();
        let known = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Known>(&bytes).ok());
        let Some(known) = known.filter(|known| target.is_none_or(|target| known.target == *target)) else { continue };
        // A directory that was removed took its standby with it.
        found.extend(Record::read(&known.directory)?);
    }
    found.sort_by(|a, b| (&a.target, &a.directory).cmp(&(&b.target, &b.directory)));
    Ok(found)
}

/// The one standby that is meant: by its directory, else the only one of the target.
///
/// # Errors
/// There is none, or more than one.
pub fn the_one(context: &Context, target: Option<&TargetName>, directory: Option<&Path>) -> Result<Record> {
    if let Some(directory) = directory {
        let none = || Error::not_found(format!("{} is no standby of drctl", directory.display()));
        return Record::read(directory)?.ok_or_else(none);
    }
    let mut found = known(context, target)?;
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => {
            let error = Error::not_found("this host has no such standby");
            Err(error.hint("drctl standby start <target> --to DIR makes one; --dir DIR names one of another state_dir"))
        }
        (Some(_), false) => Err(Error::usage("this host has several standbys").hint("name one: --dir DIR")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::SystemRng;
    use crate::repository::testing::need;

    fn write(record: &Record, directory: &Path) {
        place::place(&directory.join(RECORD), &record.document().unwrap(), 0o600).unwrap();
    }

    #[test]
    fn a_record_leads_nowhere_else() {
        let files = tempfile::tempdir().unwrap();
        let directory = files.path().to_owned();
        assert_eq!(Record::read(&directory).unwrap(), None);
        let own = Record {
            format: 1,
            target: "ledger".parse().unwrap(),
            backup: BackupId::new(&"ledger".parse().unwrap(), DateTime::UNIX_EPOCH, &SystemRng).unwrap(),
            origin: need(1000, 1090),
            socket_dir: feed::place_in(&directory, &SystemRng).unwrap(),
            directory: directory.clone(),
            run_as: None,
            region: None,
            port: 5432,
            listen: None,
            promotion: None,
        };
        write(&own, &directory);
        assert_eq!(Record::read(&directory).unwrap(), Some(own.clone()));
        let elsewhere = tempfile::tempdir().unwrap();
        let wrong = [
            Record { socket_dir: "/etc".into(), ..own.clone() },
            Record { socket_dir: elsewhere.path().join("drctl-feed-01234567"), ..own.clone() },
            Record { directory: elsewhere.path().to_owned(), ..own.clone() },
        ];
        for record in wrong {
            write(&record, &directory);
            let error = Record::read(&directory).unwrap_err();
            assert!(error.to_string().contains("is not followed"), "{error}");
        }
        std::fs::remove_file(directory.join(RECORD)).unwrap();
        write(&own, elsewhere.path());
        std::os::unix::fs::symlink(elsewhere.path().join(RECORD), directory.join(RECORD)).unwrap();
        Record::read(&directory).unwrap_err();
    }
}
