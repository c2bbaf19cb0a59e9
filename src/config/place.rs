//! Where a region keeps its objects.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::model::{Error, Result};

/// The place that a region's `url` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `s3://bucket/prefix`.
    Bucket(BucketPath),
    /// `dir:///path`, `file:///path` or a plain path; absolute.
    Directory(PathBuf),
}

/// A bucket and the prefix of every name in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPath {
    /// The bucket.
    pub bucket: String,
    /// The prefix, without slashes at its ends; may be empty.
    pub prefix: String,
}

impl Place {
    /// Reads a `url`; a relative path is taken from `directory`.
    ///
    /// # Errors
    /// Another scheme, no bucket, or a prefix with empty, `.` or `..` parts.
    pub fn parse(url: &str, directory: &Path) -> Result<Self> {
        let wrong = |why: &str| {
            Error::usage(format!("`{url}` is not a place for a region"))
                .because(why)
                .hint("write s3://bucket/prefix, dir:///path or a path")
        };
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
            if bucket.is_empty() || !bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                return Err(wrong("it names no bucket"));
            }
            if !prefix.is_empty() && prefix.split('/').any(|part| matches!(part, "" | "." | "..")) {
                return Err(wrong("its prefix has an empty, `.` or `..` part"));
            }
            return Ok(Self::Bucket(BucketPath { bucket: bucket.to_owned(), prefix: prefix.to_owned() }));
        }
        let path = ["dir://", "file://", "dir:", "file:"].iter().find_map(|scheme| url.strip_prefix(scheme));
        match path {
            None if url.contains("://") => Err(wrong("its scheme is unknown")),
            _ if path.unwrap_or(url).is_empty() => Err(wrong("it names no directory")),
            _ => Ok(Self::Directory(directory.join(path.unwrap_or(url)))),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bucket(bucket) => bucket.fmt(f),
            Self::Directory(path) => write!(f, "dir://{}", path.display()),
        }
    }
}

impl fmt::Display for BucketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_reads_and_the_canonical_one_reads_back() {
        let shown = [
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://bucket/a/b/", "s3://bucket/a/b"),
            ("dir:///srv/a", "dir:///srv/a"),
            ("file:///srv/a", "dir:///srv/a"),
            ("dir:/srv/a", "dir:///srv/a"),
            ("region-a", "dir:///etc/drctl/region-a"),
            ("/srv/a", "dir:///srv/a"),
        ];
        for (url, canonical) in shown {
            let place = Place::parse(url, Path::new("/etc/drctl")).unwrap();
            assert_eq!(place.to_string(), canonical);
            assert_eq!(Place::parse(canonical, Path::new("/")).unwrap(), place);
        }
    }

    #[test]
    fn other_places_are_refused() {
        for url in
            ["", "s3://", "s3:///prefix", "s3://a b/c", "s3://b/a//c", "s3://b/../c", "gs://b/p", "dir:", "dir://"]
        {
            assert!(Place::parse(url, Path::new("/")).is_err(), "{url}");
        }
    }
}
