//! One walreceiver: its commands, and the stream that it asks for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::jobs::feed::look::Depth;
use crate::jobs::feed::stock::{PIECE, Reach};
use crate::jobs::feed::{Doubt, Shared};
use crate::model::{Error, Kind, Lsn, Result, Timeline};
use crate::observe::task;
use crate::pg::PgError;
use crate::pg::replication::StandbyStatus;
use crate::pg::walsender::{Command, Feedback, Identity, Refusal, Session};
use crate::repository::wal::index;

/// How often the reader is asked how far it is. It hangs up after `wal_receiver_timeout` without a word, a minute.
const ASK: Duration = Duration::from_secs(1);
/// Pieces that wait for the one that is sent.
const WAITING: usize = 1;
/// Pieces that are read at the same time: some 150 MiB at most, with their frames.
const AT_ONCE: usize = 3;
/// Contents are wrong, or may be.
const DATA_CORRUPTED: &str = "XX001";

enum Piece {
    Wal(Lsn, Vec<u8>),
    Switch(Timeline, Lsn),
}

/// Serves a connection to its end.
pub(super) async fn serve(shared: Arc<Shared>, stream: UnixStream) {
    match commands(&shared, stream).await {
        Ok(()) => tracing::debug!("the walreceiver is gone"),
        Err(error @ PgError::Closed(_)) => tracing::debug!(%error, "the walreceiver's connection ended"),
        Err(error) => tracing::warn!(%error, "the feed ended a connection"),
    }
    let mut position = shared.position();
    (position.connected, position.sent) = (false, None);
}

async fn commands(shared: &Arc<Shared>, stream: UnixStream) -> Result<(), PgError> {
    let version = shared.options.origin.server_version;
    let Some(mut session) = Session::accept(stream, version).await? else { return Ok(()) };
    while let Some(command) = session.command().await? {
        match command {
            Command::IdentifySystem => match identity(shared).await {
                Ok(identity) => session.identify(&identity).await?,
                Err(error) => return Err(doubt(&mut session, &error).await),
            },
            Command::TimelineHistory(timeline) => match history(shared, timeline).await {
                Ok(content) => session.history(timeline, &content).await?,
                Err(refusal) => {
                    // The walreceiver ends with that and asks again, for ever, and the server's log alone would say why.
                    let at = shared.position().replayed.unwrap_or(shared.options.origin.stop_lsn);
                    let why = format!("the history of timeline {timeline} cannot be given: {}", refusal.message);
                    shared.position().doubt = Some(Doubt { at, why });
                    session.refuse(&refusal).await?;
                }
            },
            Command::Show(name) if name == "wal_segment_size" => {
                let size = shared.options.origin.wal_segment_size.bytes();
                session.show(&format!("{}MB", size >> 20)).await?;
            }
            Command::Show(name) => {
                let what = format!("unrecognized configuration parameter \"{name}\"");
                session.refuse(&Refusal::new(Refusal::UNDEFINED_OBJECT, what)).await?;
            }
            Command::ReadSlot(_) => session.no_slot().await?,
            Command::CreateSlot { name, .. } => session.slot_created(&name, Lsn::INVALID).await?,
            Command::Start { at, timeline, .. } => {
                let newest = shared.stock.read().await.way.history.timeline();
                stream_from(shared, &mut session, (timeline.unwrap_or(newest), at)).await?;
            }
        }
    }
    Ok(())
}

async fn identity(shared: &Shared) -> Result<Identity> {
    shared.look(Depth::New).await?;
    let stock = shared.stock.read().await;
    let origin = &shared.options.origin;
    let end = stock.end((origin.timeline, origin.stop_lsn))?;
    // The end may lie on an older timeline while WAL of the newest is still to come: the reader goes on there by itself.
    let timeline = stock.way.history.timeline();
    Ok(Identity { system_id: origin.system_id, timeline, end: end.lsn })
}

/// A history file. Absent is told only of what no region can have.
async fn history(shared: &Shared, timeline: Timeline) -> Result<Vec<u8>, Refusal> {
    let stock = shared.stock.read().await;
    let own = stock.way.branches.get(&timeline);
    let named = |number: Timeline| stock.histories.iter().filter(move |stored| stored.timeline == number);
    let found = match own {
        Some(branch) => named(timeline).find(|stored| stored.branch == *branch),
        None => named(timeline).next(),
    };
    if let Some(found) = found {
        return Ok(found.content.to_vec());
    }
    let name = timeline.history_file_name();
    let cannot = |error: Error| Refusal {
        code: Refusal::NOT_NOW,
        message: format!("whether there is a \"{name}\" cannot be told"),
        detail: Some(error.to_string()),
    };
    let regions = &shared.context.repository.regions;
    let silent = shared.position().silent.len();
    if silent >= regions.lowest_quorum() {
        return Err(cannot(Error::failed("too many regions do not answer")));
    }
    let branches = index::branches(regions, shared.options.origin.system_id).await.map_err(cannot)?;
    if branches.iter().any(|branch| branch.timeline == timeline) {
        return Err(cannot(Error::failed("WAL of that timeline is stored, and its history is in no region")));
    }
    let message = format!("could not open file \"pg_wal/{name}\": No such file or directory");
    Err(Refusal::new(Refusal::UNDEFINED_FILE, message))
}

/// Tells a doubt, which ends the connection.
async fn doubt(session: &mut Session, error: &Error) -> PgError {
    let detail = error.causes().join("; ");
    let detail = (!detail.is_empty()).then_some(detail);
    session.fatal(&Refusal { code: DATA_CORRUPTED, message: error.message().to_owned(), detail }).await
}

async fn stream_from(
    shared: &Arc<Shared>,
    session: &mut Session,
    (timeline, at): (Timeline, Lsn),
) -> Result<(), PgError> {
    if let Err(error) = shared.reach_back(timeline, at).await {
        return Err(doubt(session, &error).await);
    }
    let reach = shared.stock.read().await.reach(timeline, at);
    match reach {
        Err(error) => return Err(doubt(session, &error).await),
        Ok(Reach::Switch(next, switch)) => return session.next_timeline((next, switch)).await,
        Ok(Reach::To(_) | Reach::Nothing) => {}
    }
    session.begin_copy().await?;
    {
        let mut position = shared.position();
        (position.connected, position.timeline, position.sent) = (true, Some(timeline), Some(at));
    }
    let (sender, mut pieces) = mpsc::channel(WAITING);
    let _reading =
        AbortOnDropHandle::new(task::spawn("feed-read", read_on(Arc::clone(shared), (timeline, at), sender)));
    let mut ask = tokio::time::interval(ASK);
    loop {
        let now = shared.context.clock.now();
        tokio::select! {
            piece = pieces.recv() => match piece {
                Some(Ok(Piece::Wal(at, wal))) => {
                    session.send_wal(at, &wal, now).await?;
                    let mut position = shared.position();
                    let sent = Lsn(at.0 + wal.len() as u64);
                    position.sent = Some(sent);
                    // A reader begins at its segment anew: what is wrong further on still is.
                    let is_past = position.doubt.as_ref().is_some_and(|doubt| doubt.at < sent);
                    position.doubt = position.doubt.take().filter(|_| !is_past);
                }
                Some(Ok(Piece::Switch(next, switch))) => return session.end_timeline((next, switch)).await,
                Some(Err((at, error))) => {
                    let end = shared.position().sent.unwrap_or(at);
                    hear_out(shared, session, end).await;
                    shared.position().doubt = Some(Doubt { at, why: error.to_string() });
                    return Err(doubt(session, &error).await);
                }
                None => {
                    let error = Error::failed("the reader of the feed died");
                    return Err(doubt(session, &error).await);
                }
            },
            feedback = session.feedback() => match feedback? {
                Feedback::Status(status) => _ = shared.note(&status),
                Feedback::Done => return session.end_copy().await,
            },
            _ = ask.tick() => {
                let end = shared.position().sent.unwrap_or(at);
                session.keepalive(end, now, true).await?;
            }
        }
    }
}

impl Shared {
    /// Notes where the reader is. Returns whether it said how far it has replayed.
    fn note(&self, status: &StandbyStatus) -> bool {
        // A walreceiver that has just started says 0.
        let replayed = Some(status.apply).filter(|apply| *apply > Lsn::INVALID);
        let mut position = self.position();
        (position.connected, position.flushed) = (true, Some(status.flush));
        position.replayed = replayed.or(position.replayed);
        replayed.is_some()
    }
}

/// Asks the reader how far it is before its connection ends with a doubt, which each one after it may do as soon: else nobody
/// would ever know what was replayed.
async fn hear_out(shared: &Shared, session: &mut Session, end: Lsn) {
    let heard = async {
        session.keepalive(end, shared.context.clock.now(), true).await?;
        while let Feedback::Status(status) = session.feedback().await? {
            if shared.note(&status) {
                break;
            }
        }
        Ok::<_, PgError>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout(ASK, heard).await {
        tracing::debug!(%error, "the walreceiver does not say how far it is");
    }
}

/// A piece that is being read, and where it lies.
type Reading = ((Lsn, Lsn), AbortOnDropHandle<Result<Vec<u8>>>);

/// Reads what the stock has for a reader, piece by piece, and waits for more.
async fn read_on(
    shared: Arc<Shared>,
    (timeline, mut at): (Timeline, Lsn),
    pieces: mpsc::Sender<Result<Piece, (Lsn, Error)>>,
) {
    let mut changed = shared.changed.subscribe();
    let mut ahead = VecDeque::new();
    loop {
        changed.borrow_and_update();
        read_ahead(&shared, (timeline, at), &mut ahead).await;
        let read = match ahead.pop_front() {
            Some((span, reading)) => joined(reading).await.map(|wal| Some((span, wal))),
            None => Ok(None),
        };
        // Whoever waits for news must not keep them out.
        let reach = shared.stock.read().await.reach(timeline, at);
        let piece = match read {
            // What was learnt while it was read may end the way before it: a contradiction, or a switch.
            Ok(Some(((_, to), _))) if !matches!(reach, Ok(Reach::To(end)) if end >= to) => {
                ahead.clear();
                continue;
            }
            Ok(Some(((from, to), wal))) => {
                at = Lsn(from.0 + wal.len() as u64);
                if at != to {
                    // A fault lies behind it, and is met next.
                    ahead.clear();
                }
                Ok(Piece::Wal(from, wal))
            }
            Ok(None) => match reach {
                Ok(Reach::Switch(next, switch)) => Ok(Piece::Switch(next, switch)),
                Ok(Reach::Nothing) => match changed.changed().await {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                // It came between two looks.
                Ok(Reach::To(_)) => continue,
                Err(error) => Err((at, error)),
            },
            // Regions that are away come back; nothing is wrong with what they hold.
            Err(error) if error.is_transient() || error.kind() == Kind::Unavailable => {
                ahead.clear();
                shared.position().trouble = Some(error.to_string());
                tokio::time::sleep(ASK).await;
                continue;
            }
            Err(error) => Err((at, error)),
        };
        let is_last = !matches!(piece, Ok(Piece::Wal(..)));
        // A connection that ended wants nothing more.
        if pieces.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

/// Begins to read what follows, some pieces at a time: each waits for the way to the region.
async fn read_ahead(shared: &Arc<Shared>, (timeline, at): (Timeline, Lsn), ahead: &mut VecDeque<Reading>) {
    let mut from = ahead.back().map_or(at, |((_, to), _)| *to);
    while ahead.len() < AT_ONCE {
        let reach = shared.stock.read().await.reach(timeline, from);
        // What else there is to say is said when everything before it is sent.
        let Ok(Reach::To(end)) = reach else { return };
        let span = (from, end.min(Lsn(from.0.saturating_add(PIECE))));
        let shared = Arc::clone(shared);
        let reading = task::spawn("feed-piece", async move {
            let stock = shared.stock.read().await;
            match stock.reach(timeline, span.0) {
                Ok(Reach::To(end)) if end >= span.1 => stock.read(&shared.context, timeline, span).await,
                // A region that did not answer once made the log shorter, and the next look makes it whole.
                _ => Err(Error::new(Kind::Unavailable, "what is stored is counted anew")),
            }
        });
        ahead.push_back((span, AbortOnDropHandle::new(reading)));
        from = span.1;
    }
}

async fn joined(reading: AbortOnDropHandle<Result<Vec<u8>>>) -> Result<Vec<u8>> {
    reading.await.map_err(|error| Error::failed("the reader of the feed died").because(error))?
}
