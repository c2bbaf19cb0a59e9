//! The walk over a data directory.
//!
//! What vanishes during the walk was dropped by PostgreSQL, and WAL replay drops it again; what appears after it is in
//! the WAL. Only links in `pg_tblspc` are followed.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::error::SourceError;
use super::rules::{self, UnloggedFilter, Verdict};

/// Read last, after every other file; see [`super::local`].
pub const CONTROL_FILE: &str = "global/pg_control";

/// What a data directory holds.
#[derive(Debug, Default)]
pub struct Listing {
    /// Parents before children.
    pub directories: Vec<Directory>,
    /// Those outside of the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// By path; without the control file.
    pub files: Vec<File>,
    /// What was left out although no rule of PostgreSQL names it; for the log.
    pub notes: Vec<String>,
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Relative to the data directory.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
}

/// A link in `pg_tblspc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its oid.
    pub oid: u32,
    /// Where the link points.
    pub location: String,
}

/// A regular file as it was when it was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Relative to the data directory.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
}

/// Lists a data directory; `version_directory` is the one directory that this server uses in each tablespace
/// (`PG_15_202209061`): after pg_upgrade, others lie beside it.
///
/// # Errors
/// Something cannot be read, or a tablespace link makes no sense.
pub fn list(data_directory: &Path, version_directory: &str) -> Result<Listing, SourceError> {
    let mut walk =
        Walk { root: data_directory, version_directory, found: Listing::default(), tablespace_roots: HashSet::new() };
    walk.find_tablespaces()?;
    let mut pending = vec![String::new()];
    while let Some(directory) = pending.pop() {
        walk.directory(&directory, &mut pending)?;
    }
    let mut found = walk.found;
    found.directories.sort_by(|a, b| a.path.cmp(&b.path));
    found.files.sort_by(|a, b| a.path.cmp(&b.path));
    // A directory that changes while it is read may give a name twice: `postgresql.auto.conf` is renamed into its place.
    found.files.dedup_by(|a, b| a.path == b.path);
    Ok(found)
}

struct Walk<'a> {
    root: &'a Path,
    version_directory: &'a str,
    found: Listing,
    /// Device and inode: a tablespace may lie inside the data directory, and must not be copied twice.
    tablespace_roots: HashSet<(u64, u64)>,
}

impl Walk<'_> {
    fn find_tablespaces(&mut self) -> Result<(), SourceError> {
        for (name, metadata) in self.entries("pg_tblspc")? {
            let path = format!("pg_tblspc/{name}");
            let Some(oid) = rules::parse_oid(&name).filter(|_| metadata.is_symlink()) else { continue };
            let Some(location) = unless_vanished(fs::read_link(self.on_disk(&path)), &path)? else { continue };
            let location = absolute(&location, &path)?;
            let Some(target) = unless_vanished(fs::metadata(self.on_disk(&path)), &path)? else { continue };
            self.tablespace_roots.insert((target.dev(), target.ino()));
            self.found.directories.push(Directory { path, mode: mode(&target) });
            self.found.tablespaces.push(Tablespace { oid, location });
        }
        self.found.tablespaces.sort_by_key(|tablespace| tablespace.oid);
        Ok(())
    }

    fn directory(&mut self, directory: &str, pending: &mut Vec<String>) -> Result<(), SourceError> {
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let entries = self.entries(directory)?;
        let entries: Vec<(String, Metadata)> =
            entries.into_iter().map(|(name, metadata)| (format!("{prefix}{name}"), metadata)).collect();
        let unlogged = UnloggedFilter::of(entries.iter().map(|(path, _)| path.as_str()));
        for (path, metadata) in &entries {
            let verdict = rules::verdict(path);
            if verdict == Verdict::Leave || unlogged.leaves(path) || path == CONTROL_FILE {
                continue;
            }
            if let Some(directory) = self.entry(path, metadata, verdict)? {
                pending.push(directory);
            }
        }
        Ok(())
    }

    /// Records one entry; answers the directory to walk next, if it is one.
    fn entry(&mut self, path: &str, metadata: &Metadata, verdict: Verdict) -> Result<Option<String>, SourceError> {
        let tablespace = path.strip_prefix("pg_tblspc/").and_then(rules::parse_oid);
        if metadata.is_dir() {
            if self.tablespace_roots.contains(&(metadata.dev(), metadata.ino())) {
                self.note(path, "is a tablespace and is copied as such");
                return Ok(None);
            }
            self.found.directories.push(Directory { path: path.to_owned(), mode: mode(metadata) });
            if path == "pg_wal" {
                self.wal_directories(path)?;
            }
            return match tablespace {
                // An in-place tablespace: a plain directory where others are links.
                Some(_) => self.version_directory(path),
                None => Ok((verdict == Verdict::Take).then(|| path.to_owned())),
            };
        }
        if metadata.is_file() && verdict == Verdict::Take {
            self.found.files.push(File { path: path.to_owned(), mode: mode(metadata), size: metadata.len() });
        } else if let Some(oid) = tablespace.filter(|_| metadata.is_symlink()) {
            // One that is not known yet was created meanwhile, and so was everything in it: all of it is in the WAL.
            let known = self.found.tablespaces.iter().any(|tablespace| tablespace.oid == oid);
            return if known { self.version_directory(path) } else { Ok(None) };
        } else if metadata.is_symlink() && path == "pg_wal" {
            let Some(target) = unless_vanished(fs::metadata(self.on_disk(path)), path)? else { return Ok(None) };
            self.found.directories.push(Directory { path: path.to_owned(), mode: mode(&target) });
            self.wal_directories(path)?;
        } else if metadata.is_symlink() {
            self.note(path, "is a link, and PostgreSQL follows none here");
        } else {
            self.note(path, "is not a regular file");
        }
        Ok(None)
    }

    /// The only part of a tablespace that is this server's.
    fn version_directory(&mut self, tablespace: &str) -> Result<Option<String>, SourceError> {
        let path = format!("{tablespace}/{}", self.version_directory);
        let metadata = unless_vanished(fs::symlink_metadata(self.on_disk(&path)), &path)?;
        Ok(metadata.filter(Metadata::is_dir).map(|metadata| {
            self.found.directories.push(Directory { path: path.clone(), mode: mode(&metadata) });
            path
        }))
    }

    fn wal_directories(&mut self, wal: &str) -> Result<(), SourceError> {
        for (name, metadata) in self.entries(wal)? {
            let path = format!("{wal}/{name}");
            if metadata.is_dir() && rules::verdict(&path) == Verdict::TakeEmpty {
                self.found.directories.push(Directory { path, mode: mode(&metadata) });
            }
        }
        Ok(())
    }

    fn entries(&mut self, directory: &str) -> Result<Vec<(String, Metadata)>, SourceError> {
        let Some(entries) = unless_vanished(fs::read_dir(self.on_disk(directory)), directory)? else {
            // The top directory exists as long as the server does.
            return if directory.is_empty() {
                Err(SourceError::NoDataDirectory(self.root.to_owned()))
            } else {
                Ok(Vec::new())
            };
        };
        let mut found = Vec::new();
        for entry in entries {
            let Some(entry) = unless_vanished(entry, directory)? else { continue };
            let Ok(name) = entry.file_name().into_string() else {
                self.note(&format!("{directory}/{}", entry.file_name().display()), "has a name that is not UTF-8");
                continue;
            };
            // Not followed: a link shows itself.
            if let Some(metadata) = unless_vanished(entry.metadata(), &name)? {
                found.push((name, metadata));
            }
        }
        Ok(found)
    }

    fn on_disk(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn note(&mut self, path: &str, what: &str) {
        self.found.notes.push(format!("{path} {what}: left out"));
    }
}

fn unless_vanished<T>(result: io::Result<T>, path: &str) -> Result<Option<T>, SourceError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SourceError::Read { path: path.to_owned(), source }),
    }
}

fn absolute(location: &Path, link: &str) -> Result<String, SourceError> {
    let text = location.to_str().filter(|text| text.starts_with('/') && !text.contains('\n'));
    text.map(str::to_owned)
        .ok_or_else(|| SourceError::BadTablespace { link: link.to_owned(), location: location.to_owned() })
}

fn mode(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o7777
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    const VERSION: &str = "PG_15_202209061";

    fn put(root: &Path, path: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create(path).unwrap().set_len(8192).unwrap();
    }

    fn paths(listing: &Listing) -> Vec<&str> {
        listing.files.iter().map(|file| file.path.as_str()).collect()
    }

    #[test]
    fn a_data_directory_is_walked_as_postgresql_walks_it() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("data"), dir.path().join("space"));
        for path in [
            "PG_VERSION",
            "postmaster.pid",
            "global/pg_control",
            "global/1262",
            "base/5/1",
            "base/5/1_init",
            "base/5/2",
            "base/5/t1_3",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status/000000010000000000000001.done",
            "pg_replslot/s/state",
            "pg_tblspc/16500/PG_15_202209061/5/16501",
            "pg_tblspc/16500/PG_14_202107181/5/16501",
            "inside/PG_15_202209061/5/16502",
            "log/server.log",
        ] {
            put(&root, path);
        }
        put(&outside, "PG_15_202209061/5/16503");
        put(&outside, "PG_14_202107181/5/16503");
        symlink(&outside, root.join("pg_tblspc/16400")).unwrap();
        symlink(root.join("inside"), root.join("pg_tblspc/16401")).unwrap();
        symlink("/etc/passwd", root.join("passwd")).unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();

        let listing = list(&root, VERSION).unwrap();
        assert_eq!(
            paths(&listing),
            [
                "PG_VERSION",
                "base/5/1_init",
                "base/5/2",
                "global/1262",
                "pg_tblspc/16400/PG_15_202209061/5/16503",
                "pg_tblspc/16401/PG_15_202209061/5/16502",
                "pg_tblspc/16500/PG_15_202209061/5/16501",
            ]
        );
        let directories: Vec<&str> = listing.directories.iter().map(|directory| directory.path.as_str()).collect();
        assert_eq!(
            directories,
            [
                "base",
                "base/5",
                "global",
                "log",
                "pg_replslot",
                "pg_tblspc",
                "pg_tblspc/16400",
                "pg_tblspc/16400/PG_15_202209061",
                "pg_tblspc/16400/PG_15_202209061/5",
                "pg_tblspc/16401",
                "pg_tblspc/16401/PG_15_202209061",
                "pg_tblspc/16401/PG_15_202209061/5",
                "pg_tblspc/16500",
                "pg_tblspc/16500/PG_15_202209061",
                "pg_tblspc/16500/PG_15_202209061/5",
                "pg_wal",
                "pg_wal/archive_status",
            ]
        );
        let oids: Vec<u32> = listing.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
        assert_eq!(oids, [16400, 16401]);
        assert_eq!(listing.notes.len(), 3, "{:?}", listing.notes);
    }

    #[test]
    fn a_linked_pg_wal_is_a_directory_of_the_backup() {
        let dir = tempfile::tempdir().unwrap();
        let (root, wal) = (dir.path().join("data"), dir.path().join("wal"));
        put(&root, "PG_VERSION");
        put(&wal, "archive_status/x.done");
        symlink(&wal, root.join("pg_wal")).unwrap();
        let listing = list(&root, VERSION).unwrap();
        let directories: Vec<&str> = listing.directories.iter().map(|directory| directory.path.as_str()).collect();
        assert_eq!(directories, ["pg_wal", "pg_wal/archive_status"]);
        assert_eq!(paths(&listing), ["PG_VERSION"]);
        assert!(listing.notes.is_empty());
    }

    #[test]
    fn a_missing_data_directory_and_a_relative_tablespace_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("absent"), VERSION).is_err());
        fs::create_dir_all(dir.path().join("pg_tblspc")).unwrap();
        symlink("../elsewhere", dir.path().join("pg_tblspc/16384")).unwrap();
        assert!(matches!(list(dir.path(), VERSION), Err(SourceError::BadTablespace { .. })));
    }
}
