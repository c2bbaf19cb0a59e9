//! What a backup puts: packs, a few at a time, and single records.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::codec::sign::sign_text;
use crate::model::{Error, Result, ResultExt, TargetName};
use crate::repository::backup::packer::Sealed;
use crate::repository::handle::Writer;
use crate::repository::inventory::InventoryLine;
use crate::repository::layout;
use crate::repository::regions::fan_out::FanOut;
use crate::store::Digest;

/// Packs on their way at the same time, beyond those that the lanes hold.
const UPLOADS: usize = 2;

/// Signs a record and puts it.
///
/// # Errors
/// The quorum was not reached.
pub async fn put_signed<T: Serialize>(
    out: &FanOut,
    writer: &Writer,
    key: String,
    context: &str,
    record: &T,
) -> Result<()> {
    let mut body = serde_json::to_vec(record).map_err(|error| Error::failed("a record is not JSON").because(error))?;
    body.push(b'\n');
    let text = sign_text(&writer.signer, context, &body)?;
    put_object(out, key, text).await.map(|_| ())
}

/// Puts an object; answers its line of the inventory.
///
/// # Errors
/// The quorum was not reached.
pub async fn put_object(out: &FanOut, key: String, bytes: Vec<u8>) -> Result<InventoryLine> {
    let (size, digest) = (bytes.len() as u64, Digest::of(&bytes));
    out.put(key.clone(), Bytes::from(bytes), digest).await?;
    Ok(InventoryLine { key, size, sha256: digest.0 })
}

/// Uploads packs, a few at a time; ends with their inventory or with the first error, which also stops the workers.
pub fn spawn_uploads(
    out: Arc<FanOut>,
    target: TargetName,
    mut packs: mpsc::Receiver<Result<Sealed>>,
) -> JoinHandle<Result<Vec<InventoryLine>>> {
    crate::observe::task::spawn("backup uploads", async move {
        let mut lines = Vec::new();
        let mut running = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                Some(uploaded) = running.join_next() => {
                    lines.push(uploaded.map_err(|error| Error::failed("an upload died").because(error))??);
                }
                sealed = packs.recv(), if running.len() < UPLOADS => {
                    let Some(sealed) = sealed else { break };
                    let Sealed { pack, digest } = sealed?;
                    let (out, key) = (Arc::clone(&out), layout::pack(&target, &pack.id.backup, pack.id.ordinal));
                    running.spawn(async move {
                        let size = pack.bytes.len() as u64;
                        out.put(key.clone(), pack.bytes, digest).await.during(|| "upload a pack")?;
                        Ok::<_, Error>(InventoryLine { key, size, sha256: digest.0 })
                    });
                }
            }
        }
        while let Some(uploaded) = running.join_next().await {
            lines.push(uploaded.map_err(|error| Error::failed("an upload died").because(error))??);
        }
        lines.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(lines)
    })
}
