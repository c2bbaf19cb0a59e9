//! The sign of life: given while this daemon does what it is for, and only then.
//!
//! Alive is a loop that turns, a state directory that can be written, and WAL of every target that is streamed here that
//! has flowed into the regions at some time in the last ten minutes. A server that is stopped for longer, regions that
//! hold acknowledgement for longer, or a receiver that cannot begin: none of that is life, because what is written
//! meanwhile is in one place only.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::app::{self, World};
use crate::config::Settings;
use crate::daemon::figures::Figures;
use crate::daemon::standing::Standing;
use crate::model::Error;
use crate::observe::task;

/// How long WAL of a target may stand still.
const LONGEST_STILL: Duration = Duration::from_secs(600);

/// Gives signs until it is dropped.
pub(super) struct Life {
    task: Option<JoinHandle<()>>,
}

impl Life {
    pub(super) fn start(settings: &Settings, world: &World, standing: &Arc<Standing>, figures: &Arc<Figures>) -> Self {
        // Whoever waits for the sign pages when it stays away.
        let told = |error: &Error| tracing::error!(%error, "no sign of life will be given");
        let Some(switch) = app::dead_man(settings).inspect_err(told).ok().flatten() else { return Self { task: None } };
        let every = settings.notify.dead_man.as_ref().map_or(LONGEST_STILL, |dead_man| dead_man.every);
        let (standing, figures, clock) = (Arc::clone(standing), Arc::clone(figures), Arc::clone(&world.clock));
        let task = task::spawn("dead-man", async move {
            let mut silent = false;
            loop {
                let trouble = standing.dead().or_else(|| standing.forgetful());
                let trouble = trouble.or_else(|| still(&figures.stuck(clock.monotonic(), LONGEST_STILL)));
                let told = match &trouble {
                    Some(why) => Err(why.clone()),
                    None => switch.ping().await.map_err(|error| error.to_string()),
                };
                match told {
                    Ok(_) if std::mem::replace(&mut silent, false) => tracing::info!("signs of life are given again"),
                    Ok(_) => {}
                    Err(why) if !std::mem::replace(&mut silent, true) => {
                        tracing::warn!(why, to = switch.describe(), "no sign of life is given");
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(every).await;
            }
        });
        Self { task: Some(task) }
    }
}

fn still(stuck: &[crate::model::TargetName]) -> Option<String> {
    let names: Vec<_> = stuck.iter().map(ToString::to_string).collect();
    let minutes = LONGEST_STILL.as_secs() / 60;
    (!names.is_empty()).then(|| format!("WAL has not flowed for {minutes} min: {}", names.join(", ")))
}

impl Drop for Life {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
