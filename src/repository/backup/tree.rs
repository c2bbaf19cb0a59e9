//! Puts the pieces of files together again after the workers took them apart. Pure.

use std::collections::BTreeMap;

use crate::model::pages::{FileId, PAGE_SIZE};
use crate::model::{Error, Result};
use crate::repository::backup::packer::{Placed, PlacedPiece};
use crate::repository::pages::manifest::FileLine;
use crate::repository::pages::map::FrameRef;

/// Files in progress.
#[derive(Debug, Default)]
pub struct Tree {
    open: BTreeMap<FileId, OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    path: String,
    mode: u32,
    /// First page, pages, chunk, first entry.
    runs: Vec<Run>,
    done: Option<(u64, Vec<u32>)>,
}

#[derive(Debug, Clone)]
struct Run {
    first_page: u32,
    pages: u32,
    chunk: FrameRef,
    first_entry: u16,
    kept: u32,
}

/// A complete file; its runs ascend by page.
#[derive(Debug)]
pub struct CompleteFile {
    /// Path, mode, size and damage; its `chunks` are still empty.
    pub line: FileLine,
    /// What to put there.
    pub runs: Vec<FileRun>,
}

/// A run of pages of a complete file.
#[derive(Debug)]
pub struct FileRun {
    /// The map chunk that describes it.
    pub chunk: FrameRef,
    /// Its first entry there.
    pub first_entry: u16,
    /// How many.
    pub pages: u16,
    /// The chunk's number in the page-map state.
    pub kept: u32,
}

impl Tree {
    /// A file begins.
    ///
    /// # Errors
    /// Its number is in use: the source contradicts itself.
    pub fn begin(&mut self, id: FileId, path: String, mode: u32) -> Result<()> {
        let twice = Error::failed(format!("the source announced file {} ({path}) twice", id.0));
        let file = OpenFile { path, mode, runs: Vec::new(), done: None };
        self.open.insert(id, file).map_or(Ok(()), |_| Err(twice))
    }

    /// The path of a file in progress.
    pub fn path(&self, id: FileId) -> Option<&str> {
        self.open.get(&id).map(|file| file.path.as_str())
    }

    /// A file was gone before it was read; pieces of it may still be on their way.
    pub fn forget(&mut self, id: FileId) {
        self.open.remove(&id);
    }

    /// A file was read to its end; complete once its last piece is placed.
    ///
    /// # Errors
    /// It was never begun.
    pub fn done(&mut self, id: FileId, size: u64, damaged: Vec<u32>) -> Result<Option<CompleteFile>> {
        let unknown = || Error::failed(format!("the source finished file {}, which it never began", id.0));
        self.open.get_mut(&id).ok_or_else(unknown)?.done = Some((size, damaged));
        self.close_if_complete(id)
    }

    /// A batch is in a pack.
    ///
    /// # Errors
    /// Pages of one file overlap.
    pub fn placed(&mut self, placed: &Placed) -> Result<Vec<CompleteFile>> {
        let mut complete = Vec::new();
        for PlacedPiece { piece, chunk, first_entry, kept } in &placed.pieces {
            if let Some(file) = self.open.get_mut(&piece.file) {
                let run = Run {
                    first_page: piece.first_page,
                    pages: piece.pages,
                    chunk: chunk.clone(),
                    first_entry: *first_entry,
                    kept: *kept,
                };
                file.runs.push(run);
                complete.extend(self.close_if_complete(piece.file)?);
            }
        }
        Ok(complete)
    }

    /// To be called when everything is read and placed.
    ///
    /// # Errors
    /// A file lacks pages: it must not be committed.
    pub fn finish(self) -> Result<()> {
        match self.open.into_values().next() {
            None => Ok(()),
            Some(file) => Err(Error::failed(format!("{} was not read completely", file.path))),
        }
    }

    fn close_if_complete(&mut self, id: FileId) -> Result<Option<CompleteFile>> {
        let complete = self.open.get(&id).is_some_and(|file| {
            file.done.as_ref().is_some_and(|(size, _)| {
                let pages = size.div_ceil(PAGE_SIZE as u64);
                // Pages beyond the size, read before the file shrank, must not stand in for pages still on their way.
                let wanted = |run: &Run| u64::from(run.pages).min(pages.saturating_sub(u64::from(run.first_page)));
                file.runs.iter().map(wanted).sum::<u64>() >= pages
            })
        });
        let file = complete.then(|| self.open.remove(&id)).flatten();
        file.map(OpenFile::close).transpose()
    }
}

impl OpenFile {
    fn close(mut self) -> Result<CompleteFile> {
        let (size, damaged_blocks) = self.done.take().unwrap_or_default();
        let pages = size.div_ceil(PAGE_SIZE as u64);
        self.runs.sort_by_key(|run| run.first_page);
        let mut runs = Vec::with_capacity(self.runs.len());
        let mut next = 0;
        for run in self.runs {
            // Pages beyond the size were read from a file that shrank meanwhile: they do not exist.
            let wanted = u64::from(run.pages).min(pages.saturating_sub(next));
            if u64::from(run.first_page) != next && wanted > 0 {
                return Err(Error::failed(format!("pages of {} are missing from block {next} on", self.path)));
            }
            next += u64::from(run.pages);
            if wanted > 0 {
                let pages = u16::try_from(wanted).unwrap_or(u16::MAX);
                let Run { chunk, first_entry, kept, .. } = run;
                runs.push(FileRun { chunk, first_entry, pages, kept });
            }
        }
        let line = FileLine { path: self.path, mode: self.mode, size, chunks: Vec::new(), damaged_blocks };
        Ok(CompleteFile { line, runs })
    }
}
