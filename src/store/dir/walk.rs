//! Listing in byte order of the names, one page at a time.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, DirEntry, FileType, statat};
use rustix::io::Errno;

use super::error::Call;
use super::tree::{Tree, descend, modified, refusal, size};
use crate::store::{Depth, ListPage, ListToken, ListedObject, StoreError, name};

const PAGE: usize = 1000;

/// The page that grows during a walk. A walk looks only into directories that may hold names after `last`.
struct Walk<'a> {
    call: Call<'a>,
    prefix: &'a str,
    depth: Depth,
    /// The last entry given out, in this page or an earlier one.
    last: String,
    page: ListPage,
}

impl Tree {
    pub(super) fn list(&self, prefix: &str, depth: Depth, after: String) -> Result<ListPage, StoreError> {
        let call = self.call("list", prefix);
        let (parents, _) = name::split(prefix);
        let start = match self.directory(call, parents) {
            Err(error) if error.is_not_found() => return Ok(ListPage::default()),
            opened => opened?,
        };
        let base = prefix.get(..prefix.rfind('/').map_or(0, |slash| slash + 1)).unwrap_or_default();
        let mut walk = Walk { call, prefix, depth, last: after, page: ListPage::default() };
        let _full = walk.visit(&start, base)?;
        Ok(walk.page)
    }
}

impl Walk<'_> {
    fn visit(&mut self, directory: &OwnedFd, base: &str) -> Result<ControlFlow<()>, StoreError> {
        for (leaf, is_directory) in self.entries(directory)? {
            let full = format!("{base}{leaf}");
            if full.len() > name::MAX_NAME || !full.starts_with(self.prefix) {
                continue;
            }
            let flow = match (is_directory, self.depth) {
                (false, _) => self.add_object(directory, &leaf, full)?,
                (true, Depth::Level) => self.add_prefix(directory, &leaf, full)?,
                (true, Depth::All) => self.visit_below(directory, &leaf, &full)?,
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Names in one directory. Those of directories end in `/`, because that is the byte they compare by: `a-b` comes
    /// before everything in `a/`.
    fn entries(&self, directory: &OwnedFd) -> Result<Vec<(String, bool)>, StoreError> {
        let failed = |errno| self.call.failed(errno);
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).map_err(failed)? {
            names.extend(self.classify(directory, &entry.map_err(failed)?)?);
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The name of an entry and whether it is a directory; `None` if it cannot be part of an object name or vanished.
    fn classify(&self, directory: &OwnedFd, entry: &DirEntry) -> Result<Option<(String, bool)>, StoreError> {
        let Some(leaf) = entry.file_name().to_str().ok().filter(|leaf| name::is_part(leaf)) else { return Ok(None) };
        let kind = match entry.file_type() {
            FileType::Unknown => match statat(directory, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(self.call.failed(errno)),
            },
            known => known,
        };
        match kind {
            FileType::RegularFile => Ok(Some((leaf.to_owned(), false))),
            FileType::Directory => Ok(Some((format!("{leaf}/"), true))),
            // To skip it could hide objects behind a link that somebody placed.
            FileType::Symlink => Err(self.call.invalid(&format!("{leaf} is a symbolic link, which is not followed"))),
            _ => Err(self.call.invalid(&format!("{leaf} is neither a file nor a directory"))),
        }
    }

    fn add_object(&mut self, directory: &OwnedFd, leaf: &str, full: String) -> Result<ControlFlow<()>, StoreError> {
        if full <= self.last {
            return Ok(ControlFlow::Continue(()));
        }
        let stat = match statat(directory, leaf, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(ControlFlow::Continue(())),
            Err(errno) => return Err(self.call.failed(errno)),
        };
        if self.is_full() {
            return Ok(ControlFlow::Break(()));
        }
        self.last.clone_from(&full);
        self.page.objects.push(ListedObject { key: full, size: size(&stat), modified: modified(&stat) });
        Ok(ControlFlow::Continue(()))
    }

    fn add_prefix(&mut self, directory: &OwnedFd, leaf: &str, full: String) -> Result<ControlFlow<()>, StoreError> {
        if full <= self.last || !self.holds_an_object(directory, leaf)? {
            return Ok(ControlFlow::Continue(()));
        }
        if self.is_full() {
            return Ok(ControlFlow::Break(()));
        }
        self.last.clone_from(&full);
        self.page.prefixes.push(full);
        Ok(ControlFlow::Continue(()))
    }

    fn visit_below(&mut self, directory: &OwnedFd, leaf: &str, full: &str) -> Result<ControlFlow<()>, StoreError> {
        let is_behind = self.last.as_str() > full && !self.last.starts_with(full);
        match self.open(directory, leaf)? {
            Some(below) if !is_behind => self.visit(&below, full),
            _ => Ok(ControlFlow::Continue(())),
        }
    }

    /// Whether a put into the directory ever finished: on S3 an empty directory does not exist.
    fn holds_an_object(&self, directory: &OwnedFd, leaf: &str) -> Result<bool, StoreError> {
        let Some(below) = self.open(directory, leaf)? else { return Ok(false) };
        for entry in Dir::read_from(&below).map_err(|errno| self.call.failed(errno))? {
            let entry = entry.map_err(|errno| self.call.failed(errno))?;
            match self.classify(&below, &entry)? {
                Some((_, false)) => return Ok(true),
                Some((leaf, true)) if self.holds_an_object(&below, &leaf)? => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }

    fn open(&self, directory: &OwnedFd, leaf: &str) -> Result<Option<OwnedFd>, StoreError> {
        let leaf = leaf.trim_end_matches('/');
        match descend(directory, leaf) {
            Ok(below) => Ok(Some(below)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(refusal(self.call, directory.as_fd(), leaf, errno)),
        }
    }

    /// Marks where the next page begins once this one is full.
    fn is_full(&mut self) -> bool {
        let full = self.page.objects.len() + self.page.prefixes.len() >= PAGE;
        if full {
            self.page.next = Some(ListToken(self.last.clone()));
        }
        full
    }
}
