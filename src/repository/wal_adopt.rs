//! Taking over a log: what earlier writers left is brought to the write quorum and its end is found. Needs no key.
//!
//! A writer that died may have stored its last frame in fewer regions than the quorum. Nobody was told that it is
//! durable, but a reader may already have seen it, so it is neither ignored nor written again: it is copied as it is.

use std::collections::BTreeSet;

use bytes::Bytes;

use crate::model::{Error, Kind, Lsn, RegionName, Result, ResultExt};
use crate::repository::fan_out::FanOut;
use crate::repository::handle::Repository;
use crate::repository::wal_frame::{EpochKind, Frame, FrameKind, FramePlace};
use crate::repository::wal_index::{BranchId, Run, WalIndex, Window, windows};
use crate::store::Digest;

/// The end of the stored WAL of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The branch that it is on.
    pub branch: BranchId,
    /// Where the next writer begins.
    pub end: Lsn,
    /// Whether `end` is the end of a complete record, rather than the start of WAL that held none.
    pub at_record: bool,
    /// Frames that were copied to reach the write quorum.
    pub adopted: u64,
    /// The branches of which stored WAL leads here without a hole, newest first, and where it begins on each.
    pub unbroken: Vec<(BranchId, Lsn)>,
}

/// A branch of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Era {
    /// The branch.
    pub branch: BranchId,
    /// The first position that the next timeline owns; none for the newest.
    pub end: Option<Lsn>,
}

impl Tail {
    /// Whether stored WAL leads from there to the end without a hole.
    pub fn is_reached_from(&self, branch: &BranchId, at: Lsn) -> bool {
        self.unbroken.iter().any(|(known, start)| known == branch && *start <= at)
    }
}

/// The stored end of one branch.
struct Stored {
    tail: Tail,
    window: Window,
    streamed: bool,
}

impl Stored {
    /// Whether this begins where the older branch, all of which is stored, was left.
    fn follows(&self, older: &Self, switch: Option<Lsn>) -> bool {
        let begin = self.tail.unbroken.last().map(|(_, start)| *start);
        switch.is_some_and(|switch| older.window.end >= switch && begin.is_some_and(|begin| begin <= switch))
    }

    fn joined(mut self, older: Self) -> Self {
        self.tail.adopted += older.tail.adopted;
        self.tail.unbroken.extend(older.tail.unbroken);
        self.streamed |= older.streamed;
        self
    }
}

/// Finds where the stored WAL of a history ends, and makes all of it durable at the write quorum.
///
/// `lineage` is the history from its newest timeline back. Only branches in it count: another branch may hold WAL that
/// never happened in this history. Whoever streamed a branch began where the older one ended, or recorded a gap; what was
/// only handed over of a newer timeline counts where stored WAL leads to it. With `back_to`, the way is followed at least
/// to that branch.
///
/// # Errors
/// `Unavailable` and transient while too few regions answer: an acknowledged frame may be in any quorum of regions, so
/// all but one less than the lowest quorum must be read.
pub async fn take_over(
    repository: &Repository,
    (lineage, back_to): (&[Era], Option<&BranchId>),
    out: &FanOut,
) -> Result<Option<Tail>> {
    let mut found: Option<Stored> = None;
    for era in lineage {
        let Some(older) = stored(repository, &era.branch, out).await? else { continue };
        let next = match found.take() {
            None => older,
            Some(newer) if newer.follows(&older, era.end) => newer.joined(older),
            Some(newer) if newer.streamed => return Ok(Some(newer.tail)),
            Some(newer) => {
                tracing::warn!(timeline = era.branch.timeline.0, end = %older.window.end, "stored WAL has a hole before the next timeline");
                let adopted = older.tail.adopted + newer.tail.adopted;
                Stored { tail: Tail { adopted, ..older.tail }, ..older }
            }
        };
        let is_far_enough = back_to.is_none_or(|branch| next.tail.unbroken.iter().any(|(known, _)| known == branch));
        if next.streamed && is_far_enough {
            return Ok(Some(next.tail));
        }
        found = Some(next);
    }
    Ok(found.map(|found| found.tail))
}

/// What is stored of one branch, brought to the write quorum.
async fn stored(repository: &Repository, branch: &BranchId, out: &FanOut) -> Result<Option<Stored>> {
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    must_be_readable(repository, index.unreadable())?;
    if index.epochs().is_empty() {
        return Ok(None);
    }
    // Signers may have been enrolled since this process began.
    repository.trust.refresh(&repository.regions).await?;
    let adopted = adopt(repository, &index, out).await?;
    let (mut runs, errors) = index.runs(repository, None).await;
    // Nobody adopts frames of the other kinds: what fewer regions than the quorum hold of them is not durable, and
    // whoever began behind it would tell the server to forget what a single region has.
    let quorum = repository.regions.quorum();
    let (others, _) = index.runs_of(repository, |held| held.len() >= quorum).await;
    let is_stream = |run: &Run| run.first.epoch_kind == EpochKind::Stream;
    runs.retain(is_stream);
    runs.extend(others.into_iter().filter(|run| !is_stream(run)));
    runs.sort_by_key(|run| (run.start(), run.end()));
    for error in &errors {
        tracing::warn!(%error, "stored WAL is not readable");
    }
    match (end_of(&runs), errors.into_iter().next()) {
        (Some((window, streamed)), _) => {
            let (end, at_record) = window.last_record_end.map_or((window.start, false), |end| (end, true));
            let unbroken = vec![(branch.clone(), window.start)];
            let tail = Tail { branch: branch.clone(), end, at_record, adopted, unbroken };
            Ok(Some(Stored { tail, window, streamed }))
        }
        // Not to be able to read the end is not to have none: a fresh start would be a gap without a word.
        (None, Some(error)) => Err(error.during("find the end of stored WAL")),
        (None, None) => Ok(None),
    }
}

/// With every write acknowledged by at least W of N regions, N−W+1 of them hold at least one copy of each.
fn must_be_readable(repository: &Repository, unreadable: &[(RegionName, String)]) -> Result<()> {
    let regions = &repository.regions;
    if unreadable.len() < regions.lowest_quorum() {
        return Ok(());
    }
    let (count, needed) = (regions.all().len(), regions.all().len() + 1 - regions.lowest_quorum());
    let error =
        Error::new(Kind::Unavailable, format!("the end of stored WAL needs {needed} of {count} regions to be read"));
    let because = |error: Error, (region, reason): &(RegionName, String)| error.because(format!("{region}: {reason}"));
    Err(unreadable.iter().fold(error.transient(true), because))
}

/// The window of the newest stream run, and of whatever continues it without a hole: also of what `archive_command` brought
/// while nobody streamed. WAL of a backup beyond a hole does not move it: the hole would never be filled. Says too whether anything
/// was streamed.
fn end_of(runs: &[Run]) -> Option<(Window, bool)> {
    let newest = |kind: Option<EpochKind>| {
        let of_kind = runs.iter().filter(|run| kind.is_none_or(|kind| run.first.epoch_kind == kind));
        of_kind.filter(|run| run.end() > run.start()).max_by_key(|run| run.end())
    };
    let streamed = newest(Some(EpochKind::Stream));
    let run = streamed.or_else(|| newest(None))?;
    let window = windows(runs).into_iter().find(|window| window.covers(run.start(), run.end()))?;
    Some((window, streamed.is_some()))
}

/// Copies frames of open stream epochs that fewer regions than the quorum hold.
async fn adopt(repository: &Repository, index: &WalIndex, out: &FanOut) -> Result<u64> {
    let mut adopted = 0;
    for (epoch, seqs) in index.epochs() {
        let Some((last, _)) = seqs.last_key_value() else { continue };
        let lacking = seqs.iter().filter(|(_, held)| held.len() < repository.regions.quorum());
        let lacking: Vec<(u64, &BTreeSet<RegionName>)> = lacking.map(|(seq, held)| (*seq, held)).collect();
        if lacking.is_empty() {
            continue;
        }
        // An epoch that was closed had every frame at the quorum before; what it lacks now is a debt for repair.
        match index.header(repository, epoch, *last).await {
            Ok(header) if header.epoch_kind != EpochKind::Stream || header.kind != FrameKind::Data => continue,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the last frame of an epoch is not readable"),
        }
        for (seq, held) in lacking {
            match copy(repository, &index.place(epoch, seq), out).await {
                Ok(()) => adopted += 1,
                Err(error) if error.kind() == Kind::Damaged => {
                    tracing::error!(%error, regions = held.len(), "a frame of an earlier writer is damaged");
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(adopted)
}

async fn copy(repository: &Repository, place: &FramePlace, out: &FanOut) -> Result<()> {
    let key = place.key();
    let check = |bytes: Bytes| Frame::decode(&bytes, &repository.id, place, &repository.trust).map(|_| bytes);
    let (bytes, _) = repository.regions.read(&key, None, check).await?;
    let digest = Digest::of(&bytes);
    out.put(key.clone(), bytes, digest).await.during(|| format!("adopt {key}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Timeline;
    use crate::repository::fan_out::Patience;
    use crate::repository::testing::{Fixture, HISTORY, log};
    use crate::repository::wal_log::{Epoch, Log, Marks, branch_of};

    fn branch() -> BranchId {
        let log = log();
        BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
    }

    async fn end(fixture: &Fixture) -> Tail {
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let lineage = [Era { branch: branch(), end: None }];
        let tail = take_over(&fixture.repository, (&lineage[..], None), &out).await.unwrap().unwrap();
        Arc::into_inner(out).unwrap().drain().await;
        tail
    }

    /// Whoever streams on tells the server to forget what lies before: what one region alone holds does not count.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_pushed_counts_where_the_quorum_holds_it() {
        let fixture = Fixture::memory(3, 2).await;
        fixture.epoch(1000, &[40], true).await;
        let before: Vec<_> = fixture.stores[0].contents().await.into_iter().map(|(key, _)| key).collect();
        fixture.epoch_of(&fixture.writer, (EpochKind::Push, 1040), &[50], false).await;
        let after = fixture.stores[0].contents().await.into_iter().map(|(key, _)| key);
        let pushed = after.filter(|key| key.starts_with("wal/") && !before.contains(key)).collect::<Vec<_>>();
        assert_eq!(pushed.len(), 1);
        let told = end(&fixture).await;
        assert_eq!((told.end, told.at_record, told.adopted), (Lsn(1090), true, 0));
        fixture.stores[0].lose(&pushed[0]).await;
        assert_eq!(end(&fixture).await.end, Lsn(1090));
        fixture.stores[1].lose(&pushed[0]).await;
        let told = end(&fixture).await;
        assert_eq!((told.end, told.adopted), (Lsn(1040), 0), "and nobody adopts it");
    }

    /// Streaming from behind a hole would let the server forget the WAL that fills it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pushed_timeline_counts_where_stored_wal_leads_to_it() {
        let fixture = Fixture::memory(3, 2).await;
        fixture.epoch(1000, &[40], true).await;
        let newer = Log { timeline: Timeline(2), branch: branch_of(HISTORY), ..log() };
        let newest = BranchId { timeline: newer.timeline, branch: newer.branch.clone(), ..branch() };
        let lineage = [Era { branch: newest.clone(), end: None }, Era { branch: branch(), end: Some(Lsn(1100)) }];
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let opening = (newer, EpochKind::Push, Lsn(1100));
        let mut epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, Arc::clone(&out)).await.unwrap();
        let marks = Marks { first_record: Some(Lsn(1100)), last_record: Some((Lsn(1100), Lsn(1150))), commits: None };
        epoch.append(Lsn(1100), vec![1; 50], marks).await.unwrap();
        epoch.close().await.unwrap();
        let told = take_over(&fixture.repository, (&lineage[..], None), &out).await.unwrap().unwrap();
        assert_eq!((told.branch, told.end), (branch(), Lsn(1040)), "the way to the newer timeline is missing");
        fixture.epoch_of(&fixture.writer, (EpochKind::Push, 1040), &[60], true).await;
        let told = take_over(&fixture.repository, (&lineage[..], Some(&branch())), &out).await.unwrap().unwrap();
        assert_eq!((&told.branch, told.end), (&newest, Lsn(1150)));
        assert!(told.is_reached_from(&branch(), Lsn(1040)) && !told.is_reached_from(&branch(), Lsn(900)));
        Arc::into_inner(out).unwrap().drain().await;
    }
}
