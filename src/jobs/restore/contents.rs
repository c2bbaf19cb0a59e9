//! What a plan needs of a backup beyond its WAL: where its objects are, who opens it, and what its manifest says.

use crate::jobs::context::Context;
use crate::jobs::restore::Request;
use crate::jobs::restore::delta::Survey;
use crate::jobs::restore::words::{Plan, RegionState};
use crate::model::commit::Commit;
use crate::model::{BackupId, Error, Kind, Result};
use crate::repository::catalog::{self, Held};
use crate::repository::handle::Repository;
use crate::repository::inventory::InventoryLine;
use crate::repository::pages::manifest::Line;
use crate::repository::restore::{KeptParts, Leftover, read_outline};

#[derive(Debug)]
pub(super) struct Contents {
    pub(super) inventory: Vec<InventoryLine>,
    pub(super) regions: Vec<RegionState>,
    /// Who opens the backup.
    opened_by: Result<String>,
    /// Keysets of earlier backups that nobody opens.
    unopened: Vec<Error>,
    /// `None` if nobody opens the backup.
    pub(super) outline: Option<Leftover>,
    pub(super) parts: KeptParts,
    pub(super) survey: Survey,
}

impl Contents {
    /// Those of the first candidate.
    pub(super) async fn read_first(
        context: &Context,
        repository: &Repository,
        (candidates, request): (&[Commit], &Request),
    ) -> Option<(BackupId, Result<Self>)> {
        let first = candidates.first()?;
        Some((first.id.clone(), Self::read(context, repository, (first, request)).await))
    }

    /// Reads what can be read at the same time at the same time: every request may have a long way.
    pub(super) async fn read(
        context: &Context,
        repository: &Repository,
        (commit, request): (&Commit, &Request),
    ) -> Result<Self> {
        let mut survey = Survey::new(request);
        let look = |line: &Line| {
            if request.delta {
                survey.see(line)
            }
        };
        let contents = async {
            let inventory = catalog::inventory(repository, commit).await?;
            let others = catalog::keysets(commit, &inventory).into_iter().filter(|keyset| *keyset != commit.keyset);
            let others = others.map(|keyset| (commit.target.clone(), keyset)).collect();
            let (outline, others) = tokio::join!(
                read_outline(repository, &context.ring, (commit, &inventory), look),
                context.ring.open_all(others)
            );
            Ok::<_, Error>((inventory, outline, others))
        };
        let (contents, held, opened) = tokio::join!(
            contents,
            catalog::held_everywhere(repository, &commit.target),
            context.ring.open_by(&commit.target, &commit.keyset)
        );
        let ((inventory, outline, others), opened_by) = (contents?, opened.map(|(_, by)| by));
        let state = |(name, held): (_, Held)| {
            let debt = held.debt(commit, &inventory);
            RegionState { name, missing: debt.missing.len() + debt.damaged.len(), unreadable: debt.unreadable }
        };
        let regions = held.into_iter().map(state).collect();
        let outline = match outline {
            Err(error) if opened_by.is_err() && matches!(error.kind(), Kind::NoKey | Kind::Unavailable) => Ok(None),
            outline => outline.map(Some),
        };
        let (outline, parts) = outline?.unzip();
        let unopened = others.into_iter().filter_map(|(_, opened)| opened.err()).collect();
        let parts = parts.unwrap_or_default();
        Ok(Self { inventory, regions, opened_by, unopened, outline, parts, survey })
    }

    /// Who opens it. A backup that no key opens is a refusal, and the rest of the plan still shows.
    pub(super) fn tell(&self, plan: &mut Plan) {
        match &self.opened_by {
            Ok(by) => plan.opens_with = Some(by.clone()),
            Err(error) => plan.refuse_unopened("no key opens the backup", error),
        }
        let what = "no key opens pages that the backup shares with an earlier one";
        self.unopened.iter().for_each(|error| plan.refuse_unopened(what, error));
    }
}
