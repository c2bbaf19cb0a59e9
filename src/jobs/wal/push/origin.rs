//! Whose WAL a target's is: its cluster, and the histories of its timelines. The server itself is asked; what it said is
//! remembered, because a server that shuts down still archives and no longer answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::disk::place;
use crate::jobs::context::{Context, Target};
use crate::jobs::wal::server::{self, Server};
use crate::model::{Branch, Error, Kind, Lsn, Result, SystemId, Timeline};
use crate::pg::history::History;
use crate::repository::wal::log::branch_of;

/// How long the server may take to say who it is.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// How often a server is asked for its end that lies before WAL which it archives: a standby may be a moment behind.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// What is known of a target's cluster.
#[derive(Debug)]
pub(super) struct Origin {
    path: PathBuf,
    known: Known,
    /// The timeline that the server was on when it was asked last, and the end of its WAL.
    seen: Option<(Timeline, Lsn)>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Known {
    system_id: Option<SystemId>,
    /// History files by timeline.
    histories: BTreeMap<Timeline, String>,
}

/// A timeline as the target's cluster has it.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) branch: Branch,
    pub(super) history: History,
}

impl Origin {
    /// What an earlier process remembered.
    pub(super) fn open(context: &Context, target: &Target) -> Self {
        let path = context.state_dir.join(format!("{}.origin.json", target.name));
        let known = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self { path, known: known.unwrap_or_default(), seen: None }
    }

    /// Makes sure that WAL of `system_id` is WAL of this target.
    ///
    /// # Errors
    /// Refused: it is another cluster's. Unavailable: nobody can tell now.
    pub(super) async fn must_own(&mut self, target: &Target, system_id: SystemId) -> Result<()> {
        if self.known.system_id == Some(system_id) {
            return Ok(());
        }
        // A cluster that was made anew behind the same name says so itself.
        let asked = self.ask(target).await;
        match (self.known.system_id, asked) {
            (Some(own), _) if own == system_id => Ok(()),
            (Some(own), _) => Err(foreign(target, system_id, own)),
            (None, Err(error)) => {
                Err(error.during(format!("whose WAL it is cannot be told before {} answered once", target.name)))
            }
            (None, Ok(())) => Err(Error::failed("the server did not say which cluster it is")),
        }
    }

    /// Makes sure that the server itself has written `[start, end)` of a timeline.
    ///
    /// # Errors
    /// Refused: it has not. Unavailable: it does not answer, and had not come to that WAL when it was asked last.
    pub(super) async fn must_have_written(
        &mut self,
        target: &Target,
        timeline: Timeline,
        (start, end): (Lsn, Lsn),
    ) -> Result<()> {
        let has_written = |seen: Option<(Timeline, Lsn)>| {
            // A timeline that the server left is its history, which tells where.
            seen.is_some_and(|(current, flushed)| current > timeline || current == timeline && flushed >= end)
        };
        let mut looks = 0;
        while !has_written(self.seen) {
            if let Err(error) = self.ask(target).await {
                // A server that shuts down archives its last segment and no longer answers.
                return match self.seen {
                    Some((current, flushed)) if current == timeline && flushed >= start => Ok(()),
                    _ => Err(error.during(format!("whether {} wrote this WAL cannot be told now", target.name))),
                };
            }
            looks += 1;
            if looks == LOOKS && !has_written(self.seen) {
                return Err(ahead(target, end, self.seen));
            }
            tokio::time::sleep(if has_written(self.seen) { Duration::ZERO } else { LOOK_PAUSE }).await;
        }
        Ok(())
    }

    /// The cluster, as far as it is known.
    pub(super) const fn system_id(&self) -> Option<SystemId> {
        self.known.system_id
    }

    /// The history file of a timeline, as far as it is known.
    pub(super) fn file(&self, timeline: Timeline) -> Option<&str> {
        self.known.histories.get(&timeline).map(String::as_str)
    }

    /// A timeline of this cluster.
    ///
    /// # Errors
    /// Its history is not known, and the server does not tell it now.
    pub(super) async fn line(&mut self, target: &Target, timeline: Timeline) -> Result<Line> {
        if timeline == Timeline::FIRST {
            return Ok(Line { branch: Branch::root(), history: History::without_ancestors(timeline) });
        }
        if !self.known.histories.contains_key(&timeline) {
            let answered = self.ask(target).await;
            if !self.known.histories.contains_key(&timeline) {
                return Err(answered
                    .err()
                    .map_or_else(|| another_copy(target, timeline), |error| not_yet(timeline, &error)));
            }
        }
        let text = self.known.histories.get(&timeline).map(String::as_str).unwrap_or_default();
        line_of(timeline, text)
    }

    /// Takes a history file that was archived. The server decides which one is right, if it answers.
    ///
    /// # Errors
    /// Another history of this number is the cluster's, or the cluster has no such timeline.
    pub(super) async fn learn(&mut self, target: &Target, timeline: Timeline, text: &str) -> Result<Line> {
        let line = line_of(timeline, text)?;
        if self.known.histories.get(&timeline).is_none_or(|known| known != text) {
            let answered = self.ask(target).await;
            match (answered, self.known.histories.get(&timeline)) {
                (Err(error), _) if self.known.system_id.is_none() => return Err(error),
                (_, Some(known)) if known != text => return Err(another_history(target, timeline)),
                (Ok(()), None) => return Err(another_copy(target, timeline)),
                // After a failover the server that conninfo leads to may be gone for good.
                (Err(_), None) => {
                    self.known.histories.insert(timeline, text.to_owned());
                    self.keep();
                }
                _ => {}
            }
        }
        Ok(line)
    }

    async fn ask(&mut self, target: &Target) -> Result<()> {
        let asking = async {
            let mut client = server::connect(target).await?;
            let server = Server::identify(&mut client).await?;
            client.close().await;
            Ok::<_, Error>(server)
        };
        let hangs = || Error::new(Kind::Unavailable, format!("{} does not answer", target.name)).transient(true);
        let server = tokio::time::timeout(ANSWER_TIME, asking).await.map_err(|_| hangs())??;
        if self.known.system_id != Some(server.system_id) {
            self.known = Known { system_id: Some(server.system_id), histories: BTreeMap::new() };
        }
        self.seen = server.lineage.first().map(|newest| (newest.reign.timeline, server.flush_lsn));
        for descent in &server.lineage {
            let text = descent.file.as_deref().and_then(|file| std::str::from_utf8(file).ok());
            if let Some(text) = text {
                self.known.histories.insert(descent.reign.timeline, text.to_owned());
            }
        }
        self.keep();
        Ok(())
    }

    fn keep(&self) {
        let kept = serde_json::to_vec(&self.known).ok();
        let kept = kept.map(|bytes| place::place(&self.path, &bytes, 0o600));
        if let Some(Err(error)) = kept {
            tracing::info!(%error, "which cluster a target is will be asked again at the next start");
        }
    }
}

fn line_of(timeline: Timeline, text: &str) -> Result<Line> {
    Ok(Line { branch: branch_of(text.as_bytes()), history: History::parse(timeline, text)? })
}

fn not_yet(timeline: Timeline, error: &Error) -> Error {
    let text = format!("the history of timeline {timeline} is not known yet");
    Error::new(Kind::Unavailable, text).because(error).transient(true)
}

fn another_history(target: &Target, timeline: Timeline) -> Error {
    let text = format!("the history of timeline {timeline} is not the one that {} has", target.name);
    Error::refused(text).hint("two servers call themselves by this timeline: the one that conninfo leads to counts")
}

/// A copy of the storage that was started beside the original goes on in the same timeline.
fn ahead(target: &Target, end: Lsn, seen: Option<(Timeline, Lsn)>) -> Error {
    let flushed = seen.map_or(Lsn::INVALID, |(_, flushed)| flushed);
    let text = format!("it ends at {end}, and the server of {} has written up to {flushed}", target.name);
    Error::refused(text).hint(
        "a copy of its storage archives here: turn archiving off in that copy; after a failover, lead conninfo to the new primary",
    )
}

/// A restored copy that was promoted archives with the command of its original.
fn another_copy(target: &Target, timeline: Timeline) -> Error {
    let text = format!("the server of {} knows no timeline {timeline}: another copy of it archives here", target.name);
    Error::refused(text)
        .hint("turn archiving off in that copy; after a failover, lead conninfo to the new primary first")
}

fn foreign(target: &Target, system_id: SystemId, own: SystemId) -> Error {
    let text = format!("this is WAL of system {system_id}, and {} is system {own}", target.name);
    Error::refused(text)
        .hint("each cluster needs a target of its own; its archive_command must name that target's socket")
}
