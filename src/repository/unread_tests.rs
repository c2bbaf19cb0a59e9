//! Pages that were not read are the parent's, and claims that are to be proved are.

use crate::model::pages::{BATCH_PAGES, Batch, Claims, FileId, PAGE_SIZE, Piece};
use crate::model::{Error, Lsn, SystemId};
use crate::repository::backup::compare::Proof;
use crate::repository::backup::parent::{choose, state_path};
use crate::repository::backup::writer::{BackupOptions, BackupWriter, Written};
use crate::repository::pages::manifest::Line;
use crate::repository::testing::{Fixture, Made, need, options};
use crate::repository::tests::{expected, noise, read_back};

const PAGES: usize = 2500;

/// A page that says that it is of this position.
fn page(seed: u64, lsn: u64) -> Vec<u8> {
    let mut page = noise(seed, PAGE_SIZE);
    page[0..4].copy_from_slice(&u32::try_from(lsn >> 32).unwrap().to_le_bytes());
    page[4..8].copy_from_slice(&u32::try_from(lsn & 0xFFFF_FFFF).unwrap().to_le_bytes());
    page
}

/// The next backup of one file, of which these pages are said to be those of the parent.
async fn next(fixture: &Fixture, file: &Made, claims: (&[u32], bool), proof: Option<Proof>) -> Result<Written, Error> {
    let target = options().target;
    let state = state_path(fixture.files.path(), &target);
    let basis = choose(&fixture.repository, &fixture.writer.holders, (&target, SystemId(7)), state.clone()).await?;
    let how = BackupOptions { state: Some(state), proof, ..options() };
    let mut writer = BackupWriter::begin(&fixture.repository, &fixture.writer, how, basis).await?;
    let id = FileId(0);
    writer.line(&Line::Directory { path: "base".to_owned(), mode: 0o700 }).await?;
    writer.file(id, file.path.clone(), 0o600)?;
    for (at, bytes) in (0u32..).zip(file.bytes.chunks(BATCH_PAGES * PAGE_SIZE)) {
        let first_page = at * u32::try_from(BATCH_PAGES).unwrap();
        let mut batch = Batch { claims: Claims { read: claims.1, ..Claims::default() }, ..Batch::default() };
        for (number, page) in (0..).zip(bytes.chunks(PAGE_SIZE)) {
            let said = claims.0.contains(&(first_page + number));
            if said {
                batch.claims.same.push(number..number + 1);
            }
            if !said || claims.1 {
                batch.data.extend_from_slice(page);
            }
        }
        let pages = u32::try_from(bytes.len() / PAGE_SIZE).unwrap();
        batch.pieces.push(Piece { file: id, first_page, pages });
        writer.batch(batch).await?;
    }
    writer.file_done(id, file.bytes.len() as u64, Vec::new()).await?;
    writer.flush().await?;
    writer.commit(Some(need(1000, 1090))).await
}

fn file() -> Made {
    Made::new("base/1", (0..PAGES as u64).flat_map(|number| page(number, 50)).collect())
}

fn change(file: &mut Made, number: usize, lsn: u64) {
    file.bytes[number * PAGE_SIZE..(number + 1) * PAGE_SIZE].copy_from_slice(&page(9000 + number as u64, lsn));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_read_comes_from_the_parent() {
    let fixture = Fixture::memory(1, 1).await;
    let mut file = file();
    fixture.clock.advance(60);
    next(&fixture, &file, (&[], false), None).await.unwrap();
    let changed = [0, 1023, 1024, 1500, 2499];
    changed.iter().for_each(|number| change(&mut file, *number, 200));
    let quiet: Vec<u32> = (0..PAGES as u32).filter(|number| !changed.contains(&(*number as usize))).collect();
    for _ in 0..2 {
        // The second time the parent is one that has not read them either.
        fixture.clock.advance(60);
        let written = next(&fixture, &file, (&quiet, false), None).await.unwrap();
        assert_eq!((written.pages.read, written.pages.unread), (5, PAGES as u64 - 5));
        let back = read_back(&fixture.repository, &fixture.ring, &written.commit).await.unwrap();
        assert!(back == expected(std::slice::from_ref(&file)));
    }
    // Nobody can take over what the parent does not have.
    file.bytes.extend(page(1, 1));
    fixture.clock.advance(60);
    let refused = next(&fixture, &file, (&[PAGES as u32], false), None).await.unwrap_err();
    assert!(refused.to_string().contains("not at hand"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_was_missed_is_told_from_one_that_only_looks_so() {
    let fixture = Fixture::memory(1, 1).await;
    let mut file = file();
    fixture.clock.advance(60);
    next(&fixture, &file, (&[], false), None).await.unwrap();
    let (all, from, to) = ((0..PAGES as u32).collect::<Vec<_>>(), Lsn(100), Lsn(300));
    for (lsn, logged, expected_missed, expected_hints) in [
        (200, true, 1, 0),
        (200, false, 1, 0),
        (300, true, 0, 0),
        (99, true, 1, 0),
        // Without checksums a hint bit changes a page and leaves its position.
        (99, false, 0, 1),
    ] {
        change(&mut file, 1200, lsn);
        // Another one that looks as the parent has it.
        fixture.clock.advance(60);
        let proof = Proof { from, to, logged };
        let written = next(&fixture, &file, (&all, true), Some(proof)).await.unwrap();
        let missed = &written.pages.missed;
        assert_eq!((missed.pages, missed.hints), (expected_missed, expected_hints), "{lsn} {logged}");
        assert_eq!(missed.examples.iter().any(|name| name.starts_with("page 1200 of base/1")), expected_missed > 0);
        assert_eq!((written.pages.read, written.pages.unread, written.pages.changed), (PAGES as u64, 0, 1));
        let back = read_back(&fixture.repository, &fixture.ring, &written.commit).await.unwrap();
        assert!(back == expected(std::slice::from_ref(&file)), "the truth is stored");
        // The next turn begins with a parent that has another page there.
        change(&mut file, 1200, 10_000 + lsn);
        fixture.clock.advance(60);
        next(&fixture, &file, (&[], false), None).await.unwrap();
    }
}
