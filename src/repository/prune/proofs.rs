//! Which backups were proven, by whose word.
//!
//! A proven backup takes a place that the rules offer, and so pushes out an older one, or what it is a copy of. Whoever can make
//! others believe that a backup is proven decides what goes. So its COMMIT *and* the report of its drill must be signed by somebody
//! on whom prune relies ([`Trust::relies_on`](crate::repository::trust::Trust::relies_on)): a drill says that what the COMMIT names
//! starts, and not that it is what was backed up. How many regions hold a report says nothing, since repair spreads it.
//!
//! What others say takes no place, and costs nothing either: such a backup is *doubted*, and stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::commit::Commit;
use crate::model::retention::{Candidate, Rules};
use crate::model::{BackupId, Kind, Result, SignerId, TargetName};
use crate::repository::catalog::{self, Backup};
use crate::repository::handle::Repository;
use crate::repository::records::reports::{self, ReportHead};
use crate::repository::trust::Trust;

/// Who says of which backups that a drill proved them.
#[derive(Debug, Clone)]
pub struct Proofs {
    whose: Whose,
    drilled: BTreeMap<BackupId, BTreeSet<SignerId>>,
    /// Copies, what each is the same as, and who says so.
    same: BTreeSet<(BackupId, BackupId, SignerId)>,
}

/// Whose word counts.
#[derive(Debug, Clone)]
enum Whose {
    /// That of whoever signs: for those who take nothing away.
    Anybody,
    /// That of those on whom prune relies, and of who prunes.
    Relied { trust: Arc<Trust>, own: Option<SignerId> },
}

impl Proofs {
    /// Reads the reports of drills, of one target or of all; `own` is who prunes. A report that is not readable proves nothing.
    ///
    /// # Errors
    /// No region answers; or a newer drctl wrote one, of a backup that would look as if nobody had ever drilled it.
    pub async fn load(repository: &Repository, own: Option<&SignerId>, target: Option<&TargetName>) -> Result<Self> {
        let (heads, unreadable) = reports::list_signed(repository, target).await?;
        for error in unreadable {
            if error.kind() == Kind::Newer {
                return Err(error.during("see what drills proved"));
            }
            tracing::warn!(%error, "a report is not readable and proves nothing");
        }
        let (mut drilled, mut same): (BTreeMap<_, BTreeSet<_>>, BTreeSet<_>) = Default::default();
        for (head, signer) in heads.into_iter().filter(|(head, _)| head.proves()) {
            if let Some(backup) = head.backup {
                same.extend(head.same_as.into_iter().map(|other| (backup.clone(), other, signer.clone())));
                drilled.entry(backup).or_default().insert(signer);
            }
        }
        let whose = Whose::Relied { trust: Arc::clone(&repository.trust), own: own.cloned() };
        Ok(Self { whose, drilled, same })
    }

    /// Of these reports, for those who look on and take nothing away.
    pub fn by_anybody(heads: &[ReportHead]) -> Self {
        let backups = heads.iter().filter(|head| head.proves()).filter_map(|head| head.backup.clone());
        let drilled = backups.map(|backup| (backup, BTreeSet::new())).collect();
        Self { whose: Whose::Anybody, drilled, same: BTreeSet::new() }
    }

    /// Whether a drill proved it.
    pub fn is_drilled(&self, backup: &Backup) -> bool {
        let drilled = self.drilled.get(&backup.commit.id);
        drilled.is_some_and(|by| match self.whose {
            Whose::Anybody => true,
            Whose::Relied { .. } => self.relies_on(&backup.signer) && by.iter().any(|signer| self.relies_on(signer)),
        })
    }

    /// Whether somebody says that a drill proved it, and prune does not rely on that.
    pub fn is_doubted(&self, backup: &Backup) -> bool {
        !self.is_drilled(backup) && self.drilled.contains_key(&backup.commit.id)
    }

    /// The signers of what is said of a doubted backup on whom prune does not rely.
    pub fn strangers(&self, backup: &Backup) -> BTreeSet<SignerId> {
        let drilled = self.drilled.get(&backup.commit.id).into_iter().flatten();
        let said = [&backup.signer].into_iter().chain(drilled);
        said.filter(|signer| !self.relies_on(signer)).cloned().collect()
    }

    /// The backups of one target as its rules see them.
    pub fn candidates(
        &self,
        backups: &[&Backup],
        rules: &Rules,
        needed: impl Fn(&BackupId) -> Vec<String>,
    ) -> Vec<Candidate> {
        let commits: Vec<&Commit> = backups.iter().map(|backup| &backup.commit).collect();
        let counts = |backup: &Backup| rules.undrilled && self.relies_on(&backup.signer) || self.is_drilled(backup);
        let counted: Vec<&Commit> =
            backups.iter().filter(|backup| counts(backup)).map(|backup| &backup.commit).collect();
        let candidate = |backup: &&Backup| {
            let Commit { id, started_at, .. } = &backup.commit;
            let drilled = counts(backup);
            let is_copy = catalog::copy_among(&backup.commit, &commits).is_some();
            let proven = drilled && (!is_copy || self.is_same_as_all_before(&backup.commit, &counted));
            Candidate {
                id: id.clone(),
                at: *started_at,
                proven,
                doubted: !drilled && (rules.undrilled || self.is_doubted(backup)),
                needed: needed(id),
                copy: catalog::copy_among(&backup.commit, &commits),
            }
        };
        backups.iter().map(candidate).collect()
    }

    /// Whether a copy was compared with everything of its moment that it would take the place of: with what counts itself, since nothing
    /// else has a place. A drill shows that it starts, and not that it is what its original is.
    fn is_same_as_all_before(&self, commit: &Commit, counted: &[&Commit]) -> bool {
        let before = counted.iter().filter(|other| commit.is_copied_after(other));
        let is_same = |other: &&Commit| match self.whose {
            Whose::Anybody => true,
            Whose::Relied { .. } => {
                let said = self.same.iter().filter(|(copy, of, _)| (copy, of) == (&commit.id, &other.id));
                said.into_iter().any(|(_, _, signer)| self.relies_on(signer))
            }
        };
        before.into_iter().all(is_same)
    }

    /// Whether what this signer says counts.
    pub fn relies_on(&self, signer: &SignerId) -> bool {
        match &self.whose {
            Whose::Anybody => true,
            Whose::Relied { trust, own } => trust.relies_on(own.as_ref(), signer),
        }
    }
}
