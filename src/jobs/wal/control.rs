//! The control socket of a target: whoever streams its WAL answers here where it stands, and takes what
//! `archive_command` hands over.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/wal/{target}` | the position |
//! | `POST /v1/wal/{target}/files/{name}` with the file | `{"receipt": …}` once it is safe |
//!
//! `-` stands for the target of the socket. A refusal is `{"kind": …, "message": …, "hint": …}`.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tempfile::SpooledTempFile;
use tokio::sync::Semaphore;
use tokio_util::io::ReaderStream;

use crate::jobs::socket::{self, Guests, Served, reply, understand};
use crate::jobs::wal::position::Position;
use crate::jobs::wal::push::{Handed, PushDesk, Receipt};
use crate::model::{Error, Kind, Result, ResultExt, SystemId, TargetName};
use crate::pg::control::ControlFile;

/// A receiver answers from memory.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// A file is sent by a process of the same host.
const RECEIVE_TIME: Duration = Duration::from_secs(60);
/// A segment waits for its regions; `archive_command` gives up later than the desk does.
const PUSH_TIME: Duration = Duration::from_secs(240);
/// The largest segment that PostgreSQL can have.
const LARGEST: u64 = 1 << 30;
/// What is held in memory of one file; the rest of a large one waits in the state directory.
const IN_MEMORY: usize = 16 << 20;
/// PostgreSQL archives one file at a time.
const AT_ONCE: usize = 2;

/// Answers on a target's socket until it is stopped.
#[derive(Debug)]
pub struct ControlServer(Served);

/// Answers for one target.
#[derive(Clone)]
struct Desk {
    target: TargetName,
    ask: Arc<dyn Fn() -> Position + Send + Sync>,
    push: Arc<PushDesk>,
    spool: Arc<Path>,
    slots: Arc<Semaphore>,
}

/// Where a socket is, and who may use it.
#[derive(Debug)]
pub(super) struct Place<'p> {
    pub(super) path: &'p Path,
    pub(super) guests: &'p Guests,
    /// Where a file that is too large for memory waits.
    pub(super) spool: &'p Path,
}

impl ControlServer {
    /// Listens.
    ///
    /// # Errors
    /// Somebody answers there, or the socket cannot be made.
    pub(super) async fn start(
        place: Place<'_>,
        target: &TargetName,
        ask: impl Fn() -> Position + Send + Sync + 'static,
        push: Arc<PushDesk>,
    ) -> Result<Self> {
        let desk = Desk {
            target: target.clone(),
            ask: Arc::new(ask),
            push,
            spool: place.spool.into(),
            slots: Arc::new(Semaphore::new(AT_ONCE)),
        };
        let app = Router::new()
            .route("/v1/wal/{target}", get(answer))
            .route("/v1/wal/{target}/files/{name}", post(take))
            .with_state(desk);
        Served::start(place.path, place.guests, app).await.map(Self)
    }

    /// Stops answering and removes the socket.
    pub(super) async fn stop(self) {
        self.0.stop(ANSWER_TIME).await;
    }
}

impl Desk {
    fn is_asked(&self, target: &str) -> Result<()> {
        if target == "-" || target == self.target.as_str() {
            return Ok(());
        }
        Err(Error::not_found(format!("this socket answers for {}, not for `{target}`", self.target)))
    }
}

async fn answer(State(desk): State<Desk>, UrlPath(asked): UrlPath<String>) -> Response {
    match desk.is_asked(&asked) {
        Ok(()) => Json((desk.ask)()).into_response(),
        Err(error) => reply::<()>(Err(error)),
    }
}

/// What whoever sends a file knows beside its name.
#[derive(Debug, Default, Deserialize)]
struct From {
    system: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Taken {
    receipt: Receipt,
}

async fn take(
    State(desk): State<Desk>,
    UrlPath((target, name)): UrlPath<(String, String)>,
    Query(from): Query<From>,
    body: Body,
) -> Response {
    let taken = async {
        desk.is_asked(&target)?;
        let system_id = from.system.map(|text| text.parse()).transpose()?;
        let _slot = desk.slots.acquire().await.map_err(|error| Error::failed("no slot").because(error))?;
        let late = || Error::new(Kind::Unavailable, "the file did not come in time").transient(true);
        let received = tokio::time::timeout(RECEIVE_TIME, receive(body, &desk.spool)).await;
        let (file, length) = received.unwrap_or_else(|_| Err(late()))?;
        let receipt = desk.push.take(Handed { name, file, length, system_id }).await?;
        Ok(Taken { receipt })
    };
    reply(taken.await)
}

async fn receive(body: Body, spool: &Path) -> Result<(SpooledTempFile, u64)> {
    let (mut file, mut length) = (tempfile::spooled_tempfile_in(IN_MEMORY, spool), 0);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let cut = |error| Error::new(Kind::Unavailable, "only a part of the file came").because(error).transient(true);
        let piece = piece.map_err(cut)?;
        length += piece.len() as u64;
        if length > LARGEST {
            return Err(Error::refused("no file that PostgreSQL archives is larger than a gigabyte"));
        }
        file.write_all(&piece).map_err(|error| {
            let error = Error::new(Kind::Unavailable, "the file cannot be received").because(error);
            error.hint("the state directory may be full")
        })?;
    }
    Ok((file, length))
}

/// Asks the receiver of `target` where it stands; `None` = nobody answers, or not for this target.
///
/// # Errors
/// Somebody answers who does not speak our language.
pub async fn position(socket: &Path, target: &TargetName) -> Result<Option<Position>> {
    let asked = tokio::time::timeout(ANSWER_TIME, ask(socket, target)).await;
    let hangs = || Error::new(Kind::Unavailable, "no answer in time").transient(true);
    asked.unwrap_or_else(|_| Err(hangs())).during(|| format!("ask {}", socket.display()))
}

async fn ask(socket: &Path, target: &TargetName) -> Result<Option<Position>> {
    match socket::ask(socket, "GET", &format!("/v1/wal/{target}"), Vec::new()).await? {
        None | Some((StatusCode::NOT_FOUND, _)) => Ok(None),
        Some(answer) => understand(answer).map(Some),
    }
}

/// Hands a file to whoever takes the WAL of a target; without a target, of the one that the socket is for.
///
/// # Errors
/// Nobody is there, or the file was not taken. PostgreSQL keeps it then.
pub async fn push(socket: &Path, target: Option<&TargetName>, path: &Path) -> Result<Receipt> {
    let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_plain(name));
    let name = name.ok_or_else(|| Error::usage(format!("`{}` is no file that PostgreSQL archives", path.display())))?;
    let unreadable = |error| Error::failed(format!("read {}", path.display())).because(error);
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    let target = target.map_or("-", TargetName::as_str);
    let system = here().map(|system| format!("?system={system}")).unwrap_or_default();
    let request = Request::post(format!("/v1/wal/{target}/files/{name}{system}"));
    let body = Body::from_stream(ReaderStream::with_capacity(file, 256 * 1024));
    let request = request.body(body).map_err(|error| Error::failed("not a request").because(error))?;
    let late = || Error::new(Kind::Unavailable, "no answer in time");
    let sent = tokio::time::timeout(PUSH_TIME, socket::send(socket, request)).await;
    let answer = sent.unwrap_or_else(|_| Err(late())).during(|| format!("hand {name} to {}", socket.display()))?;
    let nobody = || {
        let error = Error::new(Kind::Unavailable, "nobody takes WAL").because(socket.display());
        error.hint("start drctl daemon, or drctl wal stream; PostgreSQL keeps the file and comes again")
    };
    understand::<Taken>(answer.ok_or_else(nobody)?).map(|taken| taken.receipt)
}

/// Names of files that PostgreSQL archives stand in a path of HTTP as they are.
fn is_plain(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.')
}

/// The cluster in whose data directory this process runs, as commands that PostgreSQL starts do.
fn here() -> Option<SystemId> {
    let bytes = std::fs::read("global/pg_control").ok()?;
    ControlFile::parse(&bytes).ok().map(|control| control.system_id)
}
