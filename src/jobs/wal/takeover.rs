//! Becoming the one owner of a target's WAL: the slot first, then what is stored.
//!
//! Whoever takes over seals every other open epoch, and a writer that works is stopped by that for good. So it is done only
//! by whoever holds the replication slot, which the server gives to one receiver at a time. The slot makes it polite; what
//! makes it safe are the SEALs.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::jobs::context::{Context, Target};
use crate::jobs::wal::acceptance;
use crate::jobs::wal::position::State;
use crate::jobs::wal::run::{Run, Trouble};
use crate::jobs::wal::server::{self, Server};
use crate::model::{EpochId, Error, Kind, Lsn, RegionName, Result, TargetName, Timeline};
use crate::pg::replication::{StandbyStatus, WalEvent};
use crate::repository::regions::fan_out::{FanOut, Patience};
use crate::repository::wal::adopt::{Era, Tail, TakeOver, take_over};
use crate::repository::wal::claim::Known;
use crate::repository::wal::index::BranchId;
use crate::repository::wal::left::successor;

/// A takeover that takes longer than this waits for regions.
const SLOW: Duration = Duration::from_secs(5);
/// Often enough for any `wal_sender_timeout` that lets a receiver live.
const STATUS: Duration = Duration::from_secs(1);

/// What a takeover did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TakenOver {
    /// The target.
    pub target: TargetName,
    /// Open epochs of other writers that were sealed.
    pub sealed: u64,
    /// Frames of theirs that were copied to the write quorum.
    pub adopted: u64,
    /// The timeline of the newest stored WAL.
    pub timeline: Option<Timeline>,
    /// Where streaming goes on; none if no WAL is stored.
    pub end: Option<Lsn>,
    /// Regions that could not be read and were given up.
    pub given_up: BTreeSet<RegionName>,
}

/// Takes a target's WAL over from whoever streamed it, and does not stream.
///
/// # Errors
/// Another receiver holds the slot; the server or too few regions answer.
pub async fn take_over_once(context: &Context, target: &Target) -> Result<TakenOver> {
    let mut client = server::connect(target).await?;
    let server = Server::identify(&mut client).await?;
    let (eras, known) = (server.eras(), Known::default());
    let out = Arc::new(FanOut::new(&context.repository.regions, Patience::PUSH));
    let taken = take_over_as(context, &target.name, (&out, &known, None), (&eras, None));
    let (tail, given_up) = while_holding_the_slot((context, target), &server, taken).await.map_err(Error::from)??;
    Ok(TakenOver {
        target: target.name.clone(),
        sealed: tail.as_ref().map_or(0, |tail| tail.sealed),
        adopted: tail.as_ref().map_or(0, |tail| tail.adopted),
        timeline: tail.as_ref().map(|tail| tail.branch.timeline),
        end: tail.map(|tail| tail.end),
        given_up,
    })
}

/// Works while nobody else can stream through the slot. The stream that keeps others from it begins where the server is:
/// there it has WAL for sure. What it brings is asked for again from the right place.
async fn while_holding_the_slot<T>(
    (context, target): (&Context, &Target),
    server: &Server,
    work: impl Future<Output = T>,
) -> Result<T, Trouble> {
    let newest = server.branches().into_iter().next();
    let newest = newest.ok_or_else(|| Error::failed("the server has no timeline"))?;
    let begin = async || {
        let client = server::connect(target).await?;
        client.start_physical(Some(&target.slot), server.flush_lsn, newest.timeline).await
    };
    let mut held = match begin().await {
        Err(error) if server::is_missing_slot(&error) => {
            server::ensure_slot(&mut server::connect(target).await?, &target.slot).await?;
            begin().await?
        }
        begun => begun?,
    };
    let mut work = std::pin::pin!(work);
    let mut ticks = interval(STATUS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            event = held.next() => must_go_on(&event?)?,
            _ = ticks.tick() => held.send_status(nothing_yet(), context.clock.now()).await?,
        }
    };
    held.stop().await?;
    Ok(done)
}

/// A stream whose timeline ended says so whenever it is asked, and holds no slot any more.
fn must_go_on(event: &WalEvent) -> Result<()> {
    let WalEvent::TimelineEnd { next_timeline, switch_lsn } = event else { return Ok(()) };
    let text = format!("the server went on to timeline {next_timeline} at {switch_lsn} while its WAL was taken over");
    let error = Error::new(Kind::Unavailable, text).transient(true);
    Err(error.hint("nothing was lost by that; take over again from where it is now"))
}

/// The server hears that somebody is there, and no position: nothing is durable by this.
const fn nothing_yet() -> StandbyStatus {
    StandbyStatus { write: Lsn::INVALID, flush: Lsn::INVALID, apply: Lsn::INVALID, reply_requested: false }
}

async fn take_over_as(
    context: &Context,
    target: &TargetName,
    (out, known, own): (&FanOut, &Known, Option<&EpochId>),
    history: (&[Era], Option<&BranchId>),
) -> Result<(Option<Tail>, BTreeSet<RegionName>)> {
    let (repository, writer) = (&context.repository, context.writer()?);
    // A SEAL that nobody can check would be no frame at all.
    repository.enroll(writer, out).await?;
    let mut lost = BTreeSet::new();
    if let Some(accepted) = acceptance::read(context, target) {
        let (by, at) = (&accepted.by, accepted.at);
        tracing::error!(%target, regions = ?accepted.regions, by, %at, "WAL that only these regions hold is given up, as an operator said");
        lost = accepted.regions;
    }
    known.give_up(lost.clone());
    let tail = take_over(&TakeOver { repository, writer, own, known }, history).await?;
    if let Some(Tail { sealed, adopted, end, .. }) = tail.as_ref().filter(|tail| tail.sealed + tail.adopted > 0) {
        tracing::info!(%target, sealed, adopted, %end, "taken over from an earlier writer");
    }
    Ok((tail, lost))
}

impl Run {
    /// Takes over while nobody else can stream through the slot.
    pub(super) async fn take_over_alone(&self, server: &Server) -> Result<Option<Tail>, Trouble> {
        let taken = async {
            let tail = self.take_over(server, None).await?;
            self.must_not_be_left(server).await?;
            Ok::<_, Error>(tail)
        };
        let tail = while_holding_the_slot((&self.context, &self.target), server, taken).await?;
        Ok(tail.inspect_err(|error| self.shared.trouble(State::WaitingForRegions, error))?)
    }

    /// A server that stayed on a timeline which another one left is no longer the one that commits are safe with.
    async fn must_not_be_left(&self, server: &Server) -> Result<()> {
        let (Some(newest), Some(branch)) = (server.lineage.first(), server.branches().into_iter().next()) else {
            return Ok(());
        };
        let own = (&branch, &newest.history);
        match successor(&self.context.repository, own, server.flush_lsn, &self.means.known).await? {
            Some(successor) => Err(successor.refuses(&branch)),
            None => Ok(()),
        }
    }

    /// Takes over, and looks what is left of the segments that `archive_command` would be told to be safe: the loss of a
    /// region may have taken what was acknowledged.
    pub(super) async fn take_over(&self, server: &Server, back_to: Option<&BranchId>) -> Result<Option<Tail>> {
        let book = || self.means.book.as_ref().map(|book| book.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(mut book) = book() {
            book.doubt();
        }
        let tail = self.take_over_aloud(&server.eras(), back_to).await?;
        if let (Some(mut book), Some(tail)) = (book(), &tail) {
            book.believe(tail, server.segment_size);
        }
        Ok(tail)
    }

    /// Adoption and SEALs need regions, for which it waits as long as it takes: what takes long is told.
    async fn take_over_aloud(&self, lineage: &[Era], back_to: Option<&BranchId>) -> Result<Option<Tail>> {
        let own = self.shared.shipped.borrow().epoch.clone();
        let ours = (self.means.out.as_ref(), self.means.known.as_ref(), own.as_ref());
        let taken = take_over_as(&self.context, &self.target.name, ours, (lineage, back_to));
        let mut taken = std::pin::pin!(taken);
        if let Ok(taken) = timeout(SLOW, &mut taken).await {
            return taken.map(|(tail, _)| tail);
        }
        self.shared.trouble(State::WaitingForRegions, &"stored WAL is brought to the write quorum first");
        taken.await.map(|(tail, _)| tail)
    }

    /// Another receiver has the slot. What this one still holds goes the usual way: if its epoch was sealed, that is the
    /// end of it; if not, the other one never took over, and it may go on when the slot is free again.
    pub(super) async fn settle_with_successor(&mut self) -> Result<()> {
        while let Some(frame) = self.pending.pop_front() {
            if self.shipper.is_gone() {
                break;
            }
            let permit = self.shipper.room(frame.chunk.wal.len()).await?;
            self.shipper.ship(frame, permit);
        }
        if self.shipper.is_gone() { self.restart_shipper().await } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_a_slot_notices_that_its_timeline_ended() {
        let now = chrono::DateTime::UNIX_EPOCH;
        must_go_on(&WalEvent::KeepAlive { server_end: Lsn(7), server_time: now, reply_requested: false }).unwrap();
        let ended = WalEvent::TimelineEnd { next_timeline: Timeline(2), switch_lsn: Lsn(7) };
        let error = must_go_on(&ended).unwrap_err();
        assert!(error.is_transient() && error.message().contains("to timeline 2 at 0/7"), "{error:?}");
    }
}
