//! Frames in bundles: found by every reader, made alike by everybody, and no bit of them believed that is not right.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use chrono::TimeDelta;
use futures::future::join_all;

use crate::model::Lsn;
use crate::observe::SystemClock;
use crate::observe::progress::Progress;
use crate::repository::bundle::form;
use crate::repository::handle::Repository;
use crate::repository::layout;
use crate::repository::mend::{Scope, mend};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::survey::scrub;
use crate::repository::testing::{Fault, Fixture, log, need};
use crate::repository::wal::bundling::{Bundling, check_bundle, find, make};
use crate::repository::wal::frame::{Frame, FrameHeader, FrameKind, FrameSealer};
use crate::repository::wal::frames::fetch_object;
use crate::repository::wal::index::{BranchId, WalIndex};
use crate::repository::wal::reader::BranchLog;

const START: u64 = 1000;
const FRAMES: usize = 30;

fn branch() -> BranchId {
    let log = log();
    BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
}

/// Three regions with an epoch that ended three days ago.
async fn old_epoch() -> (Fixture, u64) {
    let fixture = Fixture::memory(3, 2).await;
    let lengths: Vec<usize> = (0..FRAMES).map(|number| 20 + number).collect();
    fixture.epoch(START, &lengths, true).await;
    fixture.clock.advance(3 * 24 * 3600);
    (fixture, START + lengths.iter().sum::<usize>() as u64)
}

async fn found(repository: &Repository, fixture: &Fixture) -> Vec<Bundling> {
    let before = fixture.writer.clock.now() - TimeDelta::days(2);
    let (found, notes) = find(repository, &branch(), before).await.unwrap();
    assert_eq!(notes, Vec::<String>::new());
    found
}

async fn bundle(fixture: &Fixture) {
    let repository = fixture.reopen().await.unwrap();
    let out = FanOut::new(&repository.regions, Patience::PUSH);
    for bundling in found(&repository, fixture).await {
        for (numbers, _) in &bundling.bundles {
            make(&repository, &out, &bundling, *numbers).await.unwrap();
        }
    }
    out.drain().await;
}

/// What a region holds of WAL: frames and bundles.
async fn names(fixture: &Fixture, region: usize) -> (Vec<String>, Vec<String>) {
    let names = fixture.stores[region].contents().await.into_iter().map(|(key, _)| key);
    let wal = names.filter(|key| key.starts_with(layout::WAL));
    wal.partition(|key| key.rsplit('/').next().and_then(layout::parse_seq).is_some())
}

/// What prune does when every region has the bundles.
async fn lose_bundled_frames(fixture: &Fixture, region: usize) {
    for key in names(fixture, region).await.0.iter().filter(|key| {
        let seq = key.rsplit('/').next().and_then(layout::parse_seq).unwrap();
        (1..22).contains(&seq)
    }) {
        fixture.stores[region].lose(key).await;
    }
}

async fn read(fixture: &Fixture, repository: &Repository, end: u64) -> crate::model::Result<Vec<u8>> {
    let ring = fixture.ring.within(repository.regions.clone());
    let (log, mut wal) = (BranchLog::load(repository, branch()).await, Vec::new());
    let mut sink = |_: Lsn, bytes: &[u8]| {
        wal.extend_from_slice(bytes);
        Ok(ControlFlow::Continue(()))
    };
    log.read(repository, &ring, (Lsn(START), Lsn(end)), &mut sink).await?;
    Ok(wal)
}

fn expected(end: u64) -> Vec<u8> {
    (START..end).map(|at| at.to_le_bytes()[0]).collect()
}

#[tokio::test]
async fn bundles_alone_give_back_what_was_written_in_far_fewer_objects() {
    let (fixture, end) = old_epoch().await;
    let before = names(&fixture, 0).await;
    assert_eq!((before.0.len(), before.1.len()), (FRAMES + 1, 0));
    bundle(&fixture).await;
    let bundles = names(&fixture, 0).await.1;
    assert!(bundles.len() == 1 && bundles[0].ends_with("/0000000001-0000000021"), "{bundles:?}");
    for region in 0..3 {
        lose_bundled_frames(&fixture, region).await;
        assert_eq!(names(&fixture, region).await.0.len(), FRAMES + 1 - 21);
    }
    let repository = fixture.reopen().await.unwrap();
    assert_eq!(read(&fixture, &repository, end).await.unwrap(), expected(end));
    assert!(repository.regions.incidents().is_empty());
    for region in repository.regions.all() {
        let alone = scrub::alone(&repository, &region.name).unwrap();
        assert_eq!(read(&fixture, &alone, end).await.unwrap(), expected(end));
        let index = WalIndex::load(&alone.regions, branch()).await;
        let (runs, errors) = index.runs(&alone, Some(&region.name)).await;
        assert!(
            errors.is_empty() && runs.len() == 1 && (runs[0].start().0, runs[0].end().0) == (START, end),
            "{runs:?}"
        );
        assert_eq!(scrub::scrub_wal(&alone, &index, region).await, ((FRAMES + 1) as u64, Vec::new()));
    }
    assert!(found(&repository, &fixture).await.is_empty(), "what is bundled is bundled");
}

/// Two runners at once, and one that died after its first region: all make one object.
#[tokio::test]
async fn whoever_bundles_makes_the_same_objects() {
    let (fixture, _) = old_epoch().await;
    for away in [1, 2] {
        fixture.stores[away].set(Fault::Deny);
    }
    let repository = fixture.reopen().await.unwrap();
    let refused = find(&repository, &branch(), fixture.writer.clock.now()).await.unwrap_err();
    assert!(refused.to_string().contains("is not readable"), "{refused}");
    for away in [1, 2] {
        fixture.stores[away].set(Fault::None);
    }
    let todo = found(&repository, &fixture).await;
    fixture.stores[1].set(Fault::Deny);
    fixture.stores[2].set(Fault::Deny);
    let out = FanOut::new(&repository.regions, Patience::PUSH);
    make(&repository, &out, &todo[0], todo[0].bundles[0].0).await.unwrap_err();
    drop(out);
    fixture.stores[1].set(Fault::None);
    fixture.stores[2].set(Fault::None);
    assert_eq!([names(&fixture, 0).await.1.len(), names(&fixture, 1).await.1.len()], [1, 0]);
    assert_eq!(found(&repository, &fixture).await, todo, "below the quorum it is not done");
    tokio::join!(bundle(&fixture), bundle(&fixture));
    let mut all = Vec::new();
    for region in 0..3 {
        let contents = fixture.stores[region].contents().await;
        all.push(
            contents
                .into_iter()
                .filter(|(key, _)| key.contains("-00000000"))
                .filter(|(key, _)| key.rsplit('/').next().and_then(layout::parse_bundle).is_some())
                .collect::<Vec<_>>(),
        );
    }
    assert!(all[0].len() == 1 && all[0] == all[1] && all[1] == all[2], "{all:?}");
}

/// One region was pruned and the others were not; one lacks the bundle; one holds a wrong one.
#[tokio::test]
async fn repair_copies_bundles_and_never_frames_that_lie_in_one() {
    let (fixture, end) = old_epoch().await;
    bundle(&fixture).await;
    let key = names(&fixture, 0).await.1.remove(0);
    lose_bundled_frames(&fixture, 0).await;
    fixture.stores[1].lose(&key).await;
    let good = fixture.stores[0].contents().await.into_iter().find(|(known, _)| *known == key).unwrap().1;
    let mut wrong = good.to_vec();
    wrong[good.len() / 2] ^= 1;
    fixture.stores[2].damage(&key, wrong).await;
    let repository = fixture.reopen().await.unwrap();
    let region = &repository.regions.all()[2];
    let index = WalIndex::load(&repository.regions, branch()).await;
    let problems = scrub::scrub_wal(&repository, &index, region).await.1;
    assert!(problems.len() == 1 && problems[0].key == key, "{problems:?}");

    let phase = Progress::new(std::sync::Arc::new(SystemClock::new())).begin("mend", None);
    let mended = mend(&repository, &Scope::default(), &phase).await.unwrap();
    let did: Vec<_> = mended.iter().map(|of| (of.copied, of.replaced.len(), of.still_missing.len())).collect();
    assert_eq!(did, [(0, 0, 0), (1, 0, 0), (0, 1, 0)], "{mended:#?}");
    assert_eq!(names(&fixture, 0).await.0.len(), FRAMES + 1 - 21, "frames that prune took came back");
    for region in 0..3 {
        assert!(fixture.stores[region].contents().await.contains(&(key.clone(), good.clone())));
        lose_bundled_frames(&fixture, region).await;
    }
    let alone = scrub::alone(&repository, &repository.regions.all()[2].name).unwrap();
    assert_eq!(read(&fixture, &alone, end).await.unwrap(), expected(end));
}

#[tokio::test]
async fn a_reader_that_began_before_the_frames_went_ends_well() {
    let (fixture, end) = old_epoch().await;
    let repository = fixture.reopen().await.unwrap();
    let log = BranchLog::load(&repository, branch()).await;
    bundle(&fixture).await;
    for region in 0..3 {
        lose_bundled_frames(&fixture, region).await;
    }
    let (ring, mut wal) = (fixture.ring.within(repository.regions.clone()), Vec::new());
    let mut sink = |_: Lsn, bytes: &[u8]| {
        wal.extend_from_slice(bytes);
        Ok(ControlFlow::Continue(()))
    };
    log.read(&repository, &ring, (Lsn(START), Lsn(end)), &mut sink).await.unwrap();
    assert_eq!(wal, expected(end));
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_is_told() {
    let (fixture, end) = old_epoch().await;
    bundle(&fixture).await;
    for region in 0..3 {
        lose_bundled_frames(&fixture, region).await;
    }
    let key = names(&fixture, 0).await.1.remove(0);
    let good = fixture.stores[0].contents().await.into_iter().find(|(known, _)| *known == key).unwrap().1;
    let (repository, numbers) = (fixture.reopen().await.unwrap(), (1, 21));
    let index = WalIndex::load(&repository.regions, branch()).await;
    let place = index.place(index.epochs().keys().next().unwrap(), 1);
    let check = |bytes: Vec<u8>| check_bundle(&Bytes::from(bytes), numbers, &repository, &place);
    check(good.to_vec()).unwrap();
    let head = 8 * usize::try_from(form::head_bytes(numbers)).unwrap();
    // All of the head, and of each frame enough to meet every part of it.
    for bit in (0..head).chain((head..good.len() * 8).step_by(41)) {
        let mut wrong = good.to_vec();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(check(wrong).is_err(), "bit {bit} of {}", good.len() * 8);
    }
    for length in (0..good.len()).step_by(97) {
        assert!(check(good[..length].to_vec()).is_err(), "cut to {length}");
    }
    check([good.as_ref(), &[0]].concat()).unwrap_err();
    // A reader takes it from another region, and says so; without one it stops.
    for bit in [3, 8 * 9, 8 * 13 + 2, good.len() * 4] {
        let mut wrong = good.to_vec();
        wrong[bit / 8] ^= 1 << (bit % 8);
        fixture.stores[0].damage(&key, wrong).await;
        let fresh = fixture.reopen().await.unwrap();
        assert_eq!(read(&fixture, &fresh, end).await.unwrap(), expected(end), "bit {bit}");
        assert!(fresh.regions.incidents().iter().all(|incident| incident.region.as_str() == "a"));
        assert!(!fresh.regions.incidents().is_empty(), "bit {bit} is not told");
        let alone = scrub::alone(&fixture.reopen().await.unwrap(), &"a".parse().unwrap()).unwrap();
        assert!(read(&fixture, &alone, end).await.is_err(), "bit {bit} was believed");
    }
}

#[tokio::test]
async fn a_frame_that_comes_behind_a_later_one_is_not_missing() {
    let fixture = Fixture::memory(2, 1).await;
    fixture.epoch(START, &[20; 8], false).await;
    let frame = names(&fixture, 0).await.0.into_iter().find(|key| key.ends_with("/0000000005")).unwrap();
    let (_, bytes) = fixture.stores[0].contents().await.into_iter().find(|(key, _)| *key == frame).unwrap();
    fixture.stores[0].lose(&frame).await;
    let repository = fixture.reopen().await.unwrap();
    let index = WalIndex::load(&repository.regions, branch()).await;
    let region = &repository.regions.all()[0];
    let missing = async || scrub::missing_frames(&repository, &index, region, fixture.writer.clock.now()).await;
    let problems = missing().await;
    assert!(problems.len() == 1 && problems[0].key == frame, "{problems:?}");
    fixture.stores[0].damage(&frame, bytes.to_vec()).await;
    assert!(missing().await.is_empty(), "it came after the list was made");
}

/// Whoever fetches ahead misses several frames at the same moment, and one of them looks for all.
#[tokio::test(start_paused = true)]
async fn frames_that_are_missed_at_the_same_time_are_all_found_in_their_bundle() {
    let (fixture, _) = old_epoch().await;
    let repository = fixture.reopen().await.unwrap();
    let frames = names(&fixture, 0).await.0;
    bundle(&fixture).await;
    for region in 0..3 {
        lose_bundled_frames(&fixture, region).await;
    }
    let region = &repository.regions.all()[0];
    fixture.stores[0].set(Fault::Slow(Duration::from_millis(10)));
    let got = join_all(frames[1..9].iter().map(|key| region.store.get(key, None))).await;
    assert!(got.iter().all(Result::is_ok), "{got:?}");
}

/// Another bundle over the same numbers that is none hides nothing, whatever its name is.
#[tokio::test]
async fn a_bundle_that_is_none_does_not_hide_the_one_that_is() {
    for other in ["0000000003-0000000021", "0000000001-0000000022", "0000000001-0000000020"] {
        let (fixture, end) = old_epoch().await;
        bundle(&fixture).await;
        for region in 0..3 {
            lose_bundled_frames(&fixture, region).await;
            let bundle = names(&fixture, region).await.1.remove(0);
            let other = bundle.replace("0000000001-0000000021", other);
            let none = b"DRCTLB1\nnothing of the kind, but as long as a head may be: ".repeat(4);
            fixture.stores[region].damage(&other, none).await;
        }
        let repository = fixture.reopen().await.unwrap();
        assert_eq!(read(&fixture, &repository, end).await.unwrap(), expected(end), "{other}");
    }
}

/// A bundle of the right form that nobody who is known has signed, and that came later than the right one.
#[tokio::test]
async fn a_later_bundle_of_the_right_form_does_not_hide_an_earlier_one() {
    for other in ["0000000003-0000000021", "0000000001-0000000022", "0000000001-0000000020"] {
        let (fixture, end) = old_epoch().await;
        bundle(&fixture).await;
        fixture.clock.advance(60);
        let numbers = layout::parse_bundle(other).unwrap();
        let forged = form::pack(&vec![Bytes::from(vec![7; 300]); usize::try_from(numbers.1 - numbers.0 + 1).unwrap()]);
        for region in 0..3 {
            lose_bundled_frames(&fixture, region).await;
            let bundle = names(&fixture, region).await.1.remove(0);
            let key = bundle.replace("0000000001-0000000021", other);
            fixture.stores[region].damage(&key, forged.clone()).await;
        }
        let repository = fixture.reopen().await.unwrap();
        assert_eq!(read(&fixture, &repository, end).await.unwrap(), expected(end), "{other}");
    }
}

/// The names of frames that lie in a bundle are free again. Whoever may write and sign has the keys of epochs to come, and none of
/// those that are over.
#[tokio::test]
async fn wal_that_was_put_where_frames_were_is_never_taken_for_theirs() {
    let (fixture, end) = old_epoch().await;
    bundle(&fixture).await;
    fixture.epoch(end + 1000, &[20], true).await;
    let repository = fixture.reopen().await.unwrap();
    let ring = fixture.ring.within(repository.regions.clone());
    let index = WalIndex::load(&repository.regions, branch()).await;
    let mut epochs = index.epochs().keys();
    let (epoch, later) = (epochs.next().unwrap(), epochs.next().unwrap());
    let FrameHeader { target, keyset, .. } = index.header(&repository, later, 0).await.unwrap();
    let keys = ring.open(&target, &keyset).await.unwrap();
    let sealer = FrameSealer { signer: &fixture.writer.signer, key: keys.data().unwrap(), level: 1 };
    let mut spans = Vec::new();
    for seq in 1..=21 {
        let header = index.header(&repository, epoch, seq).await.unwrap();
        spans.push((header.span.start, header.span.end));
        let wal = vec![0xEE; usize::try_from(header.span.end.0 - header.span.start.0).unwrap()];
        let forged = sealer.encode(FrameHeader { keyset: keyset.clone(), ..header }, &wal).unwrap();
        for store in &fixture.stores {
            store.damage(&index.place(epoch, seq).key(), forged.clone()).await;
        }
    }
    let (from, to) = (spans[2].0, spans[10].1);
    let repository = fixture.reopen().await.unwrap();
    let log = BranchLog::load(&repository, branch()).await;
    let mut sink = |_: Lsn, _: &[u8]| Ok(ControlFlow::Continue(()));
    let error = log.read(&repository, &ring, (from, to), &mut sink).await.unwrap_err();
    assert!(error.to_string().contains("another keyset"), "{error}");
    let alone = scrub::alone(&repository, &"a".parse().unwrap()).unwrap();
    let error = scrub::read_need(&alone, (&log.index, &ring), &need(from.0, to.0), |_, _| Ok(())).await.unwrap_err();
    assert!(error.to_string().contains("another keyset"), "{error}");
}

/// A SEAL may stand where another region holds WAL, and that region may be away.
#[tokio::test]
async fn a_seal_is_never_taken_for_wal() {
    let (fixture, _) = old_epoch().await;
    let repository = fixture.reopen().await.unwrap();
    let index = WalIndex::load(&repository.regions, branch()).await;
    let epoch = index.epochs().keys().next().unwrap().clone();
    let (place, header) = (index.place(&epoch, 5), index.header(&repository, &epoch, 5).await.unwrap());
    let frames = join_all((1..=21).map(|seq| {
        let place = index.place(&epoch, seq);
        let repository = &repository;
        async move { fetch_object(repository, &place).await.unwrap() }
    }));
    let mut frames = frames.await;
    let check = |frames: &[Bytes]| {
        let packed = Bytes::from(form::pack(frames));
        check_bundle(&packed, (1, 21), &repository, &index.place(&epoch, 1))
    };
    check(&frames).unwrap();
    let seal = FrameHeader { kind: FrameKind::Seal, ..header }.encode_bare(&fixture.writer.signer).unwrap();
    fixture.stores[0].damage(&place.key(), seal.clone()).await;
    for away in [1, 2] {
        fixture.stores[away].set(Fault::Deny);
    }
    let error = fetch_object(&repository, &place).await.unwrap_err();
    assert!(error.to_string().contains("ask region"), "{error}");
    fixture.stores[2].set(Fault::None);
    assert_eq!(Frame::kind(&fetch_object(&repository, &place).await.unwrap()), Some(FrameKind::Data));
    frames[4] = Bytes::from(seal);
    let error = check(&frames).unwrap_err();
    assert!(error.to_string().contains("something else than WAL"), "{error}");
}
