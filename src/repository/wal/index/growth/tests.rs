use proptest::prelude::*;

use super::*;
use crate::repository::testing::{Fixture, log};
use crate::repository::wal::index::{BranchId, windows};

fn branch() -> BranchId {
    let log = log();
    BranchId { system_id: log.system_id, timeline: log.timeline, branch: log.branch }
}

fn shown(index: &WalIndex) -> Vec<(String, Vec<RegionName>)> {
    index.frames().map(|(place, held)| (place.key(), held.iter().cloned().collect())).collect()
}

/// An index that lost its newest knowledge learns it again by looking on.
async fn grows(lengths: Vec<usize>, (close, overtakes): (bool, bool), known: usize) {
    let fixture = Fixture::memory(2, 2).await;
    fixture.epoch(1000, &lengths, close).await;
    let repository = fixture.reopen().await.unwrap();
    let mut index = WalIndex::load(&repository.regions, branch()).await;
    let whole = shown(&index);
    let seqs = index.frames.values_mut().next().unwrap();
    let mut lost = seqs.split_off(&(known as u64));
    // Frames on their way overtake each other.
    if let Some((seq, held)) = lost.pop_last().filter(|(seq, _)| overtakes && *seq < known as u64 + 8) {
        seqs.insert(seq, held);
    }
    assert!(!seqs.is_empty());
    let kept: Vec<u64> = seqs.keys().copied().collect();
    index.sizes.retain(|(_, seq), _| kept.contains(seq));
    index.runs(&repository, None).await;
    for (_, found) in index.look_on(repository.regions.all(), false).await {
        index.take_in(found.unwrap());
    }
    assert_eq!(shown(&index), whole);

    // An epoch that began since shows only to those who look for new ones.
    let end = 1000 + lengths.iter().sum::<usize>() as u64;
    fixture.epoch(end, &[7, 7], true).await;
    for new_epochs in [false, true] {
        for (_, found) in index.look_on(repository.regions.all(), new_epochs).await {
            index.take_in(found.unwrap());
        }
        let fresh = shown(&WalIndex::load(&repository.regions, branch()).await);
        assert_eq!(shown(&index) == fresh, new_epochs);
    }
    let (runs, _) = index.runs(&repository, None).await;
    let before = windows(&runs);
    let middle = Lsn((1000 + end) / 2);
    for seq in 0..lengths.len() as u64 {
        let epoch = runs[0].first.place.epoch.clone();
        index.header(&repository, &epoch, seq).await.unwrap();
    }
    index.forget(middle);
    let (runs, errors) = index.runs(&repository, None).await;
    let after = windows(&runs);
    assert!(errors.is_empty() && after.len() == before.len());
    assert!(after[0].start <= middle && after[0].end == before[0].end, "{after:?}");
    for (_, found) in index.look_on(repository.regions.all(), true).await {
        assert!(!index.take_in(found.unwrap()), "what was forgotten does not come again");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn what_is_followed_is_what_is_listed(
        lengths in prop::collection::vec(1usize..90, 1..45), close: bool, overtakes: bool, known in 1usize..45
    ) {
        let known = known.min(lengths.len());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(grows(lengths, (close && !overtakes, overtakes), known));
    }
}
