//! The daemon's API: how things stand, run this now, pause that. HTTP on a Unix socket, and over TCP behind a token
//! (`gate`).
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/jobs` | every schedule: what runs and how far it has come, waits, is paused, comes next |
//! | `GET /v1/wal` | where the WAL of each target stands, as far as it is taken on this host |
//! | `GET /v1/wal/-/files/{name}?system=…&size=…&own=…` | a WAL file for a `restore_command` of this host, 204 if it exists nowhere; on the socket alone, and where this daemon works in the role restore |
//! | `GET /v1/status` | what `drctl status --json` shows; it asks the regions, so it takes its time |
//! | `POST /v1/schedules/{name}/run` | `{"slot": …}`; 409 when it runs already |
//! | `POST /v1/schedules/{name}/pause` with `{"until": …, "reason": …}` | the pause |
//! | `DELETE /v1/schedules/{name}/pause` | |
//!
//! A refusal is `{"kind": …, "message": …, "hint": …}`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, Query, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::io::ReaderStream;

use crate::app::{self, Role, World};
use crate::config::{SecretText, Settings, Source, load_schedules};
use crate::daemon::scheduler::View;
use crate::jobs::socket::{self, Guests, Served, reply, understand};
use crate::jobs::status;
use crate::jobs::wal::control::position;
use crate::jobs::wal::fetch::Asker;
use crate::jobs::wal::fetch::borrow::Words;
use crate::jobs::wal::fetch::desk::{FetchDesk, Given};
use crate::model::run::Pause;
use crate::model::{Error, Kind, Result, ResultExt, ScheduleName};

/// No question is longer.
const QUESTION_LIMIT: usize = 64 * 1024;
/// What asks every region gives up before whoever asked does.
const STATUS_TIME: Duration = Duration::from_secs(60);
/// A daemon answers between two looks at its schedules.
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// A question to the daemon, and where the answer goes.
#[derive(Debug)]
pub(super) enum Ask {
    /// How things stand.
    Jobs(oneshot::Sender<Vec<View>>),
    /// Run it now.
    Run(ScheduleName, oneshot::Sender<Result<Triggered>>),
    /// Pause it, or go on.
    Pause(ScheduleName, Option<Pause>, oneshot::Sender<Result<()>>),
}

/// A schedule that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Triggered {
    /// Under this slot its outcome will be recorded.
    pub slot: DateTime<Utc>,
}

/// What answers need.
#[derive(Debug, Clone)]
pub(super) struct Api {
    asks: mpsc::Sender<Ask>,
    settings: Arc<Settings>,
    role: Role,
    /// Whether this process works in the role restore, too.
    lends: bool,
    world: World,
}

impl Api {
    pub(super) fn new(
        asks: mpsc::Sender<Ask>,
        settings: &Settings,
        (role, lends): (Role, bool),
        world: &World,
    ) -> Self {
        Self { asks, settings: Arc::new(settings.clone()), role, lends, world: world.clone() }
    }
}

/// Gives WAL. The repository is opened when it is first asked for, and anew after whatever went wrong.
#[derive(Debug, Clone)]
struct Lender {
    settings: Arc<Settings>,
    world: World,
    desk: Arc<tokio::sync::Mutex<Option<Arc<FetchDesk>>>>,
}

impl Lender {
    async fn desk(&self) -> Result<Arc<FetchDesk>> {
        let mut desk = self.desk.lock().await;
        if let Some(desk) = &*desk {
            return Ok(Arc::clone(desk));
        }
        let context = app::context(&self.settings, Role::Restore, &self.world).await?;
        Ok(Arc::clone(desk.insert(FetchDesk::new(context))))
    }

    async fn give(&self, words: Words, name: &str) -> Result<Option<Given>> {
        let asker = Asker::try_from(words)?;
        let given = self.desk().await?.give(&asker, name).await;
        if given.is_err() {
            self.desk.lock().await.take();
        }
        given
    }
}

async fn lend(
    State(lender): State<Lender>,
    UrlPath((_, name)): UrlPath<(String, String)>,
    Query(words): Query<Words>,
) -> Response {
    match lender.give(words, &name).await {
        Ok(Some(Given { file, length })) => {
            let body = Body::from_stream(ReaderStream::with_capacity(tokio::fs::File::from_std(file), 256 * 1024));
            ([(CONTENT_LENGTH, length)], body).into_response()
        }
        Ok(None) => StatusCode::NO_CONTENT.into_response(),
        // A file that is not found for sure is no error: what is one here must not look like it.
        Err(error) if error.kind() == Kind::NotFound => reply::<()>(Err(Error::new(Kind::Damaged, error.to_string()))),
        Err(error) => reply::<()>(Err(error)),
    }
}

/// Where the daemon of a state directory answers.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon.sock")
}

/// Answers until it is stopped.
pub(super) struct Control(Served);

impl Control {
    pub(super) async fn start(state_dir: &Path, guests: &Guests, api: Api) -> Result<Self> {
        let lender = Lender { settings: Arc::clone(&api.settings), world: api.world.clone(), desk: Arc::default() };
        let lends = api.lends;
        let mut app = router(api);
        // WAL is given in clear: to whom the kernel vouches for, and never over a network.
        if lends {
            app = app.merge(Router::new().route("/v1/wal/{target}/files/{name}", get(lend)).with_state(lender));
        }
        Served::start(&socket_path(state_dir), guests, app).await.map(Self)
    }

    /// Stops answering and removes the socket.
    pub(super) async fn stop(self) {
        self.0.stop(Duration::from_secs(1)).await;
    }
}

/// Everything that can be asked for.
pub(super) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/jobs", get(jobs))
        .route("/v1/wal", get(wal))
        .route("/v1/status", get(how_it_stands))
        .route("/v1/schedules/{name}/run", post(run))
        .route("/v1/schedules/{name}/pause", post(pause).delete(resume))
        .layer(DefaultBodyLimit::max(QUESTION_LIMIT))
        .with_state(api)
}

async fn jobs(State(api): State<Api>) -> Response {
    let (answer, answered) = oneshot::channel();
    reply(put(&api.asks, Ask::Jobs(answer), answered).await)
}

async fn wal(State(api): State<Api>) -> Response {
    let mut positions = Vec::new();
    for target in &api.settings.targets {
        let Source::Postgres(postgres) = &target.source else { continue };
        match position(&postgres.control_socket, &target.name).await {
            Ok(position) => positions.extend(position),
            Err(error) => return reply::<()>(Err(error)),
        }
    }
    reply(Ok(positions))
}

async fn how_it_stands(State(api): State<Api>) -> Response {
    let look = async {
        let context = app::context(&api.settings, api.role, &api.world).await?;
        status::run(&context, &load_schedules(&api.settings).unwrap_or_default()).await
    };
    let late = || Error::new(Kind::Unavailable, "the regions do not answer in time").transient(true);
    reply(tokio::time::timeout(STATUS_TIME, look).await.unwrap_or_else(|_| Err(late())))
}

async fn run(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    let (answer, answered) = oneshot::channel();
    match name.parse() {
        Ok(name) => reply(put(&api.asks, Ask::Run(name, answer), answered).await.and_then(|triggered| triggered)),
        Err(error) => reply::<()>(Err(error)),
    }
}

async fn pause(State(api): State<Api>, UrlPath(name): UrlPath<String>, Json(pause): Json<Pause>) -> Response {
    set(&api.asks, &name, Some(pause)).await
}

async fn resume(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    set(&api.asks, &name, None).await
}

async fn set(asks: &mpsc::Sender<Ask>, name: &str, pause: Option<Pause>) -> Response {
    let (answer, answered) = oneshot::channel();
    match name.parse() {
        Ok(name) => reply(put(asks, Ask::Pause(name, pause, answer), answered).await.and_then(|set| set)),
        Err(error) => reply::<()>(Err(error)),
    }
}

async fn put<T>(asks: &mpsc::Sender<Ask>, ask: Ask, answered: oneshot::Receiver<T>) -> Result<T> {
    let gone = || Error::new(Kind::Unavailable, "the daemon is about to stop");
    asks.send(ask).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())
}

/// The way to a daemon.
#[derive(Debug)]
pub enum Door {
    /// Its socket on this host.
    Socket(PathBuf),
    /// Its address, and the token that opens it.
    Tcp(String, SecretText),
}

impl Door {
    /// The daemon of a state directory of this host.
    pub fn here(state_dir: &Path) -> Self {
        Self::Socket(socket_path(state_dir))
    }

    /// A daemon by its URL: `http://host:port`.
    ///
    /// # Errors
    /// Another kind of URL.
    pub fn at(url: &str, token: SecretText) -> Result<Self> {
        let address = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        let plain = |address: &&str| !address.contains(['/', '@']) && address.rsplit_once(':').is_some();
        let address = address.filter(plain).ok_or_else(|| {
            let error = Error::usage(format!("`{url}` is not the address of a daemon"));
            error.hint("write http://HOST:PORT; for TLS put a tunnel or a proxy before it")
        })?;
        Ok(Self::Tcp(address.to_owned(), token))
    }

    async fn send(&self, request: Request<Body>) -> Result<Option<(StatusCode, Bytes)>> {
        match self {
            Self::Socket(path) => socket::send(path, request).await,
            Self::Tcp(address, token) => {
                let cannot = |error| Error::new(Kind::Unavailable, "cannot connect").because(error);
                let stream = TcpStream::connect(address).await.map_err(cannot)?;
                let mut request = request;
                let wrong = |error| Error::usage("the token cannot be sent").because(error);
                let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.expose())).map_err(wrong)?;
                bearer.set_sensitive(true);
                request.headers_mut().insert(AUTHORIZATION, bearer);
                socket::exchange(TokioIo::new(stream), request).await.map(Some)
            }
        }
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Tcp(address, _) => write!(f, "http://{address}"),
        }
    }
}

/// Asks a daemon how its jobs stand.
///
/// # Errors
/// No daemon answers.
pub async fn ask_jobs(door: &Door) -> Result<Vec<View>> {
    ask(door, "GET", "/v1/jobs", Vec::new()).await
}

/// Asks for a run now.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn ask_run(door: &Door, schedule: &ScheduleName) -> Result<Triggered> {
    ask(door, "POST", &format!("/v1/schedules/{schedule}/run"), Vec::new()).await
}

/// Asks for a pause, or for its end.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn ask_pause(door: &Door, schedule: &ScheduleName, pause: Option<&Pause>) -> Result<()> {
    let path = format!("/v1/schedules/{schedule}/pause");
    match pause {
        None => ask(door, "DELETE", &path, Vec::new()).await,
        Some(pause) => {
            let body =
                serde_json::to_vec(pause).map_err(|error| Error::failed("a pause is not JSON").because(error))?;
            ask(door, "POST", &path, body).await
        }
    }
}

async fn ask<T: DeserializeOwned>(door: &Door, method: &str, path: &str, body: Vec<u8>) -> Result<T> {
    let request = Request::builder().method(method).uri(path).header(CONTENT_TYPE, "application/json");
    let request = request.body(Body::from(body)).map_err(|error| Error::failed("not a request").because(error))?;
    let asked = tokio::time::timeout(ANSWER_TIME, door.send(request)).await;
    let hangs = || Error::new(Kind::Unavailable, "no answer in time").transient(true);
    let answer = asked.unwrap_or_else(|_| Err(hangs())).during(|| format!("ask {door}"))?;
    let nobody = || {
        let error = Error::new(Kind::Unavailable, "no daemon answers").because(door);
        error.hint("start it: drctl daemon; it must use the same configuration, on this host")
    };
    understand(answer.ok_or_else(nobody)?)
}
