//! Files: directories as one tar archive, and back.
//!
//! An archive is whole whatever happens to the files while they are read; what happened to them is told. Back, nothing is
//! ever written outside of the directory that was named, whoever made the archive.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::model::pattern::Pattern;
use crate::model::{Error, Result};
use crate::source::{Copied, StreamItem, StreamSource};

mod entry;
mod names;
mod pack;
#[cfg(test)]
mod tests;
mod unpack;

pub use unpack::{Unpacked, unpack};

/// The name of the stream, and of the file when it is taken out as it is.
pub const STREAM: &str = "files.tar";
/// Things that are told one by one; of more only the number is.
const TOLD: usize = 1000;
/// What is handed on at once.
const CHUNK: usize = 1024 * 1024;

/// What is protected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Directories or files, absolute, none below another.
    pub roots: Vec<PathBuf>,
    /// If there are any, only what they cover.
    pub include: Vec<Pattern>,
    /// Never what they cover.
    pub exclude: Vec<Pattern>,
}

impl Options {
    /// Whether an archive would hold what stands at this path, wherever links lead.
    pub fn take(&self, path: &Path) -> bool {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let inside = real(path);
        self.roots.iter().any(|root| match inside.strip_prefix(real(root)) {
            Ok(below) => !self.exclude.iter().any(|pattern| pattern.covers(&root.join(below))),
            Err(_) => false,
        })
    }
}

/// What an archive holds, for the record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The roots, as they were configured.
    pub roots: Vec<String>,
    /// The patterns.
    pub include: Vec<String>,
    /// The patterns.
    pub exclude: Vec<String>,
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Links, pipes, devices, and further names of files.
    pub others: u64,
    /// Bytes of all files, holes included.
    pub bytes: u64,
}

/// What happened on the way.
#[derive(Debug, Default)]
struct Told {
    notes: Vec<String>,
    left_out: Vec<String>,
    beyond: (u64, u64),
}

impl Told {
    fn note(&mut self, text: String) {
        if self.notes.len() < TOLD { self.notes.push(text) } else { self.beyond.0 += 1 }
    }

    fn left_out(&mut self, text: String) {
        if self.left_out.len() < TOLD { self.left_out.push(text) } else { self.beyond.1 += 1 }
    }

    fn end(mut self) -> (Vec<String>, Vec<String>) {
        for (list, beyond) in [(&mut self.notes, self.beyond.0), (&mut self.left_out, self.beyond.1)] {
            if beyond > 0 {
                list.push(format!("and {beyond} more"));
            }
        }
        (self.notes, self.left_out)
    }
}

impl Contents {
    fn of(options: &Options) -> Self {
        let texts = |patterns: &[Pattern]| patterns.iter().map(|pattern| pattern.as_str().to_owned()).collect();
        Self {
            roots: options.roots.iter().map(|root| root.display().to_string()).collect(),
            include: texts(&options.include),
            exclude: texts(&options.exclude),
            ..Self::default()
        }
    }

    const fn entries(&self) -> u64 {
        self.files + self.directories + self.others
    }

    /// An archive of bare roots keeps nothing: a pattern is wrong, a file system is not mounted, or all of it is gone.
    fn refuse_nothing(&self) -> Result<()> {
        if self.files + self.others > 0 || self.directories > self.roots.len() as u64 {
            return Ok(());
        }
        let error = Error::failed(format!("nothing in {} is selected", self.roots.join(", ")));
        Err(error.hint("is all of it mounted? then see `roots`, `include` and `exclude` of the target"))
    }
}

/// Directories that are to be read.
#[derive(Debug)]
pub struct Files {
    options: Options,
}

impl Files {
    /// Nothing is read yet.
    pub const fn new(options: Options) -> Self {
        Self { options }
    }
}

#[async_trait]
impl StreamSource for Files {
    async fn copy(&mut self, items: mpsc::Sender<StreamItem>) -> Result<Copied> {
        let options = self.options.clone();
        let work = tokio::task::spawn_blocking(move || {
            let mut out = Sending { items, chunk: Vec::with_capacity(CHUNK) };
            out.send(StreamItem::Begin { name: STREAM.to_owned() }).map_err(stopped)?;
            let (contents, told) = pack::pack(&options, &mut out)?;
            out.send(StreamItem::End).map_err(stopped)?;
            let (notes, left_out) = told.end();
            let document = serde_json::to_value(&contents);
            let document = document.map_err(|error| Error::failed("describe the archive").because(error))?;
            Ok(Copied { document, notes, left_out, as_of: None })
        });
        work.await.map_err(|error| Error::failed("the reader of files died").because(error))?
    }

    fn method(&self) -> &'static str {
        "tar"
    }
}

/// Collects small writes; waits while the backup is busy, and ends when it is gone.
struct Sending {
    items: mpsc::Sender<StreamItem>,
    chunk: Vec<u8>,
}

impl Sending {
    fn send(&mut self, item: StreamItem) -> io::Result<()> {
        self.items.blocking_send(item).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        self.send(StreamItem::Bytes(chunk))
    }
}

fn stopped(error: io::Error) -> Error {
    Error::failed("hand on the archive").because(error)
}

/// A name for people: what is no printable text is escaped.
fn shown(name: &[u8]) -> String {
    match std::str::from_utf8(name) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => name.escape_ascii().to_string(),
    }
}
