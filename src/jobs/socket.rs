//! HTTP on a Unix socket: how processes of one host talk to each other. The kernel says who is at the other end; its own
//! user and root may ask, and whoever the configuration invites.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Request, State};
use axum::http::{Request as HttpRequest, Response as HttpResponse, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use axum::{Json, body::Body};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::model::{Error, Kind, Result, ResultExt};
use crate::observe::task;
use crate::pg::instance::User;

/// Whoever sends more is not drctl.
const ANSWER_LIMIT: usize = 1024 * 1024;
/// How long somebody who is not invited is listened to.
const LISTEN_OUT: std::time::Duration = std::time::Duration::from_secs(10);
/// Root may do anything anyway.
const ROOT: u32 = 0;

/// Who may use a socket beside its own user and root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guests {
    uids: Vec<u32>,
}

impl Guests {
    /// Accounts by name, or by number where the name is not in `/etc/passwd`.
    ///
    /// # Errors
    /// There is no such account.
    pub fn named(names: &[String]) -> Result<Self> {
        let uid = |name: &String| match name.parse() {
            Ok(uid) => Ok(uid),
            Err(_) => User::named(name).map(|user| user.uid).map_err(|error| {
                let error = Error::usage(format!("`{name}` may not use the sockets")).because(error);
                error.hint("[daemon] allow takes names of /etc/passwd and numbers")
            }),
        };
        Ok(Self { uids: names.iter().map(uid).collect::<Result<_>>()? })
    }

    fn admits(&self, uid: u32) -> bool {
        uid == ROOT || uid == rustix::process::geteuid().as_raw() || self.uids.contains(&uid)
    }
}

/// A refusal, as it goes over a socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    /// What kind it is.
    pub kind: Kind,
    /// What was not done, and why.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        let hint = error.hint_text().map(str::to_owned);
        Self { kind: error.kind(), message: error.to_string(), hint }
    }
}

impl From<Refusal> for Error {
    fn from(Refusal { kind, message, hint }: Refusal) -> Self {
        let error = Self::new(kind, message);
        hint.iter().fold(error, |error, hint| error.hint(hint))
    }
}

/// What became of a request, as an answer.
pub fn reply<T: Serialize>(answer: Result<T>) -> Response {
    match answer {
        Ok(value) => Json(value).into_response(),
        Err(error) => {
            let status = match error.kind() {
                Kind::NotFound => StatusCode::NOT_FOUND,
                Kind::Refused | Kind::Busy | Kind::Damaged => StatusCode::CONFLICT,
                Kind::Usage => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            (status, Json(Refusal::from(&error))).into_response()
        }
    }
}

/// The value in an answer, or the refusal.
///
/// # Errors
/// It is a refusal, or nothing of ours.
pub fn understand<T: serde::de::DeserializeOwned>((status, body): (StatusCode, Bytes)) -> Result<T> {
    let strange = || Error::failed("the answer is not understood").because(status);
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|error| strange().because(error));
    }
    let refusal: Refusal = serde_json::from_slice(&body).map_err(|_| strange())?;
    Err(refusal.into())
}

/// A socket that is served until it is stopped.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Served {
    /// Listens on `path` and serves `app`. A socket that a killed process left there is replaced; one that answers is not.
    ///
    /// # Errors
    /// Somebody answers there, or the socket cannot be made.
    pub async fn start(path: &Path, guests: &Guests, app: Router) -> Result<Self> {
        let listener = listen(path, guests).await.during(|| format!("listen on {}", path.display()))?;
        let app = app.layer(from_fn_with_state(guests.clone(), admit));
        let stop = CancellationToken::new();
        let serve = axum::serve(listener, app.into_make_service_with_connect_info::<Peer>());
        let serve = serve.with_graceful_shutdown(stop.clone().cancelled_owned());
        let shown = path.display().to_string();
        let task = task::spawn("socket", async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, socket = shown, "a socket failed");
            }
        });
        Ok(Self { path: path.to_owned(), stop, task: Some(task) })
    }

    /// Stops answering and removes the socket.
    pub async fn stop(mut self, patience: std::time::Duration) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            // A client that keeps its connection open is no reason to stay.
            let _ = tokio::time::timeout(patience, task).await;
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a socket is not removed");
        }
    }
}

async fn listen(path: &Path, guests: &Guests) -> Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            refuse_all_but_dead(path).await?;
            std::fs::remove_file(path)
                .map_err(|error| Error::failed("a dead socket cannot be removed").because(error))?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let cannot = |error| Error::failed("the socket cannot be made").because(error);
    let listener = listener.map_err(cannot)?;
    // Connecting takes the right to write. With guests the door is open, and every request is asked who it is.
    let mode = if guests.uids.is_empty() { 0o600 } else { 0o666 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(cannot)?;
    Ok(listener)
}

/// What stands at `path` may go only if it is a socket, and nobody is behind it.
async fn refuse_all_but_dead(path: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(path);
    let found = found.map_err(|error| Error::refused("what stands there is not known").because(error))?;
    if !found.file_type().is_socket() {
        let error = Error::refused("what stands there is no socket, and stays");
        return Err(error.hint("name another place for the socket, or move away what is there"));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(Error::refused("another process answers there")),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(Error::refused("whether another process answers there is not known").because(error)),
    }
}

/// Who is at the other end, as the kernel says.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: Option<u32>,
    pid: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let cred = stream.io().peer_cred().ok();
        Self { uid: cred.as_ref().map(tokio::net::unix::UCred::uid), pid: cred.and_then(|cred| cred.pid()) }
    }
}

async fn admit(
    State(guests): State<Guests>,
    ConnectInfo(Peer { uid, pid }): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if uid.is_some_and(|uid| guests.admits(uid)) {
        return next.run(request).await;
    }
    let path = request.uri().path().to_owned();
    tracing::warn!(uid, pid, path, "somebody who is not invited asked on a socket");
    let who = uid.map_or_else(|| "this account".to_owned(), |uid| format!("user {uid}"));
    let error = Error::refused(format!("{who} may not use this socket"));
    let error = error.hint("the daemon's own user and root may; others are named in [daemon] allow");
    // Whoever still writes when the connection closes gets a broken pipe, and never reads why.
    let rest = request.into_body().into_data_stream().for_each(|_| std::future::ready(()));
    let _ = tokio::time::timeout(LISTEN_OUT, rest).await;
    (StatusCode::FORBIDDEN, Json(Refusal::from(&error))).into_response()
}

/// Sends one request; `None` = nobody answers there.
///
/// # Errors
/// Somebody answers who does not speak HTTP.
pub async fn ask(socket: &Path, method: &str, path: &str, body: Vec<u8>) -> Result<Option<(StatusCode, Bytes)>> {
    let request = HttpRequest::builder().method(method).uri(path).header("content-type", "application/json");
    send(socket, request.body(Body::from(body)).map_err(|error| Error::failed("not a request").because(error))?).await
}

/// The same with a request of choice.
///
/// # Errors
/// As [`ask`].
pub async fn send(socket: &Path, request: HttpRequest<Body>) -> Result<Option<(StatusCode, Bytes)>> {
    match connect(socket).await? {
        Some(stream) => exchange(TokioIo::new(stream), request).await.map(Some),
        None => Ok(None),
    }
}

/// The same for an answer of any length: the body of a good one goes to `sink` as it comes, and the bytes that are
/// returned are those of any other.
///
/// # Errors
/// As [`ask`]; or what `sink` said.
pub async fn download(
    socket: &Path,
    request: HttpRequest<Body>,
    sink: &mut (dyn FnMut(&[u8]) -> Result<()> + Send),
) -> Result<Option<(StatusCode, Bytes)>> {
    let Some(stream) = connect(socket).await? else { return Ok(None) };
    let (response, _driver) = respond(TokioIo::new(stream), request).await?;
    let status = response.status();
    if status != StatusCode::OK {
        return Ok(Some((status, collect(response).await?)));
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        // A body that ends before the length that was announced is an error here.
        let frame = frame.map_err(|error| Error::failed("half an answer").because(error))?;
        if let Some(bytes) = frame.data_ref() {
            sink(bytes)?;
        }
    }
    Ok(Some((status, Bytes::new())))
}

async fn connect(socket: &Path) -> Result<Option<UnixStream>> {
    match UnixStream::connect(socket).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) => {
            let error = Error::failed("cannot connect").because(error);
            Err(error.hint("whoever asks needs the right to search its directory, and a place in [daemon] allow"))
        }
    }
}

/// One request and its answer over a connection.
///
/// # Errors
/// The other end does not speak HTTP, or too much of it.
pub async fn exchange<C>(connection: C, request: HttpRequest<Body>) -> Result<(StatusCode, Bytes)>
where
    C: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (response, _driver) = respond(connection, request).await?;
    Ok((response.status(), collect(response).await?))
}

/// The head of an answer; its body comes for as long as the other half lives.
async fn respond<C>(
    connection: C,
    mut request: HttpRequest<Body>,
) -> Result<(HttpResponse<Incoming>, AbortOnDropHandle<()>)>
where
    C: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let strange = |what: &str| Error::failed(what.to_owned());
    let handshake = hyper::client::conn::http1::handshake(connection).await;
    let (mut sender, connection) = handshake.map_err(|error| strange("no HTTP").because(error))?;
    let driver = AbortOnDropHandle::new(task::spawn("control-client", async {
        // Whoever reads the answer meets the same error.
        let _ = connection.await;
    }));
    let host = axum::http::HeaderValue::from_static("drctl");
    request.headers_mut().entry("host").or_insert(host);
    let response = sender.send_request(request).await.map_err(|error| strange("no answer").because(error))?;
    Ok((response, driver))
}

async fn collect(response: HttpResponse<Incoming>) -> Result<Bytes> {
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    Ok(body.map_err(|error| Error::failed("half an answer").because(error))?.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_answers_on_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        std::fs::File::create(&path).unwrap();
        let refused = listen(&path, &Guests::default()).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Refused, "{refused}");
        assert!(path.is_file());

        let socket = directory.path().join("t");
        let alive = listen(&socket, &Guests::default()).await.unwrap();
        let refused = listen(&socket, &Guests::default()).await.unwrap_err();
        assert!(refused.to_string().contains("another process answers"), "{refused}");
        drop(alive);
        listen(&socket, &Guests::default()).await.unwrap();
    }
}
