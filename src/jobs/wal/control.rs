//! The control socket of a target: whoever streams its WAL answers here where it stands. HTTP on a Unix socket that only
//! its owner may use.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path as UrlPath, State};
use axum::http::{Request, StatusCode};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::jobs::wal::position::Position;
use crate::model::{Error, Kind, Result, ResultExt, TargetName};
use crate::observe::task;

/// An answer is a few hundred bytes; whoever sends more is not drctl.
const ANSWER_LIMIT: usize = 64 * 1024;
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
        let listener = listen(path).await.during(|| format!("listen on {}", path.display()))?;
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

async fn listen(path: &Path) -> Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(Error::refused("another process answers there"));
            }
            std::fs::remove_file(path)
                .map_err(|error| Error::failed("a dead socket cannot be removed").because(error))?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let cannot = |error| Error::failed("the socket cannot be made").because(error);
    let listener = listener.map_err(cannot)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(cannot)?;
    Ok(listener)
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
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
        Err(error) => return Err(Error::failed("cannot connect").because(error)),
    };
    let strange = |what: &str| Error::failed(what.to_owned());
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| strange("no HTTP").because(error))?;
    let driver = task::spawn("control-client", connection);
    let request = Request::get(format!("/v1/wal/{target}")).header("host", "drctl").body(Empty::<Bytes>::new());
    let request = request.map_err(|error| strange("not a request").because(error))?;
    let response = sender.send_request(request).await.map_err(|error| strange("no answer").because(error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    driver.abort();
    match status {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Ok(None),
        other => return Err(strange("a refusal").because(other)),
    }
    let body = body.map_err(|error| strange("half an answer").because(error))?.to_bytes();
    let position = serde_json::from_slice(&body).map_err(|error| strange("not a position").because(error))?;
    Ok(Some(position))
}
