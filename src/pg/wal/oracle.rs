//! The walker against `pg_waldump` on the WAL of real servers.

use std::collections::HashMap;
use std::path::Path;

use chrono::NaiveDateTime;

use super::*;
use crate::model::{SegmentName, WalSegmentSize};
use crate::pg::history::History;
use crate::pg::instance::PgBinaries;
use crate::pg::testing::{Cluster, block_on, installed};

const RMGRS: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// What both sides say about one record: start, resource manager, transaction, kind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    start: Lsn,
    rmgr: u8,
    xid: u32,
    kind: RecordKind,
}

fn segment_size() -> WalSegmentSize {
    WalSegmentSize::try_from(1 << 20).unwrap()
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let rest = text.split_once(from).unwrap_or_else(|| panic!("no {from:?} in {text}")).1;
    rest.split_once(to).unwrap_or((rest, "")).0.trim()
}

fn time(text: &str) -> DateTime<Utc> {
    let text = between(text, "", " UTC");
    NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").unwrap_or_else(|_| panic!("{text}")).and_utc()
}

/// `rmgr: Heap len (rec/tot): 59/ 59, tx: 730, lsn: 0/0151A2B8, prev 0/0151A280, desc: INSERT off 3 ...`
fn parse_line(text: &str) -> Line {
    let rmgr = RMGRS.iter().position(|name| *name == between(text, "rmgr: ", " ")).unwrap();
    let description = between(text, "desc: ", "\n");
    let (operation, rest) = description.split_once(' ').unwrap_or((description, ""));
    let prepared = || {
        let (xid, rest) = rest.split_once(": ").unwrap();
        (xid.parse().unwrap(), time(rest))
    };
    let kind = match (RMGRS[rmgr], operation) {
        ("Transaction", "COMMIT") => RecordKind::Commit { time: time(rest) },
        ("Transaction", "ABORT") => RecordKind::Abort { time: time(rest) },
        ("Transaction", "COMMIT_PREPARED") => {
            let (xid, time) = prepared();
            RecordKind::CommitPrepared { xid, time }
        }
        ("Transaction", "ABORT_PREPARED") => {
            let (xid, time) = prepared();
            RecordKind::AbortPrepared { xid, time }
        }
        ("XLOG", "CHECKPOINT_SHUTDOWN") => RecordKind::CheckpointShutdown,
        ("XLOG", "CHECKPOINT_ONLINE") => RecordKind::CheckpointOnline,
        ("XLOG", "SWITCH") => RecordKind::Switch,
        ("XLOG", "PARAMETER_CHANGE") => RecordKind::ParameterChange,
        ("XLOG", "END_OF_RECOVERY") => RecordKind::EndOfRecovery,
        // pg_waldump does not print the time of a restore point.
        ("XLOG", "RESTORE_POINT") => RecordKind::RestorePoint { name: rest.to_owned(), time: DateTime::UNIX_EPOCH },
        ("Standby", "RUNNING_XACTS") => RecordKind::RunningXacts,
        _ => RecordKind::Other,
    };
    Line {
        start: between(text, "lsn: ", ",").parse().unwrap(),
        rmgr: u8::try_from(rmgr).unwrap(),
        xid: between(text, "tx: ", ",").parse().unwrap(),
        kind,
    }
}

fn line_of(record: &Record) -> Line {
    let kind = match record.kind.clone() {
        RecordKind::RestorePoint { name, .. } => RecordKind::RestorePoint { name, time: DateTime::UNIX_EPOCH },
        kind => kind,
    };
    Line { start: record.start, rmgr: record.rmgr, xid: record.xid, kind }
}

/// Pushes everything in pieces of changing sizes.
fn walk(mut walker: RecordWalker, wal: &[u8], sizes: &[usize]) -> (Vec<Record>, RecordWalker) {
    let (mut records, mut total, mut rest) = (Vec::new(), Pushed::default(), wal);
    for size in sizes.iter().cycle() {
        let (piece, behind) = rest.split_at((*size).min(rest.len()));
        let pushed = walker.push(walker.position(), piece, |record| records.push(record.clone())).unwrap();
        assert_eq!(pushed.last.is_some(), pushed.records > 0);
        total.merge(&pushed);
        assert!(walker.last_complete().is_none_or(|(_, end)| end <= walker.position()));
        rest = behind;
        if rest.is_empty() {
            break;
        }
    }
    assert_eq!((total.records, total.last), (records.len() as u64, walker.last_complete()));
    assert_eq!(total.first, records.first().map(|record| record.start));
    let times = || records.iter().filter_map(|record| record.kind.commit_time());
    assert_eq!(total.commits, times().min().zip(times().max()));
    (records, walker)
}

/// The consecutive segments of a timeline, from the oldest that is still there.
fn segments(pg_wal: &Path, timeline: Timeline) -> (Lsn, Vec<u8>, Vec<String>) {
    let names = std::fs::read_dir(pg_wal).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter_map(|name| SegmentName::parse(&name, segment_size())).collect();
    names.retain(|name| name.timeline == timeline);
    names.sort();
    let (mut bytes, mut files) = (Vec::new(), Vec::new());
    for name in &names {
        let file = name.file_name(segment_size());
        let content = std::fs::read(pg_wal.join(&file)).unwrap();
        // Segments ahead of the end are recycled or preallocated files, which carry other contents than their name.
        let Ok(header) = check_segment(&file, &content) else { break };
        assert_eq!(header.name, *name);
        bytes.extend(content);
        files.push(file);
    }
    (names[0].start(segment_size()), bytes, files)
}

async fn workload(cluster: &Cluster) {
    cluster
        .sql(&[
            "create table t (id int primary key, body text)",
            "insert into t select g, repeat(md5(g::text), 8) from generate_series(1, 5000) g",
            "begin; insert into t values (-1, 'a'); savepoint a; insert into t values (-2, 'b'); rollback to a; \
             insert into t values (-3, 'c'); commit",
            "do $$ begin for i in 1..200 loop begin insert into t values (-1000 - i, ''); \
             exception when others then raise; end; end loop; end $$",
            "begin; update t set body = 'x' where id < 100; rollback",
            "begin; create table p1 (id int primary key); insert into p1 values (1); savepoint s; \
             insert into p1 values (2); prepare transaction 'first one'",
            "begin; create table p2 as select 1 as x; prepare transaction 'second'",
            "begin; drop table t; savepoint s; create table t2 (); rollback to s; prepare transaction 'third'",
            "commit prepared 'first one'",
            "rollback prepared 'second'",
            "rollback prepared 'third'",
            "begin; drop table p1; create sequence sq; prepare transaction 'fourth'",
            "commit prepared 'fourth'",
            "select pg_create_restore_point('before the große switch')",
            "select pg_switch_wal()",
            "select pg_logical_emit_message(true, 'big', repeat('x', 3000000))",
            "select pg_logical_emit_message(false, 'odd', repeat('x', 8191))",
            "checkpoint",
            "update t set body = repeat(md5(id::text), 20)",
            "select pg_switch_wal()",
            "select pg_switch_wal()",
        ])
        .await;
    let host = cluster.directory.path().display().to_string();
    cluster.run("pgbench", &["-h", &host, "-U", "postgres", "-i", "-q", "-s", "1", "postgres"]).await;
    cluster.run("pgbench", &["-h", &host, "-U", "postgres", "-n", "-c", "4", "-t", "100", "postgres"]).await;
}

async fn compare(cluster: &Cluster, timeline: Timeline, history: &History) -> usize {
    let pg_wal = cluster.data().join("pg_wal");
    let (start, wal, files) = segments(&pg_wal, timeline);
    let path = pg_wal.display().to_string();
    let number = timeline.to_string();
    let arguments = ["-p", &path, "-t", &number, &files[0], files.last().unwrap()];
    // It reports the end of WAL as an error.
    let (_, dump) = cluster.try_run("pg_waldump", &arguments).await;
    let expected: Vec<_> = dump.lines().filter(|line| line.starts_with("rmgr:")).map(parse_line).collect();
    assert!(expected.len() > 20, "{dump}");

    let expect = Expect { magic: magic_of(cluster.binaries.major), system_id: None, history: Some(history.clone()) };
    let walker = RecordWalker::new(start, segment_size()).unwrap().of_file().expecting(expect.clone());
    let (records, walker) = walk(walker.clone(), &wal, &[8192, 1, 131_072, 77, 8191]);
    let found: Vec<_> = records.iter().map(line_of).collect();
    assert!(matches!(walker.state(), WalkState::AtZeros(_)), "{:?}", walker.state());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());

    let times = || records.iter().filter_map(|record| record.kind.commit_time());
    for record in &records {
        if let RecordKind::RestorePoint { time, .. } = &record.kind {
            assert!(times().min().unwrap() < *time && *time < times().max().unwrap());
        }
    }

    // Every segment is a place to begin, and so is the end of any record.
    for offset in (0..wal.len()).step_by(1 << 20) {
        let begin = Lsn(start.0 + offset as u64);
        let walker = RecordWalker::new(begin, segment_size()).unwrap().of_file().expecting(expect.clone());
        let expected: Vec<_> = records.iter().filter(|record| record.start >= begin).cloned().collect();
        assert_eq!(walk(walker, &wal[offset..], &[65_536]).0, expected, "from {begin}");
    }
    for index in (0..records.len()).step_by(records.len() / 50 + 1) {
        let begin = records[index].end;
        let walker = RecordWalker::at_record(begin, segment_size()).unwrap().of_file().expecting(expect.clone());
        let offset = usize::try_from(begin.0 - start.0).unwrap();
        assert_eq!(walk(walker, &wal[offset..], &[65_536]).0, records[index + 1..], "from {begin}");
    }
    kinds_seen(&records)
}

/// The number of different kinds.
fn kinds_seen(records: &[Record]) -> usize {
    let kinds: HashMap<_, _> = records.iter().map(|record| (std::mem::discriminant(&record.kind), ())).collect();
    kinds.len()
}

async fn check_version(binaries: &PgBinaries) {
    let cluster = Cluster::create(binaries, &["--wal-segsize=1"]).await;
    let settings =
        [("wal_level", "logical"), ("max_prepared_transactions", "10"), ("wal_keep_size", "1GB"), ("fsync", "off")];
    let instance = cluster.start(&settings).await;
    workload(&cluster).await;
    cluster.stop(instance).await;
    let first = History::without_ancestors(Timeline(1));
    let kinds = compare(&cluster, Timeline(1), &first).await;
    assert_eq!(kinds, 11, "every kind but OverwriteContrecord and EndOfRecovery");

    std::fs::File::create(cluster.data().join("standby.signal")).unwrap();
    let instance =
        cluster.start(&[("wal_level", "replica"), ("max_prepared_transactions", "10"), ("wal_keep_size", "1GB")]).await;
    cluster.sql(&["select pg_promote()"]).await;
    workload_after_promotion(&cluster).await;
    cluster.stop(instance).await;
    let text = std::fs::read_to_string(cluster.data().join("pg_wal/00000002.history")).unwrap();
    let second = History::parse(Timeline(2), &text).unwrap();
    assert_eq!(second.print(), text);
    compare(&cluster, Timeline(2), &second).await;
}

async fn workload_after_promotion(cluster: &Cluster) {
    cluster
        .sql(&[
            "create table u (id int)",
            "begin; drop table u; savepoint a; create table v (); prepare transaction 'fifth'",
            "commit prepared 'fifth'",
            "insert into t select g, 'x' from generate_series(100000, 110000) g",
        ])
        .await;
}

#[test]
fn every_record_is_found_as_pg_waldump_finds_it() {
    block_on(async {
        for binaries in installed().await {
            check_version(&binaries).await;
        }
    });
}
