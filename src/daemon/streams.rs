//! One WAL stream per target, begun again whenever it ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::app::{self, Role, World};
use crate::config::{Settings, Source};
use crate::jobs::wal::Stream;
use crate::model::{Error, Result, TargetName};
use crate::observe::task;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A stream that lived this long was well; its end is not counted against it.
const GOOD_LIFE: Duration = Duration::from_secs(300);
/// How often a stream is asked whether it is over.
const LOOK: Duration = Duration::from_millis(500);

/// The streams.
pub(super) struct Streams {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Streams {
    /// Starts one per target, if they are wanted here.
    pub(super) fn start(settings: &Settings, world: &World, wanted: bool) -> Self {
        let stop = CancellationToken::new();
        let settings = Arc::new(settings.clone());
        let clusters = settings.targets.iter().filter(|target| matches!(target.source, Source::Postgres(_)));
        let targets = clusters.filter(|_| wanted);
        let tasks = targets.map(|target| {
            let kept = keep(Arc::clone(&settings), world.clone(), target.name.clone(), stop.clone());
            task::spawn("wal-stream", kept)
        });
        Self { tasks: tasks.collect(), stop }
    }

    pub(super) fn count(&self) -> usize {
        self.tasks.len()
    }

    /// Ships what was received, and ends.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            // Its panic was told when it happened.
            let _ = task.await;
        }
    }
}

async fn keep(settings: Arc<Settings>, world: World, target: TargetName, stop: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    while !stop.is_cancelled() {
        let begun = world.clock.monotonic();
        match stream(&settings, &world, &target, &stop).await {
            Ok(()) if stop.is_cancelled() => return,
            Ok(()) => tracing::warn!(%target, "the WAL stream ended; it is begun again"),
            Err(error) => tracing::warn!(%target, %error, "the WAL stream ended; it is begun again"),
        }
        if world.clock.monotonic().saturating_sub(begun) >= GOOD_LIFE {
            pause = FIRST_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn stream(settings: &Settings, world: &World, target: &TargetName, stop: &CancellationToken) -> Result<()> {
    let context = app::context(settings, Role::Write, world).await?;
    let stream = Stream::start(&context, context.target(target)?).await?;
    tracing::info!(%target, "streams WAL");
    let watch = stream.watch();
    while !stream.is_over() {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => break,
        }
    }
    let owed: u64 = stream.stop().await?.iter().map(|outcome| outcome.missing_objects).sum();
    tracing::info!(%target, durable = %watch().durable_lsn, owed, "stopped");
    match stop.is_cancelled() {
        true => Ok(()),
        false => Err(Error::failed(watch().last_error.unwrap_or_else(|| "it gave no reason".to_owned()))),
    }
}
