//! Checksums of files of which a part was left as it stood, as the operating system gives them back, on all cores.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::disk::sparse::FilePool;
use crate::model::{Error, Result};
use crate::repository::restore::file::{OWNER_WRITES, WindowFile, WrittenFile};
use crate::repository::restore::of_file;

/// Bytes that one thread reads in a row, so that the largest file keeps all of them busy.
const PIECE: u64 = 64 * 1024 * 1024;
const BUFFER: usize = 256 * 1024;

/// A part of a file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    file: usize,
    start: u64,
    length: u64,
}

/// The checksum of every file, in order. Files get their final mode.
pub(super) async fn checksum_all(files: Arc<Vec<WindowFile>>, pool: Arc<FilePool>) -> Result<Vec<WrittenFile>> {
    let work = tokio::task::spawn_blocking(move || {
        let pieces = divide(&files);
        let sums = sum(&files, &pool, &pieces)?;
        let mut written: Vec<_> = files.iter().map(WindowFile::unwritten).collect();
        for (piece, sum) in pieces.iter().zip(sums) {
            let file = &mut written[piece.file];
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            file.crc32c = crc32c::crc32c_combine(file.crc32c, sum, length);
        }
        finish_all(&files, &pool)?;
        Ok(written)
    });
    work.await.map_err(|error| Error::failed("a restore worker died").because(error))?
}

/// Files get their final mode.
pub(super) fn finish_all(files: &[WindowFile], pool: &FilePool) -> Result<()> {
    files.iter().try_for_each(|file| finish(file, pool))
}

fn divide(files: &[WindowFile]) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(files.len());
    for (file, WindowFile { line, .. }) in files.iter().enumerate() {
        let mut start = 0;
        while start < line.size {
            let length = PIECE.min(line.size - start);
            pieces.push(Piece { file, start, length });
            start += length;
        }
    }
    pieces
}

/// The checksum of each piece; threads take the next one that nobody has taken.
fn sum(files: &[WindowFile], pool: &FilePool, pieces: &[Piece]) -> Result<Vec<u32>> {
    let (next, sums) = (AtomicUsize::new(0), Mutex::new(vec![0; pieces.len()]));
    let work = || -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(number) else { return Ok(()) };
            let sum = sum_piece(&files[piece.file], *piece, pool, &mut buffer)?;
            sums.lock().unwrap_or_else(PoisonError::into_inner)[number] = sum;
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(pieces.len());
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let died = || Err(Error::failed("a restore worker died"));
        running.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| died()))
    })?;
    Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn sum_piece(file: &WindowFile, piece: Piece, pool: &FilePool, buffer: &mut [u8]) -> Result<u32> {
    let path = &file.path;
    let handle = of_file(pool.get(path), path)?;
    let (mut crc32c, mut at, end) = (0, piece.start, piece.start + piece.length);
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        of_file(handle.read_exact_at(&mut buffer[..length], at), path)?;
        crc32c = crc32c::crc32c_append(crc32c, &buffer[..length]);
        at += length as u64;
    }
    Ok(crc32c)
}

fn finish(file: &WindowFile, pool: &FilePool) -> Result<()> {
    if file.line.mode & OWNER_WRITES == OWNER_WRITES {
        return Ok(());
    }
    of_file(of_file(pool.get(&file.path), &file.path)?.set_mode(file.line.mode & 0o7777), &file.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::pages::manifest::FileLine;

    #[tokio::test]
    async fn pieces_sum_up_to_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(FilePool::new(2));
        let sizes = [0, 1, 8192, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17];
        let file = |(number, size): (usize, u64)| {
            let path = dir.path().join(number.to_string());
            let handle = pool.create(&path, 0o600).unwrap();
            handle.set_len(size).unwrap();
            for at in [0, size / 3, size / 2, size.saturating_sub(9)] {
                handle.write_all_at(&b"not zeros"[..size.min(9) as usize], at.min(size - size.min(9))).unwrap();
            }
            let line = FileLine { path: number.to_string(), mode: 0o600, size, chunks: vec![], damaged_blocks: vec![] };
            WindowFile { line, path, held: 0 }
        };
        let files: Vec<_> = sizes.into_iter().enumerate().map(file).collect();
        let expected: Vec<_> = files.iter().map(|file| crc32c::crc32c(&std::fs::read(&file.path).unwrap())).collect();
        let written = checksum_all(Arc::new(files), pool).await.unwrap();
        assert_eq!(written.iter().map(|file| file.crc32c).collect::<Vec<_>>(), expected);
        assert_eq!(written.iter().map(|file| file.size).collect::<Vec<_>>(), sizes);
    }
}
