//! Directories that the tests and PostgreSQL's user can both reach.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown};
use std::path::{Path, PathBuf};

/// A directory that is removed on drop. It is open to every user; what is made in it may not be.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    /// Below the directory of this run, or `/tmp` when one test runs alone. Paths stay short: a unix socket's path may
    /// have 107 bytes.
    pub fn new() -> Self {
        let base = std::env::var_os("DRCTL_TEST_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        let directory = tempfile::Builder::new().prefix("t").tempdir_in(base).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path below it that may not exist yet.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// A new directory below it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A new directory below it that belongs to PostgreSQL's user alone.
    pub fn postgres_dir(&self, name: &str) -> PathBuf {
        let path = self.dir(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        give_to_postgres(&path);
        path
    }
}

/// The user and group that servers run as when the tests run as root, which PostgreSQL refuses.
pub fn postgres_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let user = users.lines().find(|line| line.starts_with("postgres:")).expect("there is no user postgres");
    let fields: Vec<&str> = user.split(':').collect();
    Some((fields[2].parse().unwrap(), fields[3].parse().unwrap()))
}

/// Hands a tree to PostgreSQL's user, with the tablespaces that it links to.
pub fn give_to_postgres(path: &Path) {
    let Some((uid, gid)) = postgres_user() else { return };
    let kind = fs::symlink_metadata(path).unwrap().file_type();
    lchown(path, Some(uid), Some(gid)).unwrap();
    if kind.is_symlink() && path.parent().is_some_and(|parent| parent.ends_with("pg_tblspc")) {
        let location = fs::canonicalize(path).unwrap();
        chown(&location, Some(uid), Some(gid)).unwrap();
        give_entries(&location);
    } else if kind.is_dir() {
        give_entries(path);
    }
}

fn give_entries(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        give_to_postgres(&entry.unwrap().path());
    }
}

/// Bytes of every regular file below `path`.
pub fn size_of(path: &Path) -> u64 {
    let mut size = 0;
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.metadata().unwrap();
        size += if kind.is_dir() { size_of(&entry.path()) } else { kind.len() };
    }
    size
}
