//! INVENTORY: which objects a backup needs. Clear, signed JSON lines, so that a region can be scrubbed, repaired and
//! pruned by roles that hold no key.

use serde::{Deserialize, Serialize};

use crate::codec::sign::{Signer, sign_text};
use crate::model::{BackupId, Error, RepositoryId, Result, ResultExt};
use crate::repository::trust::Trust;
use crate::store::Digest;

/// One object of the closure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InventoryLine {
    /// Its name.
    pub key: String,
    /// Stored bytes.
    pub size: u64,
    /// SHA-256 of them.
    #[serde(with = "crate::model::commit::hex32")]
    pub sha256: [u8; 32],
}

impl InventoryLine {
    /// The digest.
    pub const fn digest(&self) -> Digest {
        Digest(self.sha256)
    }
}

const LINES_PER_PART: usize = 40_000;

fn context(repository: &RepositoryId, backup: &BackupId, part: usize) -> String {
    format!("inventory {repository} {backup}/{part}")
}

/// The parts of an inventory.
///
/// # Errors
/// None in practice: the lines are plain data.
pub fn encode(
    lines: &[InventoryLine],
    repository: &RepositoryId,
    backup: &BackupId,
    signer: &Signer,
) -> Result<Vec<Vec<u8>>> {
    let chunks: Vec<_> = if lines.is_empty() { vec![lines] } else { lines.chunks(LINES_PER_PART).collect() };
    let part = |(number, lines): (usize, &[InventoryLine])| {
        let mut body = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut body, line).map_err(|error| Error::failed("encode inventory").because(error))?;
            body.push(b'\n');
        }
        Ok(sign_text(signer, &context(repository, backup, number), &body)?)
    };
    chunks.into_iter().enumerate().map(part).collect()
}

/// Reads one part.
///
/// # Errors
/// It is not signed by a trusted signer as this part of this backup, or not readable.
pub fn decode_part(
    bytes: &[u8],
    repository: &RepositoryId,
    (backup, part): (&BackupId, u32),
    trust: &Trust,
) -> Result<Vec<InventoryLine>> {
    let context = context(repository, backup, part as usize);
    let body = trust.verify_text(&context, bytes).during(|| format!("check inventory part {part} of {backup}"))?;
    let wrong = |error| Error::damaged(format!("inventory part {part} of {backup} is not readable")).because(error);
    let lines = body.split_inclusive(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(wrong)).collect()
}
