//! What stands between the staged WAL and PostgreSQL's `restore_command`: a record of what will be there, and the
//! decision for each file that is asked for.
//!
//! PostgreSQL takes every exit code from 1 to 125 for the end of the archive and opens the database without a word. So
//! "absent" is said only of what the plan itself leaves out; everything else waits or is an error.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::disk::lock::{Lock, boot_id};
use crate::disk::{DiskError, place};
use crate::model::{Error, Result, ResultExt, SegmentName, Timeline, WalSegmentSize};
use crate::pg::instance::User;

/// The record's file name.
pub const STAGING_FILE: &str = "staging.json";
/// Locked for as long as somebody stages; the kernel lets go of it whatever happens to the process.
pub const LOCK_FILE: &str = "stager.lock";

const POLL: Duration = Duration::from_millis(5);

/// What a staging directory holds, or will.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Staging {
    /// Whether everything is there, durably.
    pub complete: bool,
    /// The boot of the machine in which it is written, where the system numbers them. What is not complete may have lost
    /// bytes when the machine went down, under whole names.
    #[serde(default)]
    pub boot: Option<String>,
    /// Bytes per segment.
    pub wal_segment_size: WalSegmentSize,
    /// The segments of the plan, ascending.
    pub segments: Vec<SegmentRange>,
    /// The history files of the plan, all of them there from the start.
    pub histories: Vec<String>,
}

/// Segments of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentRange {
    /// The timeline in their names.
    pub timeline: Timeline,
    /// Number of the first.
    pub first: u64,
    /// Number of the last.
    pub last: u64,
}

/// What the plan says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planned {
    /// It is or will be there.
    Staged,
    /// The repository does not have it, or it lies behind the end of the plan.
    Absent,
    /// The plan knows nothing of it.
    Unknown,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// It is there.
    Given,
    /// The plan lists it as absent.
    Absent,
}

impl Staging {
    /// Reads the record.
    ///
    /// # Errors
    /// There is none, or it is not readable.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(STAGING_FILE);
        let io = |error| Error::from(DiskError::new("read", &path, error));
        let bytes = std::fs::read(&path).map_err(io)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::damaged(format!("{} is not readable", path.display())).because(error))
    }

    /// Writes the record durably. PostgreSQL's account reads it at any moment.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, directory: &Path, owner: Option<User>) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::failed("encode the staging record").because(error))?;
        let path = directory.join(STAGING_FILE);
        let placed = match owner {
            Some(User { uid, gid }) => place::place_for(&path, &bytes, 0o600, (uid, gid)),
            None => place::place(&path, &bytes, 0o600),
        };
        Ok(placed?)
    }

    /// The segment files of the plan.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        let of = |range: &SegmentRange| {
            let timeline = range.timeline;
            (range.first..=range.last).map(move |number| SegmentName { timeline, number })
        };
        self.segments.iter().flat_map(of).map(|name| name.file_name(self.wal_segment_size))
    }

    fn planned(&self, file: &str) -> Planned {
        if let Some(timeline) = history_timeline(file) {
            return match self.histories.iter().any(|name| name == file) {
                true => Planned::Staged,
                // Recovery probes for timelines; one that the repository has must never be told as free.
                false if timeline > 0 => Planned::Absent,
                false => Planned::Unknown,
            };
        }
        let Some(name) = SegmentName::parse(file, self.wal_segment_size) else { return Planned::Unknown };
        let holds =
            |range: &SegmentRange| range.timeline == name.timeline && (range.first..=range.last).contains(&name.number);
        if self.segments.iter().any(holds) {
            return Planned::Staged;
        }
        match self.segments.iter().map(|range| range.last).max() {
            Some(last) if name.number > last => Planned::Absent,
            _ => Planned::Unknown,
        }
    }
}

/// `0000000A.history` → 10.
fn history_timeline(file: &str) -> Option<u32> {
    let digits = file.strip_suffix(".history")?;
    let plain = digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

/// Gives `file` from the staging directory to `destination`, waiting for it while somebody stages.
///
/// # Errors
/// Any doubt: the plan does not know the file, the stager is gone, the disk fails.
pub fn fetch(directory: &Path, file: &str, destination: &Path) -> Result<Fetched> {
    let source = directory.join(file);
    loop {
        // In this order: what is complete now was there before, what is alive now may still write it.
        let staging = Staging::read(directory)?;
        match staging.planned(file) {
            Planned::Absent => return Ok(Fetched::Absent),
            Planned::Unknown => return Err(Error::failed(format!("the restore's plan does not know {file}"))),
            Planned::Staged => {}
        }
        if !staging.complete && staging.boot != boot_id() {
            let error = Error::failed(format!("the machine went down while WAL was staged: {file} may be torn"));
            return Err(error.hint("run the restore again"));
        }
        let is_staged_by_somebody = is_locked(&directory.join(LOCK_FILE))?;
        if source.exists() {
            give(&source, destination).during(|| format!("hand over {file}"))?;
            return Ok(Fetched::Given);
        }
        if staging.complete {
            return Err(Error::failed(format!("{file} was staged and is gone from {}", directory.display())));
        }
        if !is_staged_by_somebody && !Staging::read(directory)?.complete && !source.exists() {
            let error = Error::failed(format!("{file} is not staged, and whoever staged WAL here is gone"));
            return Err(error.hint("run the restore again"));
        }
        std::thread::sleep(POLL);
    }
}

fn is_locked(path: &Path) -> Result<bool> {
    match Lock::acquire(path) {
        Ok(_lock) => Ok(false),
        Err(DiskError::Locked { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Gives the file a second name, which costs nothing, or copies it where it cannot have one.
///
/// The staged name stays: PostgreSQL asks again for the last segment before it promotes, and after a crash. What the name leads
/// to stays, too, for as long as recovery may ask for it: PostgreSQL reuses the files of segments behind it, but writes no WAL
/// into them before it has removed recovery.signal, and then asks for histories at most. Whoever leaves `restore_command` where
/// it is and calls it after promotion may find newer WAL under an old name, which PostgreSQL refuses by the position in each page.
fn give(source: &Path, destination: &Path) -> Result<()> {
    let io = |error| Error::from(DiskError::new("put", destination, error));
    match std::fs::remove_file(destination) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    match std::fs::hard_link(source, destination) {
        Ok(()) => Ok(()),
        // Another file system, one without links, or a system that lets only owners make them.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => copy(source, destination),
        Err(error) => Err(io(error)),
    }
}

/// A reader sees the whole file or none. Not fsynced: PostgreSQL does it.
fn copy(source: &Path, destination: &Path) -> Result<()> {
    let parent: PathBuf = match destination.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let io = |error| Error::from(DiskError::new("copy to", destination, error));
    let temporary = tempfile::Builder::new().prefix(".drctl-").tempfile_in(parent).map_err(io)?;
    std::fs::copy(source, temporary.path()).map_err(io)?;
    temporary.persist(destination).map_err(|error| io(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging(complete: bool) -> Staging {
        let range = |timeline, first, last| SegmentRange { timeline: Timeline(timeline), first, last };
        Staging {
            complete,
            boot: boot_id(),
            wal_segment_size: WalSegmentSize::DEFAULT,
            segments: vec![range(1, 2, 4), range(2, 5, 6)],
            histories: vec!["00000002.history".to_owned()],
        }
    }

    fn segment(timeline: u32, number: u64) -> String {
        SegmentName { timeline: Timeline(timeline), number }.file_name(WalSegmentSize::DEFAULT)
    }

    #[test]
    fn absent_is_only_what_the_plan_leaves_out() {
        let staging = staging(true);
        for (file, expected) in [
            (segment(1, 2), Planned::Staged),
            (segment(2, 6), Planned::Staged),
            (segment(2, 7), Planned::Absent),
            (segment(3, 7), Planned::Absent),
            (segment(2, 4), Planned::Unknown),
            (segment(1, 5), Planned::Unknown),
            (segment(1, 1), Planned::Unknown),
            ("00000002.history".to_owned(), Planned::Staged),
            ("00000003.history".to_owned(), Planned::Absent),
            ("00000000.history".to_owned(), Planned::Unknown),
            ("0000000.history".to_owned(), Planned::Unknown),
            ("../../etc/passwd".to_owned(), Planned::Unknown),
            ("000000010000000000000002.partial".to_owned(), Planned::Unknown),
        ] {
            assert_eq!(staging.planned(&file), expected, "{file}");
        }
        assert_eq!(staging.names().count(), 5);
    }

    #[test]
    fn a_staged_file_is_given_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        staging(true).write(dir.path(), None).unwrap();
        place::place(&dir.path().join(segment(1, 3)), b"wal", 0o600).unwrap();
        let destination = dir.path().join("RECOVERYXLOG");
        for _ in 0..2 {
            assert_eq!(fetch(dir.path(), &segment(1, 3), &destination).unwrap(), Fetched::Given);
            assert_eq!(std::fs::read(&destination).unwrap(), b"wal");
            let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
            assert_eq!(names.filter(|name| name.to_string_lossy().starts_with(".drctl-")).count(), 0);
        }
        assert_eq!(fetch(dir.path(), &segment(2, 7), &destination).unwrap(), Fetched::Absent);
        // Planned, complete and not there: never "absent".
        assert!(fetch(dir.path(), &segment(1, 4), &destination).is_err());
        assert!(fetch(&dir.path().join("nowhere"), &segment(2, 7), &destination).is_err());
    }

    #[test]
    fn what_was_not_durable_when_the_machine_went_down_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let before = |complete| Staging { boot: Some("another boot".to_owned()), ..staging(complete) };
        place::place(&dir.path().join(segment(1, 3)), b"wal", 0o600).unwrap();
        let destination = dir.path().join("RECOVERYXLOG");
        before(false).write(dir.path(), None).unwrap();
        let torn = fetch(dir.path(), &segment(1, 3), &destination).unwrap_err();
        assert!(torn.message().contains("went down"), "{torn}");
        assert!(!destination.exists());
        before(true).write(dir.path(), None).unwrap();
        assert_eq!(fetch(dir.path(), &segment(1, 3), &destination).unwrap(), Fetched::Given);
    }

    #[test]
    fn a_file_is_waited_for_while_somebody_stages_and_not_longer() {
        let dir = tempfile::tempdir().unwrap();
        staging(false).write(dir.path(), None).unwrap();
        let destination = dir.path().join("RECOVERYXLOG");
        let gone = fetch(dir.path(), &segment(1, 2), &destination).unwrap_err();
        assert!(gone.message().contains("gone"), "{gone}");
        let lock = Lock::acquire(&dir.path().join(LOCK_FILE)).unwrap();
        let (path, to) = (dir.path().to_owned(), destination.clone());
        let waiting = std::thread::spawn(move || fetch(&path, &segment(1, 2), &to));
        std::thread::sleep(POLL * 5);
        assert!(!waiting.is_finished());
        place::place(&dir.path().join(segment(1, 2)), b"late", 0o600).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), Fetched::Given);
        let (path, to) = (dir.path().to_owned(), destination);
        let waiting = std::thread::spawn(move || fetch(&path, &segment(1, 4), &to));
        std::thread::sleep(POLL * 5);
        drop(lock);
        assert!(waiting.join().unwrap().is_err());
    }
}
