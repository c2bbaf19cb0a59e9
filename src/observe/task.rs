//! The one way to start a task.

use std::future::Future;
use std::panic::{AssertUnwindSafe, resume_unwind};

use futures::FutureExt;
use tokio::task::JoinHandle;
use tracing::Instrument;

/// Starts `future` in a span that carries `name`; a panic in it is logged before it reaches the handle.
///
/// # Contract
/// - Dropping the handle detaches the task; whoever needs its end keeps the handle and awaits it.
/// - A panic is never swallowed: it is told once in the log, and the handle yields it as a `JoinError`.
#[allow(clippy::disallowed_methods, reason = "this is the one place that starts a task")]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let watched = async move {
        match AssertUnwindSafe(future).catch_unwind().await {
            Ok(output) => output,
            Err(panic) => {
                tracing::error!(task = name, "task panicked: {}", panic_text(panic.as_ref()));
                resume_unwind(panic)
            }
        }
    };
    tokio::spawn(watched.instrument(tracing::info_span!("task", name)))
}

/// The message of a panic, as far as it is text.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_output_comes_back() {
        assert_eq!(spawn("answer", async { 42 }).await.unwrap(), 42);
    }

    #[tokio::test]
    async fn a_panic_reaches_the_handle() {
        let error = spawn("broken", async { panic!("on purpose") }).await.unwrap_err();
        assert_eq!(panic_text(error.into_panic().as_ref()), "on purpose");
    }
}
