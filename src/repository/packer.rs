//! From pages to packs: fingerprint, compress, seal, on every core.
//!
//! Workers share one bounded queue. Each fills a pack of its own and hands it on when it is full, so memory is bounded by
//! workers, queue and uploads in flight, whatever the size of the cluster.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::codec::compress::Compressor;
use crate::codec::fingerprint::PageFingerprinter;
use crate::codec::seal::Unit;
use crate::keys::keyset::Keyset;
use crate::model::pages::{Batch, PAGE_SIZE, Piece};
use crate::model::{Error, Result};
use crate::repository::pack::{FrameSeal, OBJECT_LIMIT, Pack, PackBuilder};
use crate::repository::page_map::{FrameRef, MapChunk, PackId, PageEntry};
use crate::store::Digest;

/// Pages compressed together. 64 KiB already reach 99 % of the ratio of 1 MiB; more would only make restore read more
/// than it needs.
pub const FRAME_PAGES: usize = 16;

/// What every worker needs.
#[derive(Debug, Clone)]
pub struct PackSettings {
    /// What frames are bound to.
    pub seal: FrameSeal,
    /// Seals them.
    pub keyset: Arc<Keyset>,
    /// Detects change.
    pub fingerprints: Arc<PageFingerprinter>,
    /// zstd level.
    pub level: i32,
}

/// Where the pages of one batch are kept.
#[derive(Debug)]
pub struct Placed {
    /// The map chunk that describes the batch.
    pub chunk: FrameRef,
    /// Each piece and the first of its entries in the chunk.
    pub pieces: Vec<(Piece, u16)>,
}

/// A pack on its way to the regions.
#[derive(Debug)]
pub struct Sealed {
    /// The pack.
    pub pack: Pack,
    /// SHA-256 of its object.
    pub digest: Digest,
}

/// The running workers.
#[derive(Debug)]
pub struct Packer {
    /// Takes batches; full means wait. Dropping it lets the workers finish.
    pub batches: mpsc::Sender<Batch>,
    /// Gives finished packs.
    pub packs: mpsc::Receiver<Result<Sealed>>,
    /// Gives the places of pages; unbounded, because a worker must never wait for the one who also feeds it.
    pub placed: mpsc::UnboundedReceiver<Placed>,
}

impl Packer {
    /// Starts `workers` threads.
    pub fn start(settings: &PackSettings, workers: usize) -> Self {
        let (batches, queue) = mpsc::channel(1);
        let (packs_in, packs) = mpsc::channel(1);
        let (placed_in, placed) = mpsc::unbounded_channel();
        let queue = Arc::new(Mutex::new(queue));
        let ordinals = Arc::new(std::sync::atomic::AtomicU32::new(0));
        for _ in 0..workers.max(1) {
            let worker = Worker {
                settings: settings.clone(),
                ordinals: Arc::clone(&ordinals),
                packs: packs_in.clone(),
                placed: placed_in.clone(),
            };
            let queue = Arc::clone(&queue);
            tokio::task::spawn_blocking(move || worker.run(&queue));
        }
        Self { batches, packs, placed }
    }
}

struct Worker {
    settings: PackSettings,
    ordinals: Arc<std::sync::atomic::AtomicU32>,
    packs: mpsc::Sender<Result<Sealed>>,
    placed: mpsc::UnboundedSender<Placed>,
}

impl Worker {
    fn run(&self, queue: &Mutex<mpsc::Receiver<Batch>>) {
        if let Err(error) = self.work(queue) {
            // The receiver is gone only when the job has failed already.
            let _ = self.packs.blocking_send(Err(error));
        }
    }

    fn work(&self, queue: &Mutex<mpsc::Receiver<Batch>>) -> Result<()> {
        let mut compressor = Compressor::new(self.settings.level)?;
        let mut open: Option<PackBuilder> = None;
        loop {
            // One worker waits in the queue and holds the lock; the others wait for the lock.
            let batch = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(batch) = batch else { break };
            let placed = self.place(&batch, &mut open, &mut compressor)?;
            let _ = self.placed.send(placed);
        }
        open.filter(|pack| !pack.is_empty()).map_or(Ok(()), |pack| self.hand_on(pack))
    }

    fn place(&self, batch: &Batch, open: &mut Option<PackBuilder>, compressor: &mut Compressor) -> Result<Placed> {
        let mut chunk = MapChunk::default();
        let mut plain = Vec::with_capacity(FRAME_PAGES * PAGE_SIZE);
        let pages = batch.data.chunks_exact(PAGE_SIZE);
        for group in pages.collect::<Vec<_>>().chunks(FRAME_PAGES) {
            plain.clear();
            let frame = u16::try_from(chunk.frames.len()).unwrap_or(u16::MAX);
            for page in group {
                let zero = page.iter().all(|byte| *byte == 0);
                let slot = u8::try_from(plain.len() / PAGE_SIZE).unwrap_or(u8::MAX);
                if !zero {
                    plain.extend_from_slice(page);
                }
                let place = (!zero).then_some((frame, slot));
                chunk.entries.push(PageEntry { place, fingerprint: self.settings.fingerprints.of(page) });
            }
            if !plain.is_empty() {
                chunk.frames.push(self.add(Unit::Frame, &plain, open, compressor)?);
            }
        }
        let mut first = 0;
        let pieces = batch.pieces.iter().map(|piece| {
            let at = first;
            first += u16::try_from(piece.pages).unwrap_or(u16::MAX);
            (*piece, at)
        });
        let pieces = pieces.collect();
        let chunk = self.add(Unit::Map, &chunk.encode(), open, compressor)?;
        Ok(Placed { chunk, pieces })
    }

    fn add(
        &self,
        unit: Unit,
        plain: &[u8],
        open: &mut Option<PackBuilder>,
        compressor: &mut Compressor,
    ) -> Result<FrameRef> {
        if plain.len() + 8192 > OBJECT_LIMIT {
            return Err(Error::failed(format!("a frame of {} bytes does not fit a pack", plain.len())));
        }
        if let Some(full) = open.take_if(|pack| !pack.has_room(plain.len())) {
            self.hand_on(full)?;
        }
        let pack = open.get_or_insert_with(|| {
            let ordinal = self.ordinals.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            PackBuilder::new(PackId { backup: self.settings.seal.backup.clone(), ordinal })
        });
        let keyset = &self.settings.keyset;
        let key = match unit {
            Unit::Map => keyset.meta(),
            _ => keyset.data().ok_or_else(|| Error::failed("the writer's keyset lacks its data secret"))?,
        };
        pack.add(&self.settings.seal, (unit, key), compressor, plain)
    }

    fn hand_on(&self, pack: PackBuilder) -> Result<()> {
        let pack = pack.finish();
        let digest = Digest::of(&pack.bytes);
        let sent = self.packs.blocking_send(Ok(Sealed { pack, digest }));
        sent.map_err(|_| Error::failed("the upload has stopped"))
    }
}
