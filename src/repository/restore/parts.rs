//! The manifest, part by part.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::keys::keyset::Keyset;
use crate::model::commit::Commit;
use crate::model::{Error, Result};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::layout;
use crate::repository::manifest::{Begin, FileLine, Line, ManifestReader, ManifestSeal, PartsSummary};
use crate::repository::restore::Leftover;

/// Reads a manifest part by part, in order, each checked against the inventory.
#[derive(Debug)]
pub struct ManifestParts<'a> {
    repository: &'a Repository,
    commit: &'a Commit,
    keyset: Arc<Keyset>,
    lines: BTreeMap<&'a str, &'a InventoryLine>,
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
        let lines: BTreeMap<_, _> = inventory.iter().map(|line| (line.key.as_str(), line)).collect();
        let mut summary = PartsSummary::default();
        for part in 0..commit.manifest.count {
            if let Some(line) = lines.get(layout::manifest(&commit.target, &commit.id, part).as_str()) {
                summary.add(line.size, line.digest());
            }
        }
        if summary.finish() != commit.manifest {
            let text = format!("the inventory of {} does not list the manifest that its COMMIT signed", commit.id);
            return Err(Error::damaged(text));
        }
        let keyset = ring.open(&commit.target, &commit.keyset).await?;
        Ok(Self { repository, commit, keyset, lines, reader: Some(ManifestReader::default()), next: 0 })
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
        let key = layout::manifest(&self.commit.target, id, self.next);
        let line =
            self.lines.get(key.as_str()).ok_or_else(|| Error::damaged(format!("{key} is not in the inventory")))?;
        let (bytes, _) = self.repository.regions.read_exact(&key, line.size, line.digest()).await?;
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
}

/// What a plan needs of a manifest: tablespaces, documents, special files. `look` sees every line.
///
/// # Errors
/// As [`ManifestParts`].
pub async fn read_outline(
    repository: &Repository,
    ring: &KeyRing,
    (commit, inventory): (&Commit, &[InventoryLine]),
    mut look: impl FnMut(&Line),
) -> Result<(Begin, Leftover)> {
    let mut parts = ManifestParts::new(repository, ring, commit, inventory).await?;
    let (mut begin, mut outline) = (None, Leftover::default());
    while let Some(lines) = parts.next().await? {
        for line in lines {
            look(&line);
            match line {
                Line::Begin(first) => begin = Some(first),
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
    let begin = begin.ok_or_else(|| Error::damaged(format!("the manifest of {} has no beginning", commit.id)))?;
    Ok((begin, outline))
}

pub(super) fn decode_small(path: String, mode: u32, base64: &str) -> Result<(String, u32, Vec<u8>)> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64);
    let bytes =
        bytes.map_err(|error| Error::damaged(format!("{path} in the manifest is not readable")).because(error))?;
    Ok((path, mode, bytes))
}
