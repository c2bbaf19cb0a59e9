//! The manifest of a copy: the lines of the original in their order, with the new places of its map chunks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::codec::compress::Compressor;
use crate::codec::seal::Unit;
use crate::keys::keyset::Keyset;
use crate::model::{BackupId, Error, KeysetId, Result};
use crate::repository::compact::Original;
use crate::repository::compact::chunks::{self, AT_ONCE, Place, place};
use crate::repository::compact::run::{Run, Written};
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::pages::manifest::{Begin, ChunkUse, FileLine, Line, ManifestSeal, ManifestWriter, PartsSummary};
use crate::repository::pages::map::{FrameRef, PackId};
use crate::repository::pages::pack::{FrameSeal, PackBuilder};
use crate::repository::restore::ManifestParts;

/// zstd level of maps; they are small.
const LEVEL: i32 = 3;

/// Rewrites one manifest.
pub(super) struct Rewriter<'r, 'a> {
    run: &'r mut Run<'a>,
    original: &'r Original,
    id: &'r BackupId,
    keyset: &'r Arc<Keyset>,
    compressor: Compressor,
    /// How the original numbers its sources.
    begin: Option<Begin>,
    numbers: HashMap<BackupId, u16>,
    manifest: ManifestWriter,
    summary: PartsSummary,
    manifest_lines: Vec<InventoryLine>,
    maps: Option<PackBuilder>,
    next_pack: u32,
    packs: BTreeSet<PackId>,
    keysets: BTreeSet<KeysetId>,
}

impl<'r, 'a> Rewriter<'r, 'a> {
    /// Packs of maps are numbered from `first_pack`.
    pub(super) fn new(
        run: &'r mut Run<'a>,
        original: &'r Original,
        (id, keyset): (&'r BackupId, &'r Arc<Keyset>),
        first_pack: u32,
    ) -> Result<Self> {
        Ok(Self {
            run,
            original,
            id,
            keyset,
            compressor: Compressor::new(LEVEL)?,
            begin: None,
            numbers: HashMap::new(),
            manifest: ManifestWriter::default(),
            summary: PartsSummary::default(),
            manifest_lines: Vec::new(),
            maps: None,
            next_pack: first_pack,
            packs: BTreeSet::new(),
            keysets: BTreeSet::from([keyset.id().clone()]),
        })
    }

    /// Reads the manifest of the original and writes that of the copy.
    pub(super) async fn write(mut self) -> Result<Written> {
        let (hands, original) = (self.run.hands, self.original);
        let (commit, inventory) = (&original.commit, &original.inventory);
        let mut parts = ManifestParts::new(hands.repository, hands.ring, commit, inventory).await?;
        while let Some(lines) = parts.next().await? {
            let (mut waiting, mut wanted) = (Vec::new(), BTreeMap::new());
            for line in lines {
                match &line {
                    Line::Begin(begin) => self.begin = Some(begin.clone()),
                    Line::File(file) => self.want(file, &mut wanted)?,
                    _ => {}
                }
                waiting.push(line);
                if wanted.len() >= AT_ONCE {
                    self.renew(std::mem::take(&mut wanted)).await?;
                    self.lines(std::mem::take(&mut waiting)).await?;
                }
            }
            self.renew(wanted).await?;
            self.lines(waiting).await?;
        }
        self.finish().await
    }

    /// The chunks of a file that name what was moved, and were not written anew yet.
    fn want(&self, file: &FileLine, wanted: &mut BTreeMap<Place, FrameRef>) -> Result<()> {
        for chunk in &file.chunks {
            let frame = chunk.frame(self.begin()?)?;
            let at = place(&frame);
            if self.run.survey.live.must_renew(&at, &self.run.left) && self.run.renewed(&at).is_none() {
                wanted.insert(at, frame);
            }
        }
        Ok(())
    }

    fn begin(&self) -> Result<&Begin> {
        self.begin.as_ref().ok_or_else(|| Error::damaged("a manifest has no beginning"))
    }

    async fn renew(&mut self, wanted: BTreeMap<Place, FrameRef>) -> Result<()> {
        for (old, mut chunk) in chunks::fetch(self.run.hands, wanted.into_values().collect()).await? {
            self.run.relocation.iter().for_each(|relocation| relocation.apply(&mut chunk));
            let frame = self.store(&chunk.encode()).await?;
            self.run.renew(place(&old), frame, &chunk);
        }
        Ok(())
    }

    async fn store(&mut self, encoded: &[u8]) -> Result<FrameRef> {
        if self.maps.as_ref().is_some_and(|pack| !pack.has_room(encoded.len())) {
            self.put_maps().await?;
        }
        let repository = self.run.hands.repository.id.clone();
        let seal = FrameSeal { repository, keyset: self.keyset.id().clone(), backup: self.id.clone() };
        let (id, size) = (PackId { backup: self.id.clone(), ordinal: self.next_pack }, self.run.hands.pack_size);
        let pack = self.maps.get_or_insert_with(|| PackBuilder::new(id, size));
        pack.add(&seal, (Unit::Map, self.keyset.meta()), &mut self.compressor, encoded)
    }

    async fn put_maps(&mut self) -> Result<()> {
        let Some(pack) = self.maps.take() else { return Ok(()) };
        let pack = pack.finish();
        self.next_pack += 1;
        let key = layout::pack(&self.run.survey.target, &pack.id.backup, pack.id.ordinal);
        self.run.put(key, pack.bytes.into()).await.map(drop)
    }

    async fn lines(&mut self, lines: Vec<Line>) -> Result<()> {
        for line in lines {
            match line {
                Line::Begin(begin) => {
                    let begin = self.begins(begin)?;
                    self.line(&Line::Begin(begin)).await?;
                }
                Line::File(mut file) => {
                    let chunks = file.chunks.iter().map(|chunk| self.chunk(chunk)).collect::<Result<_>>()?;
                    file.chunks = chunks;
                    self.line(&Line::File(file)).await?;
                }
                // The writer counts, and adds it by itself.
                Line::End { .. } => {}
                other => self.line(&other).await?,
            }
        }
        Ok(())
    }

    /// The sources of a copy: itself, those of the original, and the copies before it.
    fn begins(&mut self, begin: Begin) -> Result<Begin> {
        let copies = self.run.copies.iter().rev().cloned();
        let sources: Vec<_> = copies.chain(begin.sources.iter().cloned()).collect();
        if sources.len() >= usize::from(u16::MAX) {
            return Err(Error::refused(format!("the pages of {} come from too many backups", self.original.commit.id)));
        }
        self.numbers = (0..).zip(&sources).map(|(number, (id, _))| (id.clone(), number)).collect();
        Ok(Begin { backup: self.id.clone(), sources, ..begin })
    }

    /// Where a chunk of the original is for the copy; what it leads to becomes part of the closure.
    fn chunk(&mut self, chunk: &ChunkUse) -> Result<ChunkUse> {
        let mut frame = chunk.frame(self.begin()?)?;
        let unknown = || Error::failed(format!("map chunk {} was not read", frame.id));
        if let Some(renewed) = self.run.renewed(&place(&frame)) {
            let (packs, keysets) = self.run.named(renewed, chunk.entries());
            if let Some(pack) = packs.iter().find(|pack| self.run.left.contains(pack)) {
                return Err(Error::failed(format!("a frame of pack {pack} did not move")));
            }
            frame = renewed.frame.clone();
            self.packs.extend(packs);
            self.keysets.extend(keysets);
        } else {
            let (packs, keysets) = self.run.survey.live.named(&frame, chunk.entries()).ok_or_else(unknown)?;
            self.packs.extend(packs.into_iter().cloned());
            self.keysets.extend(keysets.into_iter().cloned());
            let moved = self.run.relocation.as_ref().and_then(|moved| moved.place(&frame.pack, frame.offset));
            if let Some((pack, offset)) = moved {
                (frame.pack, frame.offset) = (pack.clone(), *offset);
            }
        }
        self.packs.insert(frame.pack.clone());
        self.keysets.insert(frame.keyset.clone());
        let number = |backup: &BackupId| {
            let unknown = || Error::failed(format!("{backup} is not among the sources of {}", self.id));
            self.numbers.get(backup).copied().ok_or_else(unknown)
        };
        ChunkUse::new(&frame, number, chunk.entries())
    }

    fn seal<'s>(&self, repository: &'s crate::model::RepositoryId) -> ManifestSeal<'s>
    where
        'r: 's,
    {
        ManifestSeal { repository, keyset: self.keyset.id(), backup: self.id, key: self.keyset.meta() }
    }

    async fn line(&mut self, line: &Line) -> Result<()> {
        let repository = &self.run.hands.repository.id;
        let part = self.manifest.add(line, &self.seal(repository))?;
        match part {
            Some(part) => self.put_part(part).await,
            None => Ok(()),
        }
    }

    async fn put_part(&mut self, (part, bytes): (u32, Vec<u8>)) -> Result<()> {
        let key = layout::manifest(&self.run.survey.target, self.id, part);
        let line = self.run.put(key, bytes).await?;
        self.summary.add(line.size, line.digest());
        self.manifest_lines.push(line);
        Ok(())
    }

    async fn finish(mut self) -> Result<Written> {
        self.put_maps().await?;
        let repository = &self.run.hands.repository.id;
        let seal = self.seal(repository);
        let (parts, bytes) = std::mem::take(&mut self.manifest).finish(&seal)?;
        if bytes != self.original.commit.size_bytes {
            return Err(Error::failed(format!(
                "{} holds another number of bytes than its COMMIT",
                self.original.commit.id
            )));
        }
        for part in parts {
            self.put_part(part).await?;
        }
        let Self { summary, manifest_lines, packs, keysets, .. } = self;
        Ok(Written { manifest: summary.finish(), manifest_lines, packs, keysets })
    }
}
