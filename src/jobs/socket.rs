//! HTTP on a Unix socket that only its owner may use: how processes of one host talk to each other.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use axum::http::{Request, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

use crate::model::{Error, Result};
use crate::observe::task;

/// Whoever sends more is not drctl.
const ANSWER_LIMIT: usize = 1024 * 1024;

/// Listens on `path`. A socket that a killed process left there is replaced; one that answers is not.
///
/// # Errors
/// Somebody answers there, or the socket cannot be made.
pub async fn listen(path: &Path) -> Result<UnixListener> {
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

/// Sends one request; `None` = nobody answers there.
///
/// # Errors
/// Somebody answers who does not speak HTTP.
pub async fn ask(socket: &Path, method: &str, path: &str, body: Vec<u8>) -> Result<Option<(StatusCode, Bytes)>> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
        Err(error) => return Err(Error::failed("cannot connect").because(error)),
    };
    let strange = |what: &str| Error::failed(what.to_owned());
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| strange("no HTTP").because(error))?;
    let driver = task::spawn("control-client", connection);
    let request = Request::builder().method(method).uri(path).header("host", "drctl");
    let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(body)));
    let request = request.map_err(|error| strange("not a request").because(error))?;
    let response = sender.send_request(request).await.map_err(|error| strange("no answer").because(error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    driver.abort();
    let body = body.map_err(|error| strange("half an answer").because(error))?.to_bytes();
    Ok(Some((status, body)))
}
