//! One entry of a tar archive: its head forward into blocks and back.
//!
//! POSIX.1-2001 (pax), as GNU tar, bsdtar and Python write and read it: names that do not fit, times below the second and
//! extended attributes stand in an extended header before the entry; sparse files are those of GNU tar's format 1.0. The
//! `tar` crate knows the fields of a block; its own reader of extended headers cuts values at line ends, which names and
//! attributes may contain.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use crate::model::{Error, Result};

/// Bytes of a block.
pub const BLOCK: usize = 512;
/// A value of an attribute has at most 64 KiB, and a file rarely more than a few; more is an attack.
const EXTENDED_LIMIT: u64 = 16 * 1024 * 1024;
/// A map of more than a million runs is an attack, too.
pub(super) const MAP_LIMIT: u64 = 1 << 20;
/// Bytes of the name, link name, user and group fields.
const NAME_FIELD: usize = 100;
const OWNER_FIELD: usize = 31;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file of this many bytes, which follow.
    File {
        /// Bytes as the reader of the file sees them.
        size: u64,
        /// Runs of data (offset, length), ascending, between which there are holes; `None` if there are none.
        data: Option<Vec<(u64, u64)>>,
    },
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Symlink(Vec<u8>),
    /// Another name of an earlier entry.
    Hardlink(Vec<u8>),
    /// A named pipe.
    Fifo,
    /// A device.
    Device {
        /// Whether it is a character device; else a block device.
        character: bool,
        /// Its numbers.
        numbers: (u32, u32),
    },
}

/// An entry without its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, relative.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Their names, as far as they are known.
    pub owner_names: (Vec<u8>, Vec<u8>),
    /// Seconds since 1970 and nanoseconds in that second.
    pub modified: (i64, u32),
    /// Extended attributes.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Bytes that fill up the last block of this many.
pub fn padding(bytes: u64) -> usize {
    let block = BLOCK as u64;
    usize::try_from((block - bytes % block) % block).unwrap_or(0)
}

impl Entry {
    /// Bytes of contents that follow the head, without padding.
    pub fn contents(&self) -> u64 {
        match &self.kind {
            Kind::File { data: Some(runs), .. } => runs.iter().map(|(_, length)| length).sum(),
            Kind::File { size, .. } => *size,
            _ => 0,
        }
    }

    /// Writes everything before the contents.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_head(&self, out: &mut impl Write) -> io::Result<()> {
        let map = self.sparse_map();
        let records = self.records();
        if !records.is_empty() {
            let mut head = Header::new_ustar();
            fill(&mut head, EntryType::XHeader, (b"PaxHeaders/entry", records.len() as u64), 0o600);
            out.write_all(seal(&mut head))?;
            out.write_all(&records)?;
            out.write_all(&[0; BLOCK][..padding(records.len() as u64)])?;
        }
        let mut head = Header::new_ustar();
        let size = self.contents() + map.as_ref().map_or(0, |map| map.len() as u64);
        let kind = match &self.kind {
            Kind::File { .. } => EntryType::Regular,
            Kind::Directory => EntryType::Directory,
            Kind::Symlink(_) => EntryType::Symlink,
            Kind::Hardlink(_) => EntryType::Link,
            Kind::Fifo => EntryType::Fifo,
            Kind::Device { character: true, .. } => EntryType::Char,
            Kind::Device { .. } => EntryType::Block,
        };
        let shown = if map.is_some() { b"GNUSparseFile.0/file".to_vec() } else { self.path.clone() };
        fill(&mut head, kind, (&shown, size), self.mode);
        head.set_uid(self.owner.0.into());
        head.set_gid(self.owner.1.into());
        head.set_mtime(u64::try_from(self.modified.0).unwrap_or(0));
        if let Some(fields) = head.as_ustar_mut() {
            copy(&mut fields.uname, &self.owner_names.0);
            copy(&mut fields.gname, &self.owner_names.1);
            if let Kind::Symlink(link) | Kind::Hardlink(link) = &self.kind {
                copy(&mut fields.linkname, link);
            }
            if let Kind::Device { numbers: (major, minor), .. } = &self.kind {
                fields.set_device_major(*major);
                fields.set_device_minor(*minor);
            }
        }
        out.write_all(seal(&mut head))?;
        out.write_all(&map.unwrap_or_default())
    }

    /// The decimal map that stands before the data of a sparse file, filled up to whole blocks.
    fn sparse_map(&self) -> Option<Vec<u8>> {
        let Kind::File { size, data: Some(runs) } = &self.kind else { return None };
        let end = runs.last().map_or(0, |(offset, length)| offset.saturating_add(*length));
        // GNU tar gives the file its length with an empty run where it ends in a hole.
        let tail = (end < *size).then_some((*size, 0));
        let runs: Vec<_> = runs.iter().copied().chain(tail).collect();
        let mut map = format!("{}\n", runs.len()).into_bytes();
        for (offset, length) in runs {
            map.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
        }
        map.resize(map.len() + padding(map.len() as u64), 0);
        Some(map)
    }

    fn records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        let link = match &self.kind {
            Kind::Symlink(link) | Kind::Hardlink(link) => link.as_slice(),
            _ => &[],
        };
        // Names are taken for UTF-8 unless this is said.
        if std::str::from_utf8(&self.path).is_err() || std::str::from_utf8(link).is_err() {
            record(&mut records, b"hdrcharset", b"BINARY");
        }
        let (seconds, nanos) = self.modified;
        if nanos > 0 || seconds < 0 {
            record(&mut records, b"mtime", time_text(seconds, nanos).as_bytes());
        }
        if link.len() > NAME_FIELD {
            record(&mut records, b"linkpath", link);
        }
        for (keyword, name) in [(b"uname", &self.owner_names.0), (b"gname", &self.owner_names.1)] {
            if name.len() > OWNER_FIELD {
                record(&mut records, keyword, name);
            }
        }
        match &self.kind {
            Kind::File { size, data: Some(_) } => {
                record(&mut records, b"GNU.sparse.major", b"1");
                record(&mut records, b"GNU.sparse.minor", b"0");
                record(&mut records, b"GNU.sparse.name", &self.path);
                record(&mut records, b"GNU.sparse.realsize", size.to_string().as_bytes());
            }
            _ if self.path.len() > NAME_FIELD => record(&mut records, b"path", &self.path),
            _ => {}
        }
        for (name, value) in &self.attributes {
            record(&mut records, &[ATTRIBUTE, escaped(name).as_slice()].concat(), value);
        }
        records
    }

    /// Reads the next head; `None` at the end of the archive. The contents follow.
    ///
    /// # Errors
    /// The reader's; or what comes is no entry of the kinds that this file writes.
    pub fn read_head(input: &mut impl Read) -> Result<Option<Self>> {
        let Some(mut head) = read_block(input)? else { return Ok(None) };
        let mut said = Said::default();
        if head.entry_type() == EntryType::XHeader {
            said = Said::read(input, size_of(&head)?)?;
            head = read_block(input)?.ok_or_else(|| damaged("ends behind an extended header"))?;
        }
        Self::put_together(input, &head, said).map(Some)
    }

    fn put_together(input: &mut impl Read, head: &Header, said: Said) -> Result<Self> {
        let fields = head.as_ustar().ok_or_else(|| damaged("has a head that is not ustar"))?;
        let number = |value: io::Result<u64>| {
            let value = value.map_err(|error| damaged("has a number that is none").because(error))?;
            u32::try_from(value).map_err(|_| damaged("has a number that is too large"))
        };
        let link = said.link.unwrap_or_else(|| text(&fields.linkname));
        let size = size_of(head)?;
        let (kind, holds) = match head.entry_type() {
            EntryType::Regular if said.sparse => {
                let real = said.real_size.ok_or_else(|| damaged("has a sparse file without its size"))?;
                (Kind::File { size: real, data: Some(read_map(input, size, real)?) }, true)
            }
            EntryType::Regular => (Kind::File { size, data: None }, true),
            EntryType::Directory => (Kind::Directory, false),
            EntryType::Symlink => (Kind::Symlink(link), false),
            EntryType::Link => (Kind::Hardlink(link), false),
            EntryType::Fifo => (Kind::Fifo, false),
            kind @ (EntryType::Char | EntryType::Block) => {
                let part = |value: io::Result<u32>| value.map_err(|error| damaged("has no device").because(error));
                let numbers = (part(fields.device_major())?, part(fields.device_minor())?);
                (Kind::Device { character: kind == EntryType::Char, numbers }, false)
            }
            other => return Err(damaged(&format!("has an entry of an unknown kind ({})", other.as_byte()))),
        };
        if !holds && size > 0 {
            return Err(damaged("has contents where there are none"));
        }
        let seconds = head.mtime().map_err(|error| damaged("has no time").because(error))?;
        let seconds = i64::try_from(seconds).map_err(|_| damaged("has a time that is none"))?;
        Ok(Self {
            path: said.path.unwrap_or_else(|| text(&fields.name)),
            kind,
            mode: head.mode().map_err(|error| damaged("has no mode").because(error))? & 0o7777,
            owner: (number(head.uid())?, number(head.gid())?),
            owner_names: (
                said.user.unwrap_or_else(|| text(&fields.uname)),
                said.group.unwrap_or_else(|| text(&fields.gname)),
            ),
            modified: said.modified.unwrap_or((seconds, 0)),
            attributes: said.attributes,
        })
    }
}

/// Writes the end of an archive.
///
/// # Errors
/// The writer's.
pub fn write_end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// The name field alone: a prefix field would be a second way to say the same.
fn fill(head: &mut Header, kind: EntryType, (name, size): (&[u8], u64), mode: u32) {
    head.set_entry_type(kind);
    head.set_size(size);
    head.set_mode(mode);
    head.set_uid(0);
    head.set_gid(0);
    head.set_mtime(0);
    if let Some(fields) = head.as_ustar_mut() {
        copy(&mut fields.name, name);
        fields.set_device_major(0);
        fields.set_device_minor(0);
    }
}

fn seal(head: &mut Header) -> &[u8] {
    head.set_cksum();
    head.as_bytes()
}

/// What is longer is cut here and stands whole in the extended header.
fn copy(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

fn text(field: &[u8]) -> Vec<u8> {
    field.iter().copied().take_while(|byte| *byte != 0).collect()
}

/// `<length> <keyword>=<value>\n`, where the length counts itself.
fn record(records: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    for part in [b" ".as_slice(), keyword, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// As GNU tar writes a keyword that holds `=`.
fn escaped(name: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b'%' => b"%25".to_vec(),
        b'=' => b"%3D".to_vec(),
        byte => vec![*byte],
    };
    name.iter().flat_map(escape).collect()
}

fn unescaped(mut name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    while let Some((first, rest)) = name.split_first() {
        let byte;
        (name, byte) = match name {
            [b'%', b'2', b'5', rest @ ..] => (rest, b'%'),
            [b'%', b'3', b'D', rest @ ..] => (rest, b'='),
            _ => (rest, *first),
        };
        plain.push(byte);
    }
    plain
}

fn time_text(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos) {
        (seconds, 0) => seconds.to_string(),
        // The fraction counts away from zero, the nanoseconds upwards.
        (seconds @ ..0, nanos) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
        (seconds, nanos) => format!("{seconds}.{nanos:09}"),
    }
}

fn parse_time(text: &str) -> Option<(i64, u32)> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole: i64 = whole.parse().ok().filter(|seconds: &i64| *seconds >= 0)?;
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    Some(match (negative, nanos) {
        (false, nanos) => (whole, nanos),
        (true, 0) => (-whole, 0),
        (true, nanos) => (-whole - 1, 1_000_000_000 - nanos),
    })
}

/// What an extended header says of the entry that follows.
#[derive(Debug, Default)]
struct Said {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    user: Option<Vec<u8>>,
    group: Option<Vec<u8>>,
    modified: Option<(i64, u32)>,
    sparse: bool,
    real_size: Option<u64>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Said {
    fn read(input: &mut impl Read, size: u64) -> Result<Self> {
        if size > EXTENDED_LIMIT {
            return Err(damaged("has an extended header that is too large"));
        }
        let mut bytes = Vec::new();
        let whole = size + padding(size) as u64;
        let got = input.take(whole).read_to_end(&mut bytes).map_err(broken)? as u64;
        if got != whole {
            return Err(damaged("ends inside an extended header"));
        }
        bytes.truncate(usize::try_from(size).unwrap_or(0));
        let mut said = Self::default();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (keyword, value, after) = cut(rest).ok_or_else(|| damaged("has an unreadable extended header"))?;
            said.take(keyword, value)?;
            rest = after;
        }
        Ok(said)
    }

    fn take(&mut self, keyword: &[u8], value: &[u8]) -> Result<()> {
        let number = || std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        match keyword {
            b"path" | b"GNU.sparse.name" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"uname" => self.user = Some(value.to_vec()),
            b"gname" => self.group = Some(value.to_vec()),
            b"mtime" => {
                let time = std::str::from_utf8(value).ok().and_then(parse_time);
                self.modified = Some(time.ok_or_else(|| damaged("has a time that is none"))?);
            }
            b"GNU.sparse.major" if value == b"1" => self.sparse = true,
            b"GNU.sparse.minor" if value == b"0" => {}
            b"GNU.sparse.realsize" => {
                self.real_size = Some(number().ok_or_else(|| damaged("has a size that is none"))?);
            }
            b"hdrcharset" => {}
            _ => match keyword.strip_prefix(ATTRIBUTE) {
                Some(name) => self.attributes.push((unescaped(name), value.to_vec())),
                None => {
                    let shown = String::from_utf8_lossy(keyword);
                    return Err(damaged(&format!("says something unknown of an entry: {shown}")));
                }
            },
        }
        Ok(())
    }
}

/// The first record: keyword, value, and what follows it.
fn cut(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(12).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let body = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], &bytes[length..]))
}

/// The next block as a head whose sum fits; `None` at the two blocks of zeros that end an archive.
fn read_block(input: &mut impl Read) -> Result<Option<Header>> {
    let mut block = [0; BLOCK];
    let mut read = |block: &mut [u8; BLOCK]| {
        input.read_exact(block).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("ends before its end"),
            _ => broken(error),
        })
    };
    read(&mut block)?;
    if block == [0; BLOCK] {
        read(&mut block)?;
        return if block == [0; BLOCK] { Ok(None) } else { Err(damaged("has an empty block in its middle")) };
    }
    let head = Header::from_byte_slice(&block).clone();
    let sum: u32 =
        block.iter().enumerate().map(|(at, byte)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte })).sum();
    match head.cksum() {
        Ok(stored) if stored == sum => Ok(Some(head)),
        _ => Err(damaged("has a head whose sum is wrong")),
    }
}

fn size_of(head: &Header) -> Result<u64> {
    head.entry_size().map_err(|error| damaged("has a size that is none").because(error))
}

/// Reads the map of a sparse file whose map and data have `stored` bytes together.
fn read_map(input: &mut impl Read, stored: u64, real: u64) -> Result<Vec<(u64, u64)>> {
    let mut lines = MapLines { input, block: [0; BLOCK], at: BLOCK, blocks: 0 };
    let count = lines.number()?;
    if count > MAP_LIMIT {
        return Err(damaged("has a sparse file of too many runs"));
    }
    let (mut runs, mut end, mut data) = (Vec::new(), 0, 0);
    for _ in 0..count {
        let (offset, length) = (lines.number()?, lines.number()?);
        let after = offset.checked_add(length).filter(|after| offset >= end && *after <= real);
        end = after.ok_or_else(|| damaged("has a sparse file whose map makes no sense"))?;
        data += length;
        if length > 0 {
            runs.push((offset, length));
        }
    }
    if lines.blocks * BLOCK as u64 + data != stored {
        return Err(damaged("has a sparse file whose map does not fit its data"));
    }
    Ok(runs)
}

/// Decimal numbers, a line each, block by block.
struct MapLines<'a, R> {
    input: &'a mut R,
    block: [u8; BLOCK],
    at: usize,
    blocks: u64,
}

impl<R: Read> MapLines<'_, R> {
    fn number(&mut self) -> Result<u64> {
        let mut number: u64 = 0;
        for digits in 0..21 {
            if self.at == BLOCK {
                self.input.read_exact(&mut self.block).map_err(broken)?;
                (self.at, self.blocks) = (0, self.blocks + 1);
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' if digits > 0 => return Ok(number),
                b'0'..=b'9' => {
                    let next = number.checked_mul(10).and_then(|number| number.checked_add(u64::from(byte - b'0')));
                    number = next.ok_or_else(|| damaged("has a sparse file whose map is not readable"))?;
                }
                _ => break,
            }
        }
        Err(damaged("has a sparse file whose map is not readable"))
    }
}

pub(super) fn damaged(what: &str) -> Error {
    Error::damaged(format!("the archive {what}"))
}

pub(super) fn broken(error: io::Error) -> Error {
    Error::failed("read the archive").because(error)
}
