//! The repository's name in the state directory, so that a drill can report that no region answers.

use std::path::{Path, PathBuf};

use crate::app::{Role, World, assemble, context, regions, writer};
use crate::config::Settings;
use crate::disk::place;
use crate::jobs::Context;
use crate::model::{Kind, RepositoryId, Result};
use crate::repository::handle::Repository;

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("repository")
}

/// Notes which repository this host works with. It is a convenience: without it a drill that meets no region fails instead of
/// reporting.
pub(super) fn remember(state_dir: &Path, id: &RepositoryId) {
    let path = path(state_dir);
    let known = std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == id.as_str());
    if known || !state_dir.is_dir() {
        return;
    }
    if let Err(error) = place::place(&path, format!("{id}\n").as_bytes(), 0o600) {
        tracing::debug!(%error, "the repository is not remembered");
    }
}

fn remembered(state_dir: &Path) -> Option<RepositoryId> {
    std::fs::read_to_string(path(state_dir)).ok()?.trim().parse().ok()
}

/// What a drill works with: it reads as whoever restores, and signs its report if this machine can. If no region answers and
/// the repository was open here before, the drill begins all the same, so that there is a report of it.
///
/// # Errors
/// As [`context`].
pub async fn drill_context(settings: &Settings, world: &World) -> Result<Context> {
    let writer = writer(settings, Role::Restore, world).await;
    let writer = writer.inspect_err(|error| tracing::warn!(%error, "the report will not be stored")).ok();
    match context(settings, Role::Restore, world).await {
        Ok(context) => Ok(Context { writer, ..context }),
        Err(error) if error.kind() == Kind::Unavailable => {
            let id = remembered(&settings.repository.state_dir);
            let (Some(id), Some(writer)) = (id, writer) else { return Err(error) };
            tracing::info!(%error, "the drill begins without any region");
            let regions = regions(settings, Role::Restore, world).await?;
            let repository = Repository::remembered(id, regions, &writer.signer);
            assemble(settings, repository, Some(writer), world)
        }
        Err(error) => Err(error),
    }
}
