//! The record by which a region shows whose it is.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::model::{Error, RepositoryId, Result};
use crate::repository::{FORMAT, layout};
use crate::store::Digest;

/// The first object of every region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryRecord {
    /// Version of the format; a reader that does not know it stops.
    pub format: u32,
    /// The repository.
    pub repository: RepositoryId,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// SHA-256 of the other fields. Nobody's signature counts yet when this record is read, and without this one flipped
    /// bit in one region would look like two repositories.
    #[serde(with = "crate::model::commit::hex32")]
    pub sha256: [u8; 32],
}

impl RepositoryRecord {
    pub(in crate::repository) fn new(repository: RepositoryId, created_at: DateTime<Utc>) -> Self {
        let mut record = Self { format: FORMAT, repository, created_at, sha256: [0; 32] };
        record.sha256 = record.digest();
        record
    }

    fn digest(&self) -> [u8; 32] {
        let Self { format, repository, created_at, .. } = self;
        Digest::of(format!("{format} {repository} {}", created_at.to_rfc3339()).as_bytes()).0
    }

    /// Reads the record.
    ///
    /// # Errors
    /// It is damaged, or of a format that this program does not know.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let wrong = || Error::damaged(format!("{} is not readable", layout::REPOSITORY));
        let record: Self = serde_json::from_slice(bytes).map_err(|error| wrong().because(error))?;
        // A date and hex digits have several spellings of one value; a region that holds another one holds a damaged copy.
        if record.digest() != record.sha256 || to_json(&record)? != bytes {
            return Err(wrong().because("its digest does not fit"));
        }
        if record.format != FORMAT {
            let format = record.format;
            return Err(Error::failed(format!("repository format {format} is not the one this drctl knows, {FORMAT}")));
        }
        Ok(record)
    }
}

/// A record as it is stored: one line.
pub(in crate::repository) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut body = serde_json::to_vec(value).map_err(|error| Error::failed("a record is not JSON").because(error))?;
    body.push(b'\n');
    Ok(body)
}
