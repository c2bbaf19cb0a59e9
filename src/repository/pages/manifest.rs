//! MANIFEST: what a backup contains. Sealed JSON lines, streamed in parts, so that half a million files never sit in
//! memory at once.
//!
//! The first line describes the backup, the last one closes it; between them stands one line per directory, link, file
//! and document, in no particular order.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::codec::fingerprint::of_name;

use crate::codec::compress::{pack_payload, unpack_payload};
use crate::codec::seal::{Aad, SealingKey, Unit, open, seal};
use crate::model::commit::Parts;
use crate::model::{BackupId, Error, KeysetId, RepositoryId, Result, ResultExt};
use crate::repository::pages::map::{FrameId, FrameRef, PackId};
use crate::store::Digest;

/// Plain bytes per part: sealed parts stay below the object limit whatever they compress to.
const PART_BYTES: usize = 4 * 1024 * 1024;
/// A line of the largest file (1 GiB segment, 128 chunks) is about 8 KiB; a part never grows by more than one document.
const PART_LIMIT: usize = 15 * 1024 * 1024;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case", deny_unknown_fields)]
pub enum Line {
    /// The first.
    Begin(Begin),
    /// A directory below the data directory.
    Directory {
        /// Relative, `/`-separated.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// A tablespace outside the data directory.
    Tablespace {
        /// Its oid, which names the link in `pg_tblspc`.
        oid: u32,
        /// Where it was on the source.
        location: String,
    },
    /// A file made of pages.
    File(FileLine),
    /// A file too small and too special for pages: `backup_label`, `tablespace_map`.
    Small {
        /// Relative, `/`-separated.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Contents, base64.
        base64: String,
    },
    /// Something around the cluster that restore may need: captured configuration.
    Document {
        /// Its name.
        name: String,
        /// Contents.
        content: serde_json::Value,
    },
    /// The last; its counts prove that no line is missing.
    End {
        /// `File` lines.
        files: u64,
        /// Bytes of all files.
        bytes: u64,
    },
}

impl Line {
    /// The file that it describes.
    fn path(&self) -> Option<&str> {
        match self {
            Self::File(FileLine { path, .. }) | Self::Small { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// What must be known before the first file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begin {
    /// Version of the repository format.
    pub format: u32,
    /// The backup.
    pub backup: BackupId,
    /// Bytes per page.
    pub page_size: u32,
    /// The secret of the page fingerprints, hex; the same for a generation of backups.
    pub fingerprint_secret: String,
    /// Whether the source's pages carry checksums.
    pub page_checksums: bool,
    /// The backups whose frames hold map chunks of this one, with their keysets; chunks refer to them by index.
    pub sources: Vec<(BackupId, KeysetId)>,
}

/// A file and where its map is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLine {
    /// Relative, `/`-separated; below a tablespace it begins with `pg_tblspc/<oid>/`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Its pages, in ascending order.
    pub chunks: Vec<ChunkUse>,
    /// Blocks whose page checksum was wrong on the source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged_blocks: Vec<u32>,
}

/// A run of entries in a map chunk: nine numbers, because a large cluster has many of these. In order: source and pack
/// and number of the chunk's birth; source and pack where it is now; offset, length; first entry, entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkUse(pub u16, pub u32, pub u32, pub u16, pub u32, pub u32, pub u32, pub u16, pub u16);

impl ChunkUse {
    /// Writes a use of `frame`; `source_of` numbers backups.
    ///
    /// # Errors
    /// Those of `source_of`.
    pub fn new(
        frame: &FrameRef,
        source_of: impl Fn(&BackupId) -> Result<u16>,
        (first, pages): (u16, u16),
    ) -> Result<Self> {
        let (born, now) = (source_of(&frame.id.pack.backup)?, source_of(&frame.pack.backup)?);
        let FrameRef { id, pack, offset, length, .. } = frame;
        Ok(Self(born, id.pack.ordinal, id.ordinal, now, pack.ordinal, *offset, *length, first, pages))
    }

    /// The chunk's frame.
    ///
    /// # Errors
    /// A number of no source.
    pub fn frame(&self, begin: &Begin) -> Result<FrameRef> {
        let unknown = || Error::damaged(format!("the manifest of {} names an unknown source", begin.backup));
        let source = |index: u16| begin.sources.get(usize::from(index)).ok_or_else(unknown);
        let (born, keyset) = source(self.0)?;
        let (now, _) = source(self.3)?;
        let id = FrameId { pack: PackId { backup: born.clone(), ordinal: self.1 }, ordinal: self.2 };
        let pack = PackId { backup: now.clone(), ordinal: self.4 };
        Ok(FrameRef { id, keyset: keyset.clone(), pack, offset: self.5, length: self.6 })
    }

    /// The first entry of the chunk that belongs to the file, and how many.
    pub const fn entries(&self) -> (u16, u16) {
        (self.7, self.8)
    }
}

/// What seals a manifest's parts.
#[derive(Debug, Clone, Copy)]
pub struct ManifestSeal<'a> {
    /// The repository.
    pub repository: &'a RepositoryId,
    /// The backup's keyset.
    pub keyset: &'a KeysetId,
    /// The backup.
    pub backup: &'a BackupId,
    /// The keyset's `meta` secret.
    pub key: &'a SealingKey,
}

impl ManifestSeal<'_> {
    fn seal(&self, part: u32, lines: &[u8]) -> Result<Vec<u8>> {
        let id = format!("{}/{part}", self.backup);
        let aad = Aad { repository: self.repository, keyset: self.keyset, kind: Unit::Manifest, id: &id };
        Ok(seal(self.key, &aad, &pack_payload(3, lines)?)?)
    }

    fn open(&self, part: u32, sealed: &[u8]) -> Result<Vec<u8>> {
        let id = format!("{}/{part}", self.backup);
        let aad = Aad { repository: self.repository, keyset: self.keyset, kind: Unit::Manifest, id: &id };
        let payload = open(self.key, &aad, sealed).during(|| format!("open manifest part {id}"))?;
        unpack_payload(&payload, None).during(|| format!("unpack manifest part {id}"))
    }
}

/// A sealed part and its number.
pub type SealedPart = (u32, Vec<u8>);

/// Collects lines into parts.
#[derive(Debug, Default)]
pub struct ManifestWriter {
    names: HashSet<u128>,
    lines: Vec<u8>,
    next_part: u32,
    files: u64,
    bytes: u64,
}

impl ManifestWriter {
    /// Adds a line; returns a sealed part when one is full.
    ///
    /// # Errors
    /// A document too large for one part.
    pub fn add(&mut self, line: &Line, seal: &ManifestSeal<'_>) -> Result<Option<SealedPart>> {
        if let Line::File(file) = line {
            self.files += 1;
            self.bytes += file.size;
        }
        if let Some(path) = line.path().filter(|path| !self.names.insert(of_name(path))) {
            return Err(Error::failed(format!("the source names {path} twice")).hint("run the backup again"));
        }
        serde_json::to_writer(&mut self.lines, line)
            .map_err(|error| Error::failed("a manifest line is not JSON").because(error))?;
        self.lines.push(b'\n');
        if self.lines.len() > PART_LIMIT {
            return Err(Error::failed(format!("a document of {} bytes is too large for a manifest", self.lines.len())));
        }
        if self.lines.len() < PART_BYTES { Ok(None) } else { self.cut(seal).map(Some) }
    }

    /// Closes the manifest: the last part, and the bytes of all files.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn finish(mut self, seal: &ManifestSeal<'_>) -> Result<(Vec<SealedPart>, u64)> {
        let end = Line::End { files: self.files, bytes: self.bytes };
        let mut parts: Vec<_> = self.add(&end, seal)?.into_iter().collect();
        if !self.lines.is_empty() {
            parts.push(self.cut(seal)?);
        }
        Ok((parts, self.bytes))
    }

    fn cut(&mut self, seal: &ManifestSeal<'_>) -> Result<SealedPart> {
        let part = self.next_part;
        self.next_part += 1;
        let sealed = seal.seal(part, &self.lines)?;
        self.lines.clear();
        Ok((part, sealed))
    }
}

/// Reads parts back into lines and proves that the whole manifest was there.
#[derive(Debug, Default)]
pub struct ManifestReader {
    names: HashSet<u128>,
    next_part: u32,
    begun: bool,
    files: u64,
    bytes: u64,
    end: Option<(u64, u64)>,
}

impl ManifestReader {
    /// Opens the next part, in order.
    ///
    /// # Errors
    /// It does not authenticate, is not JSON lines, or a line stands where it may not.
    pub fn part(&mut self, sealed: &[u8], seal: &ManifestSeal<'_>) -> Result<Vec<Line>> {
        let plain = seal.open(self.next_part, sealed)?;
        self.next_part += 1;
        let wrong = |why: &str| Error::damaged(format!("the manifest of {} {why}", seal.backup));
        let mut lines = Vec::new();
        for text in plain.split_inclusive(|byte| *byte == b'\n') {
            let line: Line = serde_json::from_slice(text).map_err(|error| wrong("is not readable").because(error))?;
            let first = !self.begun;
            if let Some(path) = line.path().filter(|path| !self.names.insert(of_name(path))) {
                return Err(wrong(&format!("names {path} twice")));
            }
            match &line {
                Line::Begin(begin) if first && begin.backup == *seal.backup => self.begun = true,
                Line::Begin(_) => return Err(wrong("begins twice or belongs to another backup")),
                _ if first || self.end.is_some() => return Err(wrong("has a line out of place")),
                Line::File(file) => {
                    self.files += 1;
                    self.bytes += file.size;
                }
                Line::End { files, bytes } => self.end = Some((*files, *bytes)),
                _ => {}
            }
            lines.push(line);
        }
        Ok(lines)
    }

    /// To be called after the last part.
    ///
    /// # Errors
    /// Lines are missing.
    pub fn finish(self, backup: &BackupId) -> Result<()> {
        if self.end == Some((self.files, self.bytes)) {
            return Ok(());
        }
        Err(Error::damaged(format!("the manifest of {backup} is not complete")))
    }
}

/// The summary of numbered parts that COMMIT signs.
#[derive(Debug, Default)]
pub struct PartsSummary {
    digests: Vec<[u8; 32]>,
    bytes: u64,
}

impl PartsSummary {
    /// Adds the next part.
    pub fn add(&mut self, size: u64, digest: Digest) {
        self.digests.push(digest.0);
        self.bytes += size;
    }

    /// The summary.
    pub fn finish(&self) -> Parts {
        let sha256 = Digest::of(&self.digests.concat()).0;
        Parts { count: u32::try_from(self.digests.len()).unwrap_or(u32::MAX), bytes: self.bytes, sha256 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::random::SystemRng;
    use crate::keys::keyset::Keyset;

    /// A restore creates each file once, so a second line of one name would stop it for ever.
    #[test]
    fn a_name_stands_once_for_the_writer_and_for_the_reader() {
        let repository = RepositoryId::new(&SystemRng).unwrap();
        let backup: BackupId = "ledger-261120-010059-k7f".parse().unwrap();
        let keyset = Keyset::generate(&repository, &backup.target().unwrap(), &SystemRng).unwrap();
        let seal = ManifestSeal { repository: &repository, keyset: keyset.id(), backup: &backup, key: keyset.meta() };
        let small = || Line::Small { path: "backup_label".into(), mode: 0o600, base64: String::new() };
        let begin = Line::Begin(Begin {
            format: 1,
            backup: backup.clone(),
            page_size: 8192,
            fingerprint_secret: String::new(),
            page_checksums: true,
            sources: Vec::new(),
        });
        let mut writer = ManifestWriter::default();
        writer.add(&begin, &seal).unwrap();
        writer.add(&small(), &seal).unwrap();
        assert!(writer.add(&small(), &seal).unwrap_err().message().contains("backup_label twice"));

        // A writer that did not look.
        writer.names.clear();
        writer.add(&small(), &seal).unwrap();
        let (parts, _) = writer.finish(&seal).unwrap();
        let read = ManifestReader::default().part(&parts[0].1, &seal).unwrap_err();
        assert!(read.to_string().contains("backup_label twice"), "{read}");
    }
}
