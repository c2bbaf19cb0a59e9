//! Where the parts of a backup land.

use std::path::{Component, Path, PathBuf};

use crate::model::{Error, Result};
use crate::repository::restore::reuse::clear_away;
use crate::repository::restore::{CONTROL_FILE, CONTROL_FILE_PENDING, Destination};

/// Where PostgreSQL keeps its links to tablespaces.
const TABLESPACES: &str = "pg_tblspc";

pub(super) fn pending_name(path: &str) -> &str {
    if path == CONTROL_FILE { CONTROL_FILE_PENDING } else { path }
}

/// Where a relative path of the backup lands. The manifest is authenticated, and still no path leaves its directory.
pub(super) fn place_of(destination: &Destination, path: &str) -> Result<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.is_empty() {
        return Err(Error::damaged(format!("the manifest names a path outside of the data directory: `{path}`")));
    }
    Ok(destination.directory.join(path))
}

/// Creates a directory; gives the mode that it is to have once everything in it is written, if its owner may not write
/// there then.
pub(super) fn create_directory(destination: &Destination, path: &str, mode: u32) -> Result<Option<(PathBuf, u32)>> {
    use std::os::unix::fs::DirBuilderExt;
    let path = place_of(destination, path)?;
    if destination.reuse {
        make_way(destination, &path)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        // A tablespace's directory stands already, as a link.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(Error::failed(format!("create {}", path.display())).because(error)),
    }
    const OWNER_WRITES: u32 = 0o700;
    set_directory_mode(&path, mode | OWNER_WRITES)?;
    Ok((mode & OWNER_WRITES != OWNER_WRITES).then_some((path, mode)))
}

/// Removes what stands where a directory is to be and is none. A link that leads to one would let the restore write
/// somewhere else; the links of tablespaces were made by this restore.
fn make_way(destination: &Destination, path: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(path);
    let is_dir = found.as_ref().is_ok_and(std::fs::Metadata::is_dir);
    let is_tablespace = path.parent() == Some(destination.directory.join(TABLESPACES).as_path());
    if is_dir || is_tablespace { Ok(()) } else { clear_away(path, found) }
}

pub(super) fn set_directory_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(mode & 0o7777);
    std::fs::set_permissions(path, permissions)
        .map_err(|error| Error::failed(format!("set the mode of {}", path.display())).because(error))
}

pub(super) fn link_tablespace(destination: &Destination, oid: u32, location: &str) -> Result<()> {
    let unmapped = || Error::refused(format!("tablespace {oid} at {location} has no new place"));
    let place = destination.tablespaces.get(location).ok_or_else(unmapped)?;
    let parent = destination.directory.join(TABLESPACES);
    let link = parent.join(oid.to_string());
    if destination.reuse {
        if std::fs::read_link(&link).is_ok_and(|present| present == *place) {
            return Ok(());
        }
        if !std::fs::symlink_metadata(&parent).is_ok_and(|found| found.is_dir()) {
            clear_away(&parent, std::fs::symlink_metadata(&parent))?;
        }
        clear_away(&link, std::fs::symlink_metadata(&link))?;
    }
    std::fs::create_dir_all(&parent)
        .map_err(|error| Error::failed(format!("create {}", parent.display())).because(error))?;
    std::os::unix::fs::symlink(place, &link)
        .map_err(|error| Error::failed(format!("link {} to {}", link.display(), place.display())).because(error))
}
