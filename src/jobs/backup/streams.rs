//! A backup of what is no cluster: a dump, an archive of files. Its recovery point is the moment at which it began: what was
//! there by then is in it.

use tokio::sync::mpsc;

use super::detect::Told;
use super::{Options, Report, alone, workers};
use crate::jobs::context::{Context, Streamed, What};
use crate::model::commit::{BackupKind, Commit};
use crate::model::{Error, Result, ResultExt};
use crate::observe::progress::Phase;
use crate::repository::backup::parent::Basis;
use crate::repository::backup::stream::{StreamLine, StreamWriter};
use crate::repository::backup::writer::{BackupOptions, BackupWriter};
use crate::repository::catalog;
use crate::repository::pages::manifest::Line;
use crate::repository::restore::streams::StoredStreams;
use crate::source::{Copied, StreamItem, StreamSource};

/// Chunks of a mebibyte on their way.
const QUEUE: usize = 4;

/// The document in which a source describes its streams.
pub const DESCRIPTION: &str = "source";
/// The document that tells what a reader of the backup should know of it.
pub const NOTES: &str = "notes";

/// What should be in a backup and is not, in its own words: nothing for a cluster, `None` where it cannot be read.
pub async fn left_out(context: &Context, commit: &Commit) -> Option<Vec<String>> {
    if !matches!(commit.kind, BackupKind::Dump | BackupKind::Files) {
        return Some(Vec::new());
    }
    let read = async {
        let inventory = catalog::inventory(&context.repository, commit).await?;
        StoredStreams::open(&context.repository, &context.ring, (commit, &inventory)).await
    };
    let stored =
        read.await.inspect_err(|error| tracing::debug!(%error, backup = %commit.id, "what it left out")).ok()?;
    let list = stored.documents.get(NOTES).and_then(|notes| notes.get("left_out")?.as_array());
    Some(list.into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect())
}

/// Takes the backup.
pub(super) async fn run(context: &Context, target: &Streamed, options: Options) -> Result<Report> {
    if options.fast || options.full || options.verify_detection {
        let error = Error::usage(format!(
            "--fast, --full and --verify-detection mean nothing for {}, which is no cluster",
            target.name
        ));
        return Err(error.hint("leave them out: such a backup is always whole"));
    }
    let writer = context.writer()?;
    let _alone = alone(context, &target.name)?;
    let mut source = target.open();
    let how = backup_options(context, target, source.method());
    // Before the source looks at anything: COMMIT says that the backup holds what was there when it began.
    let mut backup =
        BackupWriter::begin(&context.repository, writer, how, Basis::nothing("it is no base backup")).await?;
    let read = transfer(context, source.as_mut(), &mut backup).await;
    let (streams, copied) = read.during(|| format!("back up {}", target.name))?;
    if let Some(moment) = copied.as_of {
        backup.holds_only(moment);
    }
    describe(&mut backup, &copied).await?;
    backup.flush().await.during(|| "store the streams")?;
    let written = backup.commit(None).await?;
    Ok(Report {
        backup: written.commit,
        regions: written.regions,
        wrap_debts: written.wrap_debts,
        locks: written.locks,
        not_captured: Vec::new(),
        wal_by: "none",
        streams,
        notes: copied.notes,
        left_out: copied.left_out,
        full_because: None,
        pages: written.pages,
        detection: Told { by: None, because: None, proof: None, unproved: false },
        moved: written.moved,
        not_remembered: None,
    })
}

async fn transfer(
    context: &Context,
    source: &mut dyn StreamSource,
    backup: &mut BackupWriter,
) -> Result<(Vec<StreamLine>, Copied)> {
    let phase = context.progress.begin("copy", None);
    let (items, queue) = mpsc::channel(QUEUE);
    // The end of the items says nothing of whether they are all: only the source knows.
    let (copied, stored) = tokio::join!(source.copy(items), store(queue, StreamWriter::new(backup), &phase));
    match (copied, stored) {
        (Ok(copied), Ok(writer)) => Ok((writer.finish().await?, copied)),
        (Err(copied), Ok(_)) => Err(copied),
        // A source that lost its reader complains as well; why the reader went is what matters.
        (_, Err(stored)) => Err(stored),
    }
}

/// Takes the queue, so that the source learns when this ends.
async fn store<'a>(
    mut queue: mpsc::Receiver<StreamItem>,
    mut writer: StreamWriter<'a>,
    phase: &Phase,
) -> Result<StreamWriter<'a>> {
    while let Some(item) = queue.recv().await {
        match item {
            StreamItem::Begin { name } => {
                phase.note(name.clone());
                writer.begin(name)?;
            }
            StreamItem::Bytes(bytes) => {
                phase.advance(bytes.len() as u64);
                writer.bytes(&bytes).await?;
            }
            StreamItem::End => writer.end().await?,
        }
    }
    Ok(writer)
}

/// What a restore must know, and what a reader should.
async fn describe(backup: &mut BackupWriter, copied: &Copied) -> Result<()> {
    let notes = serde_json::json!({ "notes": copied.notes, "left_out": copied.left_out });
    for (name, content) in [(DESCRIPTION, copied.document.clone()), (NOTES, notes)] {
        backup.line(&Line::Document { name: name.to_owned(), content }).await?;
    }
    Ok(())
}

fn backup_options(context: &Context, target: &Streamed, method: &str) -> BackupOptions {
    BackupOptions {
        target: target.name.clone(),
        source: target.source(),
        method: method.to_owned(),
        kind: Some(match target.what {
            What::Dump(_) => BackupKind::Dump,
            What::Files(_) => BackupKind::Files,
        }),
        level: context.levels.dumps,
        workers: workers(),
        page_checksums: false,
        pack_size: context.pack_size,
        start_lsn: None,
        detection: None,
        proof: None,
        state: None,
    }
}
