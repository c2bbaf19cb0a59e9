//! The daemon's control socket: how things stand, run this now, pause that. HTTP on a Unix socket of its owner.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/jobs` | every schedule: what runs, waits, is paused, comes next |
//! | `POST /v1/schedules/{name}/run` | `{"slot": …}`; 409 when it runs already |
//! | `POST /v1/schedules/{name}/pause` with `{"until": …, "reason": …}` | the pause |
//! | `DELETE /v1/schedules/{name}/pause` | |
//!
//! A refusal is `{"message": …, "hint": …}`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::daemon::scheduler::View;
use crate::jobs::socket;
use crate::model::run::Pause;
use crate::model::{Error, Kind, Result, ResultExt, ScheduleName};
use crate::observe::task;

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

#[derive(Debug, Serialize, Deserialize)]
struct Refusal {
    message: String,
    hint: Option<String>,
}

/// Where the daemon of a state directory answers.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon.sock")
}

/// Answers until it is stopped.
pub(super) struct Control {
    path: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Control {
    pub(super) async fn start(state_dir: &Path, asks: mpsc::Sender<Ask>) -> Result<Self> {
        let path = socket_path(state_dir);
        let listener = socket::listen(&path).await.during(|| format!("listen on {}", path.display()))?;
        let app = Router::new()
            .route("/v1/jobs", get(jobs))
            .route("/v1/schedules/{name}/run", post(run))
            .route("/v1/schedules/{name}/pause", post(pause).delete(resume))
            .with_state(asks);
        let stop = CancellationToken::new();
        let serve = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
        let task = task::spawn("daemon-socket", async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the daemon's socket failed");
            }
        });
        Ok(Self { path, stop, task })
    }

    /// Stops answering and removes the socket.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        // A client that keeps its connection open is no reason to stay.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.task).await;
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "the daemon's socket is not removed");
        }
    }
}

type Asks = State<mpsc::Sender<Ask>>;

async fn jobs(State(asks): Asks) -> Response {
    let (answer, answered) = oneshot::channel();
    reply(put(&asks, Ask::Jobs(answer), answered).await)
}

async fn run(State(asks): Asks, UrlPath(name): UrlPath<String>) -> Response {
    let (answer, answered) = oneshot::channel();
    match name.parse() {
        Ok(name) => reply(put(&asks, Ask::Run(name, answer), answered).await.and_then(|triggered| triggered)),
        Err(error) => reply::<()>(Err(error)),
    }
}

async fn pause(State(asks): Asks, UrlPath(name): UrlPath<String>, Json(pause): Json<Pause>) -> Response {
    set(&asks, &name, Some(pause)).await
}

async fn resume(State(asks): Asks, UrlPath(name): UrlPath<String>) -> Response {
    set(&asks, &name, None).await
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

fn reply<T: Serialize>(answer: Result<T>) -> Response {
    match answer {
        Ok(value) => Json(value).into_response(),
        Err(error) => {
            let status = match error.kind() {
                Kind::NotFound => StatusCode::NOT_FOUND,
                Kind::Refused => StatusCode::CONFLICT,
                Kind::Usage => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            let refusal = Refusal { message: error.to_string(), hint: error.hint_text().map(str::to_owned) };
            (status, Json(refusal)).into_response()
        }
    }
}

/// Asks the daemon of a state directory how things stand.
///
/// # Errors
/// No daemon answers.
pub async fn ask_jobs(state_dir: &Path) -> Result<Vec<View>> {
    ask(state_dir, "GET", "/v1/jobs", Vec::new()).await
}

/// Asks for a run now.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn ask_run(state_dir: &Path, schedule: &ScheduleName) -> Result<Triggered> {
    ask(state_dir, "POST", &format!("/v1/schedules/{schedule}/run"), Vec::new()).await
}

/// Asks for a pause, or for its end.
///
/// # Errors
/// No daemon answers, or it refuses.
pub async fn ask_pause(state_dir: &Path, schedule: &ScheduleName, pause: Option<&Pause>) -> Result<()> {
    let path = format!("/v1/schedules/{schedule}/pause");
    match pause {
        None => ask(state_dir, "DELETE", &path, Vec::new()).await,
        Some(pause) => {
            let body =
                serde_json::to_vec(pause).map_err(|error| Error::failed("a pause is not JSON").because(error))?;
            ask(state_dir, "POST", &path, body).await
        }
    }
}

async fn ask<T: DeserializeOwned>(state_dir: &Path, method: &str, path: &str, body: Vec<u8>) -> Result<T> {
    let socket = socket_path(state_dir);
    let asked = tokio::time::timeout(ANSWER_TIME, socket::ask(&socket, method, path, body)).await;
    let hangs = || Error::new(Kind::Unavailable, "no answer in time").transient(true);
    let answer = asked.unwrap_or_else(|_| Err(hangs())).during(|| format!("ask {}", socket.display()))?;
    let nobody = || {
        let error = Error::new(Kind::Unavailable, "no daemon answers").because(socket.display());
        error.hint("start it: drctl daemon; it must use the same configuration, on this host")
    };
    let (status, body) = answer.ok_or_else(nobody)?;
    let strange = || Error::failed("the daemon's answer is not understood").because(status);
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|error| strange().because(error));
    }
    let Refusal { message, hint } = serde_json::from_slice(&body).map_err(|_| strange())?;
    let kind = if status == StatusCode::NOT_FOUND { Kind::NotFound } else { Kind::Refused };
    let error = Error::new(kind, message);
    Err(hint.map_or(error.clone(), |hint| error.hint(hint)))
}
