//! The walker against WAL made up byte by byte.

use proptest::prelude::*;

use super::page::{LONG_HEADER, SHORT_HEADER};
use super::*;
use crate::model::WalSegmentSize;
use crate::pg::history::History;

const MAGIC: u16 = 0xD110;
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);
const RM_XACT: u8 = 1;
const RM_HEAP: u8 = 10;

fn segment_size() -> WalSegmentSize {
    WalSegmentSize::try_from(1 << 20).unwrap()
}

/// Writes WAL as a server does.
#[derive(Debug)]
struct Writer {
    start: Lsn,
    bytes: Vec<u8>,
    previous: Lsn,
    records: Vec<(Lsn, Lsn)>,
    /// Bit numbers that PostgreSQL never reads.
    idle_bits: Vec<std::ops::Range<usize>>,
}

impl Writer {
    fn new(start: Lsn) -> Self {
        Self { start, bytes: Vec::new(), previous: Lsn(start.0 - 64), records: Vec::new(), idle_bits: Vec::new() }
    }

    fn position(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn page_header(&mut self, remaining: usize, flags: u16) {
        let at = self.position();
        let is_long = at.0.is_multiple_of(segment_size().bytes());
        let begin = self.bytes.len() * 8;
        let flags = flags | u16::from(remaining > 0) | u16::from(is_long) << 1;
        self.bytes.extend(MAGIC.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(1_u32.to_le_bytes());
        self.bytes.extend(at.0.to_le_bytes());
        self.bytes.extend(u32::try_from(remaining).unwrap().to_le_bytes());
        self.bytes.extend([0; 4]);
        if is_long {
            self.bytes.extend(SYSTEM.0.to_le_bytes());
            self.bytes.extend(u32::try_from(segment_size().bytes()).unwrap().to_le_bytes());
            self.bytes.extend(8192_u32.to_le_bytes());
        }
        self.idle_bits.push(begin + 18..begin + 19);
        self.idle_bits.push(begin + 160..begin + 192);
    }

    fn at_page_start(&self) -> bool {
        self.position().0.is_multiple_of(WAL_PAGE_SIZE)
    }

    /// One record with this main data.
    fn record(&mut self, rmgr: u8, info: u8, main: &[u8]) {
        if self.at_page_start() {
            self.page_header(0, 0);
        }
        let start = self.position();
        let record = self.encode(rmgr, info, main);
        self.write(&record);
        let padding = self.bytes.len().next_multiple_of(8) - self.bytes.len();
        self.idle_bits.push(self.bytes.len() * 8..(self.bytes.len() + padding) * 8);
        self.bytes.extend(vec![0; padding]);
        self.previous = start;
        self.records.push((start, self.position()));
    }

    fn encode(&self, rmgr: u8, info: u8, main: &[u8]) -> Vec<u8> {
        let mut body = match u8::try_from(main.len()) {
            Ok(0) => Vec::new(),
            Ok(length) => vec![255, length],
            Err(_) => [&[254][..], &u32::try_from(main.len()).unwrap().to_le_bytes()].concat(),
        };
        body.extend(main);
        let mut record = Vec::new();
        record.extend(u32::try_from(body.len() + 24).unwrap().to_le_bytes());
        record.extend(731_u32.to_le_bytes());
        record.extend(self.previous.0.to_le_bytes());
        record.extend([info, rmgr, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        record
    }

    fn write(&mut self, mut record: &[u8]) {
        while !record.is_empty() {
            if self.at_page_start() {
                self.page_header(record.len(), 0);
            }
            let room = usize::try_from(WAL_PAGE_SIZE - self.position().0 % WAL_PAGE_SIZE).unwrap();
            let (piece, rest) = record.split_at(room.min(record.len()));
            self.bytes.extend(piece);
            record = rest;
        }
    }

    /// A crash in the middle of a record: the next page begins with a record that says so.
    fn crash(&mut self, length: usize, names: impl Fn(Lsn) -> Lsn) {
        let start = self.position();
        let record = self.encode(RM_HEAP, 0, &vec![9; length]);
        let room = usize::try_from(WAL_PAGE_SIZE - start.0 % WAL_PAGE_SIZE).unwrap();
        self.write(&record[..room]);
        self.page_header(0, 8);
        let main = [names(start).0.to_le_bytes(), [0; 8]].concat();
        self.record(0, 0xD0, &main);
    }

    fn switch(&mut self) {
        self.record(0, 0x40, &[]);
        let end = usize::try_from(segment_size().bytes()).unwrap();
        let end = self.bytes.len().next_multiple_of(end);
        self.idle_bits.push(self.bytes.len() * 8..end * 8);
        self.bytes.resize(end, 0);
        self.records.last_mut().unwrap().1 = self.position();
    }
}

fn expect() -> Expect {
    Expect { magic: Some(MAGIC), system_id: Some(SYSTEM), history: Some(History::without_ancestors(Timeline(1))) }
}

fn walk(walker: RecordWalker, bytes: &[u8], piece: usize) -> Result<(Vec<Record>, RecordWalker), WalError> {
    let (mut walker, mut records) = (walker, Vec::new());
    for piece in bytes.chunks(piece) {
        walker.push(walker.position(), piece, |record| records.push(record.clone()))?;
    }
    Ok((records, walker))
}

fn walk_all(writer: &Writer, piece: usize) -> Result<(Vec<Record>, RecordWalker), WalError> {
    walk(RecordWalker::new(writer.start, segment_size()).unwrap().expecting(expect()), &writer.bytes, piece)
}

fn positions(records: &[Record]) -> Vec<(Lsn, Lsn)> {
    records.iter().map(|record| (record.start, record.end)).collect()
}

/// Three pages: records of all alignments, one that spans two pages, one that ends with its page.
fn small_wal() -> Writer {
    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_XACT, 0, &820_540_800_000_000_i64.to_le_bytes());
    for length in [1, 6, 100, 300, 7000, 9000] {
        writer.record(RM_HEAP, 0x20, &vec![7; length]);
    }
    let room = usize::try_from(WAL_PAGE_SIZE - writer.position().0 % WAL_PAGE_SIZE).unwrap();
    writer.record(RM_HEAP, 0, &vec![1; room - 24 - 5]);
    writer.record(RM_XACT, 0x20, &0_i64.to_le_bytes());
    writer
}

#[test]
fn every_flipped_bit_is_an_error_or_never_read() {
    let mut writer = small_wal();
    let (records, _) = walk_all(&writer, 8192).unwrap();
    assert_eq!(positions(&records), writer.records);
    let last = writer.records.last().unwrap().0;
    let mut idle = 0;
    for bit in 0..writer.bytes.len() * 8 {
        writer.bytes[bit / 8] ^= 1 << (bit % 8);
        match walk_all(&writer, 8192) {
            Err(_) => {}
            // A length too great by far can only be seen when more WAL comes; until then the record is not complete.
            Ok((_, walker)) if walker.state() == WalkState::InRecord(last) => {}
            Ok((found, _)) => {
                assert_eq!(found, records, "bit {bit}");
                assert!(writer.idle_bits.iter().any(|range| range.contains(&bit)), "bit {bit}");
                idle += 1;
            }
        }
        writer.bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(idle, writer.idle_bits.iter().map(|range| range.len()).sum::<usize>());
}

#[test]
fn a_walk_begins_behind_the_continuation_of_an_older_record() {
    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_HEAP, 0, &vec![3; 20_001]);
    writer.record(RM_HEAP, 0, b"next");
    for page in [8192, 16_384] {
        let begin = Lsn(writer.start.0 + page as u64);
        let mut bytes = writer.bytes[page..].to_vec();
        let start = || RecordWalker::new(begin, segment_size()).unwrap().expecting(expect());
        assert_eq!(positions(&walk(start(), &bytes, 5).unwrap().0), writer.records[1..]);
        // A length of the rest that leads elsewhere must not pass over a record.
        for bit in 16 * 8..20 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            // Another length may end in the same padding, or beyond the data.
            if let Ok((records, _)) = walk(start(), &bytes, 8192) {
                assert!(records.is_empty() || positions(&records) == writer.records[1..], "bit {bit}");
            }
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_length_that_passes_over_whole_records_is_seen() {
    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_HEAP, 0, &vec![3; 9000]);
    // Each of 64 bytes: adding 64 to the rest of the first record leads to the start of the third.
    for _ in 0..4 {
        writer.record(RM_HEAP, 0, &[5; 38]);
    }
    let mut bytes = writer.bytes[8192..].to_vec();
    let remaining = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
    bytes[16..20].copy_from_slice(&(remaining + 64).to_le_bytes());
    let walker = RecordWalker::new(Lsn(writer.start.0 + 8192), segment_size()).unwrap();
    assert!(matches!(walk(walker, &bytes, 8192), Err(WalError::Record { .. })));
}

#[test]
fn a_walk_that_knows_the_record_before_it_takes_no_other() {
    let mut writer = Writer::new(Lsn(0x10_0000));
    for byte in 0..3 {
        writer.record(RM_HEAP, 0, &[byte; 38]);
    }
    let ((first, _), (second, _)) = (writer.records[0], writer.records[1]);
    let bytes = &writer.bytes[usize::try_from(second.0 - writer.start.0).unwrap()..];
    let from = |last| walk(RecordWalker::at_record(second, segment_size()).unwrap().following(last), bytes, 8192);
    for known in [None, Some(first)] {
        assert_eq!(positions(&from(known).unwrap().0), writer.records[1..]);
    }
    let other = from(Some(Lsn(first.0 + 8))).unwrap_err();
    assert_eq!(other, WalError::OtherPast { at: second, expected: Lsn(first.0 + 8), got: first });
}

#[test]
fn a_switch_is_complete_at_the_end_of_its_segment() {
    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_HEAP, 0, b"before");
    writer.switch();
    writer.record(RM_HEAP, 0, b"behind");
    for piece in [1, 8192, 1 << 21] {
        let (records, walker) = walk_all(&writer, piece).unwrap();
        assert_eq!(positions(&records), writer.records);
        assert_eq!(records[1].kind, RecordKind::Switch);
        assert_eq!(walker.last_complete(), writer.records.last().copied());
        assert_eq!(walker.state(), WalkState::AtBoundary);
    }
    let walker = RecordWalker::new(writer.start, segment_size()).unwrap();
    let (records, walker) = walk(walker, &writer.bytes[..(1 << 20) - 1], 8192).unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(walker.state(), WalkState::InRecord(writer.records[1].0));
}

#[test]
fn a_record_cut_off_by_a_crash_is_replaced() {
    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_HEAP, 0, b"before");
    writer.crash(20_000, |start| start);
    writer.record(RM_HEAP, 0, b"behind");
    let (records, _) = walk_all(&writer, 100).unwrap();
    assert_eq!(positions(&records), writer.records);
    assert_eq!(records[1].kind, RecordKind::OverwriteContrecord);
    let begin = RecordWalker::new(Lsn(writer.start.0 + 8192), segment_size()).unwrap();
    assert_eq!(walk(begin, &writer.bytes[8192..], 100).unwrap().0, records[1..]);

    let mut writer = Writer::new(Lsn(0x10_0000));
    writer.record(RM_HEAP, 0, b"before");
    writer.crash(20_000, |start| Lsn(start.0 + 8));
    assert!(matches!(walk_all(&writer, 100), Err(WalError::Record { .. })));
}

#[test]
fn zeros_end_a_file_and_break_a_stream() {
    let mut writer = small_wal();
    let end = writer.position();
    writer.bytes.resize(writer.bytes.len().next_multiple_of(8192) + 8192, 0);
    assert_eq!(walk_all(&writer, 8192).unwrap_err(), WalError::Zeros { at: end });
    let file = || RecordWalker::new(writer.start, segment_size()).unwrap().of_file().expecting(expect());
    let (records, walker) = walk(file(), &writer.bytes, 8192).unwrap();
    assert_eq!(positions(&records), writer.records);
    assert_eq!(walker.state(), WalkState::AtZeros(end));
    // A length of zero in front of a record is no end.
    let length = usize::try_from(writer.records[2].0.0 - writer.start.0).unwrap();
    let mut bytes = writer.bytes.clone();
    bytes[length..length + 4].fill(0);
    assert!(matches!(walk(file(), &bytes, 3), Err(WalError::Record { .. })));
    bytes[length..length + 24].fill(0);
    assert!(matches!(walk(file(), &bytes, 3), Err(WalError::Record { .. })));
}

#[test]
fn pieces_must_be_contiguous() {
    let writer = small_wal();
    let mut walker = RecordWalker::new(writer.start, segment_size()).unwrap();
    walker.push(writer.start, &writer.bytes[..100], |_| ()).unwrap();
    let expected = Lsn(writer.start.0 + 100);
    for got in [Lsn(0), writer.start, Lsn(expected.0 + 1), Lsn(u64::MAX)] {
        assert_eq!(walker.push(got, b"x", |_| ()).unwrap_err(), WalError::NotContiguous { expected, got });
    }
    for start in [1, 8, 23, 39, 0x10_0010, 8192 + 16, 8192 + 12, u64::MAX] {
        assert!(RecordWalker::new(Lsn(start), segment_size()).is_err(), "{start}");
        assert!(RecordWalker::at_record(Lsn(start), segment_size()).is_err(), "{start}");
    }
    assert!(RecordWalker::at_record(Lsn(8192 + 24), segment_size()).is_ok());
}

#[test]
fn other_clusters_timelines_and_versions_are_told_apart() {
    let writer = small_wal();
    let refused = |expect| {
        let walker = RecordWalker::new(writer.start, segment_size()).unwrap().expecting(expect);
        walk(walker, &writer.bytes, 8192).unwrap_err()
    };
    let at = writer.start;
    assert_eq!(
        refused(Expect { system_id: Some(SystemId(1)), ..expect() }),
        WalError::OtherSystem { at, expected: SystemId(1), got: SYSTEM }
    );
    assert_eq!(
        refused(Expect { history: Some(History::without_ancestors(Timeline(2))), ..expect() }),
        WalError::OtherTimeline { at, expected: Timeline(2), got: Timeline(1) }
    );
    assert_eq!(refused(Expect { magic: magic_of(18), ..expect() }), WalError::OtherVersion { at, got: MAGIC });
}

#[test]
fn a_segment_is_the_one_its_name_says() {
    let mut writer = Writer::new(Lsn(0x30_0000));
    writer.switch();
    let bytes = &writer.bytes;
    let header = check_segment("000000010000000000000003", bytes).unwrap();
    assert_eq!((header.system_id, header.segment_size), (SYSTEM, segment_size()));
    assert_eq!(header.page_timeline, Timeline(1));
    // The first segment of timeline 2 begins with pages of timeline 1.
    assert!(check_segment("000000020000000000000003", bytes).is_ok());
    for name in ["000000010000000000000004", "000000010000000100000003", "000000010000000000000003.partial", ""] {
        assert!(check_segment(name, bytes).is_err(), "{name}");
    }
    for length in [0, 23, 39, 8192, bytes.len() - 1] {
        assert!(check_segment("000000010000000000000003", &bytes[..length]).is_err(), "{length}");
    }
    assert_eq!((SHORT_HEADER, LONG_HEADER), (24, 40));
}

/// A commit of a prepared transaction with every section in front of its id.
fn commit_prepared(counts: [u16; 4], stats_item: usize) -> Vec<u8> {
    let xinfo: u32 = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 5;
    let mut main = [&1_000_000_i64.to_le_bytes()[..], &xinfo.to_le_bytes(), &[1; 8]].concat();
    for (count, item) in counts.into_iter().zip([4, 12, stats_item, 16]) {
        main.extend(u32::from(count).to_le_bytes());
        main.extend(vec![2; usize::from(count) * item]);
    }
    main.extend(4711_u32.to_le_bytes());
    main.extend(b"a gid\0");
    main.extend([3; 16]);
    main
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_prepared_transaction_is_found_behind_every_section(counts: [u8; 4], piece in 1usize..5000) {
        let counts = counts.map(u16::from);
        let mut writer = Writer::new(Lsn(0x10_0000));
        writer.record(RM_XACT, 0x80 | 0x30, &commit_prepared(counts, 12));
        let (records, _) = walk_all(&writer, piece).unwrap();
        let time = timestamp(1_000_000).unwrap();
        prop_assert_eq!(&records[0].kind, &RecordKind::CommitPrepared { xid: 4711, time });
    }

    #[test]
    fn what_is_written_is_found(
        lengths in prop::collection::vec(prop_oneof![0usize..300, 8000usize..8400, 0usize..40_000], 1..30),
        piece in 1usize..20_000,
        pages in 0u64..130
    ) {
        let mut writer = Writer::new(Lsn(0x10_0000 + pages * 8192));
        for length in lengths {
            writer.record(RM_HEAP, 0, &vec![4; length]);
        }
        let (records, walker) = walk_all(&writer, piece).unwrap();
        prop_assert_eq!(positions(&records), writer.records.clone());
        prop_assert_eq!(walker.position(), writer.position());
        prop_assert_eq!(walker.last_complete(), writer.records.last().copied());
        for (index, (_, end)) in writer.records.iter().enumerate() {
            let offset = usize::try_from(end.0 - writer.start.0).unwrap();
            let walker = RecordWalker::at_record(*end, segment_size()).unwrap().expecting(expect());
            prop_assert_eq!(&walk(walker, &writer.bytes[offset..], piece).unwrap().0, &records[index + 1..]);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..20_000), at_record: bool) {
        let start = Lsn(0x10_0000);
        let walker = if at_record {
            RecordWalker::at_record(Lsn(start.0 + 40), segment_size())
        } else {
            RecordWalker::new(start, segment_size())
        };
        let _ = walk(walker.unwrap().of_file(), &bytes, 100);
        let _ = check_segment("000000010000000000000003", &bytes);
    }
}
