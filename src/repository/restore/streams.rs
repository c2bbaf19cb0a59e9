//! Streams back: the bytes of a dump or an archive in their order, each frame authenticated before a byte of it is handed
//! on, from whichever region holds it intact.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::model::commit::Commit;
use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Result};
use crate::repository::backup::stream::{STREAMS, StreamLine, parse_part};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::keysets::KeyRing;
use crate::repository::pages::manifest::{ChunkUse, FileLine, Line};
use crate::repository::restore::ManifestParts;
use crate::repository::restore::memory::Memory;
use crate::repository::restore::window::{Origin, Secrets, Window};

/// Pieces of at most 8 MiB that are fetched at the same time; each is held three times over: sealed, opened, put together.
const AHEAD: usize = 3;

/// The streams of a backup, and the documents beside them.
#[derive(Debug)]
pub struct StoredStreams {
    /// What there is, in the order in which it was read.
    pub streams: Vec<StreamLine>,
    /// What the source said.
    pub documents: BTreeMap<String, serde_json::Value>,
    parts: BTreeMap<(String, u32), FileLine>,
    secrets: Secrets,
}

impl StoredStreams {
    /// Reads the manifest.
    ///
    /// # Errors
    /// No key opens it, it is in no region intact, or it is not one of streams.
    pub async fn open(
        repository: &Repository,
        ring: &KeyRing,
        (commit, inventory): (&Commit, &[InventoryLine]),
    ) -> Result<Self> {
        let wrong = |why: &str| Error::damaged(format!("the manifest of {} {why}", commit.id));
        let (mut begin, mut documents, mut parts) = (None, BTreeMap::new(), BTreeMap::new());
        let mut manifest = ManifestParts::new(repository, ring, commit, inventory).await?;
        while let Some(lines) = manifest.next().await? {
            for line in lines {
                match line {
                    Line::Begin(first) => begin = Some(Secrets::new(first)?),
                    Line::Document { name, content } => drop(documents.insert(name, content)),
                    Line::File(file) => {
                        let (stream, part) = parse_part(&file.path).ok_or_else(|| wrong("holds no streams"))?;
                        parts.insert((stream.to_owned(), part), file);
                    }
                    Line::End { .. } => {}
                    Line::Directory { .. } | Line::Tablespace { .. } | Line::Small { .. } => {
                        return Err(wrong("holds no streams"));
                    }
                }
            }
        }
        let list = documents.remove(STREAMS).ok_or_else(|| wrong("does not list its streams"))?;
        let streams: Vec<StreamLine> =
            serde_json::from_value(list).map_err(|error| wrong("lists no readable streams").because(error))?;
        let secrets = begin.ok_or_else(|| wrong("has no beginning"))?;
        let stored = Self { streams, documents, parts, secrets };
        stored.check().then_some(()).ok_or_else(|| wrong("does not hold the streams that it lists"))?;
        Ok(stored)
    }

    /// Every part is there, and nothing else.
    fn check(&self) -> bool {
        let whole = |stream: &StreamLine| {
            let part = |part| self.parts.get(&(stream.name.clone(), part));
            let sizes = (0..stream.parts).map(|number| part(number).map(|file| file.size));
            let plain = !stream.name.starts_with('.') && !stream.name.contains(['/', '\0']) && !stream.name.is_empty();
            plain && sizes.sum::<Option<u64>>() == Some(stream.bytes)
        };
        let parts: u64 = self.streams.iter().map(|stream| u64::from(stream.parts)).sum();
        self.streams.iter().all(whole) && parts == self.parts.len() as u64
    }

    /// Sends the bytes of one stream, in order; returns the bytes fetched. When it fails the receiver has got a true
    /// beginning of the stream, and must learn of the failure before it takes the end of the channel for the end of the
    /// stream.
    ///
    /// # Errors
    /// An object is in no region intact, no key opens it, or the receiver is gone.
    pub async fn send(
        &self,
        (repository, ring): (&Repository, &KeyRing),
        name: &str,
        out: &mpsc::Sender<Result<Bytes>>,
    ) -> Result<u64> {
        let origin = Origin { repository, ring, secrets: &self.secrets, memory: Memory::default() };
        let mut fetched = 0;
        let parts = self.parts.range((name.to_owned(), 0)..=(name.to_owned(), u32::MAX));
        for file in parts.map(|(_, file)| file) {
            let pieces = stream::iter(pieces(file)?).map(|piece| async move {
                let mut window = Window::default();
                window.add_known(piece, PathBuf::from(&file.path))?;
                window.read(origin).await
            });
            let mut pieces = pieces.buffered(AHEAD);
            while let Some(piece) = pieces.next().await {
                let (bytes, cost) = piece?;
                fetched += cost;
                let gone = |_| Error::failed(format!("whoever wanted {name} is gone"));
                out.send(Ok(bytes.into())).await.map_err(gone)?;
            }
        }
        Ok(fetched)
    }
}

/// A file of its own for each run of its map.
fn pieces(file: &FileLine) -> Result<Vec<FileLine>> {
    let mut left = file.size;
    let piece = |chunk: &ChunkUse| {
        let size = left.min(u64::from(chunk.entries().1) * PAGE_SIZE as u64);
        left -= size;
        FileLine { size, chunks: vec![*chunk], damaged_blocks: Vec::new(), path: file.path.clone(), mode: file.mode }
    };
    let pieces = file.chunks.iter().map(piece).collect();
    match left {
        0 => Ok(pieces),
        _ => Err(Error::damaged(format!("the manifest does not map all of {}", file.path))),
    }
}
