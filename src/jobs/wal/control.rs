//! The control socket of a target: whoever streams its WAL answers here where it stands. HTTP on a Unix socket that only
//! its owner may use.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::jobs::socket;
use crate::jobs::wal::position::Position;
use crate::model::{Error, Kind, Result, ResultExt, TargetName};
use crate::observe::task;

/// A receiver answers from memory.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Answers on a socket until it is stopped.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

type Ask = Arc<dyn Fn() -> Position + Send + Sync>;

impl ControlServer {
    /// Listens on `path`. A socket that a killed process left there is replaced; one that answers is not.
    ///
    /// # Errors
    /// Somebody answers there, or the socket cannot be made.
    pub async fn start(
        path: &Path,
        target: &TargetName,
        ask: impl Fn() -> Position + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = socket::listen(path).await.during(|| format!("listen on {}", path.display()))?;
        let app =
            Router::new().route("/v1/wal/{target}", get(answer)).with_state((target.clone(), Arc::new(ask) as Ask));
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let serve = axum::serve(listener, app).with_graceful_shutdown(stopped);
        let task = task::spawn("control-socket", async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the control socket failed");
            }
        });
        Ok(Self { path: path.to_owned(), stop, task: Some(task) })
    }

    /// Stops answering and removes the socket.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            // A client that keeps its connection open is no reason to stay.
            let _ = tokio::time::timeout(ANSWER_TIME, task).await;
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "the control socket is not removed");
        }
    }
}

async fn answer(
    State((target, ask)): State<(TargetName, Ask)>,
    UrlPath(asked): UrlPath<String>,
) -> std::result::Result<Json<Position>, StatusCode> {
    if asked == target.as_str() { Ok(Json(ask())) } else { Err(StatusCode::NOT_FOUND) }
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
    let Some((status, body)) = socket::ask(socket, "GET", &format!("/v1/wal/{target}"), Vec::new()).await? else {
        return Ok(None);
    };
    match status {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Ok(None),
        other => return Err(Error::failed("a refusal").because(other)),
    }
    let position = serde_json::from_slice(&body).map_err(|error| Error::failed("not a position").because(error))?;
    Ok(Some(position))
}
