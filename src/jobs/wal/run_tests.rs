//! What a receiver may believe to be durable when the server, or its timeline, is another one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::jobs::context::{Context, Detection, Objectives, Target};
use crate::jobs::wal::buffer::Chunk;
use crate::jobs::wal::run::{Run, Trouble};
use crate::jobs::wal::server::Start;
use crate::jobs::wal::shared::Shared;
use crate::jobs::wal::shipper::{Frame, Means};
use crate::model::{Lsn, Timeline};
use crate::pg::conninfo::ConnInfo;
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::testing::{Fault, Fixture, HISTORY, log};
use crate::repository::wal::adopt::Era;
use crate::repository::wal::frame::EpochKind;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::log::{Marks, branch_of};
use crate::source::postgres::Method;

fn target(place: &Path) -> Target {
    Target {
        name: log().target,
        objectives: Objectives::default(),
        conninfo: ConnInfo::parse("host=/nowhere user=nobody", &|_| None).unwrap(),
        method: Method::Auto,
        detection: Detection::Read,
        full_every: Duration::from_secs(1),
        data_dir: None,
        standby: None,
        slot: "drctl_ledger".to_owned(),
        ship_interval: Duration::from_secs(1),
        max_read_rate: None,
        on_pressure: None,
        pressure_percent: 90,
        wal_disk_bytes: None,
        standby_slots: false,
        stream: true,
        heartbeat: false,
        sync: true,
        control_socket: place.join("ledger.sock"),
        config_files: Vec::new(),
        heartbeat_database: "postgres".to_owned(),
        assertions: Vec::new(),
    }
}

async fn run(fixture: &Fixture) -> Run {
    let repository = fixture.repository.clone();
    let context = crate::jobs::tests::context(fixture).await;
    let context = Context { repository, writer: Some(fixture.writer.clone()), ..context };
    let out = Arc::new(FanOut::new(&fixture.repository.regions, Patience::WAL));
    let shared = Arc::new(Shared::new(log().target, Arc::clone(&context.clock), &out));
    let means = Means { out, shipped: Arc::clone(&shared.shipped), book: None, known: Arc::default() };
    let target = target(fixture.files.path());
    Run::new((&context, &target), EpochKind::Stream, (means, shared), CancellationToken::new()).unwrap()
}

fn frame(start: u64, end: u64) -> Frame {
    let marks = Marks { first_record: Some(Lsn(start)), last_record: Some((Lsn(start), Lsn(end))), commits: None };
    let wal = vec![1; usize::try_from(end - start).unwrap()];
    let chunk = Chunk { start: Lsn(start), wal, marks, at_boundary: true };
    Frame { log: log(), session: 1, is_newest: true, chunk }
}

fn old(lsn: u64) -> Start {
    Start { branch: log().branch_id(), lsn: Lsn(lsn), at_record: true, last: None, commits: None }
}

fn new(lsn: u64) -> Start {
    let branch = BranchId { timeline: Timeline(2), branch: branch_of(HISTORY), ..log().branch_id() };
    Start { branch, lsn: Lsn(lsn), at_record: true, last: None, commits: None }
}

async fn ship(run: &Run, frame: Frame) {
    let room = run.shipper.room(frame.chunk.wal.len()).await.unwrap();
    run.shipper.ship(frame, room);
}

/// The server dies while frames of its timeline are on their way to slow regions, up to 1200. The standby that takes its place
/// had come to 1150. A commit that ends at 1190 on the new timeline is stored nowhere when those frames land.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_of_the_timeline_that_was_left_say_nothing_of_the_new_one() {
    let fixture = Fixture::memory(2, 2).await;
    let mut run = run(&fixture).await;
    assert_eq!(run.settle(&old(1000), false).await.unwrap(), Lsn(1000));
    ship(&run, frame(1000, 1100)).await;
    run.ship_pending().await.unwrap();
    assert_eq!(
        run.settle(&old(1100), false).await.unwrap(),
        Lsn(1100),
        "a connection that is made again waits for nothing"
    );
    fixture.stores[1].set(Fault::Fail);
    ship(&run, frame(1100, 1150)).await;
    run.pending.push_back(frame(1150, 1200));
    let start = new(1150);
    {
        let mut settling = std::pin::pin!(run.settle(&start, false));
        let early = timeout(Duration::from_millis(300), &mut settling).await;
        assert!(early.is_err(), "what leads to the new timeline is not stored yet: {early:?}");
        fixture.stores[1].set(Fault::None);
        assert_eq!(settling.await.unwrap(), Lsn(1150));
    }
    ship(&run, frame(1200, 1240)).await;
    run.ship_pending().await.unwrap();
    let shipped = run.shared.shipped.borrow().clone();
    assert_eq!((shipped.on(&start.branch), shipped.durable), (Some(Lsn(1150)), Lsn(1150)));
}

/// Nothing is on its way of a shipper that died, and nothing of what it had arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_died_has_shipped_nothing() {
    let fixture = Fixture::memory(3, 2).await;
    let mut run = run(&fixture).await;
    run.settle(&old(1000), false).await.unwrap();
    ship(&run, frame(1000, 1100)).await;
    run.ship_pending().await.unwrap();
    let eras = [Era { branch: log().branch_id(), end: None }];
    assert_eq!(fixture.take_over(&eras, None).await.unwrap().unwrap().sealed, 1);
    run.pending.push_back(frame(1100, 1200));
    let settled = run.settle(&new(1200), false).await;
    assert!(matches!(settled, Err(Trouble::ShipperGone)), "{settled:?}");
    assert_eq!(run.shared.shipped.borrow().on(&new(1200).branch), None);
}
