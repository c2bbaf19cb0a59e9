//! Small signed records in clear text, each bound to its own name.

pub mod pins;
pub mod reports;
pub mod runs;
pub mod tombs;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::sign::sign_text;
use crate::model::{Error, RepositoryId, Result};
use crate::repository::format;
use crate::repository::handle::{Repository, Writer};

fn context(kind: &str, repository: &RepositoryId, key: &str) -> String {
    format!("{kind} {repository} {key}")
}

/// Signs a record for the name `key`.
///
/// # Errors
/// None in practice: records are plain data.
pub fn encode<T: Serialize>(
    repository: &RepositoryId,
    writer: &Writer,
    (kind, key): (&str, &str),
    record: &T,
) -> Result<Bytes> {
    let mut body =
        serde_json::to_vec(record).map_err(|error| Error::failed(format!("{key} is not JSON")).because(error))?;
    body.push(b'\n');
    sign(repository, writer, (kind, key), &body)
}

/// Signs lines for the name `key`.
///
/// # Errors
/// None in practice.
pub fn sign(repository: &RepositoryId, writer: &Writer, (kind, key): (&str, &str), body: &[u8]) -> Result<Bytes> {
    Ok(Bytes::from(sign_text(&writer.signer, &context(kind, repository, key), body)?))
}

/// The signed bytes of a record, believed only under its own name.
///
/// # Errors
/// They are damaged, not signed by a trusted signer, or belong elsewhere.
pub fn verify<'a>(repository: &Repository, (kind, key): (&str, &str), bytes: &'a [u8]) -> Result<&'a [u8]> {
    repository.trust.verify_text(&context(kind, &repository.id, key), bytes)
}

/// Reads a record, and believes it only under its own name.
///
/// # Errors
/// As [`verify`], or it is not readable, or of a newer drctl.
pub fn decode<T: DeserializeOwned>(repository: &Repository, (kind, key): (&str, &str), bytes: &[u8]) -> Result<T> {
    format::parse(key, verify(repository, (kind, key), bytes)?)
}

/// Reads the record of this name from any region that has it intact.
///
/// # Errors
/// No region has it intact.
pub async fn read<T: DeserializeOwned>(repository: &Repository, (kind, key): (&str, &str)) -> Result<T> {
    repository.regions.read(key, None, |bytes| decode(repository, (kind, key), &bytes)).await.map(|(record, _)| record)
}

/// Puts a record into every region. One that is in some of them already is spread as it is.
///
/// # Errors
/// A region does not take it.
pub async fn put_everywhere<T: Serialize>(
    repository: &Repository,
    writer: &Writer,
    (kind, key): (&str, &str),
    record: &T,
) -> Result<()> {
    let check = |bytes: Bytes| verify(repository, (kind, key), &bytes).map(|_| bytes.clone());
    let body = match repository.regions.read(key, None, check).await {
        Ok((known, _)) => known,
        Err(_) => encode(&repository.id, writer, (kind, key), record)?,
    };
    repository.regions.put_everywhere(key, body).await
}
