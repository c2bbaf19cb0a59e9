//! Taking over a log: what earlier writers left is brought to the write quorum and its end is found. Needs no key.
//!
//! A writer that died may have stored its last frame in fewer regions than the quorum. Nobody was told that it is
//! durable, but a reader may already have seen it, so it is neither ignored nor written again: it is copied as it is. And
//! a writer that only seems to be dead is sealed out first (see [`seal`](crate::repository::wal::seal)).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::future::join_all;
use tokio::time::timeout;

use crate::model::{EpochId, Error, Kind, Lsn, RegionName, Result, Timeline};
use crate::pg::wal::Record;
use crate::repository::handle::{Repository, Writer};
use crate::repository::wal::claim::{Known, is_stream, must_be_readable};
use crate::repository::wal::closing::Closing;
use crate::repository::wal::frame::{EpochKind, FrameKind, FramePlace, WalSpan};
use crate::repository::wal::frames::fetch_object;
use crate::repository::wal::index::{BranchId, Run, WalIndex, Window, windows};
use crate::repository::wal::seal::Ending;
use crate::store::{Digest, StoreError};

/// A region that hangs counts as one that is away.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// The end of the stored WAL of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The branch that it is on.
    pub branch: BranchId,
    /// Where the next writer begins.
    pub end: Lsn,
    /// Whether `end` is the end of a complete record, rather than the start of WAL that held none.
    pub at_record: bool,
    /// Where that record begins.
    pub last_record: Option<Lsn>,
    /// Epochs of other writers that were open and were sealed.
    pub sealed: u64,
    /// Frames that were copied to reach the write quorum.
    pub adopted: u64,
    /// The branches of which stored WAL leads here without a hole, newest first, and where it begins on each.
    pub unbroken: Vec<(BranchId, Lsn)>,
    /// What the write quorum lists of the branches that were looked at; what was adopted just now is left out.
    pub held: Vec<(BranchId, Vec<(Lsn, Lsn)>)>,
    /// The last commits before `end`, on a timeline that was promoted.
    pub commits: Option<Commits>,
}

/// Commits near the end of stored WAL, as nobody needs a key to see them. Two servers may have records in the same places;
/// they do not commit in the same microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commits {
    /// Start of the first record among which they are.
    pub from: Lsn,
    /// End of the last one.
    pub to: Lsn,
    /// When the first of them was.
    pub first: DateTime<Utc>,
    /// When the last of them was.
    pub last: DateTime<Utc>,
}

impl Commits {
    /// Those that end in one frame.
    fn of(span: &WalSpan) -> Option<Self> {
        let (from, to) = span.first_record.zip(span.last_record_end)?;
        let (first, last) = span.first_commit.zip(span.last_commit)?;
        Some(Self { from, to, first, last })
    }

    /// The one that a record is.
    pub fn in_record(record: &Record) -> Option<Self> {
        let time = record.kind.commit_time()?;
        Some(Self { from: record.start, to: record.end, first: time, last: time })
    }
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
    /// Whether the write quorum lists all of `[from, to)` of a branch.
    pub fn holds(&self, branch: &BranchId, (from, to): (Lsn, Lsn)) -> bool {
        let of_branch = self.held.iter().filter(|(known, _)| known == branch).flat_map(|(_, ranges)| ranges);
        of_branch.into_iter().any(|(start, end)| *start <= from && to <= *end)
    }

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
        self.tail.sealed += older.tail.sealed;
        self.tail.unbroken.extend(older.tail.unbroken);
        self.tail.held.extend(older.tail.held);
        self.streamed |= older.streamed;
        self
    }
}

/// A new owner, and what it may assume.
#[derive(Debug)]
pub struct TakeOver<'a> {
    /// The repository.
    pub repository: &'a Repository,
    /// Signs SEALs.
    pub writer: &'a Writer,
    /// The new owner's own open epoch, if it has one: it stays open.
    pub own: Option<&'a EpochId>,
    /// Epochs that are closed now are added.
    pub known: &'a Known,
}

/// Seals every other open stream epoch of a history, finds where its stored WAL ends, and makes all of it durable.
///
/// `lineage` is the history from its newest timeline back. Only branches in it count: another branch may hold WAL that
/// never happened in this history. Whoever streamed a branch began where the older one ended, or recorded a gap; what was
/// only handed over of a newer timeline counts where stored WAL leads to it. With `back_to`, the way is followed at least
/// to that branch.
///
/// # Errors
/// `Unavailable` and transient while too few regions answer: an acknowledged frame may be in any quorum of regions, so
/// all but one less than the lowest quorum must be read.
pub async fn take_over(owner: &TakeOver<'_>, (lineage, back_to): (&[Era], Option<&BranchId>)) -> Result<Option<Tail>> {
    let mut found: Option<Stored> = None;
    for era in lineage {
        let Some(older) = stored(owner, &era.branch).await? else { continue };
        let next = match found.take() {
            None => older,
            Some(newer) if newer.follows(&older, era.end) => newer.joined(older),
            Some(newer) if newer.streamed => return Ok(Some(newer.tail)),
            Some(newer) => {
                tracing::warn!(timeline = era.branch.timeline.0, end = %older.window.end, "stored WAL has a hole before the next timeline");
                let adopted = older.tail.adopted + newer.tail.adopted;
                let sealed = older.tail.sealed + newer.tail.sealed;
                let held = [older.tail.held, newer.tail.held].concat();
                Stored { tail: Tail { adopted, sealed, held, ..older.tail }, ..older }
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
async fn stored(owner: &TakeOver<'_>, branch: &BranchId) -> Result<Option<Stored>> {
    let repository = owner.repository;
    owner.known.take(branch);
    // Signers may have been enrolled since this process began.
    repository.trust.refresh(&repository.regions).await?;
    let Closed { mut index, sealed, unclean } = close_epochs(owner, branch).await?;
    if index.epochs().is_empty() {
        return Ok(None);
    }
    let adopted = adopt(owner, &mut index, &unclean).await?;
    let (mut runs, mut errors) = index.spans(repository).await;
    // Nobody adopts frames of the other kinds: what fewer regions than the quorum hold of them is not durable, and
    // whoever began behind it would tell the server to forget what a single region has.
    let quorum = repository.regions.quorum();
    let displaced = index.displaced(repository).await;
    let (others, unread) = index.spans_of(repository, &displaced, |held| held.len() >= quorum).await;
    errors.extend(unread);
    let held = windows(&others).iter().map(|window| (window.start, window.end)).collect();
    let is_stream = |run: &Run| run.first.epoch_kind == EpochKind::Stream;
    runs.retain(is_stream);
    runs.extend(others.into_iter().filter(|run| !is_stream(run)));
    runs.sort_by_key(|run| (run.start(), run.end()));
    // What does not answer may be the newest of all. To go on from an older end would be to ask the server for what it
    // may have removed long ago, and to record a gap that is none.
    if let Some(at) = errors.iter().position(|error| !is_rot(repository, error)) {
        return Err(errors.swap_remove(at).during("find the end of stored WAL"));
    }
    for error in &errors {
        tracing::error!(%error, "stored WAL is damaged in every region");
    }
    match (end_of(&runs), errors.into_iter().next()) {
        (Some((window, streamed)), _) => {
            let (end, at_record) = window.last_record_end.map_or((window.start, false), |end| (end, true));
            let unbroken = vec![(branch.clone(), window.start)];
            let last_record = window.last_record.filter(|_| at_record);
            let (held, branch) = (vec![(branch.clone(), held)], branch.clone());
            let commits = last_commits(repository, &index, &runs, &window).await;
            let tail = Tail { branch, end, at_record, last_record, sealed, adopted, unbroken, held, commits };
            Ok(Some(Stored { tail, window, streamed }))
        }
        // Not to be able to read the end is not to have none: a fresh start would be a gap without a word.
        (None, Some(error)) => Err(error.during("find the end of stored WAL")),
        (None, None) => Ok(None),
    }
}

/// Whether every region that has it gave bytes that are no frame: no waiting brings that back.
fn is_rot(repository: &Repository, error: &Error) -> bool {
    error.kind() == Kind::Damaged && !repository.trust.lacks_keys()
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

/// The last commits of a window. A server that was never promoted has a history of its own, and is not asked for them.
async fn last_commits(repository: &Repository, index: &WalIndex, runs: &[Run], window: &Window) -> Option<Commits> {
    let run = runs.iter().rev().find(|run| run.end() == window.end)?;
    if index.branch().timeline == Timeline::FIRST {
        return None;
    }
    let header = index.newest_with_commits(repository, run).await;
    let header = header.inspect_err(|error| tracing::debug!(%error, "the last commits are not known"));
    Commits::of(&header.ok()??.span)
}

/// A branch on which no epoch is open but the owner's own.
struct Closed {
    index: WalIndex,
    sealed: u64,
    /// Epochs that their writers did not end.
    unclean: Vec<EpochId>,
}

/// Seals every open stream epoch of a branch but the owner's own. What is read after that is the end: whatever an older
/// writer still puts is never acknowledged.
async fn close_epochs(owner: &TakeOver<'_>, branch: &BranchId) -> Result<Closed> {
    let repository = owner.repository;
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    let needed = owner.known.read_quorum(repository, index.unreadable());
    must_be_readable(repository, index.unreadable(), needed)?;
    let (mut sealed, mut unclean) = (0, Vec::new());
    for epoch in index.epochs().keys().filter(|epoch| Some(*epoch) != owner.own) {
        if is_stream(repository, &index, epoch).await? && !is_ended(repository, &index, epoch).await {
            unclean.push(epoch.clone());
        } else {
            owner.known.add(epoch.clone());
        }
    }
    for epoch in &unclean {
        let mut ending = Ending::look(repository, (&index, epoch), needed).await?;
        if let Closing::Open(at) = ending.closing {
            ending.seal(repository, owner.writer, (&index, epoch)).await?;
            tracing::info!(%epoch, at, "the epoch of an earlier writer is sealed");
            sealed += 1;
        }
        owner.known.add(epoch.clone());
    }
    let index = if sealed > 0 { WalIndex::load(&repository.regions, branch.clone()).await } else { index };
    must_be_readable(repository, index.unreadable(), needed)?;
    Ok(Closed { index, sealed, unclean })
}

async fn is_ended(repository: &Repository, index: &WalIndex, epoch: &EpochId) -> bool {
    let last = index.epochs().get(epoch).and_then(BTreeMap::last_key_value);
    let Some((last, _)) = last else { return false };
    index.header(repository, epoch, *last).await.is_ok_and(|header| header.kind == FrameKind::End)
}

/// Copies frames of sealed epochs that fewer regions than the quorum hold. An epoch that was ended by its own writer had
/// every frame at the quorum before; what it lacks now is a debt for repair.
async fn adopt(owner: &TakeOver<'_>, index: &mut WalIndex, unclean: &[EpochId]) -> Result<u64> {
    let repository = owner.repository;
    let needed = owner.known.read_quorum(repository, index.unreadable());
    let mut adopted = 0;
    for epoch in unclean {
        let Some(seqs) = index.epochs().get(epoch) else { continue };
        let ending = Ending::look(repository, (index, epoch), needed).await?;
        let Closing::Sealed(end) = ending.closing else { continue };
        for (seq, listed) in seqs.range(..end) {
            // A SEAL is listed like a frame, so of the last ones the list tells too little.
            let held = ending.holders(*seq).unwrap_or_else(|| listed.clone());
            if held.len() >= repository.regions.quorum() {
                continue;
            }
            match copy(repository, &index.place(epoch, *seq), held, enough(owner, index, ending.seals(*seq))).await {
                Ok(copied) => adopted += u64::from(copied),
                Err(error) if error.kind() == Kind::Damaged => {
                    tracing::error!(%error, "a frame of an earlier writer is damaged");
                }
                Err(error) => return Err(error),
            }
        }
        // A frame that lost against the SEAL may still be in a region, and nobody brings it to more.
        index.cut(epoch, end);
    }
    Ok(adopted)
}

/// In how many regions an adopted frame must be. While regions are away it is as many as the configuration allows a write
/// to be acknowledged with. A region with a SEAL under the frame's name never takes the frame; of these there are too few
/// to keep it from having been acknowledged, so enough others are left.
fn enough(owner: &TakeOver<'_>, index: &WalIndex, seals: usize) -> usize {
    let regions = &owner.repository.regions;
    let usual = if index.unreadable().is_empty() { regions.quorum() } else { regions.lowest_quorum() };
    let able = regions.all().len().saturating_sub(seals + owner.known.given_up(index.unreadable()));
    usual.min(able).max(1)
}

/// Copies a frame as it is to the regions that lack it, and says whether any took it.
async fn copy(
    repository: &Repository,
    place: &FramePlace,
    mut held: BTreeSet<RegionName>,
    quorum: usize,
) -> Result<bool> {
    let key = place.key();
    let frame = fetch_object(repository, place).await?;
    let digest = Digest::of(&frame);
    let lacking = repository.regions.all().iter().filter(|region| !held.contains(&region.name));
    let puts = lacking.map(|region| async {
        let put = region.put(&key, (frame.clone(), digest), None);
        (region.name.clone(), timeout(ANSWER_TIME, put).await)
    });
    let puts = join_all(puts).await;
    let before = held.len();
    let mut reasons = Vec::new();
    for (region, put) in puts {
        match put {
            Ok(Ok(_)) => {
                held.insert(region);
            }
            // A SEAL was tried under this name before the frame was seen.
            Ok(Err(StoreError::Conflict { .. })) => reasons.push((region, "a SEAL has its name".to_owned())),
            Ok(Err(error)) => reasons.push((region, error.to_string())),
            Err(_) => reasons.push((region, "no answer in time".to_owned())),
        }
    }
    if held.len() >= quorum {
        return Ok(held.len() > before);
    }
    let error = Error::new(Kind::Unavailable, format!("{key} is in {} of {quorum} regions", held.len()));
    let because = |error: Error, (region, why): &(RegionName, String)| error.because(format!("{region}: {why}"));
    Err(reasons.iter().fold(error.transient(true), because).during("adopt a frame of an earlier writer"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::testing::{Fixture, HISTORY, log};
    use crate::repository::wal::log::{Epoch, Log, Marks, branch_of};

    fn branch() -> BranchId {
        let log = log();
        BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
    }

    async fn end(fixture: &Fixture) -> Tail {
        let lineage = [Era { branch: branch(), end: None }];
        fixture.take_over(&lineage, None).await.unwrap().unwrap()
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

    /// What does not answer may be the newest: to go on from an older end is to ask the server for what it removed.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_end_that_cannot_be_read_is_no_older_end() {
        let fixture = Fixture::memory(3, 2).await;
        fixture.epoch(1000, &[40], true).await;
        let before: BTreeSet<_> = fixture.stores[0].contents().await.into_iter().map(|(key, _)| key).collect();
        fixture.epoch(1040, &[40, 40], true).await;
        let newest = fixture.stores[0].contents().await.into_iter().map(|(key, _)| key);
        let newest: Vec<_> = newest.filter(|key| key.starts_with("wal/") && !before.contains(key)).collect();
        assert_eq!(newest.len(), 3);
        // Two of its frames tell where it is; the one between is asked for nothing.
        fixture.mute(Some(&newest[1]));
        assert_eq!(end(&fixture).await.end, Lsn(1120));
        let lineage = [Era { branch: branch(), end: None }];
        for unread in [&newest[0], &newest[2]] {
            fixture.mute(Some(unread));
            let error = fixture.take_over(&lineage, None).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{unread}: {error:?}");
        }
        // One region has rotten bytes, the others do not answer: they may have good ones.
        fixture.mute(Some(&newest[0]));
        fixture.stores[0].mute(None);
        fixture.stores[0].damage(&newest[0], vec![1; 40]).await;
        assert_eq!(fixture.take_over(&lineage, None).await.unwrap_err().kind(), Kind::Unavailable);
        fixture.mute(None);
        assert_eq!(end(&fixture).await.end, Lsn(1120));
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
        let told = fixture.take_over(&lineage, None).await.unwrap().unwrap();
        assert_eq!((told.branch, told.end), (branch(), Lsn(1040)), "the way to the newer timeline is missing");
        fixture.epoch_of(&fixture.writer, (EpochKind::Push, 1040), &[60], true).await;
        let told = fixture.take_over(&lineage, Some(&branch())).await.unwrap().unwrap();
        assert_eq!((&told.branch, told.end), (&newest, Lsn(1150)));
        assert!(told.is_reached_from(&branch(), Lsn(1040)) && !told.is_reached_from(&branch(), Lsn(900)));
        Arc::into_inner(out).unwrap().drain().await;
    }
}
