//! The plan of a drill, made when the region holds what was on its way: the beat that precedes the drill, and frames of WAL
//! that overtook each other. The wait belongs to the drill, not to a recovery.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::jobs::context::{Context, Target};
use crate::jobs::drill::report::Report;
use crate::jobs::drill::scratch::Scratch;
use crate::jobs::drill::select;
use crate::jobs::drill::stop::Stop;
use crate::jobs::restore::{self, Memory, Point, Prepared, Request};
use crate::model::{Kind, Lsn, ResultExt};
use crate::repository::regions::fan_out::Patience;

/// How long the region may take to hold the beat. Afterwards the drill goes on, and finds an older beat: that is what it
/// measures.
const BEAT_ARRIVES: Duration = Duration::from_secs(10);
/// What a writer that leaves a region behind may need beyond its patience.
const MARGIN: Duration = Duration::from_secs(2);
/// No drill waits longer, whatever keeps arriving.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(300);

/// What a drill restores.
pub(super) struct Ready {
    pub(super) request: Request,
    pub(super) prepared: Prepared,
    /// How long the last planning took.
    pub(super) planned_in: Duration,
    /// What is missing in the WAL for good.
    pub(super) hole: Option<String>,
}

/// Plans until the region holds `beat` and no frame is missing before another, or is given up waiting for.
pub(super) async fn plan(
    context: &Context,
    scratch: &Scratch,
    (target, beat): (&Target, Option<Lsn>),
    report: &mut Report,
) -> Result<Ready, Stop> {
    let (what, point) = select::point(context, &target.name, &mut report.asked).await.map_err(Stop::planning)?;
    let mut request = request(context, scratch, (what, point), &[]);
    let (newest, start, stands) = (report.asked.is_newest(), context.clock.monotonic(), stands(context));
    let mut holes = Holes::default();
    loop {
        let began = context.clock.monotonic();
        let planned = restore::prepare(context, &request).await.during(|| "plan the restore");
        let now = context.clock.monotonic();
        let prepared = match planned {
            // The hole lies below the end of the backup itself.
            Err(error) if newest && error.kind() == Kind::Refused && now - start < stands => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            planned => planned.map_err(Stop::planning)?,
        };
        let plan = &prepared.plan;
        if plan.tablespaces.iter().any(|(_, place)| place.is_none()) {
            let locations: Vec<_> = plan.tablespaces.iter().map(|(location, _)| location.clone()).collect();
            request = self::request(context, scratch, (request.what, request.point), &locations);
            continue;
        }
        let hole = plan.unreachable.clone().filter(|_| newest);
        // Of a timeline that began just now the first WAL may be on its way.
        let is_coming = hole.is_some() || newest && !plan.not_followed.is_empty();
        let stood = holes.look(is_coming.then_some(plan.end_lsn), now);
        let arrived = beat.is_none_or(|beat| plan.end_lsn >= beat) || now - start >= BEAT_ARRIVES;
        let decided = stood.is_none_or(|stood| stood >= stands) || now - start >= LONGEST_WAIT;
        if arrived && decided {
            if stood.is_some_and(|stood| stood < stands) {
                report.warnings.push(format!("WAL behind {} was still arriving", plan.end_lsn));
            }
            let hole = hole.filter(|_| stood.is_some_and(|stood| stood >= stands));
            return Ok(Ready { request, prepared, planned_in: now - began, hole });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A writer that knows a frame to be missing in a region has left it behind by then: nothing is on its way any more.
fn stands(context: &Context) -> Duration {
    let patience = context.repository.regions.detach_after().unwrap_or(Patience::WAL.laggard);
    (patience + MARGIN).min(LONGEST_WAIT)
}

/// For how long the WAL has ended at the same place before a hole. One that moves is a frame that comes after its successor.
#[derive(Debug, Default)]
struct Holes {
    seen: Option<(Lsn, Duration)>,
}

impl Holes {
    fn look(&mut self, at: Option<Lsn>, now: Duration) -> Option<Duration> {
        self.seen = at.map(|at| self.seen.filter(|(known, _)| *known == at).unwrap_or((at, now)));
        self.seen.map(|(_, since)| now.saturating_sub(since))
    }
}

fn request(context: &Context, scratch: &Scratch, (what, point): (String, Point), tablespaces: &[String]) -> Request {
    let place = |(number, location): (usize, &String)| (location.clone(), scratch.tablespace(number));
    let tablespaces: BTreeMap<String, PathBuf> = tablespaces.iter().enumerate().map(place).collect();
    Request {
        what,
        directory: scratch.data(),
        tablespaces,
        region: None,
        point,
        timeline: None,
        start: true,
        run_as: context.scratch.run_as.clone(),
        delta: false,
        feed: Some(restore::Feed::Staged),
        standby: false,
        memory: Memory::default(),
        invocation: vec!["drctl".to_owned()],
        known: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_that_moves_was_a_frame_on_its_way() {
        let seconds = Duration::from_secs;
        let mut holes = Holes::default();
        assert_eq!(holes.look(Some(Lsn(100)), seconds(1)), Some(seconds(0)));
        assert_eq!(holes.look(Some(Lsn(100)), seconds(4)), Some(seconds(3)));
        assert_eq!(holes.look(Some(Lsn(200)), seconds(5)), Some(seconds(0)));
        assert_eq!(holes.look(None, seconds(6)), None);
        assert_eq!(holes.look(Some(Lsn(200)), seconds(7)), Some(seconds(0)));
        assert_eq!(holes.look(Some(Lsn(200)), seconds(19)), Some(seconds(12)));
    }
}
