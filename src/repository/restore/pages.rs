//! Pages of a fetched frame: compared with the map, then written where they belong.

use std::sync::Arc;

use crate::codec::compress::Decompressor;
use crate::codec::fingerprint::PageFingerprinter;
use crate::disk::sparse::{FilePool, Gathered};
use crate::model::pages::PAGE_SIZE;
use crate::model::{Error, Result};
use crate::observe::progress::Phase;
use crate::repository::pages::map::FrameRef;
use crate::repository::pages::pack::unpack_frame;
use crate::repository::restore::file::WindowFile;
use crate::repository::restore::frames::Fetched;
use crate::repository::restore::of_file;
use crate::repository::restore::sums::Sums;

/// Where a page of a frame goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageTarget {
    pub(super) file: u32,
    pub(super) page: u32,
    pub(super) slot: u8,
    pub(super) fingerprint: [u8; 16],
}

pub(super) struct PageChecker {
    pub(super) files: Arc<Vec<WindowFile>>,
    pub(super) fingerprints: Arc<PageFingerprinter>,
}

impl PageChecker {
    pub(super) fn check_all(&self, frame: &FrameRef, pages: &[PageTarget], plain: &[u8]) -> Result<()> {
        pages.iter().try_for_each(|page| self.check(frame, page, plain))
    }

    fn check(&self, frame: &FrameRef, page: &PageTarget, plain: &[u8]) -> Result<()> {
        let bytes = slot(plain, page.slot, 1);
        if bytes.is_some_and(|bytes| self.fingerprints.of(bytes) == page.fingerprint) {
            return Ok(());
        }
        let path = self.files.get(page.file as usize).map_or("", |file| file.line.path.as_str());
        Err(Error::damaged(format!("block {} of {path} in frame {} is not the one in its map", page.page, frame.id)))
    }
}

pub(super) struct PageWriter {
    pub(super) checker: PageChecker,
    pub(super) pool: Arc<FilePool>,
    pub(super) progress: Arc<Phase>,
    /// Takes the checksums of what is written, unless the files are read once more in the end.
    pub(super) sums: Option<Arc<Sums>>,
}

impl PageWriter {
    pub(super) fn write(&self, frames: Vec<Fetched<Vec<PageTarget>>>) -> Result<()> {
        let (mut decompressor, mut gathered) = (Decompressor::new()?, Gathered::default());
        for Fetched { frame, note: mut pages, payload } in frames {
            let plain = unpack_frame(&frame, &payload, &mut decompressor)?;
            self.checker.check_all(&frame, &pages, &plain)?;
            pages.sort_by_key(|target| (target.file, target.page));
            let follows = |a: &PageTarget, b: &PageTarget| {
                a.file == b.file && a.page + 1 == b.page && a.slot.checked_add(1) == Some(b.slot)
            };
            for run in pages.chunk_by(follows) {
                self.write_run(run, &plain, &mut gathered)?;
            }
        }
        Ok(gathered.flush()?)
    }

    fn write_run(&self, run: &[PageTarget], plain: &[u8], gathered: &mut Gathered) -> Result<()> {
        let Some(first) = run.first() else { return Ok(()) };
        let Some(WindowFile { line, path, .. }) = self.checker.files.get(first.file as usize) else { return Ok(()) };
        let offset = u64::from(first.page) * PAGE_SIZE as u64;
        let bytes = slot(plain, first.slot, run.len()).unwrap_or_default();
        // The last page of a file may be short; the frame holds it filled up with zeros.
        let length = usize::try_from(line.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        // What fails may be an earlier file, which the error names.
        gathered.write(&of_file(self.pool.get(path), path)?, &bytes[..length], offset)?;
        if let Some(sums) = &self.sums {
            (first.page..)
                .zip(bytes[..length].chunks(PAGE_SIZE))
                .for_each(|(page, bytes)| sums.wrote(first.file, page, bytes));
        }
        self.progress.advance(length as u64);
        Ok(())
    }
}

pub(super) fn slot(plain: &[u8], slot: u8, pages: usize) -> Option<&[u8]> {
    let start = usize::from(slot) * PAGE_SIZE;
    plain.get(start..start + pages * PAGE_SIZE)
}
