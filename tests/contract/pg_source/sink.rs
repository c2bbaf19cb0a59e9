//! Writes what a source yields into a directory, and holds the source to its contract.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use drctl::disk::sparse::TargetFile;
use drctl::source::{BATCH_PAGES, Batch, FileId, Finished, Item, PAGE_SIZE};
use tokio::sync::mpsc;

/// What arrived.
#[derive(Default)]
pub struct Sunk {
    /// Paths in the order in which they were announced.
    pub files: Vec<String>,
    /// Directories in the order in which they came.
    pub directories: Vec<String>,
    /// Oids and locations.
    pub tablespaces: Vec<(u32, String)>,
    /// By path.
    pub damaged: BTreeMap<String, Vec<u32>>,
    /// Files that were gone.
    pub vanished: usize,
    open: HashMap<FileId, Open>,
    ids: HashSet<FileId>,
}

struct Open {
    path: String,
    file: TargetFile,
    next_page: u32,
}

/// Receives everything; blocks.
pub fn sink(mut items: mpsc::Receiver<Item>, target: &Path) -> Sunk {
    let mut sunk = Sunk::default();
    while let Some(item) = items.blocking_recv() {
        sunk.take(item, target);
    }
    let unfinished: Vec<&String> = sunk.open.values().map(|open| &open.path).collect();
    assert!(unfinished.is_empty(), "{unfinished:?}");
    let count = u32::try_from(sunk.ids.len()).unwrap();
    assert!((0..count).all(|id| sunk.ids.contains(&FileId(id))), "ids have holes");
    sunk
}

impl Sunk {
    fn take(&mut self, item: Item, target: &Path) {
        match item {
            Item::Directory { path, mode } => {
                fs::create_dir_all(target.join(&path)).unwrap();
                fs::set_permissions(target.join(&path), fs::Permissions::from_mode(mode)).unwrap();
                let parent = Path::new(&path).parent().unwrap().to_str().unwrap();
                assert!(parent.is_empty() || self.directories.iter().any(|known| known == parent), "{path}");
                self.directories.push(path);
            }
            Item::Tablespace { oid, location } => {
                let place = space(target, oid);
                fs::create_dir(&place).unwrap();
                fs::create_dir_all(target.join("pg_tblspc")).unwrap();
                symlink(&place, target.join(format!("pg_tblspc/{oid}"))).unwrap();
                self.tablespaces.push((oid, location));
            }
            Item::File { id, path, mode } => {
                let parent = Path::new(&path).parent().unwrap().to_str().unwrap();
                assert!(parent.is_empty() || self.directories.iter().any(|known| known == parent), "{path}");
                assert!(self.ids.insert(id), "{id:?} twice");
                let file = TargetFile::create(&target.join(&path), mode).unwrap();
                self.files.push(path.clone());
                self.open.insert(id, Open { path, file, next_page: 0 });
            }
            Item::Batch(batch) => self.batch(&batch),
            Item::FileDone { id, size, damaged_blocks } => {
                let open = self.open.remove(&id).unwrap();
                assert_eq!(u64::from(open.next_page), size.div_ceil(PAGE_SIZE as u64), "{}", open.path);
                open.file.set_len(size).unwrap();
                if !damaged_blocks.is_empty() {
                    self.damaged.insert(open.path, damaged_blocks);
                }
            }
            Item::FileVanished { id } => {
                let open = self.open.remove(&id).unwrap();
                fs::remove_file(target.join(&open.path)).unwrap();
                self.files.retain(|path| *path != open.path);
                self.vanished += 1;
            }
        }
    }

    fn batch(&mut self, batch: &Batch) {
        let pages: u32 = batch.pieces.iter().map(|piece| piece.pages).sum();
        assert!(pages > 0 && pages as usize <= BATCH_PAGES && batch.data.len() == pages as usize * PAGE_SIZE);
        let mut rest = batch.data.as_slice();
        for piece in &batch.pieces {
            let open = self.open.get_mut(&piece.file).unwrap();
            assert_eq!(piece.first_page, open.next_page, "{}: pages in order, each once", open.path);
            assert!(batch.pieces.len() == 1 || piece.pages <= 64);
            assert!((piece.first_page as usize).is_multiple_of(BATCH_PAGES), "aligned");
            let (data, after) = rest.split_at(piece.pages as usize * PAGE_SIZE);
            open.file.write_all_at(data, u64::from(piece.first_page) * PAGE_SIZE as u64).unwrap();
            open.next_page += piece.pages;
            rest = after;
        }
    }
}

/// Where this sink puts a tablespace.
fn space(target: &Path, oid: u32) -> PathBuf {
    target.parent().unwrap().join(format!("space-{oid}"))
}

/// Adds what makes the directory a backup. Not the tablespace map: recovery would link to the source's own tablespaces.
pub fn complete(target: &Path, finished: &Finished, wal: &Path) {
    let label = finished.files.iter().find(|file| file.path == "backup_label").unwrap();
    fs::write(target.join("backup_label"), &label.bytes).unwrap();
    for entry in fs::read_dir(wal).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), target.join("pg_wal").join(entry.file_name())).unwrap();
        }
    }
}
