//! This side against drctl's own client of the other side, on a real socket.

use tokio::net::UnixListener;

use super::*;
use crate::pg::conninfo::ConnInfo;
use crate::pg::replication::{ReplicationClient, WalEvent};

const SYSTEM: SystemId = SystemId(7_123);
const SWITCH: Lsn = Lsn(0x300_0000 + 300_000);

fn wal() -> Vec<u8> {
    (0..300_000_u32).map(|n| n.to_le_bytes()[1] ^ n.to_le_bytes()[0]).collect()
}

/// Answers as a walsender of timelines 1 and 2 would.
async fn serve(listener: UnixListener) -> Result<Vec<Lsn>, PgError> {
    let (stream, _) = listener.accept().await.unwrap();
    let mut session = Session::accept(stream, 150_018).await?.unwrap();
    let mut flushed = Vec::new();
    while let Some(command) = session.command().await? {
        match command {
            Command::IdentifySystem => {
                session.identify(&Identity { system_id: SYSTEM, timeline: Timeline(2), end: SWITCH }).await?;
            }
            Command::Show(_) => session.show("16MB").await?,
            Command::TimelineHistory(Timeline(2)) => session.history(Timeline(2), b"1\t0/3\tx\n").await?,
            Command::TimelineHistory(timeline) => {
                let name = timeline.history_file_name();
                session.refuse(&Refusal::new(Refusal::UNDEFINED_FILE, format!("no {name}"))).await?;
            }
            Command::Start { at: SWITCH, .. } => session.next_timeline((Timeline(2), SWITCH)).await?,
            Command::Start { at, timeline: Some(Timeline(1)), .. } => {
                session.begin_copy().await?;
                session.keepalive(at, DateTime::UNIX_EPOCH, true).await?;
                let Feedback::Status(status) = session.feedback().await? else { panic!("no status") };
                flushed.push(status.flush);
                session.send_wal(at, &wal(), DateTime::UNIX_EPOCH).await?;
                session.end_timeline((Timeline(2), SWITCH)).await?;
            }
            Command::Start { at, .. } => {
                session.begin_copy().await?;
                session.send_wal(at, b"some", DateTime::UNIX_EPOCH).await?;
                while session.feedback().await? != Feedback::Done {}
                session.end_copy().await?;
            }
            Command::ReadSlot(_) | Command::CreateSlot { .. } => session.no_slot().await?,
        }
    }
    Ok(flushed)
}

#[tokio::test]
async fn a_client_gets_everything_up_to_the_switch_and_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
    let info = format!("host={} port=5432 user=x sslmode=disable", directory.path().display());
    let client = async {
        let mut client = ReplicationClient::connect(&ConnInfo::parse(&info, &|_| None).unwrap()).await.unwrap();
        assert_eq!(client.server_version(), 150_018);
        let identity = client.identify_system().await.unwrap();
        assert_eq!((identity.system_id, identity.timeline), (SYSTEM, Timeline(2)));
        assert_eq!(client.timeline_history(Timeline(2)).await.unwrap(), b"1\t0/3\tx\n");
        let absent = client.timeline_history(Timeline(3)).await.unwrap_err();
        assert!(absent.to_string().contains("58P01"), "{absent}");

        let start = Lsn(0x300_0000);
        let mut stream = client.start_physical(None, start, Timeline(1)).await.unwrap();
        let (mut received, mut ended) = (Vec::new(), None);
        while ended.is_none() {
            match stream.next().await.unwrap() {
                WalEvent::KeepAlive { reply_requested, .. } => {
                    assert!(reply_requested);
                    let status = StandbyStatus { write: start, flush: start, apply: start, reply_requested: false };
                    stream.send_status(status, DateTime::UNIX_EPOCH).await.unwrap();
                }
                WalEvent::Wal { data, .. } => received.extend_from_slice(&data),
                WalEvent::TimelineEnd { next_timeline, switch_lsn } => ended = Some((next_timeline, switch_lsn)),
            }
        }
        assert_eq!((ended, received), (Some((Timeline(2), SWITCH)), wal()));

        let client = stream.stop().await.unwrap();
        let mut stream = client.start_physical(None, SWITCH, Timeline(1)).await.unwrap();
        let expected = WalEvent::TimelineEnd { next_timeline: Timeline(2), switch_lsn: SWITCH };
        assert_eq!(stream.next().await.unwrap(), expected);
        let client = stream.stop().await.unwrap();
        let mut stream = client.start_physical(Some("s"), Lsn(0x300_0008), Timeline(2)).await.unwrap();
        assert!(matches!(stream.next().await.unwrap(), WalEvent::Wal { data, .. } if data.as_ref() == b"some"));
        let mut client = stream.stop().await.unwrap();
        assert_eq!(client.identify_system().await.unwrap().system_id, SYSTEM);
        client.close().await;
    };
    let (served, ()) = tokio::join!(serve(listener), client);
    assert_eq!(served.unwrap(), [Lsn(0x300_0000)]);
}

#[tokio::test]
async fn whoever_wants_sql_or_too_much_is_sent_away() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await.unwrap();
    theirs.write_all(b"\0\0\0\x10\0\x03\0\0user\0x\0\0").await.unwrap();
    let refused = Session::accept(ours, 180_000).await.unwrap_err();
    assert!(refused.to_string().contains("only physical replication"), "{refused}");
    let mut told = Vec::new();
    theirs.read_to_end(&mut told).await.unwrap();
    assert!(told.starts_with(b"NE"), "{told:?}");

    for head in [&b"\x7f\xff\xff\xff\0\0\0\0"[..], b"\0\0\0\x04\0\0\0\0"] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(head).await.unwrap();
        assert!(matches!(Session::accept(ours, 180_000).await, Err(PgError::Protocol(_))));
    }
    assert!(split_message(&mut BytesMut::from(&b"Q\x7f\xff\xff\xff"[..])).is_err());
    assert!(split_message(&mut BytesMut::from(&b"Q\0\0\0\x05"[..])).unwrap().is_none());
}
