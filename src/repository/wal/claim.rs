//! Opening an epoch so that nobody else has one: each writer shows itself first and looks round then.
//!
//! A takeover seals the epochs that it sees. A writer that was asleep between its takeover and its first frame would not
//! have been seen, and would acknowledge beside its successor. So an epoch begins with a frame without WAL, at the write
//! quorum, and only then its writer looks for epochs that it does not know to be closed. Of two writers that do so at
//! least one sees the other: the quorum of the frame and the regions that are read have one region in common.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use futures::future::join_all;

use crate::model::{EpochId, Error, Kind, RegionName, Result};
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::regions::list_prefixes;
use crate::repository::wal::closing::Closing;
use crate::repository::wal::frame::{EpochKind, Frame, FrameHeader, IN_FLIGHT};
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::repository::wal::seal::Ending;

/// What a writer knows of the others.
#[derive(Debug, Default)]
pub struct Known {
    /// Epochs that need no second look: closed ones, those of other kinds, and this writer's own.
    epochs: Mutex<BTreeSet<EpochId>>,
    /// Regions that somebody gave up, with whatever they alone hold.
    lost: Mutex<BTreeSet<RegionName>>,
    /// Branches whose epochs this writer has closed.
    taken: Mutex<BTreeSet<BranchId>>,
}

impl Known {
    /// Adds one.
    pub fn add(&self, epoch: EpochId) {
        self.lock().insert(epoch);
    }

    /// Forgets all: what was this writer's own is another's now.
    pub fn clear(&self) {
        self.lock().clear();
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Notes that the epochs of a branch are being closed.
    pub(in crate::repository) fn take(&self, branch: &BranchId) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(branch.clone());
    }

    /// A branch, and the older ones that were taken over on the way to it: whoever was asleep may begin again on any of them.
    fn line(&self, branch: &BranchId) -> BTreeSet<BranchId> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let older = |known: &&BranchId| known.system_id == branch.system_id && known.timeline < branch.timeline;
        taken.iter().filter(older).chain([branch]).cloned().collect()
    }

    /// Whether an epoch is among them.
    pub fn contains(&self, epoch: &EpochId) -> bool {
        self.lock().contains(epoch)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<EpochId>> {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these regions may be away.
    pub fn give_up(&self, regions: BTreeSet<RegionName>) {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = regions;
    }

    /// How many regions must answer, and hold a SEAL: as many as share one with every write quorum, less those that do
    /// not answer and were given up.
    pub(in crate::repository) fn read_quorum(
        &self,
        repository: &Repository,
        unreadable: &[(RegionName, String)],
    ) -> usize {
        repository.regions.read_quorum().saturating_sub(self.given_up(unreadable)).max(1)
    }

    /// How many of the regions that do not answer were given up.
    pub(in crate::repository) fn given_up(&self, unreadable: &[(RegionName, String)]) -> usize {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        unreadable.iter().filter(|(region, _)| lost.contains(region)).count()
    }
}

/// Whether an epoch is of the kind that has one owner at a time. Only a header tells: one that a region does not give just
/// now may be that of a writer who is about to acknowledge.
///
/// # Errors
/// `Unavailable` and transient: no frame of it is readable. One that a signer signed who is not on the configuration's list
/// is nobody's rival.
pub(in crate::repository) async fn is_stream(
    repository: &Repository,
    index: &WalIndex,
    epoch: &EpochId,
) -> Result<bool> {
    let Some(seqs) = index.epochs().get(epoch) else { return Ok(false) };
    let (mut failed, mut refused) = (None::<Error>, false);
    let near = seqs.keys().take(1).chain(seqs.keys().skip(1).rev().take(usize::try_from(IN_FLIGHT).unwrap_or(1)));
    for seq in near {
        match index.header(repository, epoch, *seq).await {
            Ok(FrameHeader { epoch_kind, .. }) => return Ok(epoch_kind == EpochKind::Stream),
            Err(_) if is_refused(repository, index, epoch, *seq).await => refused = true,
            // What does not answer now says more than what is no frame.
            Err(error) if failed.as_ref().is_none_or(is_damaged) => failed = Some(error),
            Err(_) => {}
        }
    }
    match failed {
        Some(error) if !is_damaged(&error) || may_have_begun(repository, index, epoch) => Err(unknown(epoch, &error)),
        Some(error) => {
            tracing::error!(%epoch, %error, "what lies under the name of a WAL epoch is none; it is left as it is");
            Ok(false)
        }
        None => {
            tracing::error!(%epoch, refused, "a WAL epoch was signed by nobody on the list of signers; it is left as it is");
            Ok(false)
        }
    }
}

fn is_damaged(error: &Error) -> bool {
    error.kind() == Kind::Damaged
}

/// Whether as many regions may hold anything of an epoch as acknowledge the frame that it begins with. Its writer looks for others
/// once they do, and finds whoever did not wait for it.
fn may_have_begun(repository: &Repository, index: &WalIndex, epoch: &EpochId) -> bool {
    let listed = index.epochs().get(epoch).into_iter().flat_map(BTreeMap::values).flatten().collect::<BTreeSet<_>>();
    listed.len() + index.unreadable().len() >= repository.regions.lowest_quorum()
}

fn unknown(epoch: &EpochId, error: &Error) -> Error {
    let text = format!("WAL epoch {epoch} is not readable, so whether its writer still works is not known");
    let error = Error::new(Kind::Unavailable, text).transient(true).because(error);
    error.hint("it goes on when a region gives a frame of it: see drctl verify and drctl repair")
}

/// Whether every region that lists a frame gives one whose signer the list of signers refuses.
async fn is_refused(repository: &Repository, index: &WalIndex, epoch: &EpochId, seq: u64) -> bool {
    let key = index.place(epoch, seq).key();
    let Some(held) = index.epochs().get(epoch).and_then(|seqs| seqs.get(&seq)) else { return false };
    for region in held {
        let Ok(region) = repository.regions.named(region) else { return false };
        let Ok(bytes) = region.store.get(&key, None).await else { return false };
        if !Frame::claimed_signer(&bytes).is_some_and(|signer| repository.trust.refuses(&signer)) {
            return false;
        }
    }
    true
}

/// Looks for other open epochs of the branch, and of those that were taken over with it, once this writer's own is to be seen at
/// the write quorum.
///
/// # Errors
/// `Failed`: there is one, which a takeover must seal first. `Unavailable` and transient: too few regions answer.
pub async fn must_be_alone(repository: &Repository, branch: &BranchId, known: &Known) -> Result<()> {
    for branch in known.line(branch) {
        must_be_alone_on(repository, &branch, known).await?;
    }
    Ok(())
}

async fn must_be_alone_on(repository: &Repository, branch: &BranchId, known: &Known) -> Result<()> {
    let epochs = epochs(repository, branch, known).await?;
    if epochs.iter().all(|epoch| known.contains(epoch)) {
        return Ok(());
    }
    repository.trust.refresh(&repository.regions).await?;
    let index = WalIndex::load(&repository.regions, branch.clone()).await;
    let needed = known.read_quorum(repository, index.unreadable());
    must_be_readable(repository, index.unreadable(), needed)?;
    for epoch in index.epochs().keys().filter(|epoch| !known.contains(epoch)) {
        if is_stream(repository, &index, epoch).await? {
            let ending = Ending::look(repository, (&index, epoch), needed).await?;
            if let Closing::Open(_) = ending.closing {
                return Err(Error::failed(format!("another writer has an open WAL epoch beside this one: {epoch}")));
            }
        }
        known.add(epoch.clone());
    }
    Ok(())
}

/// The names of the epochs alone: far fewer than frames.
async fn epochs(repository: &Repository, branch: &BranchId, known: &Known) -> Result<BTreeSet<EpochId>> {
    let prefix = layout::wal_branch(branch.system_id, branch.timeline, &branch.branch);
    let lists = repository.regions.all().iter().map(|region| list_prefixes(region.store.as_ref(), &prefix));
    let (mut epochs, mut unreadable) = (BTreeSet::new(), Vec::new());
    for (region, list) in repository.regions.all().iter().zip(join_all(lists).await) {
        match list {
            Ok(names) => {
                let parse = |name: &String| name.strip_prefix(&prefix)?.trim_end_matches('/').parse().ok();
                epochs.extend(names.iter().filter_map(parse));
            }
            Err(error) => unreadable.push((region.name.clone(), error.to_string())),
        }
    }
    must_be_readable(repository, &unreadable, known.read_quorum(repository, &unreadable))?;
    Ok(epochs)
}

/// With every write acknowledged by at least W of N regions, N−W+1 of them hold at least one copy of each.
pub(in crate::repository) fn must_be_readable(
    repository: &Repository,
    unreadable: &[(RegionName, String)],
    needed: usize,
) -> Result<()> {
    let count = repository.regions.all().len();
    if count - unreadable.len() >= needed {
        return Ok(());
    }
    let text = format!("the end of stored WAL needs {needed} of {count} regions to be read");
    let error = Error::new(Kind::Unavailable, text).transient(true);
    let because = |error: Error, (region, reason): &(RegionName, String)| error.because(format!("{region}: {reason}"));
    Err(unreadable.iter().fold(error, because))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::codec::SystemRng;
    use crate::codec::sign::Signer;
    use crate::model::Lsn;
    use crate::repository::handle::Writer;
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::testing::{Fixture, log};
    use crate::repository::wal::adopt::{Era, TakeOver, take_over};
    use crate::repository::wal::frame::FramePlace;
    use crate::repository::wal::log::{Epoch, Marks};
    use crate::store::{Digest, ObjectStore, PutOptions};

    async fn open(fixture: &Fixture, writer: &Writer) -> Epoch {
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        Epoch::open(&fixture.repository, writer, (log(), EpochKind::Stream, Lsn(1000)), 1, out).await.unwrap()
    }

    /// A region that lists a frame and does not give it hides a writer that works.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_epoch_that_cannot_be_read_is_nobody_s_leave_to_acknowledge() {
        let fixture = Fixture::memory(3, 2).await;
        let (mut rival, known) = (open(&fixture, &fixture.writer).await, Known::default());
        rival.claim(&Known::default()).await.unwrap();
        let mut own = open(&fixture, &fixture.writer).await;
        fixture.mute(Some(rival.id().as_str()));
        let unknown = own.claim(&known).await.unwrap_err();
        assert_eq!((unknown.kind(), unknown.is_transient()), (Kind::Unavailable, true), "{unknown:?}");
        assert!(!known.contains(rival.id()), "it is looked at again");
        let eras = [Era { branch: log().branch_id(), end: None }];
        let unknown = fixture.take_over(&eras, None).await.unwrap_err();
        assert_eq!(unknown.kind(), Kind::Unavailable, "{unknown:?}");
        fixture.mute(None);
        assert_eq!(own.claim(&known).await.unwrap_err().kind(), Kind::Failed, "the rival is there");
        let tail = fixture.take_over(&eras, None).await.unwrap();
        assert_eq!(tail, None, "neither has stored any WAL");
        let marks = Marks { last_record: Some((Lsn(1000), Lsn(1040))), ..Marks::default() };
        let sealed = rival.append(Lsn(1000), vec![1; 40], marks).await.unwrap_err();
        assert_eq!(sealed.kind(), Kind::Refused, "it was seen and sealed");
    }

    /// Bytes under the name of an epoch that never was, in fewer regions than acknowledge the beginning of one.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_no_epoch_stops_nobody() {
        for (stores, stops) in [(1, false), (2, true)] {
            let fixture = Fixture::memory(3, 2).await;
            fixture.epoch(1000, &[40, 50], true).await;
            let id = EpochId::new(fixture.writer.clock.now(), &SystemRng).unwrap();
            let BranchId { system_id, timeline, branch } = log().branch_id();
            let place = FramePlace { system_id, timeline, branch, epoch: id, seq: 3 };
            for store in &fixture.stores[..stores] {
                let body = Bytes::from_static(b"no frame");
                let digest = Digest::of(&body);
                store.put(&place.key(), body, digest, &PutOptions::default()).await.unwrap();
            }
            let claimed = open(&fixture, &fixture.writer).await.claim(&Known::default()).await;
            assert_eq!(claimed.is_err_and(|error| error.kind() == Kind::Unavailable), stops);
            let taken = fixture.take_over(&[Era { branch: log().branch_id(), end: None }], None).await;
            assert_eq!(taken.ok().flatten().map(|tail| tail.end), (!stops).then_some(Lsn(1090)));
        }
    }

    /// Whoever may write and is on nobody's list must not be able to stop those who are.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_epoch_that_no_listed_signer_signed_stops_nobody() {
        let mut fixture = Fixture::memory(3, 2).await;
        let stranger = Signer::generate(&SystemRng).unwrap();
        let stranger = Writer { signer: Arc::new(stranger), ..fixture.writer.clone() };
        open(&fixture, &stranger).await.claim(&Known::default()).await.unwrap();
        let listed = BTreeSet::from([fixture.writer.signer.id().clone()]);
        fixture.repository = Repository::open(fixture.repository.regions.clone(), listed).await.unwrap();
        let mut own = open(&fixture, &fixture.writer).await;
        own.claim(&Known::default()).await.unwrap();
        let marks = Marks { last_record: Some((Lsn(1000), Lsn(1040))), ..Marks::default() };
        own.append(Lsn(1000), vec![1; 40], marks).await.unwrap();
        let (known, repository, writer) = (Known::default(), &fixture.repository, &fixture.writer);
        let owner = TakeOver { repository, writer, own: None, known: &known };
        let eras = [Era { branch: log().branch_id(), end: None }];
        let tail = take_over(&owner, (&eras, None)).await.unwrap().unwrap();
        assert_eq!((tail.end, tail.sealed), (Lsn(1040), 1), "its own alone");
    }
}
