//! What a sweep writes down: what it takes, what it left alone, and its end.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{Dead, Sweep, Swept};
use crate::model::commit::Commit;
use crate::model::{BackupId, Error, Result, ResultExt};
use crate::repository::FORMAT;
use crate::repository::catalog;
use crate::repository::layout;
use crate::repository::prune::facts::Facts;
use crate::repository::prune::garbage::{Item, Why};
use crate::repository::prune::{kept, spare};
use crate::repository::records;
use crate::repository::records::tombs::{self, Tomb, WalCut};
use crate::repository::sweeps::{self, Begun, Ended};

impl Sweep<'_> {
    /// Writes down in every region which backups go.
    pub(super) async fn bury(&self, facts: &Facts, (begun, free): (&Begun, &BTreeSet<BackupId>)) -> Result<()> {
        for commit in facts.backups.iter().map(|backup| &backup.commit).filter(|commit| free.contains(&commit.id)) {
            let lines = facts.inventories.get(&commit.id).map(Vec::as_slice).unwrap_or_default();
            let why = self.ripe.head.backups.iter().find(|doomed| doomed.id == commit.id);
            let tomb = Tomb {
                format: FORMAT,
                backup: commit.id.clone(),
                target: commit.target.clone(),
                prune: begun.id.clone(),
                at: begun.at,
                why: why.map_or_else(String::new, |doomed| doomed.why.clone()),
                keysets: catalog::keysets(commit, lines).into_iter().collect(),
                wal: commit.wal.clone(),
                host: self.writer.host.clone(),
            };
            let key = tomb.key();
            self.record((tombs::TOMB, &key), &tomb).await.during(|| format!("record the end of {}", commit.id))?;
        }
        Ok(())
    }

    /// Writes down in every region which WAL goes: what is about to be removed, and no frame more.
    pub(super) async fn cut(&self, begun: &Begun, dead: &Dead) -> Result<()> {
        for epoch in &dead.epochs {
            let frames = dead.items.iter().filter(|item| item.why == Why::Wal && item.of == epoch.prefix);
            let Some(before) = frames.filter_map(last_frame).max().map(|last| last + 1) else { continue };
            let branch = epoch.branch.clone();
            let cut = WalCut {
                format: FORMAT,
                target: epoch.target.clone(),
                system_id: branch.system_id,
                timeline: branch.timeline,
                branch: branch.branch,
                epoch: epoch.epoch.clone(),
                before,
                keyset: epoch.keyset.clone().filter(|_| before == epoch.before),
                prune: begun.id.clone(),
                at: begun.at,
            };
            let key = cut.key();
            self.record((tombs::CUT, &key), &cut).await.during(|| "record what WAL is gone")?;
        }
        Ok(())
    }

    /// Puts back the COMMITs of backups that stay after all. That they stay is told first: from then on they are backups that a
    /// region lacks a part of, whatever becomes of this process.
    pub(super) async fn bring_back(
        &self,
        (begun, facts): (&Begun, &Facts),
        commits: &BTreeMap<String, (String, Bytes)>,
        locked: &BTreeSet<String>,
    ) -> Result<()> {
        let mut first_error = None;
        for (of, commit) in commits.iter().filter(|(of, _)| locked.contains(*of)) {
            // One that cannot be brought back is no reason to leave the next one behind.
            if let Err(error) = self.bring_one_back((begun, facts), (of, commit)).await {
                first_error = first_error.or(Some(error));
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    async fn bring_one_back(
        &self,
        (begun, facts): (&Begun, &Facts),
        (of, (key, bytes)): (&str, &(String, Bytes)),
    ) -> Result<()> {
        let commit = facts.backups.iter().map(|backup| &backup.commit).find(|commit| commit.id.as_str() == of);
        let told = match commit {
            Some(Commit { target, id, .. }) => {
                let tomb = (target, id, &begun.id);
                kept::record(self.repository, self.writer, tomb, "its COMMIT is locked").await
            }
            None => Ok(()),
        };
        let since = commit.map_or(begun.at, |commit| commit.started_at);
        kept::put_back(self.repository, (key, bytes), since).await.and(told)
    }

    /// Ends the tombs of backups that it left alone, by a pin that came late or because it stopped early. Nothing that it asked
    /// for is on its way any more.
    pub(super) async fn spare(&self, begun: &Begun) -> Result<()> {
        if begun.backups.is_empty() {
            return Ok(());
        }
        let standing = tombs::standing(self.repository, None, |id| begun.backups.contains(id)).await?;
        let own = standing.tombs.into_iter().map(|stone| stone.tomb).filter(|tomb| tomb.prune == begun.id);
        let spared = spare::of_whole(self.repository, self.writer, (own.collect(), "its sweep left it alone")).await;
        spared.map(drop).during(|| "record which backups were spared; the next prune does it")
    }

    /// Puts a record into every region.
    pub(super) async fn record<T: serde::Serialize>(&self, name: (&str, &str), record: &T) -> Result<()> {
        records::put_everywhere(self.repository, self.writer, name, record).await
    }

    /// Writes down that the sweep is over.
    pub(super) async fn end(&self, swept: &Swept, error: Option<&Error>) -> Result<()> {
        let Some(id) = swept.id.clone() else { return Ok(()) };
        let Swept { objects, bytes, retained, .. } = *swept;
        let (stopped, at) = (error.map(ToString::to_string), self.writer.clock.now());
        let ended = Ended { format: FORMAT, id, objects, bytes, retained, stopped, at };
        let key = layout::sweep_end(&ended.id);
        let body = records::encode(&self.repository.id, self.writer, (sweeps::ENDED, &key), &ended)?;
        self.repository.regions.put_everywhere(&key, body).await.during(|| "record the end of the sweep")
    }
}

fn last_frame(item: &Item) -> Option<u64> {
    let name = item.key.rsplit('/').next()?;
    layout::parse_seq(name).or_else(|| layout::parse_bundle(name).map(|(_, last)| last))
}
