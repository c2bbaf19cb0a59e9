//! The state reads back, and nothing else is believed.

use std::os::unix::fs::FileExt as _;

use super::*;
use crate::model::commit::StateDigest;
use crate::repository::FORMAT;
use crate::repository::pages::map::{FrameId, PackId, PageEntry};

fn frame(ordinal: u32) -> FrameRef {
    let pack = PackId { backup: "ledger-261120-010059-k7f".parse().unwrap(), ordinal };
    let keyset = "0".repeat(32).parse().unwrap();
    FrameRef { id: FrameId { pack: pack.clone(), ordinal }, keyset, pack, offset: 8, length: 90 }
}

fn chunk(pages: u8) -> MapChunk {
    let entry = |page| PageEntry { place: Some((0, page)), fingerprint: [page; 16] };
    MapChunk { frames: vec![frame(7)], entries: (0..pages).map(entry).collect() }
}

fn head() -> StateHead {
    StateHead {
        format: FORMAT,
        repository: "1".repeat(32).parse().unwrap(),
        backup: "ledger-261120-010059-k7f".parse().unwrap(),
        fingerprint_secret: "5a".repeat(192),
        start_lsn: Some(Lsn(0x28)),
        generation: Some(DateTime::UNIX_EPOCH),
        page_checksums: Some(true),
    }
}

/// Two files that share a chunk, one of two chunks, one without pages.
fn keep(path: &Path) -> StateDigest {
    let keeper = Keeper::begin(Some(path), &head());
    assert_eq!(keeper.chunk(&frame(0), &chunk(9).encode()), 0);
    assert_eq!((keeper.carry(40, &frame(1), &chunk(3)), keeper.carry(40, &frame(1), &chunk(3))), (1, 1));
    keeper.file("base/1", (4 * 8192, true), vec![(0, 0, 4)]);
    keeper.file("base/2", (7 * 8192 - 1, false), vec![(0, 4, 5), (1, 1, 2)]);
    keeper.file("base/empty", (0, false), Vec::new());
    let line = InventoryLine { key: "packs/x".to_owned(), size: 7, sha256: [3; 32] };
    let (kept, why_not) = keeper.finish([line].iter());
    let kept = kept.unwrap();
    assert_eq!((why_not, path.exists()), (None, false), "it is in place before its COMMIT");
    let digest = kept.digest;
    kept.place().unwrap();
    digest
}

fn open(path: &Path, digest: &StateDigest) -> Result<KnownPages> {
    KnownPages::open(path, (&head().repository, &head().backup), digest)
}

#[test]
fn what_was_kept_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.pages");
    let digest = keep(&path);
    let known = open(&path, &digest).unwrap();
    assert_eq!(known.chunk(0).unwrap(), (frame(0), chunk(9)));
    assert_eq!(known.chunk(1).unwrap(), (frame(1), chunk(3)));
    let file = known.file("base/2").unwrap();
    let run = |first_page, pages, chunk, first_entry| KnownRun { first_page, pages, chunk, first_entry };
    assert_eq!(file.run_of(4), Some(&run(0, 5, 0, 4)));
    assert_eq!([5, 6].map(|page| file.run_of(page)), [Some(&run(5, 2, 1, 1)); 2]);
    assert_eq!((file.run_of(7), known.file("base/empty").unwrap().run_of(0)), (None, None));
    assert!(known.file("base/3").is_none());
    let sound = ["base/1", "base/2", "base/empty"].map(|path| known.file(path).unwrap().sound_pages());
    assert_eq!(sound, [0, 6, 0], "nothing of what was damaged, and no half page");
    assert_eq!(*known.head(), head());
    assert_eq!((known.objects().len(), known.sources().len()), (1, 1));
    assert_eq!(hex::encode(known.fingerprints().secret()), head().fingerprint_secret);
}

#[test]
fn no_flipped_bit_cut_or_addition_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.pages");
    let digest = keep(&path);
    let good = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        crate::disk::place::place(&path, bytes, 0o600).unwrap();
        let error = open(&path, &digest).expect_err(what).to_string();
        assert!(error.contains("is not the page map that the COMMIT"), "{what}: {error}");
    };
    for at in 0..good.len() {
        let mut wrong = good.clone();
        wrong[at] ^= 1 << (at % 8);
        refused(&wrong, &format!("byte {at}"));
    }
    for cut in (0..good.len()).step_by(41) {
        refused(&good[..cut], &format!("cut to {cut}"));
    }
    refused(&[&good[..], b"x"].concat(), "one byte more");
    crate::disk::place::place(&path, &good, 0o600).unwrap();
    let other = "2".repeat(32).parse().unwrap();
    assert!(KnownPages::open(&path, (&other, &head().backup), &digest).is_err(), "of another repository");
    std::fs::remove_file(&path).unwrap();
    assert!(open(&path, &digest).unwrap_err().to_string().contains("is not in"));
}

#[test]
fn a_file_that_rots_after_it_was_checked_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.pages");
    let known = open(&path, &keep(&path)).unwrap();
    let good = std::fs::read(&path).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for at in 0..good.len() {
        file.write_all_at(&[good[at] ^ 0x40], at as u64).unwrap();
        for (number, expected) in [(0, (frame(0), chunk(9))), (1, (frame(1), chunk(3)))] {
            if let Ok(read) = known.chunk(number) {
                assert_eq!(read, expected, "byte {at}");
            }
        }
        file.write_all_at(&good[at..=at], at as u64).unwrap();
    }
}

#[test]
fn a_state_that_cannot_be_written_is_given_up_and_said_so() {
    let keeper = Keeper::begin(Some(Path::new("/nonexistent/ledger.pages")), &head());
    assert_eq!(keeper.chunk(&frame(0), &chunk(1).encode()), 0);
    keeper.file("base/1", (8192, false), vec![(0, 0, 1)]);
    let (kept, why_not) = keeper.finish(std::iter::empty());
    assert!(kept.is_none() && why_not.unwrap().contains("/nonexistent"));
}
