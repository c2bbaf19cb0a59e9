//! Which pages of which relations a record changes, read as its body streams by.
//!
//! A record that goes through shared buffers names every block that it changes in the headers before its data; that is
//! what makes full page images possible, and it holds for every resource manager of PostgreSQL. What does not go through
//! shared buffers is named by a few records of their own: the creation and truncation of a relation's files, and the
//! creation and removal of databases. Everything else that changes without naming blocks (`_vm` and `_fsm`, whose pages
//! change unlogged, and files that are no relations) is no business of this reader.

use super::body::RM_XLOG;
use crate::pg::le::{u16_at, u32_at};

const RM_SMGR: u8 = 2;
const RM_DBASE: u8 = 4;
/// `RM_LOGICALMSG_ID`, the last resource manager from 13 to 18. Those of extensions begin at 128.
const RM_LAST: u8 = 21;

/// The bits of `xl_info` that belong to the resource manager.
const RMGR_INFO: u8 = 0xF0;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
/// Record kinds of `RM_XLOG` that exist in no version: 0xC0 and 0xF0.
const XLOG_UNKNOWN: [u8; 2] = [0xC0, 0xF0];
const SMGR_CREATE: u8 = 0x10;
const SMGR_TRUNCATE: u8 = 0x20;
/// The highest kind of `RM_DBASE`: `CREATE` and `DROP`, since 15 `CREATE_FILE_COPY`, `CREATE_WAL_LOG` and `DROP`. All of
/// them begin with the database's oid.
const DBASE_LAST: (u8, u8) = (0x10, 0x20);
/// `wal_level` in `xl_parameter_change`.
const PARAMETER_WAL_LEVEL: usize = 20;
const WAL_LEVEL_MINIMAL: u32 = 0;

const MAGIC_13: u16 = 0xD106;
const MAGIC_15: u16 = 0xD110;
const MAGIC_18: u16 = 0xD118;

const MAX_BLOCK_ID: u8 = 32;
const BLOCK_FORK: u8 = 0x0F;
const BLOCK_HAS_IMAGE: u8 = 0x10;
const BLOCK_SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;
/// `BKPIMAGE_IS_COMPRESSED` before 15; that bit means something else since.
const IMAGE_COMPRESSED_13: u8 = 0x02;
/// pglz, lz4 or zstd.
const IMAGE_COMPRESSED_15: u8 = 0x1C;

/// As much of a record's own data as any kind read here needs.
const MAIN_KEPT: usize = 32;

/// The fork that holds rows and index entries.
pub const MAIN_FORK: u8 = 0;

/// A relation's files: `RelFileLocator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locator {
    /// The tablespace's oid: 1663 for `base`, 1664 for `global`.
    pub tablespace: u32,
    /// The database's oid; 0 for `global`.
    pub database: u32,
    /// The number in the file name.
    pub node: u32,
}

/// What a record changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// One page.
    Block {
        /// Whose.
        relation: Locator,
        /// Which fork, as PostgreSQL numbers them.
        fork: u8,
        /// Which page.
        block: u32,
    },
    /// The main fork from this page on: the relation was created, or cut off there, and may have grown again since.
    From {
        /// Whose.
        relation: Locator,
        /// The first page.
        block: u32,
    },
    /// Every file of a database, in every tablespace.
    Database(u32),
    /// Nobody knows: the reason. Whatever is derived from the log must not reach across this record.
    Unknown(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Id,
    ShortLength,
    LongLength,
    Block,
    Image,
    Locator,
    Number,
    Main,
    Done,
}

/// Reads one body.
#[derive(Debug, Clone)]
pub(super) struct BlockReader {
    rmgr: u8,
    info: u8,
    magic: u16,
    step: Step,
    field: Vec<u8>,
    skip: u64,
    /// Bytes of the body that were not fed yet.
    left: u64,
    /// Bytes of data and images that the headers announced.
    data: u64,
    main_length: u64,
    main: Vec<u8>,
    flags: u8,
    relation: Option<Locator>,
    touched: Vec<Touch>,
    trouble: Option<&'static str>,
}

impl BlockReader {
    /// A reader for the body of a record of this length, written by a server with this page magic.
    pub(super) fn new((rmgr, info): (u8, u8), length: u64, magic: Option<u16>) -> Self {
        let known = magic.filter(|magic| (MAGIC_13..=MAGIC_18).contains(magic));
        let trouble = match (known, rmgr) {
            (None, _) => Some("its version of PostgreSQL is unknown"),
            (_, RM_LAST..) if rmgr != RM_LAST => Some("it is of a resource manager of an extension"),
            (_, RM_XLOG) if XLOG_UNKNOWN.contains(&(info & RMGR_INFO)) => Some("it is of an unknown kind"),
            _ => None,
        };
        let mut reader = Self {
            rmgr,
            info,
            magic: known.unwrap_or_default(),
            step: Step::Id,
            field: Vec::new(),
            skip: 0,
            left: length,
            data: 0,
            main_length: 0,
            main: Vec::new(),
            flags: 0,
            relation: None,
            touched: Vec::new(),
            trouble,
        };
        reader.next_header();
        reader
    }

    /// Takes the next bytes.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.step != Step::Done {
            if self.skip > 0 {
                let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
                bytes = &bytes[skipped..];
                self.skip -= skipped as u64;
                self.left = self.left.saturating_sub(skipped as u64);
                continue;
            }
            let width = self.width();
            let (taken, rest) = bytes.split_at(width.saturating_sub(self.field.len()).min(bytes.len()));
            self.field.extend_from_slice(taken);
            self.left = self.left.saturating_sub(taken.len() as u64);
            bytes = rest;
            if self.field.len() >= width {
                if self.advance().is_none() {
                    self.give_up("its block references are not well-formed");
                }
                self.field.clear();
            }
        }
    }

    fn width(&self) -> usize {
        match self.step {
            Step::Id | Step::ShortLength => 1,
            Step::Block => 3,
            Step::LongLength | Step::Number => 4,
            Step::Image => 5,
            Step::Locator => 12,
            Step::Main => usize::try_from(self.main_length).unwrap_or(usize::MAX).min(MAIN_KEPT),
            Step::Done => 0,
        }
    }

    /// Goes on behind the field that is complete.
    fn advance(&mut self) -> Option<()> {
        match self.step {
            Step::Id => match *self.field.first()? {
                255 => self.step = Step::ShortLength,
                254 => self.step = Step::LongLength,
                253 => self.skip_header(2),
                252 => self.skip_header(4),
                0..=MAX_BLOCK_ID => self.step = Step::Block,
                _ => return None,
            },
            Step::ShortLength => self.main_header(u64::from(*self.field.first()?))?,
            Step::LongLength => self.main_header(u64::from(u32_at(&self.field, 0)?))?,
            Step::Block => {
                self.flags = *self.field.first()?;
                self.data += u64::from(u16_at(&self.field, 1)?);
                let image = self.flags & BLOCK_HAS_IMAGE != 0;
                self.step = if image { Step::Image } else { self.behind_image() };
            }
            Step::Image => {
                self.data += u64::from(u16_at(&self.field, 0)?);
                let info = *self.field.get(4)?;
                let compressed = if self.magic >= MAGIC_15 { IMAGE_COMPRESSED_15 } else { IMAGE_COMPRESSED_13 };
                // The length of the hole is written only where the image's own length does not tell it.
                self.skip = if info & compressed != 0 && info & IMAGE_HAS_HOLE != 0 { 2 } else { 0 };
                self.step = self.behind_image();
            }
            Step::Locator => {
                let part = |offset| u32_at(&self.field, offset);
                self.relation = Some(Locator { tablespace: part(0)?, database: part(4)?, node: part(8)? });
                self.step = Step::Number;
            }
            Step::Number => {
                let (relation, block) = (self.relation?, u32_at(&self.field, 0)?);
                self.touched.push(Touch::Block { relation, fork: self.flags & BLOCK_FORK, block });
                self.next_header();
            }
            Step::Main => {
                self.main.extend_from_slice(&self.field);
                self.step = Step::Done;
            }
            Step::Done => {}
        }
        Some(())
    }

    const fn behind_image(&self) -> Step {
        if self.flags & BLOCK_SAME_RELATION != 0 { Step::Number } else { Step::Locator }
    }

    fn skip_header(&mut self, bytes: u64) {
        self.skip = bytes;
        self.skip = bytes;
        self.step = if self.left.saturating_sub(bytes) > self.data { Step::Id } else { Step::Done };
    }

    /// Where the headers end: behind that of the record's own data, or where only data is left.
    fn next_header(&mut self) {
        self.step = if self.left > self.data { Step::Id } else { Step::Done };
    }

    /// The record's own data stands behind that of its blocks.
    fn main_header(&mut self, length: u64) -> Option<()> {
        self.main_length = length;
        self.skip = self.data;
        self.step = if length == 0 { Step::Done } else { Step::Main };
        (self.left == self.data + length).then_some(())
    }

    fn give_up(&mut self, why: &'static str) {
        self.trouble.get_or_insert(why);
        self.step = Step::Done;
    }

    /// What the record changes, once its whole body was fed.
    pub(super) fn finish(&self) -> Vec<Touch> {
        let mut touched = self.touched.clone();
        match self.special() {
            _ if self.trouble.is_some() => return self.trouble.map(Touch::Unknown).into_iter().collect(),
            Ok(special) => touched.extend(special),
            Err(why) => return vec![Touch::Unknown(why)],
        }
        touched
    }

    /// What the record's kind says beside its block references.
    fn special(&self) -> Result<Option<Touch>, &'static str> {
        const SHORT: &str = "its data is too short";
        let info = self.info & RMGR_INFO;
        if self.step != Step::Done {
            return Err("its block references are longer than itself");
        }
        match (self.rmgr, info) {
            (RM_SMGR, SMGR_CREATE) => {
                let relation = self.locator(0).ok_or(SHORT)?;
                let fork = u32_at(&self.main, 12).ok_or(SHORT)?;
                Ok((fork == u32::from(MAIN_FORK)).then_some(Touch::From { relation, block: 0 }))
            }
            (RM_SMGR, SMGR_TRUNCATE) => {
                let block = u32_at(&self.main, 0).ok_or(SHORT)?;
                // Its flags may leave the main fork alone; what is read for nothing then is little.
                Ok(Some(Touch::From { relation: self.locator(4).ok_or(SHORT)?, block }))
            }
            (RM_SMGR, _) => Err("it is of an unknown kind"),
            (RM_DBASE, _) => {
                let last = if self.magic >= MAGIC_15 { DBASE_LAST.1 } else { DBASE_LAST.0 };
                let database = u32_at(&self.main, 0).ok_or(SHORT)?;
                if info <= last { Ok(Some(Touch::Database(database))) } else { Err("it is of an unknown kind") }
            }
            (RM_XLOG, XLOG_PARAMETER_CHANGE) => match u32_at(&self.main, PARAMETER_WAL_LEVEL).ok_or(SHORT)? {
                WAL_LEVEL_MINIMAL => Err("behind it relations change without WAL: wal_level is minimal"),
                _ => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn locator(&self, offset: usize) -> Option<Locator> {
        let part = |index: usize| u32_at(&self.main, offset + 4 * index);
        Some(Locator { tablespace: part(0)?, database: part(1)?, node: part(2)? })
    }
}
