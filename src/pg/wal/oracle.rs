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

/// A page as `pg_waldump` names it: tablespace, database, relation, fork, block.
type Named = (u32, u32, u32, u8, u32);

/// `blkref #0: rel 1663/5/16384 fork vm blk 0 FPW`, as many as a record has. The fork is left out where it is the main one,
/// and so are `blk` and the word `rel` of a line of its own since 15.
fn references(line: &str) -> Vec<Named> {
    let reference = |text: &str| {
        let mut words = between(text, "rel ", "blkref").split_whitespace();
        let mut oids = words.next().unwrap().trim_end_matches(',').split('/').map(|oid| oid.parse().unwrap());
        let mut oid = || oids.next().unwrap();
        let (tablespace, database, node) = (oid(), oid(), oid());
        let mut fork = 0;
        let mut word = words.next().unwrap();
        if word == "fork" {
            let names = ["main", "fsm", "vm", "init"];
            let name = words.next().unwrap();
            fork = u8::try_from(names.iter().position(|known| *known == name).unwrap()).unwrap();
            word = words.next().unwrap();
        }
        assert_eq!(word, "blk", "{text}");
        let block = words.next().unwrap().trim_end_matches([',', ';']).parse().unwrap();
        (tablespace, database, node, fork, block)
    };
    line.split("blkref #").skip(1).map(reference).collect()
}

/// Every access method, and whatever moves, cuts or replaces files.
async fn touching_workload(cluster: &Cluster) {
    let space = cluster.path("space");
    cluster.make_directory(space.to_str().unwrap());
    let tablespace = format!("create tablespace space location '{}'", space.display());
    cluster
        .sql(&[
            "create table t (id int primary key, body text, tags int[], place point, ip inet)",
            "insert into t select g, repeat(md5(g::text), 6), array[g % 7, g], point(g, g), '10.0.0.0'::inet + g \
             from generate_series(1, 6000) g",
            "create index on t using hash (id); create index on t using gin (tags); create index on t using gist (place)",
            "create index on t using spgist (ip inet_ops); create index on t using brin (id)",
            "checkpoint",
            "update t set body = body || 'x', tags = tags || 3, place = point(id, 1) where id % 3 = 0",
            "delete from t where id > 4000",
            "vacuum (freeze) t",
            "insert into t select g, 'y', array[g], point(g, 2), '11.0.0.0'::inet + g from generate_series(9000, 9900) g",
            "create sequence s; select nextval('s'), setval('s', 100)",
            "create table big as select g, repeat(md5(g::text), 200) as wide from generate_series(1, 300) g",
            "begin; create table f (a int); copy f from program 'seq 1 2000' with (freeze); commit",
            "cluster t using t_pkey; reindex table t; truncate f",
            "vacuum full big",
            &tablespace,
        ])
        .await;
    for statement in ["create database copied template template1", "alter table t set tablespace space"] {
        cluster.sql(&[statement]).await;
    }
    if cluster.binaries.major >= 15 {
        cluster.sql(&["create database cloned template template1 strategy file_copy"]).await;
    }
    cluster.sql(&["alter database copied set tablespace space", "drop database copied", "checkpoint"]).await;
    cluster.sql(&["create unlogged table u as select 1 as a; alter table u set logged; drop table big"]).await;
}

async fn check_references(binaries: &PgBinaries) {
    let cluster = Cluster::create(binaries, &["--wal-segsize=1", "--data-checksums"]).await;
    let compression = if binaries.major >= 15 { "lz4" } else { "on" };
    let instance = cluster
        .start(&[
            ("wal_level", "replica"),
            ("wal_keep_size", "1GB"),
            ("fsync", "off"),
            ("wal_compression", compression),
        ])
        .await;
    touching_workload(&cluster).await;
    cluster.stop(instance).await;
    let pg_wal = cluster.data().join("pg_wal");
    let (start, wal, files) = segments(&pg_wal, Timeline(1));
    let path = pg_wal.display().to_string();
    let (_, dump) = cluster.try_run("pg_waldump", &["-p", &path, "-t", "1", &files[0], files.last().unwrap()]).await;
    let lines: Vec<_> = dump.lines().filter(|line| line.starts_with("rmgr:")).collect();

    let expect = Expect { magic: magic_of(binaries.major), ..Expect::default() };
    let walker = RecordWalker::new(start, segment_size()).unwrap().of_file().expecting(expect).reading_blocks();
    let (records, _) = walk(walker, &wal, &[8192, 1, 131_072, 77, 8191]);
    assert_eq!(records.len(), lines.len());
    let (mut blocks, mut special) = (0, [0; 3]);
    for (record, line) in records.iter().zip(&lines) {
        let named: Vec<Named> = record
            .touched
            .iter()
            .filter_map(|touch| match touch {
                Touch::Block { relation: r, fork, block } => Some((r.tablespace, r.database, r.node, *fork, *block)),
                _ => None,
            })
            .collect();
        assert_eq!(named, references(line), "{line}");
        blocks += named.len();
        for touch in &record.touched {
            match touch {
                Touch::Block { .. } => {}
                Touch::From { block: 0, .. } => special[0] += 1,
                Touch::From { .. } => special[1] += 1,
                Touch::Database(_) => special[2] += 1,
                Touch::Unknown(why) => panic!("{why}: {line}"),
            }
        }
        assert_eq!(line.starts_with("rmgr: Database"), record.touched.iter().any(|t| matches!(t, Touch::Database(_))));
        assert_eq!(record.previous, between(line, "prev ", ",").parse().unwrap());
    }
    let ids: std::collections::BTreeSet<_> = records.iter().filter(|r| !r.touched.is_empty()).map(|r| r.rmgr).collect();
    for rmgr in ["Heap2", "Heap", "Btree", "Hash", "Gin", "Gist", "Sequence", "SPGist", "BRIN", "Storage", "Database"] {
        let id = RMGRS.iter().position(|name| *name == rmgr).unwrap();
        assert!(ids.contains(&u8::try_from(id).unwrap()), "{rmgr} in {}", binaries.major);
    }
    assert!(blocks > 5000 && special.iter().all(|count| *count > 0), "{blocks} {special:?}");
}

#[test]
fn every_changed_page_is_found_as_pg_waldump_finds_it() {
    block_on(async {
        for binaries in installed().await {
            check_references(&binaries).await;
        }
    });
}
