//! Small files of the server: from this disk if it is the server's, else through the server.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::SourceError;
use crate::pg::PgError;
use crate::pg::sql::SqlClient;

/// A configuration file is smaller, and a capture is held in memory.
const MAX_BYTES: u64 = 1 << 20;

const READ_FILES: &str =
    "GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO <role>; GRANT pg_read_server_files TO <role>;";

/// What is in a file, or why that is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// All of it.
    Bytes(#[serde(serialize_with = "encode", deserialize_with = "decode")] Vec<u8>),
    /// Nothing of it.
    Missing {
        /// Why.
        reason: String,
        /// What a superuser must run, if that helps.
        grant: Option<String>,
    },
}

fn encode<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

/// Reads one file of the server.
///
/// # Errors
/// The connection is lost.
pub async fn read(client: &SqlClient, path: &str, local: bool) -> Result<Contents, SourceError> {
    if local {
        let path = PathBuf::from(path);
        let found = tokio::task::spawn_blocking(move || read_here(&path)).await;
        // The server may read what this process may not.
        if let Ok(found @ Contents::Bytes(_)) = found {
            return Ok(found);
        }
    }
    match read_there(client, path).await {
        Ok(contents) => Ok(contents),
        Err(error) if error.is_denied() => {
            Ok(Contents::Missing { reason: error.to_string(), grant: Some(READ_FILES.to_owned()) })
        }
        // No such file, or a directory: the settings name it all the same.
        Err(SourceError::Pg(error @ PgError::Server { .. })) => {
            Ok(Contents::Missing { reason: error.to_string(), grant: None })
        }
        Err(error) => Err(error),
    }
}

async fn read_there(client: &SqlClient, path: &str) -> Result<Contents, SourceError> {
    // The variant without offset and length fails for what is too large to be sent, not before.
    let query = "SELECT pg_catalog.pg_read_binary_file($1)";
    let row = client.query_one(query, &[&path]).await.map_err(PgError::from)?;
    let bytes: Vec<u8> = row.try_get(0).map_err(PgError::from)?;
    Ok(bounded(bytes))
}

fn read_here(path: &Path) -> Contents {
    let mut bytes = Vec::new();
    let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    let file = if is_file { fs::File::open(path) } else { Err(std::io::ErrorKind::NotFound.into()) };
    match file.and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)) {
        Ok(_) => bounded(bytes),
        Err(error) => Contents::Missing { reason: error.to_string(), grant: None },
    }
}

fn bounded(bytes: Vec<u8>) -> Contents {
    if bytes.len() as u64 <= MAX_BYTES {
        return Contents::Bytes(bytes);
    }
    Contents::Missing { reason: format!("larger than {MAX_BYTES} bytes"), grant: None }
}

/// Reads the files that the configuration names in addition. Each pattern answers with at least one entry, so that one
/// that matches nothing is seen.
pub async fn extra(patterns: &[String], local: bool) -> Vec<(String, Contents)> {
    let missing = |pattern: &String, reason: &str| {
        (pattern.clone(), Contents::Missing { reason: reason.to_owned(), grant: None })
    };
    if !local {
        return patterns.iter().map(|pattern| missing(pattern, "only read on the server's own host")).collect();
    }
    let patterns = patterns.to_vec();
    let read = move || {
        let one = |pattern: &String| {
            let paths = expand(pattern);
            let found = paths.iter().map(|path| (path.display().to_string(), read_here(path)));
            let found: Vec<_> = found.collect();
            if found.is_empty() { vec![missing(pattern, "no such file")] } else { found }
        };
        patterns.iter().flat_map(one).collect()
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_default()
}

/// The files that a pattern means, in order.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let path = Path::new(pattern);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !name.contains('*') {
        return vec![path.to_owned()];
    }
    let Some(entries) = path.parent().and_then(|directory| fs::read_dir(directory).ok()) else { return Vec::new() };
    let matching =
        entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(|found| matches(name, found)));
    let mut paths: Vec<PathBuf> = matching.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    paths.sort();
    paths
}

/// Whether `name` is what `pattern` means, where `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(after) = name.strip_prefix(first) else { return false };
    after
        .char_indices()
        .map(|(index, _)| index)
        .chain([after.len()])
        .any(|index| after.get(index..).is_some_and(|tail| matches(rest, tail)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name) in [("*.conf", "a.conf"), ("*", ""), ("a*b*c", "abc"), ("a*b*c", "axbbyc"), ("x", "x")] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("*.conf", "a.conf.bak"), ("a*c", "b"), ("x", "xy"), ("a*b", "a")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn contents_read_back_from_json() {
        let missing = Contents::Missing { reason: "no".to_owned(), grant: None };
        for contents in [Contents::Bytes(vec![0, 255, 10]), Contents::Bytes(Vec::new()), missing] {
            let text = serde_json::to_string(&contents).unwrap();
            assert_eq!(serde_json::from_str::<Contents>(&text).unwrap(), contents);
        }
    }

    #[tokio::test]
    async fn a_pattern_without_a_match_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        crate::disk::place::place(&dir.path().join("a.conf"), b"a", 0o600).unwrap();
        let pattern = |name: &str| [dir.path().join(name).display().to_string()];
        assert!(
            matches!(extra(&pattern("*.conf"), true).await.as_slice(), [(_, Contents::Bytes(bytes))] if bytes == b"a")
        );
        assert!(matches!(extra(&pattern("*.none"), true).await.as_slice(), [(_, Contents::Missing { .. })]));
        assert!(matches!(extra(&pattern("*.conf"), false).await.as_slice(), [(_, Contents::Missing { .. })]));
    }
}
