//! From pages to packs: fingerprint, compare, compress, seal, on every core.
//!
//! Workers share one bounded queue. Each fills a pack of its own and hands it on when it is full, so memory is bounded by
//! workers, queue and uploads in flight, whatever the size of the cluster.
//!
//! A page whose fingerprint is the parent's for the same block of the same file is not stored again: the map names the
//! parent's frame. Where nothing changed at all, the file refers to the parent's map chunk.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::codec::compress::Compressor;
use crate::codec::fingerprint::PageFingerprinter;
use crate::codec::seal::Unit;
use crate::keys::keyset::Keyset;
use crate::model::pages::{BATCH_PAGES, Batch, PAGE_SIZE, Piece};
use crate::model::{Error, Result};
use crate::repository::backup::compare::{ChunkBuilder, Look, Proof, Recall, Tally};
use crate::repository::backup::state::{Keeper, KnownFile, KnownPages};
use crate::repository::pages::map::{FrameRef, PackId};
use crate::repository::pages::pack::{FrameSeal, OBJECT_LIMIT, Pack, PackBuilder};
use crate::store::Digest;

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
    /// Bytes that a pack stays within.
    pub pack_size: usize,
    /// What the parent holds.
    pub parent: Option<Arc<KnownPages>>,
    /// Remembers the maps for the next backup.
    pub keeper: Arc<Keeper>,
    /// The number of the first pack that is free.
    pub first_pack: u32,
    /// What claims that are to be proved mean.
    pub proof: Option<Proof>,
}

/// A batch and what the parent knows of its files, piece by piece.
#[derive(Debug)]
pub struct Work {
    /// The pages.
    pub batch: Batch,
    /// One for each piece; `None` for a file that the parent does not have.
    pub known: Vec<Option<Arc<KnownFile>>>,
    /// One for each piece, where claims are to be proved.
    pub paths: Vec<String>,
}

/// Where the pages of one batch are kept.
#[derive(Debug)]
pub struct Placed {
    /// Its pieces.
    pub pieces: Vec<PlacedPiece>,
}

/// A piece and the map chunk that describes it.
#[derive(Debug)]
pub struct PlacedPiece {
    /// The piece.
    pub piece: Piece,
    /// The chunk: a new one of this backup, or one that the parent uses.
    pub chunk: FrameRef,
    /// The entry of the piece's first page.
    pub first_entry: u16,
    /// The chunk's number in the page-map state.
    pub kept: u32,
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
    pub batches: mpsc::Sender<Work>,
    /// Gives finished packs.
    pub packs: mpsc::Receiver<Result<Sealed>>,
    /// Gives the places of pages; unbounded, because a worker must never wait for the one who also feeds it.
    pub placed: mpsc::UnboundedReceiver<Placed>,
    /// Counts, complete once the workers have finished.
    pub tally: Arc<Mutex<Tally>>,
}

impl Packer {
    /// Starts `workers` threads.
    pub fn start(settings: &PackSettings, workers: usize) -> Self {
        let (batches, queue) = mpsc::channel(1);
        let (packs_in, packs) = mpsc::channel(1);
        let (placed_in, placed) = mpsc::unbounded_channel();
        let queue = Arc::new(Mutex::new(queue));
        let ordinals = Arc::new(std::sync::atomic::AtomicU32::new(settings.first_pack));
        let tally = Arc::new(Mutex::new(Tally::default()));
        let maps = Arc::new(Mutex::new(None));
        for _ in 0..workers.max(1) {
            let worker = Worker {
                settings: settings.clone(),
                ordinals: Arc::clone(&ordinals),
                maps: Arc::clone(&maps),
                packs: packs_in.clone(),
                placed: placed_in.clone(),
                tally: Arc::clone(&tally),
            };
            let queue = Arc::clone(&queue);
            tokio::task::spawn_blocking(move || worker.run(&queue));
        }
        Self { batches, packs, placed, tally }
    }
}

/// The pack that a worker fills, and its compressor.
type Sink<'a> = (&'a mut Option<PackBuilder>, &'a mut Compressor);

struct Worker {
    settings: PackSettings,
    ordinals: Arc<std::sync::atomic::AtomicU32>,
    /// The pack of map chunks, which all workers fill: a restore reads them before everything else, and together they are
    /// few requests. The last worker to end hands it on.
    maps: Arc<Mutex<Option<PackBuilder>>>,
    packs: mpsc::Sender<Result<Sealed>>,
    placed: mpsc::UnboundedSender<Placed>,
    tally: Arc<Mutex<Tally>>,
}

impl Worker {
    fn run(self, queue: &Mutex<mpsc::Receiver<Work>>) {
        let worked = self.work(queue).and_then(|()| match Arc::into_inner(self.maps) {
            Some(maps) => hand_on(&self.packs, maps.into_inner().unwrap_or_else(PoisonError::into_inner)),
            None => Ok(()),
        });
        if let Err(error) = worked {
            // The receiver is gone only when the job has failed already.
            let _ = self.packs.blocking_send(Err(error));
        }
    }

    fn work(&self, queue: &Mutex<mpsc::Receiver<Work>>) -> Result<()> {
        let mut compressor = Compressor::new(self.settings.level)?;
        let mut open: Option<PackBuilder> = None;
        loop {
            // One worker waits in the queue and holds the lock; the others wait for the lock.
            let work = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(work) = work else { break };
            let mut tally = Tally::default();
            let placed = self.place(&work, &mut tally, (&mut open, &mut compressor))?;
            self.tally.lock().unwrap_or_else(PoisonError::into_inner).add(tally);
            let _ = self.placed.send(placed);
        }
        hand_on(&self.packs, open)
    }

    fn place(&self, work: &Work, tally: &mut Tally, (open, compressor): Sink<'_>) -> Result<Placed> {
        let mut rest = Rest::of(&work.batch)?;
        tally.unread += u64::from(work.batch.claims.unread());
        let mut recall = Recall::new(self.settings.parent.as_deref());
        let mut builder = ChunkBuilder::default();
        // Pieces of the new chunk wait here for its name.
        let (mut pieces, mut new) = (Vec::with_capacity(work.batch.pieces.len()), Vec::new());
        for (index, (piece, known)) in work.batch.pieces.iter().zip(&work.known).enumerate() {
            let first = rest.next;
            let pages = rest.piece(piece)?;
            tally.read += pages.iter().flatten().count() as u64;
            let looks = self.looks(&pages, (piece, known.as_deref()), &mut recall)?;
            if let Some(run) = known.as_ref().and_then(|known| recall.unchanged(known, piece, &looks)) {
                let (chunk, map) = recall.chunk(run.chunk).ok_or_else(forgotten)?;
                let kept = self.settings.keeper.carry(run.chunk, chunk, map);
                tally.refer_to_chunk(chunk, map, run.entries());
                let chunk = chunk.clone();
                pieces.push(PlacedPiece { piece: *piece, chunk, first_entry: run.first_entry, kept });
                continue;
            }
            new.push((*piece, builder.entries()));
            for ((at, page), look) in (0..).zip(&pages).zip(&looks) {
                let number = piece.first_page + at;
                match (known.as_ref().and_then(|known| recall.same(known, number, look)), page) {
                    (Some(place), _) => builder.share(place, look, tally),
                    (None, Some(page)) => {
                        tally.changed += 1;
                        if let Some(proof) = self.settings.proof.filter(|_| work.batch.claims.has(first + at)) {
                            let name =
                                || format!("page {number} of {}", work.paths.get(index).map_or("?", |path| path));
                            proof.judge(look, page, &mut tally.missed, name);
                        }
                        builder.store(page, look);
                    }
                    (None, None) => return Err(forgotten()),
                }
                if builder.is_full() {
                    self.store_frame(&mut builder, (open, compressor))?;
                }
            }
        }
        self.store_frame(&mut builder, (open, compressor))?;
        if !new.is_empty() {
            let encoded = builder.finish().encode();
            let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
            let chunk = self.add(Unit::Map, &encoded, (&mut maps, compressor))?;
            drop(maps);
            let kept = self.settings.keeper.chunk(&chunk, &encoded);
            let place = |(piece, first_entry)| PlacedPiece { piece, chunk: chunk.clone(), first_entry, kept };
            pieces.extend(new.into_iter().map(place));
        }
        Ok(Placed { pieces })
    }

    /// How the pages of a piece look; those that were not read, as they did to the parent.
    fn looks(
        &self,
        pages: &[Option<&[u8]>],
        (piece, known): (&Piece, Option<&KnownFile>),
        recall: &mut Recall<'_>,
    ) -> Result<Vec<Look>> {
        let look = |(number, page): (u32, &Option<&[u8]>)| match page {
            Some(page) => Ok(Look::at(page, &self.settings.fingerprints)),
            None => known.and_then(|known| recall.remembered(known, number)).ok_or_else(forgotten),
        };
        (piece.first_page..).zip(pages).map(look).collect()
    }

    fn store_frame(&self, builder: &mut ChunkBuilder, sink: Sink<'_>) -> Result<()> {
        if builder.waiting().is_empty() {
            return Ok(());
        }
        let frame = self.add(Unit::Frame, builder.waiting(), sink)?;
        builder.stored(frame);
        Ok(())
    }

    fn add(&self, unit: Unit, plain: &[u8], (open, compressor): Sink<'_>) -> Result<FrameRef> {
        if plain.len() + 8192 > OBJECT_LIMIT {
            return Err(Error::failed(format!("a frame of {} bytes does not fit a pack", plain.len())));
        }
        if let Some(full) = open.take_if(|pack| !pack.has_room(plain.len())) {
            hand_on(&self.packs, Some(full))?;
        }
        let pack = open.get_or_insert_with(|| {
            let ordinal = self.ordinals.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let id = PackId { backup: self.settings.seal.backup.clone(), ordinal };
            PackBuilder::new(id, self.settings.pack_size)
        });
        let keyset = &self.settings.keyset;
        let key = match unit {
            Unit::Map => keyset.meta(),
            _ => keyset.data().ok_or_else(|| Error::failed("the writer's keyset lacks its data secret"))?,
        };
        pack.add(&self.settings.seal, (unit, key), compressor, plain)
    }
}

/// Sends a pack to the regions, if there is one.
fn hand_on(packs: &mpsc::Sender<Result<Sealed>>, pack: Option<PackBuilder>) -> Result<()> {
    let Some(pack) = pack.filter(|pack| !pack.is_empty()).map(PackBuilder::finish) else { return Ok(()) };
    let digest = Digest::of(&pack.bytes);
    let sent = packs.blocking_send(Ok(Sealed { pack, digest }));
    sent.map_err(|_| Error::failed("the upload has stopped"))
}

/// The pages of a batch that were not taken out of it yet.
struct Rest<'b> {
    batch: &'b Batch,
    data: &'b [u8],
    /// The number of the next page in the batch.
    next: u32,
}

impl<'b> Rest<'b> {
    fn of(batch: &'b Batch) -> Result<Self> {
        // More entries than a map chunk holds would read back as damage.
        let pages: u64 = batch.pieces.iter().map(|piece| u64::from(piece.pages)).sum();
        let read = pages.checked_sub(u64::from(batch.claims.unread()));
        if pages > BATCH_PAGES as u64 || read.map(|read| read * PAGE_SIZE as u64) != Some(batch.data.len() as u64) {
            return Err(Error::failed("the source sent a batch that is not what it says"));
        }
        Ok(Self { batch, data: &batch.data, next: 0 })
    }

    /// The pages of the next piece; `None` for one that was not read.
    fn piece(&mut self, piece: &Piece) -> Result<Vec<Option<&'b [u8]>>> {
        let mut pages = Vec::with_capacity(piece.pages as usize);
        for _ in 0..piece.pages {
            let claims = &self.batch.claims;
            if !claims.read && claims.has(self.next) {
                pages.push(None);
            } else {
                let (page, rest) = self.data.split_at_checked(PAGE_SIZE).ok_or_else(short_batch)?;
                self.data = rest;
                pages.push(Some(page));
            }
            self.next += 1;
        }
        Ok(pages)
    }
}

fn short_batch() -> Error {
    Error::failed("the source sent a batch with fewer pages than it says")
}

fn forgotten() -> Error {
    Error::failed("a map chunk of the parent is not at hand")
}
