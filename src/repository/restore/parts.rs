//! The manifest, part by part.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use crate::keys::keyset::Keyset;
use crate::model::commit::Commit;
use crate::model::{Error, Result};
use crate::observe::task;
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::pages::manifest::{FileLine, Line, ManifestReader, ManifestSeal, PartsSummary};
use crate::repository::restore::Leftover;

/// Parts that are fetched at the same time.
const AHEAD: usize = 4;
/// The most of a manifest that is kept in memory for whoever reads it a second time, sealed as it is stored.
const KEPT: usize = 16 << 20;

/// The first parts of a manifest, sealed, each proven to be the one that the inventory names.
#[derive(Debug, Clone, Default)]
pub struct KeptParts {
    parts: Vec<Bytes>,
    bytes: usize,
}

impl KeptParts {
    fn keep(&mut self, part: u32, bytes: &Bytes) {
        let fits = self.bytes + bytes.len() <= KEPT;
        if fits && usize::try_from(part).is_ok_and(|part| part == self.parts.len()) {
            self.bytes += bytes.len();
            self.parts.push(bytes.clone());
        }
    }
}

/// Reads a manifest part by part, in order, each checked against the inventory.
#[derive(Debug)]
pub struct ManifestParts<'a> {
    repository: &'a Repository,
    commit: &'a Commit,
    keyset: Arc<Keyset>,
    stored: Stored<'a>,
    reader: Option<ManifestReader>,
    next: u32,
}

impl<'a> ManifestParts<'a> {
    /// Opens the backup's keyset and checks that the inventory names the manifest that COMMIT signed.
    ///
    /// # Errors
    /// No key holder opens the keyset; the inventory contradicts COMMIT.
    pub async fn new(
        repository: &'a Repository,
        ring: &KeyRing,
        commit: &'a Commit,
        inventory: &'a [InventoryLine],
    ) -> Result<Self> {
        Self::after(repository, ring, (commit, inventory), KeptParts::default()).await
    }

    /// The same, with parts that were read before.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub async fn after(
        repository: &'a Repository,
        ring: &KeyRing,
        (commit, inventory): (&'a Commit, &'a [InventoryLine]),
        kept: KeptParts,
    ) -> Result<Self> {
        let lines: BTreeMap<_, _> = inventory.iter().map(|line| (line.key.as_str(), line)).collect();
        let named = |part| lines.get(layout::manifest(&commit.target, &commit.id, part).as_str()).copied();
        let lines: Vec<_> = (0..commit.manifest.count).map_while(named).collect();
        let mut summary = PartsSummary::default();
        lines.iter().for_each(|line| summary.add(line.size, line.digest()));
        if summary.finish() != commit.manifest {
            let text = format!("the inventory of {} does not list the manifest that its COMMIT signed", commit.id);
            return Err(Error::damaged(text));
        }
        let mut stored = Stored { lines, kept, asked: 0, ahead: VecDeque::new() };
        // What is sealed may come before the key that opens it.
        stored.ask(repository);
        let keyset = ring.open(&commit.target, &commit.keyset).await?;
        Ok(Self { repository, commit, keyset, stored, reader: Some(ManifestReader::default()), next: 0 })
    }

    /// The lines of the next part; `None` after the last, once the manifest has proven complete.
    ///
    /// # Errors
    /// A part is in no region intact, or the manifest is not complete.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>> {
        let id = &self.commit.id;
        if self.next == self.commit.manifest.count {
            return self.reader.take().map_or(Ok(()), |reader| reader.finish(id)).map(|()| None);
        }
        let bytes = self.stored.next(self.repository, self.next).await?;
        let seal = ManifestSeal {
            repository: &self.repository.id,
            keyset: &self.commit.keyset,
            backup: id,
            key: self.keyset.meta(),
        };
        self.next += 1;
        match &mut self.reader {
            Some(reader) => reader.part(&bytes, &seal).map(Some),
            None => Ok(None),
        }
    }

    /// What was read, for whoever reads it once more.
    pub fn kept(self) -> KeptParts {
        self.stored.kept
    }
}

/// The parts as they are stored, a few on their way.
#[derive(Debug)]
struct Stored<'a> {
    lines: Vec<&'a InventoryLine>,
    kept: KeptParts,
    /// Parts before this one were asked for.
    asked: usize,
    ahead: VecDeque<Fetching>,
}

type Fetching = AbortOnDropHandle<Result<Bytes>>;

impl Stored<'_> {
    fn ask(&mut self, repository: &Repository) {
        while self.ahead.len() < AHEAD {
            let Some(line) = self.lines.get(self.asked) else { return };
            let (repository, key) = (repository.clone(), line.key.clone());
            let (size, digest, kept) = (line.size, line.digest(), self.kept.parts.get(self.asked).cloned());
            self.asked += 1;
            self.ahead.push_back(AbortOnDropHandle::new(task::spawn("manifest-part", async move {
                match kept {
                    Some(bytes) => Ok(bytes),
                    None => repository.regions.read_exact(&key, size, digest).await.map(|(bytes, _)| bytes),
                }
            })));
        }
    }

    async fn next(&mut self, repository: &Repository, part: u32) -> Result<Bytes> {
        self.ask(repository);
        let missing = || Error::damaged(format!("part {part} of the manifest is not in the inventory"));
        let next = self.ahead.pop_front().ok_or_else(missing)?;
        let bytes = next.await.map_err(|error| Error::failed("a reader of the manifest died").because(error))??;
        self.kept.keep(part, &bytes);
        Ok(bytes)
    }
}

/// What a plan needs of a manifest: tablespaces, documents, special files; and its parts, for the restore that reads them
/// once more. `look` sees every line.
///
/// # Errors
/// As [`ManifestParts`].
pub async fn read_outline(
    repository: &Repository,
    ring: &KeyRing,
    (commit, inventory): (&Commit, &[InventoryLine]),
    mut look: impl FnMut(&Line),
) -> Result<(Leftover, KeptParts)> {
    let mut parts = ManifestParts::new(repository, ring, commit, inventory).await?;
    let (mut has_begin, mut outline) = (false, Leftover::default());
    while let Some(lines) = parts.next().await? {
        for line in lines {
            look(&line);
            match line {
                Line::Begin(_) => has_begin = true,
                Line::Tablespace { oid, location } => outline.tablespaces.push((oid, location)),
                Line::Small { path, mode, base64 } => outline.small_files.push(decode_small(path, mode, &base64)?),
                Line::Document { name, content } => outline.documents.push((name, content)),
                Line::End { files, bytes } => (outline.files, outline.bytes) = (files, bytes),
                Line::File(FileLine { path, damaged_blocks, .. }) if !damaged_blocks.is_empty() => {
                    outline.damaged.push((path, damaged_blocks));
                }
                Line::File(_) | Line::Directory { .. } => {}
            }
        }
    }
    match has_begin {
        true => Ok((outline, parts.kept())),
        false => Err(Error::damaged(format!("the manifest of {} has no beginning", commit.id))),
    }
}

pub(super) fn decode_small(path: String, mode: u32, base64: &str) -> Result<(String, u32, Vec<u8>)> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64);
    let bytes =
        bytes.map_err(|error| Error::damaged(format!("{path} in the manifest is not readable")).because(error))?;
    Ok((path, mode, bytes))
}
