//! Named tasks: the one place that spawns.

use std::future::Future;

use tracing::Instrument;

/// Runs `future` as a task whose log lines carry `name`.
#[allow(clippy::disallowed_methods)]
pub fn spawn<F>(name: &'static str, future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future.instrument(tracing::debug_span!("task", name)))
}
