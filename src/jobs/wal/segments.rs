//! Which segments are stored, and what was in them: the digests by which `archive_command` is told "known" or "another
//! one", although whoever writes WAL cannot read it back.
//!
//! The book is a cache in the state directory. A digest that it lost costs a second copy of a segment, never WAL. What it
//! says is true of one repository only: its first line names that, and the book of another one is not believed. A digest is
//! a fingerprint under the book's own secret, which stands there, too: all WAL that is received is digested, whether it is
//! archived or not, and SHA-256 would cost as much as compressing it.
//!
//! Regions can be lost, and a book does not notice. So it tells apart what a segment held from whether it is safe: safe is
//! what this process saw at the full write quorum, or a takeover found there. Of all else (noted by an earlier process, or
//! at a lowered quorum, or not found again by a takeover) only the digest counts: other bytes are refused, and the same
//! ones are stored again before anybody is told that they are.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::codec::fingerprint::{Fingerprint, PageFingerprinter, RunningFingerprint};
use crate::disk::{DiskError, place};
use crate::model::{Branch, Lsn, RepositoryId, Result, Rng, SystemId, Timeline, WalSegmentSize};
use crate::repository::wal::adopt::Tail;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::Log;

/// Segments remembered: 64 GiB of WAL at the usual size. A server that archives later than that stores a second copy.
const KEPT: usize = 4096;

/// The fingerprint of a whole segment under the secret of its book.
pub(super) type SegmentDigest = Fingerprint;

/// One segment of one branch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct SegmentKey {
    pub(super) system_id: SystemId,
    pub(super) timeline: Timeline,
    pub(super) branch: Branch,
    /// The position of its first byte.
    pub(super) start: Lsn,
}

impl SegmentKey {
    /// The segment of `log` that begins at `start`.
    pub(super) fn of(log: &Log, start: Lsn) -> Self {
        Self { system_id: log.system_id, timeline: log.timeline, branch: log.branch.clone(), start }
    }

    fn branch_id(&self) -> BranchId {
        BranchId { system_id: self.system_id, timeline: self.timeline, branch: self.branch.clone() }
    }
}

/// A segment of which every byte is durable at the write quorum in force.
#[derive(Debug, Clone)]
pub(super) struct Durable {
    pub(super) key: SegmentKey,
    pub(super) digest: SegmentDigest,
    /// Whether no byte of it was acknowledged at a lowered one.
    pub(super) at_full_quorum: bool,
}

/// A segment that is stored twice, with other bytes the second time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contradiction {
    pub(super) key: SegmentKey,
    /// The digest that was noted before; it stays in the book.
    pub(super) before: SegmentDigest,
    /// The one that came now.
    pub(super) now: SegmentDigest,
}

/// The digests of the segments that were durable at the write quorum.
#[derive(Debug)]
pub(super) struct SegmentBook {
    path: PathBuf,
    /// The first line: whose book it is, and its secret.
    title: String,
    digester: Digester,
    known: HashMap<SegmentKey, SegmentDigest>,
    /// Those of them that are certain to be stored.
    safe: HashSet<SegmentKey>,
    /// Oldest first.
    order: VecDeque<SegmentKey>,
    /// Lines in the file, those of forgotten segments among them; `None` = what stands there is to be replaced.
    lines: Option<usize>,
}

impl SegmentBook {
    /// Reads the book of a target in a repository; what is not readable in it is not known. A digest that another repository
    /// holds would call WAL safe that is not in this one.
    ///
    /// # Errors
    /// No randomness for a new one.
    pub(super) fn open(state_dir: &Path, target: &str, repository: &RepositoryId, rng: &dyn Rng) -> Result<Self> {
        let path = state_dir.join(format!("{target}.segments"));
        let whose = format!("segments of {target} in {repository}");
        let text = match std::fs::read(&path) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) => {
                tracing::debug!(%error, "no digests of earlier segments");
                None
            }
        };
        let kept = text.as_deref().and_then(|text| Some((secret_of(text, &whose)?, text.split_once('\n')?.1)));
        let Some((fingerprinter, lines)) = kept else {
            if text.is_some() {
                tracing::warn!(path = %path.display(), "the digests of segments are those of another repository or target, or of an older drctl, and are not used");
            }
            return Ok(Self::new(path, title_of(&whose, PageFingerprinter::generate(rng)?)));
        };
        let mut book = Self::new(path, title_of(&whose, fingerprinter));
        book.lines = Some(lines.lines().count());
        for (key, digest) in lines.lines().filter_map(parse) {
            book.learn(key, digest);
        }
        Ok(book)
    }

    fn new(path: PathBuf, (title, digester): (String, Digester)) -> Self {
        Self { path, title, digester, known: HashMap::new(), safe: HashSet::new(), order: VecDeque::new(), lines: None }
    }

    /// What digests are made with that this book understands.
    pub(super) fn digester(&self) -> Digester {
        self.digester.clone()
    }

    /// What a segment held when it was stored, if that is known. It may be lost since.
    pub(super) fn get(&self, key: &SegmentKey) -> Option<SegmentDigest> {
        self.known.get(key).copied()
    }

    /// The same of a segment that needs not be stored again.
    pub(super) fn safe(&self, key: &SegmentKey) -> Option<SegmentDigest> {
        self.safe.contains(key).then(|| self.get(key)).flatten()
    }

    /// Regions may have been lost: nothing is safe before it is found again.
    pub(super) fn doubt(&mut self) {
        self.safe.clear();
    }

    /// What the write quorum lists is safe. A digest says nothing of where its segment ends; its server does.
    pub(super) fn believe(&mut self, tail: &Tail, size: WalSegmentSize) {
        let is_held = |key: &&SegmentKey| {
            let end = key.start.checked_add(size.bytes());
            end.is_some_and(|end| tail.holds(&key.branch_id(), (key.start, end)))
        };
        let held: Vec<_> = self.order.iter().filter(is_held).cloned().collect();
        self.safe.extend(held);
    }

    /// The segment is durable. Says so if it was noted with another digest before, which stays.
    pub(super) fn note(&mut self, Durable { key, digest, at_full_quorum }: Durable) -> Option<Contradiction> {
        let before = self.get(&key);
        if let Some(before) = before.filter(|before| *before != digest) {
            return Some(Contradiction { key, before, now: digest });
        }
        if at_full_quorum {
            self.safe.insert(key.clone());
        }
        if before.is_some() {
            return None;
        }
        let line = print(&key, &digest);
        self.learn(key, digest);
        let kept = match self.lines {
            Some(lines) if lines < 2 * KEPT => self.append(&line, lines),
            _ => self.rewrite(),
        };
        if let Err(error) = kept {
            tracing::info!(%error, "the digest of a segment is remembered until the next start alone");
        }
        None
    }

    fn learn(&mut self, key: SegmentKey, digest: SegmentDigest) {
        if self.known.insert(key.clone(), digest).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > KEPT {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
                self.safe.remove(&oldest);
            }
        }
    }

    fn append(&mut self, line: &str, lines: usize) -> Result<(), DiskError> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(&self.path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .map_err(|error| DiskError::new("write", &self.path, error))?;
        self.lines = Some(lines + 1);
        Ok(())
    }

    fn rewrite(&mut self) -> Result<(), DiskError> {
        let lines = self.order.iter().filter_map(|key| Some(print(key, self.known.get(key)?)));
        let text: String = std::iter::once(self.title.clone()).chain(lines).collect();
        place::place(&self.path, text.as_bytes(), 0o600)?;
        self.lines = Some(self.order.len());
        Ok(())
    }
}

/// The first line of a book under a secret.
fn title_of(whose: &str, fingerprinter: PageFingerprinter) -> (String, Digester) {
    let title = format!("{whose} under {}", hex::encode(fingerprinter.secret()));
    (format!("{title} {:08x}\n", crc32c::crc32c(title.as_bytes())), Digester(std::sync::Arc::new(fingerprinter)))
}

/// The secret in the first line of a book, if it is whose it is to be.
fn secret_of(text: &str, whose: &str) -> Option<PageFingerprinter> {
    let (title, sum) = text.lines().next()?.rsplit_once(' ')?;
    if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(title.as_bytes()) {
        return None;
    }
    let secret = title.strip_prefix(whose)?.strip_prefix(" under ")?;
    Some(PageFingerprinter::new(hex::decode(secret).ok()?.try_into().ok()?))
}

/// A line with a checksum of its own: a digest that a disk changed would call good WAL another one for ever.
fn print(SegmentKey { system_id, timeline, branch, start }: &SegmentKey, digest: &SegmentDigest) -> String {
    let text = format!("{system_id} {timeline} {branch} {start} {}", hex::encode(digest));
    let sum = crc32c::crc32c(text.as_bytes());
    format!("{text} {sum:08x}\n")
}

fn parse(line: &str) -> Option<(SegmentKey, SegmentDigest)> {
    let (text, sum) = line.rsplit_once(' ')?;
    if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(text.as_bytes()) {
        return None;
    }
    let mut fields = text.split(' ');
    let key = SegmentKey {
        system_id: fields.next()?.parse().ok()?,
        timeline: Timeline(fields.next()?.parse().ok()?),
        branch: Branch::try_from(fields.next()?.to_owned()).ok()?,
        start: fields.next()?.parse().ok()?,
    };
    let digest = hex::decode(fields.next()?).ok()?.try_into().ok()?;
    Some((key, digest))
}

/// Makes the digests of one book.
#[derive(Debug, Clone)]
pub(super) struct Digester(std::sync::Arc<PageFingerprinter>);

impl Digester {
    /// The digest of a segment that comes in pieces.
    pub(super) fn running(&self) -> RunningFingerprint {
        self.0.running()
    }

    /// The digest of a whole segment.
    pub(super) fn of(&self, mut read: impl std::io::Read) -> std::io::Result<SegmentDigest> {
        let (mut running, mut buffer) = (self.running(), vec![0; 256 * 1024]);
        loop {
            match read.read(&mut buffer)? {
                0 => return Ok(running.finish()),
                length => running.update(buffer.get(..length).unwrap_or_default()),
            }
        }
    }
}

/// A book that several tasks write into.
pub(super) type SharedBook = std::sync::Arc<std::sync::Mutex<SegmentBook>>;

/// Notes digests without holding up a thread that also answers the server. Gives those that contradict what was noted.
pub(super) async fn note(book: &SharedBook, durable: Vec<Durable>) -> Vec<Contradiction> {
    if durable.is_empty() {
        return Vec::new();
    }
    let book = std::sync::Arc::clone(book);
    let noted = tokio::task::spawn_blocking(move || {
        let mut book = book.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        durable.into_iter().filter_map(|durable| book.note(durable)).collect()
    });
    noted.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the digest of a segment was not noted");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::SystemRng;

    fn log(timeline: u32) -> Log {
        Log {
            target: "ledger".parse().unwrap(),
            system_id: SystemId(7),
            timeline: Timeline(timeline),
            branch: Branch::root(),
            wal_segment_size: WalSegmentSize::try_from(1 << 20).unwrap(),
        }
    }

    fn repository(byte: u8) -> RepositoryId {
        hex::encode([byte; 16]).parse().unwrap()
    }

    fn open(dir: &Path) -> SegmentBook {
        open_of(dir, 1)
    }

    fn open_of(dir: &Path, byte: u8) -> SegmentBook {
        SegmentBook::open(dir, "ledger", &repository(byte), &SystemRng).unwrap()
    }

    fn durable(key: &SegmentKey, digest: SegmentDigest) -> Durable {
        Durable { key: key.clone(), digest, at_full_quorum: true }
    }

    #[test]
    fn a_book_is_read_back_and_forgets_the_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = open(dir.path());
        let key = |number: u64| SegmentKey::of(&log(1), Lsn(number << 20));
        let digester = book.digester();
        let digest = |number: u64| digester.of(&number.to_le_bytes()[..]).unwrap();
        for number in 0..2 * KEPT as u64 + 10 {
            book.note(durable(&key(number), digest(number)));
        }
        for book in [book, open(dir.path())] {
            assert_eq!(book.get(&key(9)), None);
            assert_eq!(book.get(&key(2 * KEPT as u64 + 9)), Some(digest(2 * KEPT as u64 + 9)));
            assert_eq!(book.digester().of(&b"wal"[..]).unwrap(), digester.of(&b"wal"[..]).unwrap());
            assert!(book.order.len() <= KEPT && book.lines.unwrap() < 2 * KEPT);
        }
    }

    #[test]
    fn what_is_not_readable_in_a_book_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let key = |number: u64| SegmentKey::of(&log(1), Lsn(number << 20));
        let mut book = open(dir.path());
        book.note(durable(&key(1), [1; 16]));
        book.note(durable(&key(2), [2; 16]));
        let mut bytes = std::fs::read(&book.path).unwrap();
        let digit = bytes.len() - 20;
        bytes[digit] = if bytes[digit] == b'0' { b'1' } else { b'0' };
        bytes.extend_from_slice(b"7 1 0 0/300000 00");
        place::place(&book.path, &bytes, 0o600).unwrap();
        let book = open(dir.path());
        assert_eq!([1, 2, 3].map(|number| book.get(&key(number)).is_some()), [true, false, false]);
    }

    #[test]
    fn other_bytes_contradict_and_the_first_digest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let key = SegmentKey::of(&log(1), Lsn(1 << 20));
        assert_eq!(open(dir.path()).note(durable(&key, [1; 16])), None);
        let mut book = open(dir.path());
        assert_eq!(book.note(durable(&key, [1; 16])), None);
        let contradiction = Contradiction { key: key.clone(), before: [1; 16], now: [2; 16] };
        assert_eq!(book.note(durable(&key, [2; 16])), Some(contradiction));
        for book in [book, open(dir.path())] {
            assert_eq!(book.get(&key), Some([1; 16]));
        }
    }

    #[test]
    fn the_book_of_another_repository_is_not_believed_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let key = |number: u64| SegmentKey::of(&log(1), Lsn(number << 20));
        open(dir.path()).note(durable(&key(1), [1; 16]));
        let mut other = open_of(dir.path(), 2);
        assert_eq!(other.get(&key(1)), None);
        other.note(durable(&key(2), [2; 16]));
        let other = open_of(dir.path(), 2);
        assert_eq!([1, 2].map(|number| other.get(&key(number)).is_some()), [false, true]);
        assert_eq!(open(dir.path()).get(&key(2)), None);
        // What an older drctl left has no first line, or one without a secret.
        let title = format!("segments of ledger in {}", repository(1));
        let title = format!("{title} {:08x}\n", crc32c::crc32c(title.as_bytes()));
        place::place(&other.path, format!("{title}{}", print(&key(3), &[3; 16])).as_bytes(), 0o600).unwrap();
        assert_eq!(open(dir.path()).get(&key(3)), None);
        place::place(&other.path, print(&key(3), &[3; 16]).as_bytes(), 0o600).unwrap();
        assert_eq!(open(dir.path()).get(&key(3)), None);
    }

    /// Whoever answers by a digest for WAL that was lost since lets the server remove the last copy.
    #[test]
    fn what_was_noted_is_safe_only_while_it_is_certain_to_be_stored() {
        let dir = tempfile::tempdir().unwrap();
        let (mut book, size) = (open(dir.path()), log(1).wal_segment_size);
        let key = |timeline, number: u64| SegmentKey::of(&log(timeline), Lsn(number << 20));
        let lowered = Durable { at_full_quorum: false, ..durable(&key(1, 1), [1; 16]) };
        assert_eq!(book.note(lowered), None);
        assert_eq!((book.safe(&key(1, 1)), book.get(&key(1, 1))), (None, Some([1; 16])));
        for (timeline, number) in [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)] {
            assert_eq!(book.note(durable(&key(timeline, number), [1; 16])), None);
            assert!(book.safe(&key(timeline, number)).is_some());
        }
        let tail = Tail {
            branch: log(1).branch_id(),
            end: Lsn(5 << 20),
            at_record: true,
            last_record: None,
            sealed: 0,
            adopted: 0,
            unbroken: Vec::new(),
            held: vec![(log(1).branch_id(), vec![(Lsn(1 << 20), Lsn(3 << 20)), (Lsn((3 << 20) + 1), Lsn(5 << 20))])],
            commits: None,
        };
        let safe = |book: &SegmentBook| {
            [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)].map(|(line, number)| book.safe(&key(line, number)).is_some())
        };
        for mut book in [book, open(dir.path())] {
            book.doubt();
            assert_eq!(safe(&book), [false; 5]);
            book.believe(&tail, size);
            assert_eq!(safe(&book), [true, true, false, true, false], "a byte of the third is missing");
            let other = book.note(durable(&key(1, 3), [2; 16]));
            assert!(other.is_some() && book.safe(&key(1, 3)).is_none(), "its digest counts all the same");
            assert_eq!(book.note(durable(&key(1, 3), [1; 16])), None);
            assert_eq!(safe(&book), [true, true, true, true, false]);
        }
    }
}
