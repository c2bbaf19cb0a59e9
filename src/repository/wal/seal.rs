//! Closing the epoch of a writer that did not close it itself, so that it can never acknowledge again. Needs no key.
//!
//! A writer acknowledges a frame when this frame and all before it are in W of N regions. A SEAL takes the name of a
//! frame. Once N−W+1 regions hold a SEAL under one number, W regions can never hold WAL there, and nothing from that
//! number on will ever be acknowledged, however long its writer was asleep and whatever its clock says. W is the lowest
//! quorum that the configuration allows.
//!
//! The number is the lowest one of which no WAL is seen. One that is higher would leave the writer a hole to fill. The
//! writer may win the name in some regions in the meantime. While W regions can still hold its frame, that frame is taken
//! over with the others, and the next number is tried; if they cannot, the SEAL stands, and the frame counts for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::timeout;

use crate::model::{EpochId, Error, Kind, RegionName, Result};
use crate::repository::handle::{Repository, Writer};
use crate::repository::regions::Region;
use crate::repository::wal::closing::{Closing, Enough, Holding, Holdings, closing, holding};
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FramePlace, WalSpan};
use crate::repository::wal::index::WalIndex;
use crate::store::{Digest, StoreError};

/// A region that hangs counts as one that is away.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// The end of one epoch, as the regions that answer show it.
#[derive(Debug)]
pub struct Ending {
    holdings: Holdings<RegionName>,
    enough: Enough,
    /// How it stands.
    pub closing: Closing,
}

impl Ending {
    /// Looks at the last frames of an epoch in every region that listed them.
    ///
    /// # Errors
    /// A region listed a frame and does not give it.
    pub async fn look(repository: &Repository, (index, epoch): Sealed<'_>, needed: usize) -> Result<Self> {
        let regions = &repository.regions;
        let enough = Enough { regions: regions.all().len(), needed, barrier: regions.read_quorum() };
        let holdings = index.holdings(repository, epoch).await?;
        let closing = closing(&holdings, enough);
        Ok(Self { holdings, enough, closing })
    }

    /// Closes the epoch unless it is closed.
    ///
    /// # Errors
    /// `Unavailable` and transient: too few regions took the SEAL.
    pub async fn seal(&mut self, repository: &Repository, writer: &Writer, sealed: Sealed<'_>) -> Result<()> {
        while let Closing::Open(at) = self.closing {
            let object = self.object(repository, writer, sealed, at).await?;
            let (place, digest) = (sealed.0.place(sealed.1, at), Digest::of(&object));
            let puts = repository.regions.all().iter().map(|region| async {
                let put = put_seal(repository, region, &place, (object.clone(), digest));
                let gone = || Error::new(Kind::Unavailable, "no answer in time");
                (region.name.clone(), timeout(ANSWER_TIME, put).await.unwrap_or_else(|_| Err(gone())))
            });
            let mut away = Vec::new();
            for (region, put) in join_all(puts).await {
                match put {
                    Ok(holding) => {
                        self.holdings.entry(at).or_default().insert(region, holding);
                    }
                    Err(error) => away.push((region, error)),
                }
            }
            self.closing = closing(&self.holdings, self.enough);
            if self.closing == Closing::Open(at) {
                return Err(self.not_sealed(sealed.1, &away));
            }
        }
        Ok(())
    }

    /// The SEAL that is to stand at `at`: one that is there already is spread as it is.
    async fn object(&self, repository: &Repository, writer: &Writer, sealed: Sealed<'_>, at: u64) -> Result<Bytes> {
        let (index, epoch) = sealed;
        let place = index.place(epoch, at);
        for region in self.holdings.get(&at).into_iter().flat_map(BTreeMap::keys) {
            let region = repository.regions.named(region)?;
            if let Ok(Some((Holding::Seal, bytes))) = holding(repository, region, &place, u64::MAX).await {
                return Ok(bytes);
            }
        }
        let before = self.before(repository, index, (epoch, at)).await?;
        let span = before.span;
        let header = FrameHeader {
            place,
            kind: FrameKind::Seal,
            span: WalSpan { start: span.end, first_record: None, first_commit: None, last_commit: None, ..span },
            quorum: u8::try_from(repository.regions.lowest_quorum()).unwrap_or(u8::MAX),
            written_at: writer.clock.now(),
            ..before
        };
        Ok(Bytes::from(header.encode_bare(&writer.signer)?))
    }

    /// The last readable frame before `at`: it names the log and the keyset.
    async fn before(&self, repository: &Repository, index: &WalIndex, at: (&EpochId, u64)) -> Result<FrameHeader> {
        let mut last = Error::damaged(format!("WAL epoch {} has no frame", at.0));
        let seqs = index.epochs().get(at.0);
        for seq in seqs.into_iter().flat_map(|seqs| seqs.range(..at.1).rev()).map(|(seq, _)| *seq) {
            match index.header(repository, at.0, seq).await {
                Ok(header) => return Ok(header),
                Err(error) => last = error,
            }
        }
        Err(last.during(format!("seal WAL epoch {}", at.0)))
    }

    /// The regions that hold a frame, where they are known better than by their lists.
    pub fn holders(&self, seq: u64) -> Option<BTreeSet<RegionName>> {
        let held = self.holdings.get(&seq)?;
        let good = held.iter().filter(|(_, holding)| matches!(holding, Holding::Wal | Holding::End));
        Some(good.map(|(region, _)| region.clone()).collect())
    }

    /// In how many regions a SEAL has the name of a frame.
    pub fn seals(&self, seq: u64) -> usize {
        let held = self.holdings.get(&seq).into_iter().flat_map(BTreeMap::values);
        held.filter(|holding| **holding == Holding::Seal).count()
    }

    fn not_sealed(&self, epoch: &EpochId, away: &[(RegionName, Error)]) -> Error {
        let (needed, count) = (self.enough.needed, self.enough.regions);
        let text = format!("sealing WAL epoch {epoch} needs {needed} of {count} regions");
        let error = Error::new(Kind::Unavailable, text).transient(true);
        away.iter().fold(error, |error, (region, why)| error.because(format!("{region}: {why}")))
    }
}

/// Which epoch of which log is sealed.
pub type Sealed<'a> = (&'a WalIndex, &'a EpochId);

async fn put_seal(
    repository: &Repository,
    region: &Region,
    place: &FramePlace,
    (object, digest): (Bytes, Digest),
) -> Result<Holding> {
    let size = object.len() as u64;
    match region.put(&place.key(), (object, digest), None).await {
        Ok(_) => Ok(Holding::Seal),
        Err(StoreError::Conflict { .. }) => {
            let there = holding(repository, region, place, size).await?;
            there.map(|(holding, _)| holding).ok_or_else(|| Error::failed(format!("{} comes and goes", place.key())))
        }
        Err(error) => Err(error.into()),
    }
}

/// The SEAL that stands in the way of a frame, if that is what stands there.
pub async fn sealed_by(repository: &Repository, place: &FramePlace) -> Option<FrameHeader> {
    // Whoever sealed may be new here.
    let _ = repository.trust.refresh(&repository.regions).await;
    for region in repository.regions.all() {
        let Ok(bytes) = region.store.get(&place.key(), None).await else { continue };
        match Frame::header(&bytes, &repository.id, place, &repository.trust) {
            Ok(header) if header.kind == FrameKind::Seal => return Some(header),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Lsn;
    use crate::repository::regions::fan_out::{FanOut, Patience};
    use crate::repository::testing::{Fixture, log};
    use crate::repository::wal::adopt::Era;
    use crate::repository::wal::claim::Known;
    use crate::repository::wal::frame::EpochKind;
    use crate::repository::wal::index::BranchId;
    use crate::repository::wal::log::{Epoch, Marks};
    use crate::repository::wal::reader::BranchLog;
    use crate::store::{ObjectStore as _, PutOptions};

    fn branch() -> BranchId {
        let log = log();
        BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
    }

    fn marks(start: u64, end: u64) -> Marks {
        Marks { first_record: Some(Lsn(start)), last_record: Some((Lsn(start), Lsn(end))), commits: None }
    }

    async fn claimed(fixture: &Fixture, start: u64, known: &Known) -> Epoch {
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let opening = (log(), EpochKind::Stream, Lsn(start));
        let mut epoch = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, out).await.unwrap();
        epoch.claim(known).await.unwrap();
        epoch
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_was_sealed_out_stops_and_says_by_whom() {
        let fixture = Fixture::memory(3, 2).await;
        let mut epoch = claimed(&fixture, 1000, &Known::default()).await;
        epoch.append(Lsn(1000), vec![1; 40], marks(1000, 1040)).await.unwrap();
        let tail = fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap();
        assert_eq!((tail.end, tail.sealed, tail.adopted), (Lsn(1040), 1, 0));
        let error = epoch.append(Lsn(1040), vec![2; 40], marks(1040, 1080)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        let text = format!("{error:?}");
        assert!(text.contains("taken over") && text.contains(fixture.writer.signer.id().as_str()), "{text}");
        let again = fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap();
        assert_eq!((again.end, again.sealed), (Lsn(1040), 0), "a closed epoch stays as it is");
    }

    /// Between its takeover and its first frame a writer may sleep, and nobody sees it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_two_writers_that_begin_the_second_sees_the_first() {
        let fixture = Fixture::memory(3, 2).await;
        let mut first = claimed(&fixture, 1000, &Known::default()).await;
        let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
        let opening = (log(), EpochKind::Stream, Lsn(1000));
        let mut second = Epoch::open(&fixture.repository, &fixture.writer, opening, 1, out).await.unwrap();
        let known = Known::default();
        assert_eq!(second.claim(&known).await.unwrap_err().kind(), Kind::Failed);
        first.append(Lsn(1000), vec![1; 40], marks(1000, 1040)).await.unwrap();
        first.close().await.unwrap();
        second.claim(&known).await.unwrap();
    }

    /// A frame that overtook another one is no part of the log: nobody was told of either.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_seal_stands_in_the_lowest_hole_and_hides_what_is_behind() {
        for garbage in [None, Some(11), Some(12)] {
            lowest_hole(garbage).await;
        }
    }

    /// With bytes that nobody signed under a number as far ahead as a writer can be, or a little further.
    async fn lowest_hole(garbage: Option<u64>) {
        let fixture = Fixture::memory(3, 2).await;
        let mut epoch = claimed(&fixture, 1000, &Known::default()).await;
        for at in [1000, 1040, 1080, 1120] {
            epoch.append(Lsn(at), vec![1; 40], marks(at, at + 40)).await.unwrap();
        }
        let key = |seq| {
            let crate::repository::wal::log::Log { system_id, timeline, branch, .. } = log();
            FramePlace { system_id, timeline, branch, epoch: epoch.id().clone(), seq }.key()
        };
        // Frame 3 reached nobody, frames 2 and 4 one region each.
        for (region, lost) in [(0, vec![3]), (1, vec![2, 3, 4]), (2, vec![2, 3, 4])] {
            for seq in lost {
                // Acknowledged by two regions, it may still be on its way to the third.
                while fixture.stores[region].head(&key(seq)).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                fixture.stores[region].lose(&key(seq)).await;
            }
        }
        if let Some(seq) = garbage {
            let body = Bytes::from_static(b"no frame");
            let digest = Digest::of(&body);
            fixture.stores[0].put(&key(seq), body, digest, &PutOptions::default()).await.unwrap();
        }
        let tail = fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap();
        assert_eq!((tail.end, tail.sealed, tail.adopted), (Lsn(1080), 1, 1));
        let log = BranchLog::load(&fixture.repository, branch()).await;
        assert_eq!(log.runs.iter().map(|run| (run.start(), run.end())).collect::<Vec<_>>(), [(Lsn(1000), Lsn(1080))]);
        let error = epoch.append(Lsn(1160), vec![1; 40], marks(1160, 1200)).await;
        assert!(error.is_ok(), "its names behind the SEAL are free, and it is never acknowledged: 3 is missing");
    }

    /// Whoever may write can put bytes under the names that come next, or far ahead. A SEAL behind them would leave the
    /// sleeper a number under which it still wins a quorum.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_nobody_signed_keeps_no_seal_from_the_lowest_hole() {
        for (forged, stores, sealed) in [(2, 1, 2), (5_000, 1, 2), (5_000, 3, 2), (2, 2, 3)] {
            let fixture = Fixture::memory(3, 2).await;
            let mut epoch = claimed(&fixture, 1000, &Known::default()).await;
            epoch.append(Lsn(1000), vec![1; 40], marks(1000, 1040)).await.unwrap();
            let BranchId { system_id, timeline, branch: name } = branch();
            let key = |seq| {
                let (branch, epoch) = (name.clone(), epoch.id().clone());
                FramePlace { system_id, timeline, branch, epoch, seq }.key()
            };
            for store in &fixture.stores[..stores] {
                let body = Bytes::from_static(b"no frame");
                let digest = Digest::of(&body);
                store.put(&key(forged), body, digest, &PutOptions::default()).await.unwrap();
            }
            let tail = fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap();
            assert_eq!((tail.end, tail.sealed), (Lsn(1040), 1));
            let (seal, behind) = (key(sealed), key(sealed + 1));
            let seal = fixture.stores[2].get(&seal, None).await.unwrap();
            let place =
                FramePlace { system_id, timeline, branch: name.clone(), epoch: epoch.id().clone(), seq: sealed };
            let header = Frame::header(&seal, &fixture.repository.id, &place, &fixture.repository.trust).unwrap();
            assert_eq!(header.kind, FrameKind::Seal);
            assert!(fixture.stores[2].head(&behind).await.is_err(), "there is one");
            let again = fixture.take_over(&[Era { branch: branch(), end: None }], None).await.unwrap().unwrap();
            assert_eq!((again.end, again.sealed), (Lsn(1040), 0));
            assert!(epoch.append(Lsn(1040), vec![2; 40], marks(1040, 1080)).await.is_err());
        }
    }

    /// The writer may win a name in one region after another region gave it to the SEAL. Whoever takes over must get on.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_frame_that_won_one_region_counts_if_the_others_can_still_take_it() {
        for (regions, adopted, end) in [(2, 0, 1080), (3, 1, 1120)] {
            let fixture = Fixture::memory(regions, 2).await;
            let mut epoch = claimed(&fixture, 1000, &Known::default()).await;
            for at in [1000, 1040, 1080] {
                epoch.append(Lsn(at), vec![1; 40], marks(at, at + 40)).await.unwrap();
            }
            let BranchId { system_id, timeline, branch: name } = branch();
            let place = FramePlace { system_id, timeline, branch: name, epoch: epoch.id().clone(), seq: 3 };
            let frame = match fixture.stores[0].get(&place.key(), None).await {
                Ok(frame) => frame,
                Err(_) => fixture.stores[1].get(&place.key(), None).await.unwrap(),
            };
            for store in &fixture.stores {
                // Two regions that took it are enough; on its way to the third it is not to be lost yet.
                while store.head(&place.key()).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                store.lose(&place.key()).await;
            }
            let eras = [Era { branch: branch(), end: None }];
            assert_eq!(fixture.take_over(&eras, None).await.unwrap().unwrap().end, Lsn(1080));
            // As it would be had the frame come to one region first and the SEAL to another, and to no third one yet.
            for store in fixture.stores.iter().skip(1) {
                store.lose(&place.key()).await;
            }
            let digest = Digest::of(&frame);
            fixture.stores[1].put(&place.key(), frame, digest, &PutOptions::default()).await.unwrap();
            let tail = fixture.take_over(&eras, None).await.unwrap().unwrap();
            assert_eq!((tail.end, tail.adopted), (Lsn(end), adopted), "{regions} regions");
        }
    }
}
