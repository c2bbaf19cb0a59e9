//! Streams of a backup that is no cluster: a dump, an archive of files. Each is cut into numbered files of pages, which
//! seals, regions, repair and verification treat like any other.

use serde::{Deserialize, Serialize};

use crate::model::pages::{BATCH_PAGES, Batch, FileId, PAGE_SIZE, Piece};
use crate::model::{Error, Result};
use crate::repository::backup::writer::BackupWriter;
use crate::repository::pages::manifest::Line;

/// Bytes of each file but the last, as PostgreSQL cuts its relations: no line of a manifest and no window of a restore
/// grows with the stream.
pub const PART_BYTES: u64 = 1 << 30;
/// The document that lists the streams.
pub const STREAMS: &str = "streams";

const BATCH_BYTES: usize = BATCH_PAGES * PAGE_SIZE;

/// A stream, as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamLine {
    /// Its name, which is a plain file name.
    pub name: String,
    /// How many files hold it.
    pub parts: u32,
    /// Its bytes.
    pub bytes: u64,
}

/// The file that holds a part of a stream.
pub fn part_name(stream: &str, part: u32) -> String {
    format!("{stream}/{part:06}")
}

/// The stream and the part that a file holds.
pub fn parse_part(path: &str) -> Option<(&str, u32)> {
    let (stream, digits) = path.split_once('/')?;
    let part = digits.parse().ok()?;
    (part_name(stream, part) == path).then_some((stream, part))
}

/// Feeds streams into a backup, one after the other.
#[derive(Debug)]
pub struct StreamWriter<'a> {
    backup: &'a mut BackupWriter,
    part_bytes: u64,
    next_file: u32,
    open: Option<Open>,
    lines: Vec<StreamLine>,
}

#[derive(Debug)]
struct Open {
    name: String,
    file: FileId,
    part: u32,
    /// Bytes handed on, of this part and of the parts before it.
    sent: (u64, u64),
    buffer: Vec<u8>,
}

impl<'a> StreamWriter<'a> {
    /// Nothing is written yet.
    pub const fn new(backup: &'a mut BackupWriter) -> Self {
        Self::cutting(backup, PART_BYTES)
    }

    /// With parts of another size, a multiple of what a batch holds.
    pub const fn cutting(backup: &'a mut BackupWriter, part_bytes: u64) -> Self {
        Self { backup, part_bytes, next_file: 0, open: None, lines: Vec::new() }
    }

    /// A stream begins.
    ///
    /// # Errors
    /// The one before has not ended, or the name is no plain file name, or was used already.
    pub fn begin(&mut self, name: String) -> Result<()> {
        if self.open.is_some() || name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(Error::failed(format!("the source began a stream `{name}` out of turn")));
        }
        if self.lines.iter().any(|line| line.name == name) {
            return Err(Error::failed(format!("the source began a second stream `{name}`")));
        }
        self.open = Some(self.part(name, (0, 0))?);
        Ok(())
    }

    fn part(&mut self, name: String, (part, before): (u32, u64)) -> Result<Open> {
        let file = FileId(self.next_file);
        self.next_file += 1;
        self.backup.file(file, part_name(&name, part), 0o600)?;
        Ok(Open { name, file, part, sent: (0, before), buffer: Vec::with_capacity(BATCH_BYTES) })
    }

    /// The next bytes.
    ///
    /// # Errors
    /// No stream is open, or packing or uploading failed.
    pub async fn bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let mut open = self.open.take().ok_or_else(out_of_turn)?;
            let (now, later) = bytes.split_at(bytes.len().min(BATCH_BYTES - open.buffer.len()));
            open.buffer.extend_from_slice(now);
            bytes = later;
            if open.buffer.len() == BATCH_BYTES {
                self.send(&mut open).await?;
                if open.sent.0 >= self.part_bytes {
                    let Open { name, file, part, sent: (size, before), .. } = open;
                    self.backup.file_done(file, size, Vec::new()).await?;
                    open = self.part(name, (part + 1, before + size))?;
                }
            }
            self.open = Some(open);
        }
        Ok(())
    }

    /// The stream is whole.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub async fn end(&mut self) -> Result<()> {
        let mut open = self.open.take().ok_or_else(out_of_turn)?;
        self.send(&mut open).await?;
        let Open { name, file, part, sent: (size, before), .. } = open;
        self.backup.file_done(file, size, Vec::new()).await?;
        self.lines.push(StreamLine { name, parts: part + 1, bytes: before + size });
        Ok(())
    }

    async fn send(&mut self, open: &mut Open) -> Result<()> {
        if open.buffer.is_empty() {
            return Ok(());
        }
        let mut data = std::mem::replace(&mut open.buffer, Vec::with_capacity(BATCH_BYTES));
        let (bytes, pages) = (data.len() as u64, data.len().div_ceil(PAGE_SIZE));
        data.resize(pages * PAGE_SIZE, 0);
        let page = |bytes: u64| u32::try_from(bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let piece = Piece { file: open.file, first_page: page(open.sent.0), pages };
        open.sent.0 += bytes;
        self.backup.batch(Batch { pieces: vec![piece], data, ..Batch::default() }).await
    }

    /// Lists the streams in the manifest.
    ///
    /// # Errors
    /// One has not ended, or a manifest part did not reach the quorum.
    pub async fn finish(self) -> Result<Vec<StreamLine>> {
        if let Some(open) = self.open {
            return Err(Error::failed(format!("{} was not read to its end", open.name)));
        }
        let content = serde_json::to_value(&self.lines);
        let content = content.map_err(|error| Error::failed("encode the list of streams").because(error))?;
        self.backup.line(&Line::Document { name: STREAMS.to_owned(), content }).await?;
        Ok(self.lines)
    }
}

fn out_of_turn() -> Error {
    Error::failed("the source sent bytes of no stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_in_one_way() {
        assert_eq!(parse_part(&part_name("app.dump", 7)), Some(("app.dump", 7)));
        for path in ["app.dump", "app.dump/7", "app.dump/0000007", "app.dump/-00001", "a/b/000001", "/000001/x"] {
            assert_eq!(parse_part(path), None, "{path}");
        }
    }
}
