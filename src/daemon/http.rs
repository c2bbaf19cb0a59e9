//! The daemon's TCP listener: probes and metrics for whoever reaches it, and whatever else is merged in.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | 200 while the loop turns, else 503 with the reason: restart it |
//! | `GET /readyz` | 200 when the scheduler runs, its state can be written and enough regions answer, else 503 and why |
//! | `GET /metrics` | the text format of Prometheus |
//!
//! What is asked here is answered from memory. `listener` bounds how many connections there are, and how long they last.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::daemon::figures::Figures;
use crate::daemon::listener::{self, Bounds};
use crate::daemon::standing::Standing;
use crate::model::{Error, Result};
use crate::observe::task;

/// How long a client that is being answered can delay the end.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Answers until it is stopped.
pub(super) struct Http {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Http {
    /// Listens on `address`. `more` is served beside the probes and guards itself: these need no token, it may.
    pub(super) async fn start(address: SocketAddr, known: Known, more: Router) -> Result<Self> {
        let cannot = |error| Error::failed(format!("listen on {address}")).because(error);
        let (listener, address) = listener::bind(address).await.map_err(cannot)?;
        let app = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(known)
            .merge(more);
        let stop = CancellationToken::new();
        let task = task::spawn("daemon-http", listener::serve(listener, app, Bounds::DAEMON, stop.clone()));
        tracing::info!(%address, "answers /healthz, /readyz and /metrics");
        Ok(Self { stop, task })
    }

    /// Stops answering.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(LAST_ANSWER, &mut self.task).await;
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is answered from.
pub(super) type Known = (Arc<Standing>, Arc<Figures>);

async fn healthz(State((standing, _)): State<Known>) -> Response {
    told(standing.dead().into_iter().collect())
}

async fn readyz(State((standing, _)): State<Known>) -> Response {
    told(standing.unready())
}

fn told(reasons: Vec<String>) -> Response {
    match reasons.is_empty() {
        true => (StatusCode::OK, "ok\n").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response(),
    }
}

async fn metrics(State((_, figures)): State<Known>) -> Response {
    match figures.text() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
