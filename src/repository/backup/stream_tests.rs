//! Streams there and back: across parts, with holes of zeros, and with damage in one region and in all of them.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::model::commit::{BackupKind, Commit};
use crate::model::pages::{BATCH_PAGES, PAGE_SIZE};
use crate::model::{Kind, Result};
use crate::observe::progress::Progress;
use crate::repository::backup::parent::Basis;
use crate::repository::backup::stream::StreamWriter;
use crate::repository::backup::writer::{BackupOptions, BackupWriter};
use crate::repository::catalog;
use crate::repository::restore::check_files;
use crate::repository::restore::streams::StoredStreams;
use crate::repository::survey::scrub::open_everything;
use crate::repository::testing::{Fixture, options};

const BATCH: usize = BATCH_PAGES * PAGE_SIZE;

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(next).collect()
}

/// Writes these streams, cut after every batch, and commits.
async fn written(fixture: &Fixture, streams: &[(&str, Vec<u8>)]) -> Commit {
    let how = BackupOptions { source: "dump", kind: Some(BackupKind::Dump), page_checksums: false, ..options() };
    let basis = Basis::nothing("a test");
    let mut backup = BackupWriter::begin(&fixture.repository, &fixture.writer, how, basis).await.unwrap();
    let mut writer = StreamWriter::cutting(&mut backup, BATCH as u64);
    for (name, bytes) in streams {
        writer.begin((*name).to_owned()).unwrap();
        assert!(writer.begin("between".to_owned()).is_err());
        for chunk in bytes.chunks(1_000_003) {
            writer.bytes(chunk).await.unwrap();
        }
        writer.end().await.unwrap();
        assert!(writer.begin((*name).to_owned()).is_err(), "a second {name}");
    }
    let lines = writer.finish().await.unwrap();
    assert_eq!(lines.iter().map(|line| line.bytes).collect::<Vec<_>>(), lengths(streams));
    backup.flush().await.unwrap();
    backup.commit(None).await.unwrap().commit
}

fn lengths(streams: &[(&str, Vec<u8>)]) -> Vec<u64> {
    streams.iter().map(|(_, bytes)| bytes.len() as u64).collect()
}

/// What comes back of one stream, and how it ended.
async fn read(fixture: &Fixture, commit: &Commit, name: &str) -> (Vec<u8>, Result<u64>) {
    let inventory = catalog::inventory(&fixture.repository, commit).await.unwrap();
    let stored = StoredStreams::open(&fixture.repository, &fixture.ring, (commit, &inventory)).await.unwrap();
    let (out, mut pieces) = mpsc::channel::<Result<Bytes>>(1);
    let send = async {
        let sent = stored.send((&fixture.repository, &fixture.ring), name, &out).await;
        drop(out);
        sent
    };
    let take = async {
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.recv().await {
            bytes.extend_from_slice(&piece.unwrap());
        }
        bytes
    };
    let (sent, bytes) = tokio::join!(send, take);
    (bytes, sent)
}

#[tokio::test]
async fn streams_come_back_byte_by_byte_whatever_their_length() {
    let fixture = Fixture::memory(2, 2).await;
    let mut holed = noise(BATCH + 3 * PAGE_SIZE, 1);
    holed[PAGE_SIZE..BATCH / 2].fill(0);
    let streams = [
        ("a.dump", holed),
        ("empty.dump", Vec::new()),
        ("one.dump", vec![7]),
        ("whole.dump", noise(BATCH, 2)),
        ("long.dump", noise(2 * BATCH + 12_345, 3)),
        ("globals.sql", b"CREATE ROLE a;\n".to_vec()),
    ];
    let commit = written(&fixture, &streams).await;
    assert_eq!((commit.kind, commit.wal.is_none(), commit.parent.is_none()), (BackupKind::Dump, true, true));
    for (name, wanted) in &streams {
        let (bytes, sent) = read(&fixture, &commit, name).await;
        assert!(sent.is_ok() && bytes == *wanted, "{name}: {sent:?}, {} of {}", bytes.len(), wanted.len());
    }
    let inventory = catalog::inventory(&fixture.repository, &commit).await.unwrap();
    let phase = Arc::new(Progress::new(fixture.clock.clone()).begin("x", None));
    let total = check_files(&fixture.repository, &fixture.ring, (&commit, &inventory), &phase).await.unwrap();
    assert_eq!(total, lengths(&streams).iter().sum::<u64>());
}

#[tokio::test]
async fn what_is_damaged_everywhere_ends_the_stream_with_an_error_behind_a_true_beginning() {
    let fixture = Fixture::memory(2, 2).await;
    let streams = [("a.dump", noise(3 * BATCH, 4))];
    let commit = written(&fixture, &streams).await;
    let inventory = catalog::inventory(&fixture.repository, &commit).await.unwrap();
    let packs: Vec<_> = inventory.iter().filter(|line| line.key.starts_with("packs/")).collect();
    let last = packs.last().unwrap();
    for (number, store) in fixture.stores.iter().enumerate() {
        let contents = store.contents().await;
        let (_, bytes) = contents.iter().find(|(key, _)| *key == last.key).unwrap();
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        store.damage(&last.key, bytes).await;
        let (bytes, sent) = read(&fixture, &commit, "a.dump").await;
        if number == 0 {
            assert!(sent.is_ok() && bytes == streams[0].1, "the other region has it: {sent:?}");
            continue;
        }
        assert_eq!(sent.unwrap_err().kind(), Kind::Damaged);
        assert!(bytes.len() < streams[0].1.len() && streams[0].1.starts_with(&bytes), "{}", bytes.len());
    }
}

/// Every frame of it opens, and nothing comes back: verification must say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_no_list_makes_a_stream_of_are_no_backup() {
    let fixture = Fixture::memory(1, 1).await;
    let whole = written(&fixture, &[("one.dump", noise(BATCH + 5, 1))]).await;
    let how = BackupOptions { source: "dump", kind: Some(BackupKind::Dump), page_checksums: false, ..options() };
    let mut backup =
        BackupWriter::begin(&fixture.repository, &fixture.writer, how, Basis::nothing("a test")).await.unwrap();
    let mut writer = StreamWriter::new(&mut backup);
    writer.begin("one.dump".to_owned()).unwrap();
    writer.bytes(&noise(9000, 2)).await.unwrap();
    writer.end().await.unwrap();
    drop(writer);
    backup.flush().await.unwrap();
    let unlisted = backup.commit(None).await.unwrap().commit;
    let region = &fixture.repository.regions.all()[0];
    let phase = Arc::new(Progress::new(Arc::clone(&fixture.writer.clock)).begin("verify", None));
    for (commit, good) in [(whole, true), (unlisted, false)] {
        let opened = open_everything(&fixture.repository, (region, &fixture.ring), &commit, &phase).await;
        assert_eq!(opened.is_ok(), good, "{opened:?}");
    }
}
