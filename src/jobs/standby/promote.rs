//! Promotion: a plan that says what it loses, and the run: drain to the durable end, make sure that it is the end, promote,
//! and check where the new timeline began.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::disk::place;
use crate::jobs::context::Context;
use crate::jobs::feed::{Feed, Position};
use crate::jobs::restore::{self, Primary, Refusal};
use crate::jobs::standby::control;
use crate::jobs::standby::drain::{Drain, Seen, Step, streams};
use crate::jobs::standby::record::Record;
use crate::jobs::standby::server::{self, Server};
use crate::jobs::standby::status::{State, Status};
use crate::jobs::standby::words::{Overrides, Promoted, Wish};
use crate::jobs::wal::reaches;
use crate::model::{Error, Lsn, Result, ResultExt, Timeline};
use crate::pg::history::History;
use crate::repository::wal::index;

const POLL: Duration = Duration::from_millis(200);
/// A server that is promoted writes one record first; a large one renames and checks many files.
pub(super) const OPENING: Duration = Duration::from_secs(600);

/// What promotion will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Identifies the plan; its first six digits are enough.
    pub digest: String,
    /// How the standby is now.
    pub standby: Status,
    /// Whether the primary still answers as one.
    pub primary: Primary,
    /// What stands in the way.
    pub refused: Vec<Refusal>,
    /// What the reader should know.
    pub warnings: Vec<String>,
    /// The command that runs this plan; absent when something stands in the way.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub command: String,
}

impl Plan {
    /// As people type it.
    pub fn short_digest(&self) -> &str {
        self.digest.get(..6).unwrap_or(&self.digest)
    }

    /// An error if something stands in the way.
    ///
    /// # Errors
    /// The refusals.
    pub fn refuse(&self) -> Result<()> {
        let Some(first) = self.refused.first() else { return Ok(()) };
        let error = Error::refused(format!("the standby of {} is not promoted: {}", self.standby.target, first.what));
        let rest = self.refused.iter().map(|refusal| format!("{}: {}", refusal.what, refusal.why));
        Err(rest.fold(error, |error, refusal| error.because(refusal)).hint(first.next.clone()))
    }

    /// Whether it is the plan that was named.
    ///
    /// # Errors
    /// It is another one.
    pub fn must_be(&self, wanted: &str) -> Result<()> {
        const LEAST: usize = 6;
        if wanted.len() >= LEAST && self.digest.starts_with(wanted) {
            return Ok(());
        }
        let error = Error::refused(format!("the plan is not {wanted}, it is {}", self.short_digest()));
        Err(error.hint("look at the plan again: drctl standby promote"))
    }

    fn refuse_because(&mut self, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.refused.push(Refusal { what: what.into(), why: why.into(), next: next.into(), judges: false });
    }
}

/// Computes the plan; nothing is touched.
///
/// # Errors
/// The standby answers, and not as it should.
pub async fn plan(context: &Context, record: &Record, overrides: Overrides) -> Result<Plan> {
    let (standby, followed) = match control::status(record, true).await? {
        Some(status) => (status, None),
        None => match server::followed(record).await? {
            Some(at) => (Status::promoted(record, at), Some(at)),
            None => (Status::not_fed(record, None), None),
        },
    };
    let primary = match context.target(&record.target) {
        Ok(target) => restore::ask_primary(target, record.origin.system_id).await,
        Err(error) => Primary::Unknown(error.to_string()),
    };
    let mut plan = Plan {
        digest: digest(record, overrides)?,
        standby,
        primary,
        refused: Vec::new(),
        warnings: Vec::new(),
        command: String::new(),
    };
    if followed.is_some() {
        // What was ordered is done, whatever else is true by now.
        return Ok(plan);
    }
    plan.judge_life((context, record), overrides);
    plan.judge(context, overrides);
    Ok(plan)
}

impl Plan {
    /// Whether somebody still takes writes.
    fn judge_life(&mut self, (context, record): (&Context, &Record), overrides: Overrides) {
        let mut lives = |what: &str, why: String| match overrides.primary_lives {
            true => self.warnings.push(format!("{what}: {why}")),
            false => {
                let next = "stop or fence it, or add --primary-is-fenced".to_owned();
                self.refused.push(Refusal { what: what.to_owned(), why, next, judges: false });
            }
        };
        let streams = streams(self.standby.streamed_at, context.clock.now(), ship_interval(context, record));
        match (&self.primary, streams) {
            (Primary::Answers, _) => {
                let why = "what it commits from now on would be lost, and two servers would take writes";
                lives("the primary still answers", why.to_owned());
            }
            (_, Some(streams)) => lives("the primary may live", streams),
            (Primary::Unknown(why), None) => {
                let warning =
                    format!("whether the primary lives is not known ({why}): make sure that it takes no writes");
                self.warnings.push(warning);
            }
            (Primary::Silent, None) => {}
        }
    }

    fn judge(&mut self, context: &Context, overrides: Overrides) {
        let Status { state, why, silent, .. } = self.standby.clone();
        if state == State::NotFed {
            let next = format!("drctl standby start {} --to {}", self.standby.target, self.standby.directory.display());
            self.refuse_because("nobody feeds it", "what is stored and not replayed would be lost", next);
        }
        if matches!(state, State::ServerDown | State::Promoting) {
            let why = why.clone().unwrap_or_else(|| state.words().to_owned());
            self.refuse_because(format!("it is {}", state.words()), why, "see drctl standby status");
        }
        let (newest, end) = (self.standby.newest_timeline, self.standby.durable_timeline.zip(self.standby.durable_end));
        if let Some((newest, end)) = newest.zip(end).filter(|(newest, (timeline, _))| newest != timeline) {
            let error = short_of(newest, end);
            let next =
                format!("see drctl wal status; drctl restore {} goes to the end of any timeline", self.standby.target);
            self.refuse_because(error.message(), error.causes().join("; "), next);
        }
        let mut loss = |what: String, why: String| match overrides.accept_loss {
            true => self.warnings.push(format!("{what}: {why}")),
            false => self.refused.push(Refusal {
                what,
                why,
                next: "see drctl wal status; --accept-loss promotes all the same".to_owned(),
                judges: false,
            }),
        };
        if let (State::InDoubt, Some(why)) = (state, why) {
            loss("stored WAL is not all replayed".to_owned(), why);
        }
        if silent.len() >= context.repository.regions.lowest_quorum() {
            let names = silent.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            loss(format!("{names}: no answer"), "acknowledged WAL may be there alone".to_owned());
        }
    }
}

/// Whose standby, where, and what is overridden; not its position, which moves until it is promoted.
fn digest(record: &Record, Overrides { primary_lives, accept_loss }: Overrides) -> Result<String> {
    let canonical = serde_json::json!({
        "action": "promote",
        "target": record.target,
        "system": record.origin.system_id.to_string(),
        "directory": record.directory,
        "overrides": [primary_lives, accept_loss],
    });
    let text = serde_json::to_vec(&canonical).map_err(|error| Error::failed("encode the plan").because(error))?;
    Ok(hex::encode(Sha256::digest(&text)))
}

/// Promotes.
pub(super) async fn run(
    context: &Context,
    (record, feed, server): (&Record, &Feed, &mut Server),
    wish: Wish,
) -> Result<Promoted> {
    let clock = context.clock.as_ref();
    let began = clock.monotonic();
    let position = reach_the_end(context, (record, feed), wish).await?;
    let drained = clock.monotonic();
    let end = position.end.ok_or_else(|| Error::failed("the end of the stored WAL is not known"))?;
    take_numbers(record, feed, server).await?;
    open(record, server, clock.now()).await?;
    let opened = clock.monotonic();
    let (timeline, (_, switch)) = switched(record, server).await?;
    let mut warnings = warnings(server).await;
    let stored_to = stored_since(feed, end.lsn).await.unwrap_or_else(|warning| {
        warnings.push(warning);
        end.lsn
    });
    let lost_to = (switch < stored_to && !reaches(switch, stored_to)).then_some(stored_to);
    let seconds = |from: Duration, to: Duration| (to - from).as_secs_f64();
    let phases = [("drain", seconds(began, drained)), ("promote", seconds(drained, opened))];
    Ok(Promoted {
        target: record.target.clone(),
        directory: record.directory.clone(),
        recovered_to: lost_to.map_or(end.lsn, |_| end.lsn.min(switch)),
        switch,
        lost_to,
        old_timeline: end.timeline,
        timeline,
        last_commit: end.last_commit,
        stored_at: end.written_at,
        silent: position.silent,
        phases: phases.map(|(name, took)| (name.to_owned(), took)).to_vec(),
        seconds: seconds(began, opened),
        warnings,
        next: next(record, lost_to),
        stored_as: None,
        record: None,
    })
}

/// Ends recovery, and waits until the server takes writes.
async fn open(record: &Record, server: &mut Server, now: DateTime<Utc>) -> Result<()> {
    record.note_promotion(Some(now), server.owner())?;
    server.promote()?;
    server.opened(OPENING).await.during(|| "promote")
}

/// Replays all that is stored, and makes sure that it is all.
async fn reach_the_end(context: &Context, of: (&Record, &Feed), wish: Wish) -> Result<Position> {
    let position = drain(context, of, wish).await.during(|| "drain the standby")?;
    must_know_every_timeline(context, of, wish).await?;
    must_be_the_end(of.1, wish).await?;
    Ok(position)
}

/// Up to where the old timeline is stored once the new one has begun, or a word on why nobody knows.
async fn stored_since(feed: &Feed, end: Lsn) -> std::result::Result<Lsn, String> {
    let unknown = |error: Error| format!("whether more was stored meanwhile is not known: {error}");
    feed.look_anew().await.map_err(unknown)?;
    Ok(feed.position().end.map_or(end, |later| later.lsn.max(end)))
}

/// How long the primary's receiver lets WAL wait.
fn ship_interval(context: &Context, record: &Record) -> Duration {
    context.target(&record.target).map_or(Duration::from_secs(1), |target| target.ship_interval)
}

/// Waits until everything that is stored is replayed, and nothing more comes. It begins with a list of everything: what came
/// into being unseen no look at the next names shows.
async fn drain(context: &Context, (record, feed): (&Record, &Feed), wish: Wish) -> Result<Position> {
    let mut drain = Drain::new(wish, ship_interval(context, record));
    let mut looked = feed.look_anew().await;
    loop {
        let position = feed.position();
        let doubt = looked.err().map(|error| error.to_string()).or_else(|| doubts(context, &position));
        let seen = Seen {
            at: context.clock.monotonic(),
            on: context.clock.now(),
            growth: feed.growth(),
            end: position.end.map(|end| end.lsn),
            replayed: position.replayed,
            doubt,
            is_withheld: position.doubt.is_some(),
            streaming: position.streaming,
        };
        match drain.step(seen) {
            Step::Done => return Ok(position),
            Step::Refuse(error) => return Err(error),
            Step::Wait => tokio::time::sleep(POLL).await,
        }
        looked = feed.look().await;
    }
}

/// A server that knows of a newer timeline than it has WAL of would call that one its parent, in a history that contradicts
/// itself.
async fn must_be_the_end(feed: &Feed, wish: Wish) -> Result<()> {
    let position = feed.position();
    let nothing = |error: Error| Err(error.hint("nothing was promoted"));
    if let Some((newest, end)) = position.newest.zip(position.end).filter(|(newest, end)| *newest != end.timeline) {
        return nothing(short_of(newest, (end.timeline, end.lsn)));
    }
    match feed.hole().await {
        Some(hole) if !wish.accept_loss => nothing(Error::refused("stored WAL is not all replayed").because(hole)),
        _ => Ok(()),
    }
}

fn short_of(newest: Timeline, (timeline, end): (Timeline, Lsn)) -> Error {
    let text = format!("the WAL of timeline {timeline} ends at {end}, before timeline {newest} began");
    Error::refused(text).because("promoted there it would not know whose child it is")
}

fn doubts(context: &Context, position: &Position) -> Option<String> {
    let silent = position.silent.len() >= context.repository.regions.lowest_quorum();
    let names = || position.silent.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let silent = silent.then(|| format!("{}: no answer", names()));
    let doubt = position.doubt.as_ref().map(|doubt| format!("WAL from {} on: {}", doubt.at, doubt.why));
    doubt.or_else(|| position.trouble.clone()).or(silent)
}

/// WAL of a timeline whose history is not stored may be the newest there is, and its number is not free.
async fn must_know_every_timeline(context: &Context, (record, feed): (&Record, &Feed), wish: Wish) -> Result<()> {
    let known = feed.histories().await;
    let stored = index::branches(&context.repository.regions, record.origin.system_id).await?;
    let is_unknown = |branch: &&index::BranchId| {
        branch.timeline > Timeline::FIRST && known.iter().all(|known| known.timeline != branch.timeline)
    };
    match stored.iter().find(is_unknown) {
        Some(unknown) if !wish.accept_loss => {
            let text = format!("WAL of timeline {} is stored, and its history is in no region", unknown.timeline);
            Err(Error::refused(text).hint("nothing was promoted; hand the history file to drctl wal push"))
        }
        _ => Ok(()),
    }
}

/// A server takes the number behind the highest that it finds a history of: every stored one must be there.
async fn take_numbers(record: &Record, feed: &Feed, server: &Server) -> Result<()> {
    let pg_wal = record.directory.join("pg_wal");
    if pg_wal.is_symlink() {
        return Err(Error::refused(format!("{} is a link, and nothing is written through links", pg_wal.display())));
    }
    for stored in feed.histories().await {
        let path = pg_wal.join(stored.timeline.history_file_name());
        if path.exists() {
            continue;
        }
        place::place(&path, &stored.content, 0o600)?;
        restore::give(&path, server.owner())?;
    }
    Ok(())
}

/// The timeline that the server began, and which one it left for it, where.
pub(super) async fn switched(record: &Record, server: &Server) -> Result<(Timeline, (Timeline, Lsn))> {
    let unknown = || Error::failed("the promoted server has no history of its timeline");
    let timeline = server.timeline().await?;
    let path = record.directory.join("pg_wal").join(timeline.history_file_name());
    let text = std::fs::read_to_string(&path).map_err(|error| unknown().because(error))?;
    let history = History::parse(timeline, &text)?;
    let last = history.entries().last().ok_or_else(unknown)?;
    Ok((timeline, (last.timeline, last.switch)))
}

pub(super) async fn warnings(server: &Server) -> Vec<String> {
    let mut warnings = Vec::new();
    match server.setting("synchronous_standby_names").await {
        Ok(names) if !names.is_empty() => {
            warnings.push(format!("synchronous_standby_names is '{names}': commits wait until such a standby connects"))
        }
        Ok(_) => {}
        Err(error) => warnings.push(format!("synchronous_standby_names is not known: {error}")),
    }
    warnings
}

/// What the operator does now.
pub(super) fn next(record: &Record, lost_to: Option<Lsn>) -> Vec<String> {
    let listens = record.listen.as_ref().map_or_else(
        || "it listens in its data directory alone: restart it to listen as its configuration says".to_owned(),
        |listen| format!("it listens on {listen}, port {}: let clients in", record.port),
    );
    let lost = lost_to
        .map(|_| "let no client in before somebody decided whose commits count: the old timeline went on".to_owned());
    let steps = [
        listens,
        format!(
            "let the conninfo of {} name it, and stream its WAL: drctl wal stream {}",
            record.target, record.target
        ),
        format!("drctl backup {}", record.target),
    ];
    lost.into_iter().chain(steps).collect()
}
