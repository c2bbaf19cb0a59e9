//! From the source's items to the backup's lines and batches.

use base64::Engine as _;
use tokio::sync::mpsc;

use crate::jobs::context::Context;
use crate::model::{Error, Result};
use crate::observe::progress::Phase;
use crate::repository::backup::writer::BackupWriter;
use crate::repository::pages::manifest::Line;
use crate::source::{Begun, Finished, Item, PhysicalSource};

/// Items on their way; a batch is up to 8 MiB, so this bounds memory: see [`super::WORKERS`].
const QUEUE: usize = 1;

/// Reads everything and hands it to the backup.
pub(super) async fn run(
    context: &Context,
    source: &mut dyn PhysicalSource,
    backup: &mut BackupWriter,
    begun: &Begun,
) -> Result<()> {
    let phase = context.progress.begin("copy", (begun.estimated_bytes > 0).then_some(begun.estimated_bytes));
    let (items, mut queue) = mpsc::channel(QUEUE);
    let store = async {
        while let Some(item) = queue.recv().await {
            take(backup, item, &phase).await?;
        }
        Ok::<_, Error>(())
    };
    let mut store = std::pin::pin!(store);
    let mut copy = source.copy(items);
    let mut copied = false;
    loop {
        tokio::select! {
            read = &mut copy, if !copied => {
                // The source has dropped its sender: what is queued is stored, then `store` ends.
                read?;
                copied = true;
            }
            stored = &mut store => {
                // Storing failed, or everything is stored; a source that is cut off must not look complete.
                stored?;
                return if copied { Ok(()) } else { copy.await };
            }
        }
    }
}

async fn take(backup: &mut BackupWriter, item: Item, phase: &Phase) -> Result<()> {
    match item {
        Item::Directory { path, mode } => backup.line(&Line::Directory { path, mode }).await,
        Item::Tablespace { oid, location } => backup.line(&Line::Tablespace { oid, location }).await,
        Item::File { id, path, mode } => backup.file(id, path, mode),
        Item::Batch(batch) => {
            phase.advance(batch.data.len() as u64);
            backup.batch(batch).await
        }
        Item::FileDone { id, size, damaged_blocks } => backup.file_done(id, size, damaged_blocks).await,
        Item::FileVanished { id } => {
            backup.vanished(id);
            Ok(())
        }
    }
}

/// `backup_label` and `tablespace_map`: without the label PostgreSQL would start from the wrong checkpoint.
pub(super) async fn small_files(backup: &mut BackupWriter, finished: &Finished) -> Result<()> {
    if !finished.files.iter().any(|file| file.path == "backup_label") {
        return Err(Error::failed("the server gave no backup_label: a restore could not start safely"));
    }
    for file in &finished.files {
        let base64 = base64::engine::general_purpose::STANDARD.encode(&file.bytes);
        backup.line(&Line::Small { path: file.path.clone(), mode: 0o600, base64 }).await?;
    }
    Ok(())
}
