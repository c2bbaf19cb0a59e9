//! A restore over what stands there: whose directory it is, what of it may stay, and what goes.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, FileType};
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::disk::DiskError;
use crate::jobs::restore::marker::{LOCK, Marker};
use crate::jobs::restore::words::Reuse;
use crate::jobs::restore::{MARKER, Request};
use crate::model::{Result, SystemId};
use crate::pg::control::ControlFile;
use crate::repository::pages::manifest::Line;
use crate::repository::restore::{CONTROL_FILE, CONTROL_FILE_PENDING};

const TABLESPACES: &str = "pg_tblspc";
/// Names that a plan shows of what it removes.
const EXAMPLES: usize = 5;

/// The cluster whose data directory this is: its control file says so, or the marker of a restore that did not end.
/// Nothing else tells a data directory from any other one.
pub(super) fn owner_of(directory: &Path) -> Option<SystemId> {
    let control = |name: &str| ControlFile::parse(&fs::read(directory.join(name)).ok()?).ok();
    let control = control(CONTROL_FILE).or_else(|| control(CONTROL_FILE_PENDING));
    control.map(|control| control.system_id).or_else(|| Marker::read(directory)?.system_id)
}

/// Whether `place` is a tablespace of the cluster in `directory`, or of a restore into it that did not end.
pub(super) fn is_tablespace_of(directory: &Path, place: &Path) -> bool {
    let links = fs::read_dir(directory.join(TABLESPACES)).into_iter().flatten().flatten();
    let mut linked = links.filter_map(|entry| fs::read_link(entry.path()).ok());
    linked.any(|target| target == place)
        || Marker::read(directory).is_some_and(|marker| marker.tablespaces.iter().any(|known| known == place))
}

/// What a backup names, and what of it stands in the directory. Names are kept as hashes under a random key: a cluster has
/// hundreds of thousands.
#[derive(Debug)]
pub(super) struct Survey {
    directory: PathBuf,
    /// Location on the source → directory here.
    tablespaces: BTreeMap<String, PathBuf>,
    /// Oid → directory here, of those that the backup has.
    places: BTreeMap<String, PathBuf>,
    hasher: RandomState,
    names: HashSet<u64>,
    found: Reuse,
}

impl Survey {
    pub(super) fn new(request: &Request) -> Self {
        Self {
            directory: request.directory.clone(),
            tablespaces: request.tablespaces.clone(),
            places: BTreeMap::new(),
            hasher: RandomState::new(),
            names: HashSet::new(),
            found: Reuse::default(),
        }
    }

    /// To be called with every line of the manifest, in order.
    pub(super) fn see(&mut self, line: &Line) {
        match line {
            Line::Tablespace { oid, location } => {
                self.name(&format!("{TABLESPACES}/{oid}"));
                self.places.extend(self.tablespaces.get(location).map(|place| (oid.to_string(), place.clone())));
            }
            Line::Directory { path, .. } | Line::Small { path, .. } => self.name(path),
            Line::File(file) => {
                self.name(&file.path);
                let standing = fs::symlink_metadata(self.place_of(&file.path)).ok().filter(fs::Metadata::is_file);
                if let Some(standing) = standing {
                    self.found.files += 1;
                    self.found.bytes += standing.len().min(file.size);
                }
            }
            Line::Begin(_) | Line::Document { .. } | Line::End { .. } => {}
        }
    }

    fn name(&mut self, path: &str) {
        let hash = self.hasher.hash_one(path.as_bytes());
        self.names.insert(hash);
    }

    fn has(&self, path: &OsStr) -> bool {
        self.names.contains(&self.hasher.hash_one(path.as_bytes()))
    }

    /// A tablespace may stand elsewhere than where its old link leads.
    fn place_of(&self, path: &str) -> PathBuf {
        let inside = path.strip_prefix(TABLESPACES).and_then(|rest| rest.strip_prefix('/')?.split_once('/'));
        match inside.and_then(|(oid, rest)| Some(self.places.get(oid)?.join(rest))) {
            Some(place) => place,
            None => self.directory.join(path),
        }
    }

    /// What may stay, and the paths of what goes: files and whole directories that the backup does not have. In tablespaces
    /// only the directories of this major version are looked at.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub(super) fn end(mut self, major: u32) -> Result<(Reuse, Vec<PathBuf>)> {
        let mut doomed = Vec::new();
        self.walk(&self.directory.clone(), Path::new(""), &mut doomed)?;
        let version = format!("PG_{major}_");
        for (oid, place) in self.places.clone() {
            for (name, kind) in entries(&place)? {
                if kind.is_dir() && name.as_bytes().starts_with(version.as_bytes()) {
                    let relative = Path::new(TABLESPACES).join(&oid).join(&name);
                    self.meet(&place.join(&name), &relative, kind, &mut doomed)?;
                }
            }
        }
        Ok((self.found, doomed))
    }

    fn walk(&mut self, directory: &Path, relative: &Path, doomed: &mut Vec<PathBuf>) -> Result<()> {
        for (name, kind) in entries(directory)? {
            let (path, relative) = (directory.join(&name), relative.join(&name));
            let ours = relative == Path::new(MARKER) || relative == Path::new(LOCK);
            // Until everything else is in its place there is no control file, whatever the backup has.
            let control = relative == Path::new(CONTROL_FILE) || relative == Path::new(CONTROL_FILE_PENDING);
            if !ours && !control {
                self.meet(&path, &relative, kind, doomed)?;
            }
        }
        Ok(())
    }

    fn meet(&mut self, path: &Path, relative: &Path, kind: FileType, doomed: &mut Vec<PathBuf>) -> Result<()> {
        match (self.has(relative.as_os_str()), kind.is_dir()) {
            (true, true) => self.walk(path, relative, doomed),
            (true, false) => Ok(()),
            (false, is_dir) => {
                self.doom(path, relative, is_dir)?;
                doomed.push(path.to_owned());
                Ok(())
            }
        }
    }

    fn doom(&mut self, path: &Path, relative: &Path, is_dir: bool) -> Result<()> {
        if is_dir {
            return entries(path)?
                .into_iter()
                .try_for_each(|(name, kind)| self.doom(&path.join(&name), &relative.join(&name), kind.is_dir()));
        }
        self.found.remove_files += 1;
        self.found.remove_bytes += fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
        if self.found.examples.len() < EXAMPLES {
            self.found.examples.push(relative.display().to_string());
        }
        if relative.starts_with("log") {
            self.found.remove_logs += 1;
        }
        Ok(())
    }
}

fn entries(directory: &Path) -> Result<Vec<(std::ffi::OsString, FileType)>> {
    let io = |error| DiskError::new("read directory", directory, error);
    let list = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        list => list.map_err(io)?,
    };
    let mut found = Vec::new();
    for entry in list {
        let entry = entry.map_err(io)?;
        found.push((entry.file_name(), entry.file_type().map_err(io)?));
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// Removes what the plan says goes.
///
/// # Errors
/// The disk refuses; what is left is removed by the next run.
pub(super) fn remove(doomed: &[PathBuf]) -> Result<()> {
    for path in doomed {
        // Links are removed, never followed.
        let removed = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(|error| DiskError::new("remove", path, error))?;
    }
    Ok(())
}
