//! The tar archives of a server's own base backup, turned into items while they arrive.

use std::collections::HashSet;
use std::io::{self, Read};

use bytes::{Buf, Bytes};
use tar::{Archive, Entry, EntryType};
use tokio::sync::mpsc;

use super::error::SourceError;
use super::listing::CONTROL_FILE;
use super::packer::{Packer, Part, SMALL_PAGES};
use super::pages::{Damage, Held, PageCheck};
use super::rules::{self, Verdict};
use crate::pg::control::ControlFile;
use crate::source::{BATCH_PAGES, FileId, Item, PAGE_SIZE, SmallFile};

/// What arrives.
#[derive(Debug)]
pub enum Chunk {
    /// An archive begins: the data directory, or the tablespace with this oid.
    Archive(Option<u32>),
    /// More of it.
    Data(Bytes),
}

/// What is known when all archives have been read.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// `backup_label`, which the server puts into the archive.
    pub files: Vec<SmallFile>,
    /// Files whose damage depends on where the backup ends.
    pub held: Vec<Held>,
    /// Whether any file is damaged for certain.
    pub damaged: bool,
}

/// Reads all archives and sends what belongs in the backup; for a thread, because it blocks.
///
/// # Errors
/// The archive ends early or is not one that PostgreSQL writes, or the receiver is gone.
pub fn unpack(
    chunks: mpsc::Receiver<Chunk>,
    items: mpsc::Sender<Item>,
    check: PageCheck,
) -> Result<Unpacked, SourceError> {
    let mut input = Input { chunks, current: Bytes::new(), next: None };
    let mut unpacker = Unpacker {
        packer: Packer::new(items),
        check,
        next_id: 0,
        sent: HashSet::new(),
        control: false,
        found: Unpacked::default(),
    };
    while let Some(tablespace) = input.next_archive() {
        unpacker.archive(&mut input, tablespace)?;
    }
    if !unpacker.control {
        return Err(SourceError::Answer(format!("no {CONTROL_FILE} in the base backup")));
    }
    Ok(unpacker.found)
}

/// The bytes of one archive after the other, as a reader that ends with each.
struct Input {
    chunks: mpsc::Receiver<Chunk>,
    current: Bytes,
    next: Option<Option<u32>>,
}

impl Input {
    /// Skips the rest of this archive.
    fn next_archive(&mut self) -> Option<Option<u32>> {
        while self.next.is_none() {
            match self.chunks.blocking_recv()? {
                Chunk::Archive(tablespace) => self.next = Some(tablespace),
                Chunk::Data(_) => {}
            }
        }
        self.current = Bytes::new();
        self.next.take()
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && self.next.is_none() {
            match self.chunks.blocking_recv() {
                Some(Chunk::Data(data)) => self.current = data,
                Some(Chunk::Archive(tablespace)) => self.next = Some(tablespace),
                None => break,
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(buffer.get_mut(..count).unwrap_or_default());
        Ok(count)
    }
}

struct Unpacker {
    packer: Packer,
    check: PageCheck,
    next_id: u32,
    sent: HashSet<String>,
    control: bool,
    found: Unpacked,
}

impl Unpacker {
    fn archive(&mut self, input: &mut Input, tablespace: Option<u32>) -> Result<(), SourceError> {
        let prefix = tablespace.map(|oid| format!("pg_tblspc/{oid}/")).unwrap_or_default();
        for entry in Archive::new(input).entries().map_err(malformed)? {
            let mut entry = entry.map_err(malformed)?;
            let Some(name) = entry_name(&entry)? else { continue };
            let path = format!("{prefix}{name}");
            let mode = entry.header().mode().map_err(malformed)? & 0o7777;
            let verdict = rules::verdict(&path);
            match entry.header().entry_type() {
                EntryType::Directory if verdict != Verdict::Leave => self.directory(&path, mode)?,
                EntryType::Regular if path == "backup_label" => {
                    let mut bytes = Vec::new();
                    entry.read_to_end(&mut bytes).map_err(malformed)?;
                    self.found.files.push(SmallFile { path, bytes });
                }
                EntryType::Regular if verdict == Verdict::Take => self.file(&mut entry, path, mode)?,
                EntryType::Directory | EntryType::Regular => {}
                // The locations of the tablespaces came before the archives.
                EntryType::Symlink if path.strip_prefix("pg_tblspc/").and_then(rules::parse_oid).is_some() => {}
                EntryType::Symlink => tracing::warn!("{path} is a link, and PostgreSQL follows none here: left out"),
                other => return Err(SourceError::Answer(format!("{path} is a {other:?} in the base backup"))),
            }
        }
        if let Some(oid) = tablespace {
            // Even one without anything in it needs its directory.
            self.directory(&format!("pg_tblspc/{oid}"), 0o700)?;
        }
        self.packer.flush()
    }

    /// Sends a directory, and before it those of its parents that were not: tablespaces arrive before `pg_tblspc`.
    fn directory(&mut self, path: &str, mode: u32) -> Result<(), SourceError> {
        let ends = path.match_indices('/').map(|(index, _)| index).chain([path.len()]);
        for directory in ends.filter_map(|end| path.get(..end)) {
            if self.sent.insert(directory.to_owned()) {
                self.packer.send(Item::Directory { path: directory.to_owned(), mode })?;
            }
        }
        Ok(())
    }

    fn file<R: Read>(&mut self, entry: &mut Entry<'_, R>, path: String, mode: u32) -> Result<(), SourceError> {
        let id = FileId(self.next_id);
        self.next_id =
            id.0.checked_add(1).ok_or_else(|| SourceError::Unsupported("more than 2^32 files".to_owned()))?;
        let (size, is_control) = (entry.size(), path == CONTROL_FILE);
        if is_control {
            // The server reads it after all other files and sends it last; gathered pages must not pass it.
            self.packer.flush()?;
        }
        self.packer.send(Item::File { id, path: path.clone(), mode })?;
        let mut contents = Contents { check: self.check, entry, path: &path, damage: Damage::default() };
        if size <= (SMALL_PAGES * PAGE_SIZE) as u64 {
            let bytes = contents.pages(0, size)?;
            if is_control {
                ControlFile::parse(&bytes).map_err(|error| SourceError::ControlFile(error.to_string()))?;
                self.control = true;
            }
            self.packer.add_file(id, &Part::whole(bytes))?;
        } else {
            contents.send_large(&mut self.packer, id, size)?;
        }
        let damage = contents.damage;
        match damage.certain() {
            Some(damaged_blocks) => {
                self.found.damaged |= !damaged_blocks.is_empty();
                self.packer.send_after(Item::FileDone { id, size, damaged_blocks });
            }
            None => self.found.held.push(Held { id, size, damage }),
        }
        Ok(())
    }
}

struct Contents<'a, E> {
    check: PageCheck,
    entry: &'a mut E,
    path: &'a str,
    damage: Damage,
}

impl<E: Read> Contents<'_, E> {
    fn send_large(&mut self, packer: &mut Packer, id: FileId, size: u64) -> Result<(), SourceError> {
        const BATCH: u64 = (BATCH_PAGES * PAGE_SIZE) as u64;
        let mut read = 0;
        while read < size {
            let first_page = u32::try_from(read / PAGE_SIZE as u64)
                .map_err(|_| SourceError::Unsupported(format!("{} has {size} bytes", self.path)))?;
            let bytes = self.pages(first_page, BATCH.min(size - read))?;
            read += bytes.len() as u64;
            packer.send_pages(id, first_page, Part::whole(bytes))?;
        }
        Ok(())
    }

    /// Reads exactly `length` bytes and judges the pages in them. The server has read a wrong page twice before it sent
    /// the second reading.
    fn pages(&mut self, first_page: u32, length: u64) -> Result<Vec<u8>, SourceError> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.entry.read_exact(&mut bytes).map_err(malformed)?;
        if let Some(first_block) = self.check.first_block(self.path, first_page) {
            for (page, contents) in (0..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                self.damage.add(first_page + page, self.check.judge(contents, first_block.wrapping_add(page)));
            }
        }
        Ok(bytes)
    }
}

/// The path inside the archive; `None` for one that is not UTF-8, which PostgreSQL never makes.
fn entry_name<R: Read>(entry: &Entry<'_, R>) -> Result<Option<String>, SourceError> {
    let bytes = entry.path_bytes();
    let Ok(name) = std::str::from_utf8(&bytes) else {
        tracing::warn!(name = %String::from_utf8_lossy(&bytes), "a name that is not UTF-8: left out");
        return Ok(None);
    };
    let name = name.strip_prefix("./").unwrap_or(name).trim_end_matches('/');
    if name.is_empty() || name == "." {
        return Ok(None);
    }
    // The archive decides where the restore writes: it must not reach outside.
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(SourceError::Answer(format!("`{name}` in the base backup is not a path inside it")));
    }
    Ok(Some(name.to_owned()))
}

fn malformed(error: io::Error) -> SourceError {
    SourceError::Answer(format!("the base backup is not a whole tar archive: {error}"))
}

#[cfg(test)]
mod tests {
    use tar::{Builder, Header};

    use super::*;
    use crate::model::Lsn;

    fn archive(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (name, kind, contents) in entries {
            let mut header = Header::new_ustar();
            // Not set_path, which refuses what must be refused here.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o100_600);
            header.set_size(contents.len() as u64);
            header.set_cksum();
            builder.append(&header, *contents).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// Feeds the archives in pieces of `step` bytes.
    fn unpack_all(archives: &[(Option<u32>, Vec<u8>)], step: usize) -> Result<(Unpacked, Vec<Item>), SourceError> {
        let (chunks, receiver) = mpsc::channel(10_000);
        for (tablespace, bytes) in archives {
            chunks.try_send(Chunk::Archive(*tablespace)).unwrap();
            for piece in bytes.chunks(step) {
                chunks.try_send(Chunk::Data(Bytes::copy_from_slice(piece))).unwrap();
            }
        }
        drop(chunks);
        let (items, mut found) = mpsc::channel(10_000);
        let unpacked = unpack(receiver, items, PageCheck { checksums: false, start: Lsn(1) })?;
        Ok((unpacked, std::iter::from_fn(|| found.try_recv().ok()).collect()))
    }

    fn control() -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE];
        bytes[8..12].copy_from_slice(&1300u32.to_le_bytes());
        for (offset, value) in [(216usize, 8192u32), (220, 131_072), (224, 8192), (228, 16 << 20), (16, 6), (48, 1)] {
            bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        let sum = crc32c::crc32c(&bytes[..288]);
        bytes[288..292].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn archives_become_items_whatever_the_pieces() {
        use EntryType::{Directory, Regular, Symlink};
        let control = control();
        let base = archive(&[
            ("backup_label", Regular, b"label"),
            ("log/", Directory, b""),
            ("log/server.log", Regular, b"x"),
            ("standby.signal", Regular, b""),
            ("pg_tblspc/", Directory, b""),
            ("pg_tblspc/16384/", Symlink, b""),
            ("PG_VERSION", Regular, b"15\n"),
            ("global/", Directory, b""),
            ("global/pg_control", Regular, &control),
        ]);
        let space = archive(&[("PG_15_202209061/", Directory, b""), ("PG_15_202209061/x", Regular, b"123")]);
        for step in [1, 511, 512, 1000, 32_768] {
            if base.len() / step > 9000 {
                continue;
            }
            let (unpacked, items) = unpack_all(&[(Some(16384), space.clone()), (None, base.clone())], step).unwrap();
            assert_eq!(unpacked.files.len(), 1);
            let names: Vec<&str> = items
                .iter()
                .filter_map(|item| match item {
                    Item::Directory { path, .. } | Item::File { path, .. } => Some(path.as_str()),
                    _ => None,
                })
                .collect();
            assert_eq!(
                names,
                [
                    "pg_tblspc",
                    "pg_tblspc/16384",
                    "pg_tblspc/16384/PG_15_202209061",
                    "pg_tblspc/16384/PG_15_202209061/x",
                    "log",
                    "PG_VERSION",
                    "global",
                    "global/pg_control",
                ]
            );
        }
    }

    #[test]
    fn what_is_no_whole_base_backup_is_refused() {
        let control = control();
        let whole =
            archive(&[("a", EntryType::Regular, &[7; 3000]), ("global/pg_control", EntryType::Regular, &control)]);
        assert!(unpack_all(&[(None, whole.clone())], 4096).is_ok());
        for end in [0, 100, 512, 1000, 3000, 4000, 5000, 9000] {
            assert!(unpack_all(&[(None, whole[..end].to_vec())], 4096).is_err(), "cut at {end}");
        }
        for name in ["../a", "a/../../b", "/etc/passwd", "a//b", "a/./b"] {
            let bad = archive(&[(name, EntryType::Regular, b"x"), ("global/pg_control", EntryType::Regular, &control)]);
            assert!(unpack_all(&[(None, bad)], 4096).is_err(), "{name}");
        }
        let device = archive(&[("a", EntryType::Block, b""), ("global/pg_control", EntryType::Regular, &control)]);
        assert!(unpack_all(&[(None, device)], 4096).is_err());
    }
}
