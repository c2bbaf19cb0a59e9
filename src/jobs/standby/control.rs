//! The socket on which a standby that is fed answers.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/standby?look=false` | how it is; with `look=true` after a look into every region |
//! | `POST /v1/standby/promote` with `{"accept_loss": …}` | what promotion came to, once it is over |
//! | `POST /v1/standby/stop` | `{}` once it is on its way |
//!
//! A refusal is `{"kind": …, "message": …, "hint": …}`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Query, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};

use crate::jobs::feed::Feed;
use crate::jobs::socket::{self, Guests, Served, reply, understand};
use crate::jobs::standby::record::Record;
use crate::jobs::standby::status::{ServerView, Status};
use crate::jobs::standby::words::{Promoted, Wish};
use crate::model::{Clock, Error, Kind, RegionName, Result};

/// The socket's name beside that of the feed.
const SOCKET: &str = "control";

/// What a standby is told to do.
#[derive(Debug)]
pub(super) enum Order {
    Promote(Wish, oneshot::Sender<Result<Promoted>>),
    Stop(oneshot::Sender<()>),
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Question {
    #[serde(default)]
    look: bool,
}

/// What answers without the standby's own loop.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) record: Record,
    pub(super) feed: Feed,
    pub(super) region: Option<RegionName>,
    pub(super) server: Mutex<ServerView>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) orders: mpsc::Sender<Order>,
}

impl Desk {
    pub(super) fn status(&self) -> Status {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status::of(&self.record, self.region.as_ref(), (&self.feed.position(), &server), self.clock.now())
    }

    pub(super) fn note(&self, change: impl FnOnce(&mut ServerView)) {
        change(&mut self.server.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn path(record: &Record) -> PathBuf {
    record.socket_dir.join(SOCKET)
}

/// Removes the socket that a process left which was killed.
pub(super) fn remove(record: &Record) {
    if let Err(error) = std::fs::remove_file(path(record)) {
        tracing::debug!(%error, "the control socket of a standby is not removed");
    }
}

/// Answers until it is dropped.
pub(super) async fn serve(desk: Arc<Desk>) -> Result<Served> {
    let path = path(&desk.record);
    let app = Router::new()
        .route("/v1/standby", get(answer))
        .route("/v1/standby/promote", post(promote))
        .route("/v1/standby/stop", post(stop))
        .with_state(desk);
    Served::start(&path, &Guests::default(), app).await
}

async fn answer(State(desk): State<Arc<Desk>>, Query(Question { look }): Query<Question>) -> Response {
    if look && let Err(error) = desk.feed.look().await {
        tracing::debug!(%error, "a look into the regions failed");
    }
    reply(Ok(desk.status()))
}

fn busy() -> Error {
    Error::new(Kind::Busy, "the standby is being stopped or promoted")
}

async fn promote(State(desk): State<Arc<Desk>>, Json(wish): Json<Wish>) -> Response {
    let (sender, receiver) = oneshot::channel();
    let ordered = desk.orders.try_send(Order::Promote(wish, sender)).map_err(|_| busy());
    reply(match ordered {
        Ok(()) => receiver.await.unwrap_or_else(|_| Err(Error::failed("the standby ended before it was promoted"))),
        Err(error) => Err(error),
    })
}

async fn stop(State(desk): State<Arc<Desk>>) -> Response {
    let (sender, receiver) = oneshot::channel();
    let ordered = desk.orders.try_send(Order::Stop(sender)).map_err(|_| busy());
    if ordered.is_ok() {
        // It ends with the process.
        let _ = receiver.await;
    }
    reply(ordered.map(|()| serde_json::json!({})))
}

async fn ask<T: serde::de::DeserializeOwned>(
    record: &Record,
    method: &str,
    what: &str,
    body: Vec<u8>,
) -> Result<Option<T>> {
    let socket: &Path = &path(record);
    socket::ask(socket, method, what, body).await?.map(understand).transpose()
}

/// How a standby is; `None` = nobody feeds it.
///
/// # Errors
/// It answers, and not as it should.
pub(super) async fn status(record: &Record, look: bool) -> Result<Option<Status>> {
    ask(record, "GET", &format!("/v1/standby?look={look}"), Vec::new()).await
}

/// Orders promotion and waits for its end; `None` = nobody feeds it.
///
/// # Errors
/// What stopped it.
pub(super) async fn order_promotion(record: &Record, wish: Wish) -> Result<Option<Promoted>> {
    let body = serde_json::to_vec(&wish).map_err(|error| Error::failed("encode a request").because(error))?;
    ask(record, "POST", "/v1/standby/promote", body).await
}

/// Orders the end; `None` = nobody feeds it.
///
/// # Errors
/// It answers, and not as it should.
pub(super) async fn order_stop(record: &Record) -> Result<Option<serde_json::Value>> {
    ask(record, "POST", "/v1/standby/stop", Vec::new()).await
}
